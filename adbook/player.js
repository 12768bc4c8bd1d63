// The rollout player. All it shows is in the model, so that it needs neither a kernel nor a network.
// Axes: A agents, n tasks, K episodes, T steps, Q coordinates. Lengths are in metres, z points up.

const HOLD = 0.5; // seconds of rest at the end of an episode while playing
const SPEEDS = [0.25, 0.5, 1, 2, 4, 8];
const ICONS = {
  play: "M4 2 14 8 4 14z", pause: "M3 2h4v12H3zM9 2h4v12H9z",
  back: "M12 2 5 8l7 6z", forward: "M4 2l7 6-7 6z",
  previous: "M2 2h2v12H2zM14 2 5 8l9 6z", next: "M12 2h2v12h-2zM2 2l9 6-9 6z",
};

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const number = (x, digits = 2) => x.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");

// ---------------------------------------------------------------------------------------------------------------
// data

async function inflate(view) {
  const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Undoes `_pack` of player.py: planes of low and high bytes of the differences along the second to last axis.
function unpack(bytes, count, rows, width) {
  if (bytes.length !== 2 * count) throw new Error(`there are ${bytes.length} bytes of it instead of ${2 * count}`);
  const values = new Int16Array(count);
  for (let i = 0; i < count; i++) values[i] = bytes[i] | (bytes[count + i] << 8);
  for (let start = 0; start < count; start += rows * width) {
    for (let i = start + width; i < start + rows * width; i++) values[i] += values[i - width];
  }
  return values;
}

export async function decode(model) {
  const [A, n, K, T] = model.get("shape");
  const scene = model.get("scene");
  const stride = model.get("stride");
  const F = Math.ceil(T / stride) + 1;
  const Q = scene.used.length;
  const [low, unit] = [model.get("low"), model.get("unit")];
  const part = async (name, count, rows, width) => {
    try {
      return unpack(await inflate(model.get(name)), count, rows, width);
    } catch (error) {
      throw new Error(`The recording is damaged: ${name} cannot be read (${error.message}).`);
    }
  };
  const frames = await part("frames", A * n * K * F * Q, F, Q);
  const rewards = await part("rewards", A * n * K * T, T, 1);
  const rewardUnit = model.get("reward_unit");
  const lengths = model.get("lengths");
  const slots = Math.max(...scene.used) + 1;
  const insight = model.get("insight");
  const seen = insight.names ? await part("seen", A * n * K * T * insight.names.length, T, insight.names.length) : null;
  return {
    A, n, K, T, scene, insight,
    length: (a, i, k) => lengths[a][i][k],
    // qpos at a time in steps, between frames by interpolation; what is not drawn stays 0
    qpos(a, i, k, t) {
      const q = new Float64Array(slots);
      const at = clamp(t, 0, lengths[a][i][k]);
      const first = Math.min(Math.floor(at / stride), F - 1);
      const second = Math.min(first + 1, F - 1);
      const part = (at - first * stride) / (Math.min(second * stride, T) - first * stride || 1); // the last gap may be shorter
      const base = ((a * n + i) * K + k) * F;
      for (let j = 0; j < Q; j++) {
        const [x, y] = [frames[(base + first) * Q + j], frames[(base + second) * Q + j]];
        q[scene.used[j]] = low[j] + unit[j] * (32768 + x + part * (y - x));
      }
      return q;
    },
    reward: (a, i, k, t) => rewards[((a * n + i) * K + k) * T + t] * rewardUnit, // of the step from t to t + 1
    seen(a, i, k, t) {
      if (!seen || !insight.agents[a]) return null;
      const width = insight.names.length;
      const base = (((a * n + i) * K + k) * T + t) * width;
      return Object.fromEntries(insight.names.map((name, j) => [name, seen[base + j] * insight.units[j]]));
    },
  };
}

// ---------------------------------------------------------------------------------------------------------------
// kinematics: rotation matrices are rows of nine numbers

const rotate = (R, [x, y, z]) => [
  R[0] * x + R[1] * y + R[2] * z, R[3] * x + R[4] * y + R[5] * z, R[6] * x + R[7] * y + R[8] * z];
const add = (p, q) => [p[0] + q[0], p[1] + q[1], p[2] + q[2]];
const subtract = (p, q) => [p[0] - q[0], p[1] - q[1], p[2] - q[2]];

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

// ---------------------------------------------------------------------------------------------------------------
// the camera, and what it sees

function camera(view, target, turn, width, height) {
  const [az, el] = [view.azimuth + turn.azimuth, clamp(view.elevation + turn.elevation, 2, 89)].map((d) => (d * Math.PI) / 180);
  const toward = [Math.cos(el) * Math.cos(az), Math.cos(el) * Math.sin(az), Math.sin(el)]; // from the target to the eye
  const right = [-Math.sin(az), Math.cos(az), 0];
  const up = [-Math.sin(el) * Math.cos(az), -Math.sin(el) * Math.sin(az), Math.cos(el)];
  const zoom = 1.9 * Math.min(width, 1.25 * height);
  const dot = (p, q) => p[0] * q[0] + p[1] * q[1] + p[2] * q[2];
  return {
    elevation: el,
    // x and y in pixels, pixels a metre there, and the depth
    see(point) {
      const p = subtract(point, target);
      const depth = Math.max(view.distance - dot(p, toward), 0.05 * view.distance);
      const scale = zoom / depth;
      return { x: width / 2 + dot(p, right) * scale, y: height / 2 - dot(p, up) * scale, scale, depth };
    },
  };
}

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const mix = (color, other, part) => `rgb(${color.map((c, i) => Math.round(c + (other[i] - c) * part))})`;
const [WHITE, BLACK] = [[255, 255, 255], [0, 0, 0]];

// A capsule seen from afar: two circles and what lies between them, lit from above.
function capsule(g, a, b, radius, color) {
  const [ra, rb] = [radius * a.scale, radius * b.scale];
  const distance = Math.hypot(b.x - a.x, b.y - a.y);
  if (distance < 0.5) return ball(g, ra > rb ? a : b, radius, color);
  let [nx, ny] = [-(b.y - a.y) / distance, (b.x - a.x) / distance];
  if (ny > 0 || (ny === 0 && nx > 0)) [nx, ny] = [-nx, -ny]; // to the side that is up
  const r = Math.max(ra, rb);
  const [mx, my] = [(a.x + b.x) / 2, (a.y + b.y) / 2];
  const shade = g.createLinearGradient(mx + nx * r, my + ny * r, mx - nx * r, my - ny * r);
  shade.addColorStop(0, mix(color, WHITE, 0.16));
  shade.addColorStop(0.28, mix(color, WHITE, 0.34));
  shade.addColorStop(0.62, mix(color, BLACK, 0.08));
  shade.addColorStop(1, mix(color, BLACK, 0.48));
  const angle = Math.atan2(b.y - a.y, b.x - a.x);
  const lean = Math.acos(clamp((ra - rb) / distance, -1, 1)); // where the common tangents touch
  g.fillStyle = shade;
  g.beginPath();
  g.arc(a.x, a.y, ra, angle + lean, angle - lean + 2 * Math.PI);
  g.arc(b.x, b.y, rb, angle - lean, angle + lean);
  g.closePath();
  g.fill();
}

function ball(g, a, radius, color) {
  const r = radius * a.scale;
  const shade = g.createRadialGradient(a.x - 0.3 * r, a.y - 0.4 * r, 0.1 * r, a.x, a.y, r);
  shade.addColorStop(0, mix(color, WHITE, 0.5));
  shade.addColorStop(0.5, mix(color, WHITE, 0.06));
  shade.addColorStop(1, mix(color, BLACK, 0.48));
  g.fillStyle = shade;
  g.beginPath();
  g.arc(a.x, a.y, r, 0, 2 * Math.PI);
  g.fill();
}

function ring(eye, [x, y, z], radius) {
  return Array.from({ length: 40 }, (_, i) => {
    const angle = (i / 20) * Math.PI;
    return eye.see([x + radius * Math.cos(angle), y + radius * Math.sin(angle), z]);
  });
}

function polygon(g, points) {
  g.beginPath();
  points.forEach(({ x, y }, i) => (i ? g.lineTo(x, y) : g.moveTo(x, y)));
  g.closePath();
}

// An upright cylinder: its side, then its top.
function cylinder(g, eye, bottom, top, radius, color) {
  const [low, high] = [ring(eye, bottom, radius), ring(eye, top, radius)];
  const [left, right] = [Math.min(...low.map((p) => p.x)), Math.max(...low.map((p) => p.x))];
  const shade = g.createLinearGradient(left, 0, right, 0);
  shade.addColorStop(0, mix(color, BLACK, 0.3));
  shade.addColorStop(0.35, mix(color, WHITE, 0.15));
  shade.addColorStop(1, mix(color, BLACK, 0.5));
  Object.assign(g, { fillStyle: shade, strokeStyle: shade, lineWidth: 1 });
  low.forEach((p, i) => {
    const j = (i + 1) % low.length;
    polygon(g, [p, low[j], high[j], high[i]]);
    g.fill();
    g.stroke(); // no seams
  });
  g.fillStyle = mix(color, WHITE, 0.28);
  polygon(g, high);
  g.fill();
}

// ---------------------------------------------------------------------------------------------------------------
// one agent's picture

// A context in CSS pixels, cleared, sharp on any screen.
function context(canvas, look) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== h) canvas.height = h;
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.clearRect(0, 0, width, height);
  g.font = `12px ${look.font}`;
  Object.assign(g, { lineJoin: "round", lineCap: "round", globalAlpha: 1 });
  return { g, width, height };
}

function write(g, text, x, y, color, { align = "left", base = "alphabetic", alpha = 1 } = {}) {
  g.save();
  Object.assign(g, { fillStyle: color, textAlign: align, textBaseline: base, globalAlpha: alpha });
  g.fillText(text, x, y);
  g.restore();
}

function line(g, points, color, width, alpha = 1, dash = []) {
  g.save();
  Object.assign(g, { strokeStyle: color, lineWidth: width, globalAlpha: alpha });
  g.setLineDash(dash);
  g.beginPath();
  points.forEach(([x, y], i) => (i ? g.lineTo(x, y) : g.moveTo(x, y)));
  g.stroke();
  g.restore();
}

const flat = ({ x, y }) => [x, y];

function ground(g, eye, view, target, look) {
  const size = 10 ** Math.round(Math.log10(view.distance / 6));
  const step = view.distance / size > 9 ? 2 * size : size;
  const [reach, z] = [1.1 * view.distance, view.ground];
  const middle = eye.see([target[0], target[1], z]);
  const fade = g.createRadialGradient(middle.x, middle.y, 0, middle.x, middle.y, 0.95 * reach * middle.scale);
  fade.addColorStop(0, look.text);
  fade.addColorStop(1, "transparent");
  g.save();
  Object.assign(g, { strokeStyle: fade, globalAlpha: 0.26, lineWidth: 1 });
  g.beginPath();
  for (const axis of [0, 1]) {
    const first = Math.ceil((target[axis] - reach) / step) * step;
    for (let at = first; at <= target[axis] + reach; at += step) {
      const half = Math.sqrt(Math.max(reach * reach - (at - target[axis]) ** 2, 0));
      const end = (side) => {
        const other = target[1 - axis] + side * half;
        return eye.see(axis ? [other, at, z] : [at, other, z]);
      };
      g.moveTo(...flat(end(-1)));
      g.lineTo(...flat(end(1)));
    }
  }
  g.stroke();
  g.restore();
}

function goalMark(g, eye, scene, goal, target, look) {
  const view = scene.view;
  if (view.goal === "point") {
    const at = [goal[0], goal[1], view.goal_height];
    g.save();
    g.fillStyle = look.goal;
    g.globalAlpha = 0.22;
    polygon(g, ring(eye, at, view.goal_radius));
    g.fill();
    g.restore();
    for (const [radius, width] of [[view.goal_radius, 2.5], [1.6 * view.goal_radius, 1]]) {
      const points = ring(eye, at, radius).map(flat);
      line(g, [...points, points[0]], look.goal, width);
    }
  } else if (view.goal === "direction") {
    const [dx, dy] = [Math.cos(goal[0]), Math.sin(goal[0])];
    const along = (forward, side) => eye.see([
      target[0] + forward * dx - side * dy, target[1] + forward * dy + side * dx, view.ground + 0.01]);
    g.save();
    Object.assign(g, { fillStyle: look.goal, globalAlpha: 0.85 });
    polygon(g, [[0.9, -0.06], [1.7, -0.06], [1.7, -0.2], [2.1, 0], [1.7, 0.2], [1.7, 0.06], [0.9, 0.06]].map((p) => along(...p)));
    g.fill();
    g.restore();
  }
}

// What a reader of the text alone is told about a moment.
function status(data, a, task, k, t, goal) {
  const { scene } = data;
  const place = (time) => kinematics(scene, data.qpos(a, task, k, time))[scene.tracked].p;
  const here = place(t);
  if (scene.view.goal === "point") {
    const off = 100 * Math.hypot(here[0] - goal[0], here[1] - goal[1]);
    return { text: `${number(off, 1)} cm from the goal`, value: `${number(off, 1)} cm` };
  }
  const before = place(Math.max(t - 1, 0));
  const over = (Math.min(t, 1) || 1) * scene.dt;
  const speed = [here[0] - before[0], here[1] - before[1]].map((x) => x / over);
  const along = scene.view.goal === "velocity" ? speed[0] : speed[0] * Math.cos(goal[0]) + speed[1] * Math.sin(goal[0]);
  const wanted = scene.view.goal === "velocity" ? ` (wanted ${number(goal[0])})` : "";
  const text = `${number(along)} m/s${wanted}`;
  return { text, value: text, speed: along };
}

function drawRobot(canvas, data, { a, task, k, t, goal, turn, color, ends }, look) {
  const { g, width, height } = context(canvas, look);
  const { scene } = data;
  const { view } = scene;
  const placed = kinematics(scene, data.qpos(a, task, k, t));
  const tracked = placed[scene.tracked].p;
  const target = view.follow ? [tracked[0], view.goal === "velocity" ? 0 : tracked[1], 0.6 + view.look_at[2]] : view.look_at;
  const eye = camera(view, target, turn, width, height);
  ground(g, eye, view, target, look);
  goalMark(g, eye, scene, goal, target, look);

  // Where earlier episodes ended, then the path of this one.
  const path = (time) => kinematics(scene, data.qpos(a, task, k, time))[scene.tracked].p;
  if (!view.follow) {
    for (let e = 0; e < k; e++) {
      const { x, y } = eye.see(ends(e));
      g.save();
      Object.assign(g, { fillStyle: look.ends, globalAlpha: 0.25 + (0.6 * (e + 1)) / k });
      g.beginPath();
      g.arc(x, y, 3, 0, 2 * Math.PI);
      g.fill();
      g.restore();
    }
  }
  const [steps, back] = [Math.min(Math.ceil(t), 60), Math.max(0, t - 60)];
  const drop = view.follow ? view.ground + 0.01 : null; // a walker's path is drawn on the ground
  let last = null;
  for (let s = 0; s <= steps; s++) {
    const p = path(Math.min(back + s, t));
    const here = flat(eye.see(drop === null ? p : [p[0], p[1], drop]));
    if (last) line(g, [last, here], color, 3, 0.12 + 0.75 * (s / steps));
    last = here;
  }

  const base = rgb(color);
  const parts = scene.shapes.map((shape) => {
    const { p, R } = shape.body < 0 ? { p: [0, 0, 0], R: [1, 0, 0, 0, 1, 0, 0, 0, 1] } : placed[shape.body];
    const [from, to] = [shape.from, shape.to].map((x) => add(p, rotate(R, x)));
    const middle = eye.see(from.map((x, i) => (x + to[i]) / 2));
    return { shape, from, to, depth: middle.depth };
  });
  drawShadows(g, canvas, parts, eye, view, look);
  parts.sort((p, q) => q.depth - p.depth);
  for (const { shape, from, to } of parts) {
    const tint = shape.role === "robot" ? base : rgb(shape.role === "object" ? look.object : look.frame);
    if (shape.kind === "cylinder") {
      const [bottom, top] = from[2] < to[2] ? [from, to] : [to, from];
      cylinder(g, eye, bottom, top, shape.radius, tint);
    } else if (shape.kind === "sphere") ball(g, eye.see(from), shape.radius, tint);
    else capsule(g, eye.see(from), eye.see(to), shape.radius, tint);
  }
  if (view.goal === "point" && view.goal_height > view.ground + 0.005) { // above the ground, and over the arm
    const points = ring(eye, [goal[0], goal[1], view.goal_height], view.goal_radius).map(flat);
    line(g, [...points, points[0]], look.goal, 2, 0.9);
  }
  if (view.goal === "velocity") velocityBar(g, width, height, status(data, a, task, k, t, goal).speed, goal[0], color, look);
}

// Shadows of a light above: drawn apart, since where two overlap it is no darker.
function drawShadows(g, canvas, parts, eye, view, look) {
  canvas.shade ||= document.createElement("canvas");
  const { shade } = canvas;
  [shade.width, shade.height] = [canvas.width, canvas.height]; // this also clears it
  const s = shade.getContext("2d");
  s.setTransform(g.getTransform());
  Object.assign(s, { lineCap: "round", strokeStyle: "#000" });
  const squash = 0.35 + 0.65 * Math.sin(eye.elevation);
  for (const { shape, from, to } of parts) {
    if (shape.role === "frame") continue;
    const [p, q] = [from, to].map((x) => eye.see([x[0], x[1], view.ground]));
    s.lineWidth = 2 * shape.radius * p.scale * squash;
    s.beginPath();
    s.moveTo(p.x, p.y);
    s.lineTo(q.x + 0.01, q.y);
    s.stroke();
  }
  g.save();
  g.setTransform(1, 0, 0, 1, 0, 0);
  g.globalAlpha = look.dark ? 0.5 : 0.17;
  g.drawImage(shade, 0, 0);
  g.restore();
}

// Wanted and actual velocity on one scale at the bottom of the picture.
function velocityBar(g, width, height, speed, wanted, color, look) {
  const [left, right, y] = [24, width - 24, height - 26];
  const at = (v) => left + (clamp(v, -1, 4) + 1) / 5 * (right - left);
  line(g, [[left, y], [right, y]], look.text, 2, 0.25);
  for (let v = -1; v <= 4; v++) write(g, number(v, 0), at(v), y + 17, look.text, { align: "center", alpha: 0.75 });
  line(g, [[at(0), y], [at(speed), y]], color, 6);
  line(g, [[at(wanted), y - 9], [at(wanted), y + 5]], look.goal, 3);
  write(g, "wanted", at(wanted), y - 13, look.goal, { align: "center" });
  write(g, "m/s", right, y - 10, look.text, { align: "right", alpha: 0.75 });
}

// ---------------------------------------------------------------------------------------------------------------
// the time line, the map of tasks, and what the network sees

// About `most` round numbers from low to high.
function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / size - 1e-9) * size; v <= high + 1e-9 * size; v += size) found.push(v);
  return found;
}

// All episodes one after the other, with their returns; the result turns a pixel into a position in episodes.
function drawTimeline(canvas, { curves, references, episodes, position }, look) {
  const { g, width, height } = context(canvas, look);
  const all = [...curves.flatMap(({ values }) => values), ...references.map(([, value]) => value)];
  const [least, most] = [Math.min(...all), Math.max(...all)];
  const margin = 0.1 * (most - least || 1);
  const [low, high] = [least - margin, most + margin];
  const area = { left: 46, right: width - 10, top: 20, bottom: height - 22 };
  const x = (p) => area.left + (p / episodes) * (area.right - area.left);
  const y = (v) => area.bottom - ((v - low) / (high - low)) * (area.bottom - area.top);
  const current = Math.min(Math.floor(position), episodes - 1);

  g.save(); // the episode that is shown, and how far it is
  Object.assign(g, { fillStyle: look.text, globalAlpha: 0.07 });
  g.fillRect(x(current), area.top, x(current + 1) - x(current), area.bottom - area.top);
  g.restore();
  write(g, "Return by episode: click or drag", 4, 12, look.text, { alpha: 0.85 });
  for (const v of ticks(low, high, 4)) {
    line(g, [[area.left, y(v)], [area.right, y(v)]], look.text, 1, 0.12);
    write(g, number(v, most - least < 2 ? 1 : 0), area.left - 6, y(v), look.text, { align: "right", base: "middle", alpha: 0.8 });
  }
  for (const v of ticks(1, episodes, Math.min(10, Math.floor(width / 60))).filter(Number.isInteger)) {
    write(g, v, x(v - 0.5), area.bottom + 15, look.text, { align: "center", alpha: 0.8 });
  }
  for (const [name, v] of references) {
    line(g, [[area.left, y(v)], [area.right, y(v)]], look.text, 1, 0.5, [6, 5]);
    write(g, name, area.right - 2, y(v) + (v > (low + high) / 2 ? 13 : -4), look.text, { align: "right", alpha: 0.8 });
  }
  for (const { values, color } of curves) {
    const points = values.map((v, e) => [x(e + 0.5), y(v)]);
    line(g, points, color, 2, 0.9);
    for (const [px, py] of points) {
      g.fillStyle = color;
      g.beginPath();
      g.arc(px, py, points.length > 60 ? 1.5 : 3, 0, 2 * Math.PI);
      g.fill();
    }
  }
  line(g, [[x(position), area.top - 4], [x(position), area.bottom]], look.goal, 2);
  g.fillStyle = look.goal;
  polygon(g, [[-6, -7], [6, -7], [0, 2]].map(([dx, dy]) => ({ x: x(position) + dx, y: area.top - 2 + dy })));
  g.fill();
  return (pixel) => clamp(((pixel - area.left) / (area.right - area.left)) * episodes, 0, episodes);
}

// The goals of a family on a map; the result turns a pixel into the nearest task.
function drawMap(canvas, { kind, tasks, others, task }, look) {
  const { g, width, height } = context(canvas, look);
  const [cx, cy, size] = [width / 2, height / 2, Math.min(width, height) / 2 - 10];
  let place;
  if (kind === "point") {
    const goals = [...tasks, ...others];
    const [xs, ys] = [0, 1].map((i) => goals.map((goal) => goal[i]));
    const middle = [xs, ys].map((v) => (Math.min(...v) + Math.max(...v)) / 2);
    const reach = Math.max(...goals.map((goal) => Math.hypot(goal[0] - middle[0], goal[1] - middle[1]))) || 1;
    place = (goal) => [cx + ((goal[0] - middle[0]) / reach) * size, cy - ((goal[1] - middle[1]) / reach) * size];
  } else if (kind === "direction") {
    place = ([angle]) => [cx + size * 0.9 * Math.cos(angle), cy - size * 0.9 * Math.sin(angle)];
  } else {
    const speeds = [...tasks, ...others].map(([v]) => v);
    const [low, high] = [Math.min(0, ...speeds), Math.max(...speeds, 1)];
    place = ([v]) => [14 + ((v - low) / (high - low)) * (width - 28), cy];
    line(g, [[14, cy], [width - 14, cy]], look.text, 1, 0.4);
    for (const v of ticks(low, high, 4)) write(g, number(v, 1), place([v])[0], cy + 26, look.text, { align: "center", alpha: 0.8 });
    write(g, "m/s", width - 12, cy - 16, look.text, { align: "right", alpha: 0.8 });
  }
  if (kind !== "velocity") {
    g.save();
    Object.assign(g, { strokeStyle: look.text, globalAlpha: 0.2 });
    g.beginPath();
    g.arc(cx, cy, kind === "point" ? size + 4 : size * 0.9, 0, 2 * Math.PI);
    g.stroke();
    g.restore();
  }
  const dot = ([px, py], radius, color, alpha) => {
    g.save();
    Object.assign(g, { fillStyle: color, globalAlpha: alpha });
    g.beginPath();
    g.arc(px, py, radius, 0, 2 * Math.PI);
    g.fill();
    g.restore();
  };
  for (const goal of others) dot(place(goal), 2, look.text, 0.3);
  tasks.forEach((goal, i) => i !== task && dot(place(goal), 4.5, look.dot, 0.9));
  dot(place(tasks[task]), 7, look.goal, 1);
  return (px, py) => {
    const far = tasks.map((goal) => Math.hypot(place(goal)[0] - px, place(goal)[1] - py));
    return far.indexOf(Math.min(...far));
  };
}

// The distribution that the action was drawn from, component by component, and the action itself.
function drawActions(canvas, seen, size, color, look) {
  const { g, width, height } = context(canvas, look);
  const row = (height - 16) / size;
  const x = (v) => 40 + ((clamp(v, -1.25, 1.25) + 1.25) / 2.5) * (width - 52);
  for (const v of [-1, 0, 1]) {
    line(g, [[x(v), 2], [x(v), height - 16]], look.text, 1, v ? 0.18 : 0.3);
    write(g, number(v, 0), x(v), height - 3, look.text, { align: "center", alpha: 0.8 });
  }
  for (let j = 0; j < size; j++) {
    const y = (j + 0.5) * row;
    const [mean, std, action] = ["mean", "std", "action"].map((name) => seen[`${name} ${j + 1}`]);
    write(g, `a${j + 1}`, 4, y, look.text, { base: "middle" });
    g.save();
    g.beginPath();
    for (let i = 0; i <= 300; i++) {
      const v = -1.25 + (2.5 * i) / 300;
      g.lineTo(x(v), y + 0.42 * row - 0.8 * row * Math.exp(-0.5 * ((v - mean) / Math.max(std, 0.012)) ** 2));
    }
    Object.assign(g, { fillStyle: color, globalAlpha: 0.35 });
    g.fill();
    g.restore();
    line(g, [[x(action), y - 0.4 * row], [x(action), y + 0.4 * row]], look.text, 2.5);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// page elements

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function button(icon, label, key) {
  const node = make("button", { type: "button", "aria-label": label, title: `${label} (${key})` });
  node.innerHTML = `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${ICONS[icon]}"/></svg>`;
  return node;
}

function build(model, data) {
  const ui = {
    task: make("select", { "aria-label": "Task" }),
    map: make("canvas", { class: "adp-map", role: "img", title: "Click a task" }),
    panels: model.get("agents").map(({ name, color }) => {
      const canvas = make("canvas", { class: "adp-robot", role: "img" });
      const [total, now] = [make("span", { class: "adp-value" }), make("span", { class: "adp-value" })];
      const swatch = make("span", { class: "adp-swatch", style: `background:${color}` });
      const head = make("header", {}, swatch, make("b", {}, name), make("span", {}, "return ", total), now);
      return { name, color, canvas, total, now, root: make("div", { class: "adp-panel" }, head, canvas) };
    }),
    timeline: make("canvas", { class: "adp-timeline", role: "slider", tabindex: 0, "aria-label": "Time line" }),
    previous: button("previous", "Previous episode", "Page Up"),
    back: button("back", "Step back", "←"),
    play: button("play", "Play", "space"),
    forward: button("forward", "Step forward", "→"),
    next: button("next", "Next episode", "Page Down"),
    speed: make("select", { "aria-label": "Speed" }),
    said: make("p", { class: "adp-said", role: "status" }),
    actions: make("canvas", { class: "adp-actions", role: "img" }),
    sees: make("dl", { class: "adp-sees" }),
  };
  model.get("tasks").forEach(({ label }, i) => ui.task.append(make("option", { value: i }, label)));
  SPEEDS.forEach((s) => ui.speed.append(make("option", { value: s }, `${s}×`)));
  ui.speed.value = 1;
  const insight = data.insight.names
    ? [make("details", { class: "adp-insight", open: "" }, make("summary", {}, "What the network sees and does"),
      make("div", {}, ui.actions, ui.sees))]
    : [];
  ui.root = make("div", { class: "adbook-player", role: "group", tabindex: 0, "aria-label": "Rollout player" },
    make("div", { class: "adp-main" },
      make("div", { class: "adp-side" }, make("label", {}, "Task ", ui.task), ui.map,
        make("p", { class: "adp-hint" }, "Goals it was tested on; faint: those it was trained on. Drag a robot to look around.")),
      make("div", { class: `adp-panels adp-${ui.panels.length}` }, ...ui.panels.map(({ root }) => root))),
    ui.timeline,
    make("div", { class: "adp-controls" }, ui.previous, ui.back, ui.play, ui.forward, ui.next,
      make("label", {}, "Speed ", ui.speed), ui.said),
    ...insight);
  return ui;
}

// ---------------------------------------------------------------------------------------------------------------
// behaviour

async function render({ model, el }) {
  let data;
  try {
    data = await decode(model);
  } catch (error) {
    el.append(make("div", { class: "adbook-player adp-error", role: "alert" }, `${error.message} Make the player again.`));
    return () => {};
  }
  const ui = build(model, data);
  el.append(ui.root);
  const { n, K, T, A } = data;
  const tasks = model.get("tasks").map(({ goal }) => goal);
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  const turn = { azimuth: 0, elevation: 0 };
  const state = () => ({ task: model.get("task"), episode: model.get("episode"), step: model.get("step") });
  let look = {};
  let phase = 0; // the part of a step that has passed while playing
  let playing = 0; // the running animation frame, or 0
  let wanted = 0; // a frame that has been asked for
  let toPosition = () => 0;
  let toTask = () => 0;

  function readLook() {
    const css = getComputedStyle(ui.root);
    const value = (name) => css.getPropertyValue(`--adp-${name}`).trim();
    look = { text: css.color, font: css.fontFamily, dark: css.colorScheme.includes("dark") };
    for (const name of ["goal", "ends", "object", "frame", "dot"]) look[name] = value(name);
  }

  const length = (episode, task) => Math.max(...Array.from({ length: A }, (_, a) => data.length(a, task, episode)));

  function show() {
    wanted = 0;
    const { task, episode, step } = state();
    const t = step + phase;
    const goal = tasks[task];
    const said = [];
    ui.task.value = task;
    ui.panels.forEach((panel, a) => {
      const over = data.length(a, task, episode);
      const now = status(data, a, task, episode, Math.min(t, over), goal);
      const ends = (e) => kinematics(data.scene, data.qpos(a, task, e, data.length(a, task, e)))[data.scene.tracked].p;
      drawRobot(panel.canvas, data, { a, task, k: episode, t: Math.min(t, over), goal, turn, color: panel.color, ends }, look);
      panel.total.textContent = number(model.get("returns")[a][task][episode]);
      panel.now.textContent = t > over ? "ended early" : now.value;
      panel.canvas.setAttribute("aria-label", `${panel.name} in episode ${episode + 1}, step ${step}: ${now.text}.`);
      said.push(`${A > 1 ? `${panel.name}: ` : ""}${t > over ? "ended early" : now.text}`);
    });
    const at = `Episode ${episode + 1} of ${K}, step ${step} of ${T}`;
    ui.said.textContent = `${at}. ${said.join("; ")}.`;
    ui.timeline.setAttribute("aria-valuemax", K * T);
    ui.timeline.setAttribute("aria-valuemin", 0);
    ui.timeline.setAttribute("aria-valuenow", episode * T + step);
    ui.timeline.setAttribute("aria-valuetext", at);
    toPosition = drawTimeline(ui.timeline, {
      curves: ui.panels.map(({ color }, a) => ({ color, values: model.get("returns")[a][task] })),
      references: model.get("references").map(([name, values]) => [name, values[task]]),
      episodes: K, position: episode + t / T,
    }, look);
    toTask = drawMap(ui.map, { kind: data.scene.view.goal, tasks, others: model.get("others"), task }, look);
    ui.map.setAttribute("aria-label", `Map of ${n} tasks; task ${task + 1} is shown.`);
    if (data.insight.names) showInsight(task, episode, step);
  }

  function showInsight(task, episode, step) {
    const a = data.insight.agents.findIndex(Boolean);
    const s = clamp(step, 0, data.length(a, task, episode) - 1);
    const seen = data.seen(a, task, episode, s);
    const size = data.insight.actions;
    drawActions(ui.actions, seen, size, ui.panels[a].color, look);
    ui.actions.setAttribute("aria-label", Array.from({ length: size }, (_, j) =>
      `action ${j + 1}: mean ${number(seen[`mean ${j + 1}`])}, taken ${number(seen[`action ${j + 1}`])}`).join("; "));
    let before = 0;
    for (let e = 0; e < episode; e++) before += data.length(a, task, e);
    const rows = [
      ["Agent", ui.panels[a].name],
      ["Steps in its memory", (before + s).toLocaleString("en")],
      ["Reward of the step before", s ? number(data.reward(a, task, episode, s - 1), 3) : "–"],
    ];
    if ("change" in seen) rows.push(["Change of its state", `${number(100 * seen.change, 1)} %`]);
    ui.sees.replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  }

  const ask = () => { wanted ||= requestAnimationFrame(show); };

  function setPlaying(on) {
    cancelAnimationFrame(playing);
    playing = 0;
    phase = 0;
    ui.play.setAttribute("aria-label", on ? "Pause" : "Play");
    ui.play.querySelector("path").setAttribute("d", on ? ICONS.pause : ICONS.play);
    ui.said.setAttribute("aria-live", on ? "off" : "polite"); // a stream of it would drown a screen reader
    if (on) start();
    else model.save_changes();
    ask();
  }

  function move(change) {
    for (const [name, value] of Object.entries(change)) model.set(name, value);
    ask();
  }

  function start() {
    const { episode, step } = state();
    if (episode === K - 1 && step >= T) move({ episode: 0, step: 0 });
    else if (step >= T) move({ step: 0 });
    let last = performance.now();
    let rest = 0; // seconds of rest left
    const tick = (time) => {
      const passed = Math.max(0, time - last) / 1000;
      last = time;
      rest = rest > 0 ? rest - passed : advance(passed * Number(ui.speed.value));
      if (playing) playing = requestAnimationFrame(tick);
    };
    playing = requestAnimationFrame(tick);
  }

  // Moves on by some seconds; the result are seconds to rest before the next move.
  function advance(seconds) {
    const { task, episode, step } = state();
    const last = still.matches ? step : length(episode, task);
    const t = step + phase + seconds / data.scene.dt;
    if (t < last) {
      phase = t - Math.floor(t);
      move({ step: Math.floor(t) });
      return 0;
    }
    phase = 0;
    if (step < last) {
      move({ step: last });
      return HOLD;
    }
    if (episode === K - 1) setPlaying(false);
    else move({ episode: episode + 1, step: still.matches ? length(episode + 1, task) : 0 });
    return still.matches ? 2 * HOLD : 0; // with reduced motion: from end to end, without movement in between
  }

  function choose(change) {
    if (playing) setPlaying(false);
    phase = 0;
    move(change);
    model.save_changes();
  }

  // To a position in steps since the beginning.
  const seek = (at) => {
    const all = clamp(Math.round(at), 0, K * T);
    const episode = Math.min(Math.floor(all / T), K - 1);
    choose({ episode, step: all - episode * T });
  };
  const step = (by) => {
    const now = state();
    seek(now.episode * T + now.step + by);
  };
  const toEpisode = (episode) => choose({ episode: clamp(episode, 0, K - 1), step: 0 });
  const nextTask = (by) => choose({ task: (state().task + by + n) % n });
  const faster = (by) => { ui.speed.selectedIndex = clamp(ui.speed.selectedIndex + by, 0, SPEEDS.length - 1); };

  ui.task.onchange = () => choose({ task: Number(ui.task.value) });
  ui.previous.onclick = () => toEpisode(state().episode - (state().step === 0));
  ui.next.onclick = () => toEpisode(state().episode + 1);
  ui.back.onclick = () => step(-1);
  ui.forward.onclick = () => step(1);
  ui.play.onclick = () => setPlaying(!playing);
  ui.map.onclick = (event) => choose({ task: toTask(event.offsetX, event.offsetY) });
  const drag = (node, begin, moved) => {
    node.onpointerdown = (event) => {
      node.setPointerCapture(event.pointerId);
      begin(event);
      node.onpointermove = moved;
    };
    node.onpointerup = node.onpointercancel = () => { node.onpointermove = null; };
  };
  const scrub = (event) => seek(toPosition(event.offsetX) * T);
  drag(ui.timeline, scrub, scrub);
  for (const { canvas } of ui.panels) {
    drag(canvas, () => {}, (event) => {
      turn.azimuth -= 0.4 * event.movementX;
      turn.elevation += 0.3 * event.movementY;
      ask();
    });
    canvas.ondblclick = () => {
      Object.assign(turn, { azimuth: 0, elevation: 0 });
      ask();
    };
  }
  const keys = {
    " ": () => setPlaying(!playing), ArrowLeft: () => step(-1), ArrowRight: () => step(1),
    PageUp: () => ui.previous.onclick(), PageDown: () => ui.next.onclick(), Home: () => seek(0), End: () => seek(K * T),
    ArrowUp: () => nextTask(-1), ArrowDown: () => nextTask(1), "+": () => faster(1), "-": () => faster(-1),
  };
  ui.root.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, summary")) return;
    if (event.key === " " && event.target.matches("button")) return; // it presses the button
    if (!keys[event.key]) return;
    event.preventDefault();
    event.stopPropagation(); // JupyterLab has shortcuts of its own
    keys[event.key]();
  };

  const refresh = () => { readLook(); ask(); };
  const names = ["change:task", "change:episode", "change:step"];
  names.forEach((name) => model.on(name, ask));
  const resized = new ResizeObserver(refresh);
  resized.observe(ui.root);
  const themed = new MutationObserver(refresh); // the book's theme switch, JupyterLab's
  const attributeFilter = ["class", "data-theme", "data-jp-theme-light"];
  for (const node of [document.documentElement, document.body]) themed.observe(node, { attributeFilter });
  readLook();
  show();

  return () => {
    cancelAnimationFrame(playing);
    cancelAnimationFrame(wanted);
    names.forEach((name) => model.off(name, ask));
    resized.disconnect();
    themed.disconnect();
  };
}

export default { render };
