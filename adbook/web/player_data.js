// What the rollout player shows: recordings, and the kinematics that turn them into places.
// Axes: A agents, n tasks, K episodes, T steps, Q coordinates. Lengths are in metres, z points up.

export const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
export const number = (x, digits = 2) => x.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");

async function inflate(view) {
  const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Undoes `_deflate` of recording.py: 16 bits each, all low bytes and then all high bytes.
async function numbers(view, count) {
  const bytes = await inflate(view);
  if (bytes.length !== 2 * count) throw new Error(`there are ${bytes.length} bytes of it instead of ${2 * count}`);
  const values = new Int16Array(count);
  for (let i = 0; i < count; i++) values[i] = bytes[i] | (bytes[count + i] << 8);
  return values;
}

// From differences between rows of some width to the rows, in place; every so many rows begin anew.
function sum(values, rows, width) {
  for (let start = 0; start < values.length; start += rows * width) {
    for (let i = start + width; i < start + rows * width; i++) values[i] += values[i - width];
  }
  return values;
}

// The recording in a model, as functions of agent a, task i, episode k and time t in steps.
export async function decode(model) {
  const [A, n, K, T] = model.get("shape");
  const scene = model.get("scene");
  const stride = model.get("stride");
  const F = Math.ceil(T / stride) + 1;
  const Q = scene.used.length;
  const [low, unit] = [model.get("low"), model.get("unit")];
  if (!A || !n || !T || (!K && !model.get("limits"))) throw new Error("The recording holds no episode.");
  const part = async (name, count) => {
    try {
      return await numbers(model.get(name), count);
    } catch (error) {
      throw new Error(`The recording is damaged: ${name} cannot be read (${error.message}).`);
    }
  };
  const [lengths, returns, insight] = ["lengths", "returns", "insight"].map((name) => model.get(name));
  // Both are asked for at once: by the time that one is read, the model may hold a longer recording.
  const [packed, seen] = await Promise.all([
    part("frames", A * n * K * F * Q),
    insight.names ? part("seen", insight.names.length * A * n * K * T) : null,
  ]);
  const frames = sum(packed, F, Q);
  const places = new Map(); // those that have been asked for
  return {
    A, n, K, T, scene, insight,
    // where the body is whose path is drawn; whole steps are kept, since every frame asks for many
    place(a, i, k, t) {
      if (!Number.isInteger(t)) return placeOf(scene, this.qpos(a, i, k, t));
      const key = ((a * n + i) * K + k) * (T + 1) + t;
      if (!places.has(key)) places.set(key, placeOf(scene, this.qpos(a, i, k, t)));
      return places.get(key);
    },
    length: (a, i, k) => lengths[a][i][k],
    returns: (a, i) => returns[a][i], // of the episodes that are over
    total: (a, i, k) => returns[a][i][k],
    // qpos between two stored frames by interpolation; what is not drawn stays 0
    qpos(a, i, k, t) {
      const at = clamp(t, 0, lengths[a][i][k]);
      const first = Math.min(Math.floor(at / stride), F - 1);
      const second = Math.min(first + 1, F - 1);
      const share = (at - first * stride) / (Math.min(second * stride, T) - first * stride || 1); // the last gap may be shorter
      const base = ((a * n + i) * K + k) * F;
      return spread(scene, (j) => {
        const [x, y] = [frames[(base + first) * Q + j], frames[(base + second) * Q + j]];
        return low[j] + unit[j] * (x + share * (y - x));
      });
    },
    seen(a, i, k, t) { // in the step from t to t + 1
      if (!seen || !insight.agents[a]) return null;
      return named(insight, a, (j) => seen[(((j * A + a) * n + i) * K + k) * T + t] * insight.units[j]);
    },
  };
}

// The coordinates that are drawn, by their place in qpos.
function spread(scene, value) {
  const q = new Float64Array(scene.coordinates);
  scene.used.forEach((slot, j) => { q[slot] = value(j); });
  return q;
}

const named = (insight, a, value) => Object.fromEntries(insight.agents[a].map((name) => [name, value(insight.names.indexOf(name))]));

// What a kernel is playing at this moment, as one more episode after those recorded.
export function withCurrent(data, model) {
  const steps = model.get("current_steps") || [];
  if (!steps.length) return data;
  const view = model.get("current");
  const numbers = new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  const { scene, insight, K } = data;
  const Q = scene.used.length;
  let at = 0;
  const take = (count) => numbers.subarray(at, (at += count));
  const now = steps.map((t, a) => {
    const W = insight.agents && insight.agents[a] ? insight.names.length : 0;
    return { t, W, qpos: take((t + 1) * Q), rewards: take(t), seen: take(t * W) };
  });
  return {
    ...data, K: K + 1,
    length: (a, i, k) => (k < K ? data.length(a, i, k) : now[a].t),
    total: (a, i, k) => (k < K ? data.total(a, i, k) : now[a].rewards.reduce((x, y) => x + y, 0)),
    place(a, i, k, t) {
      return k < K ? data.place(a, i, k, t) : placeOf(scene, this.qpos(a, i, k, t));
    },
    qpos(a, i, k, t) {
      if (k < K) return data.qpos(a, i, k, t);
      const first = Math.floor(clamp(t, 0, now[a].t));
      return spread(scene, (j) => now[a].qpos[first * Q + j]);
    },
    seen(a, i, k, t) {
      if (k < K) return data.seen(a, i, k, t);
      return now[a].W && now[a].t ? named(insight, a, (j) => now[a].seen[t * now[a].W + j]) : null;
    },
  };
}

// ---------------------------------------------------------------------------------------------------------------
// kinematics: rotation matrices are rows of nine numbers

export const rotate = (R, [x, y, z]) => [
  R[0] * x + R[1] * y + R[2] * z, R[3] * x + R[4] * y + R[5] * z, R[6] * x + R[7] * y + R[8] * z];
export const add = (p, q) => [p[0] + q[0], p[1] + q[1], p[2] + q[2]];
export const subtract = (p, q) => [p[0] - q[0], p[1] - q[1], p[2] - q[2]];

function multiply(a, b) {
  const out = new Array(9);
  for (let r = 0; r < 3; r++) {
    for (let c = 0; c < 3; c++) out[3 * r + c] = a[3 * r] * b[c] + a[3 * r + 1] * b[3 + c] + a[3 * r + 2] * b[6 + c];
  }
  return out;
}

function fromQuaternion([w, x, y, z]) {
  const s = 2 / (w * w + x * x + y * y + z * z);
  return [
    1 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y),
    s * (x * y + w * z), 1 - s * (x * x + z * z), s * (y * z - w * x),
    s * (x * z - w * y), s * (y * z + w * x), 1 - s * (x * x + y * y)];
}

const about = (axis, angle) => {
  const s = Math.sin(angle / 2);
  return fromQuaternion([Math.cos(angle / 2), axis[0] * s, axis[1] * s, axis[2] * s]);
};

// Position and rotation of every body in the world.
export function kinematics(scene, qpos) {
  const placed = [];
  for (const body of scene.bodies) {
    const parent = body.parent < 0 ? { p: [0, 0, 0], R: [1, 0, 0, 0, 1, 0, 0, 0, 1] } : placed[body.parent];
    let p = add(parent.p, rotate(parent.R, body.pos));
    let R = multiply(parent.R, fromQuaternion(body.quat));
    for (const joint of body.joints) {
      const q = qpos[joint.q] || 0;
      if (joint.kind === "free") {
        p = [qpos[joint.q], qpos[joint.q + 1], qpos[joint.q + 2]];
        R = fromQuaternion(qpos.slice(joint.q + 3, joint.q + 7));
      } else if (joint.kind === "slide") {
        p = add(p, rotate(R, joint.axis.map((x) => x * q)));
      } else { // the anchor stays where it is
        const anchor = add(p, rotate(R, joint.pos));
        R = multiply(R, about(joint.axis, q));
        p = subtract(anchor, rotate(R, joint.pos));
      }
    }
    placed.push({ p, R });
  }
  return placed;
}

export const placeOf = (scene, qpos) => kinematics(scene, qpos)[scene.tracked].p;

// What a reader of the text alone is told about a moment.
export function status(data, a, task, k, t, goal) {
  const { scene } = data;
  const place = (time) => data.place(a, task, k, time);
  const here = place(t);
  if (scene.view.goal === "point") {
    const origin = scene.view.goal_origin;
    const off = 100 * Math.hypot(here[0] - origin[0] - goal[0], here[1] - origin[1] - goal[1]);
    return { text: `${number(off, 1)} cm from the goal`, value: `${number(off, 1)} cm` };
  }
  const before = place(Math.max(t - 1, 0));
  const over = (Math.min(t, 1) || 1) * scene.dt;
  const speed = [here[0] - before[0], here[1] - before[1]].map((x) => x / over);
  const along = scene.view.goal === "velocity" ? speed[0] : speed[0] * Math.cos(goal[0]) + speed[1] * Math.sin(goal[0]);
  const wanted = scene.view.goal === "velocity" ? ` (wanted ${number(goal[0])})` : "";
  const text = `${number(along)} m/s${scene.view.goal === "direction" ? " along the arrow" : wanted}`;
  return { text, value: text, speed: along };
}
