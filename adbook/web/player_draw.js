// How the rollout player draws: the camera, a robot, the time line, the map of tasks, what a network sees.

import { add, clamp, kinematics, number, rotate, status, subtract } from "./player_data.js";

function camera(view, target, turn, width, height) {
  const [az, el] = [view.azimuth + turn.azimuth, clamp(view.elevation + turn.elevation, 2, 89)].map((d) => (d * Math.PI) / 180);
  const toward = [Math.cos(el) * Math.cos(az), Math.cos(el) * Math.sin(az), Math.sin(el)]; // from the target to the eye
  const right = [-Math.sin(az), Math.cos(az), 0];
  const up = [-Math.sin(el) * Math.cos(az), -Math.sin(el) * Math.sin(az), Math.cos(el)];
  const zoom = 1.9 * Math.min(0.87 * width, view.aspect * height);
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
    // the point at height z that a pixel shows
    meet(x, y, z) {
      const [u, v] = [(x - width / 2) / zoom, (height / 2 - y) / zoom];
      const depth = (z - target[2] - toward[2] * view.distance) / (up[2] * v - toward[2]);
      return [0, 1].map((i) => target[i] + (right[i] * u + up[i] * v - toward[i]) * depth + toward[i] * view.distance);
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
export function context(canvas, look) {
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

export function write(g, text, x, y, color, { align = "left", base = "alphabetic", alpha = 1 } = {}) {
  g.save();
  Object.assign(g, { fillStyle: color, textAlign: align, textBaseline: base, globalAlpha: alpha });
  g.fillText(text, x, y);
  g.restore();
}

export function line(g, points, color, width, alpha = 1, dash = []) {
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

// Where a goal that is a point lies, and the reverse: goals count from a place of the robot's own.
const [toWorld, toGoal] = [1, -1].map((sign) => (view, [x, y]) => [x + sign * view.goal_origin[0], y + sign * view.goal_origin[1]]);

// The goal of the episode; as a ghost, the one that is to come.
function goalMark(g, eye, scene, goal, target, look, ghost = false) {
  const view = scene.view;
  if (view.goal === "point") {
    const at = [...toWorld(view, goal), view.goal_height];
    g.save();
    g.fillStyle = look.goal;
    g.globalAlpha = ghost ? 0.08 : 0.22;
    polygon(g, ring(eye, at, view.goal_radius));
    g.fill();
    g.restore();
    for (const [radius, width] of [[view.goal_radius, 2.5], [1.6 * view.goal_radius, 1]]) {
      const points = ring(eye, at, radius).map(flat);
      line(g, [...points, points[0]], look.goal, width, 1, ghost ? [3, 5] : []);
    }
  } else if (view.goal === "direction") {
    const [dx, dy] = [Math.cos(goal[0]), Math.sin(goal[0])];
    const along = (forward, side) => eye.see([
      target[0] + forward * dx - side * dy, target[1] + forward * dy + side * dx, view.ground + 0.01]);
    g.save();
    Object.assign(g, { fillStyle: look.goal, globalAlpha: ghost ? 0.3 : 0.85 });
    polygon(g, [[0.9, -0.06], [1.7, -0.06], [1.7, -0.2], [2.1, 0], [1.7, 0.2], [1.7, 0.06], [0.9, 0.06]].map((p) => along(...p)));
    g.fill();
    g.restore();
  }
}

// The result turns a pixel into a point at the goal's height, and the goal to come into a pixel.
export function drawRobot(canvas, data, { a, task, k, t, goal, next, moved, turn, color }, look) {
  const { g, width, height } = context(canvas, look);
  const { scene } = data;
  const { view } = scene;
  const placed = kinematics(scene, data.qpos(a, task, k, t));
  const tracked = placed[scene.tracked].p;
  const target = view.follow ? [tracked[0], view.goal === "velocity" ? 0 : tracked[1], 0.6 + view.look_at[2]] : view.look_at;
  const eye = camera(view, target, turn, width, height);
  ground(g, eye, view, target, look);
  if (moved) goalMark(g, eye, scene, moved, target, { ...look, goal: look.frame }, true);
  goalMark(g, eye, scene, goal, target, look);
  if (next) goalMark(g, eye, scene, next, target, look, true);

  // Where earlier episodes ended, then the path of this one.
  if (!view.follow) {
    for (let e = 0; e < k; e++) {
      const { x, y } = eye.see(data.place(a, task, e, data.length(a, task, e)));
      g.save();
      Object.assign(g, { fillStyle: look.ends, globalAlpha: 0.25 + (0.6 * (e + 1)) / k });
      g.beginPath();
      g.arc(x, y, 3, 0, 2 * Math.PI);
      g.fill();
      g.restore();
    }
  }
  const since = Math.max(0, Math.floor(t) - 60);
  const path = Array.from({ length: Math.ceil(t) - since + 1 }, (_, s) => {
    const [x, y, z] = data.place(a, task, k, Math.min(since + s, t));
    return flat(eye.see([x, y, view.follow ? view.ground + 0.01 : z])); // a walker's is drawn on the ground
  });
  const piece = Math.max(1, Math.ceil(path.length / 12)); // the older, the fainter
  for (let s = 0; s + 1 < path.length; s += piece) {
    line(g, path.slice(s, s + piece + 1), color, 3, 0.12 + 0.75 * ((s + piece) / (path.length + piece)));
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
    const points = ring(eye, [...toWorld(view, goal), view.goal_height], view.goal_radius).map(flat);
    line(g, [...points, points[0]], look.goal, 2, 0.9);
  }
  if (view.goal === "velocity") {
    velocityBar(g, width, height, { speed: status(data, a, task, k, t, goal).speed, wanted: goal[0], next: next && next[0], color }, look);
  }
  return {
    toPoint: (x, y) => toGoal(view, eye.meet(x, y, view.goal_height)),
    ofPoint: (point) => eye.see([...toWorld(view, point), view.goal_height]),
  };
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
function velocityBar(g, width, height, { speed, wanted, next, color }, look) {
  const [left, right, y] = [24, width - 24, height - 26];
  const [low, high] = [Math.min(-1, wanted, next ?? 0), Math.max(4, wanted, next ?? 0)];
  const at = (v) => left + ((clamp(v, low, high) - low) / (high - low)) * (right - left);
  line(g, [[left, y], [right, y]], look.text, 2, 0.25);
  for (const v of ticks(low, high, 5)) write(g, v ? number(v, 0) : "0 m/s", at(v), y + 17, look.text, { align: "center", alpha: 0.75 });
  line(g, [[at(0), y], [at(speed), y]], color, 6);
  line(g, [[at(wanted), y - 9], [at(wanted), y + 5]], look.goal, 3);
  write(g, "wanted", clamp(at(wanted), left + 4, right - 4), y - 13, look.goal, { align: at(wanted) > right - 24 ? "right" : at(wanted) < left + 24 ? "left" : "center" });
  if (next !== undefined) line(g, [[at(next), y - 9], [at(next), y + 5]], look.goal, 3, 0.5, [2, 4]);
}

// ---------------------------------------------------------------------------------------------------------------
// the time line, the map of tasks, and what the network sees

// About `most` round numbers from low to high, at least so far apart.
export function ticks(low, high, most, least = 0) {
  const rough = Math.max((high - low) / most, least) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / size - 1e-9) * size; v <= high + 1e-9 * size; v += size) found.push(v);
  return found;
}

// All episodes one after the other, with their returns; the result turns a pixel into a position in episodes.
export function drawTimeline(canvas, { curves, references, moves, episodes, current, position }, look) {
  const { g, width, height } = context(canvas, look);
  const all = [...curves.flatMap(({ values }) => values), ...references.map(([, value]) => value)];
  const empty = !all.length;
  if (empty) all.push(0, 1);
  const [least, most] = [Math.min(...all), Math.max(...all)];
  const margin = 0.1 * (most - least || 1);
  const [low, high] = [least - margin, most + margin];
  const area = { left: 46, right: width - (references.length ? 62 : 10), top: 32, bottom: height - 22 };
  const x = (p) => area.left + (p / episodes) * (area.right - area.left);
  const y = (v) => area.bottom - ((v - low) / (high - low)) * (area.bottom - area.top);

  g.save(); // the episode that is shown, and how far it is
  Object.assign(g, { fillStyle: look.text, globalAlpha: 0.07 });
  g.fillRect(x(current), area.top, x(current + 1) - x(current), area.bottom - area.top);
  g.restore();
  write(g, "Return by episode: click or drag", 4, 12, look.text, { alpha: 0.85 });
  for (const v of empty ? [] : ticks(low, high, 4)) {
    line(g, [[area.left, y(v)], [area.right, y(v)]], look.text, 1, 0.12);
    write(g, number(v, most - least < 2 ? 1 : 0), area.left - 6, y(v), look.text, { align: "right", base: "middle", alpha: 0.8 });
  }
  for (const v of ticks(1, episodes, Math.min(10, width / 60), 1)) {
    write(g, v, x(v - 0.5), area.bottom + 15, look.text, { align: "center", alpha: 0.8 });
  }
  for (const [name, v] of references) {
    line(g, [[area.left, y(v)], [area.right, y(v)]], look.text, 1, 0.5, [6, 5]);
    write(g, name, area.right + 6, y(v), look.text, { base: "middle", alpha: 0.8 });
  }
  let free = 200; // from here on the title's line is
  for (const k of moves) {
    line(g, [[x(k), x(k) > free ? 4 : area.top], [x(k), area.bottom]], look.goal, 1.5, 0.8, [2, 4]);
    if (x(k) <= free) continue;
    write(g, "goal moved", x(k) + 4, 12, look.goal);
    free = x(k) + 80;
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

// The goals of a family on a map, or, in a live player, all that a goal may be; the result turns a pixel into the nearest
// task and into a goal.
export function drawMap(canvas, { kind, tasks, others, task, limits }, look) {
  const { g, width, height } = context(canvas, look);
  const [cx, cy, size] = [width / 2, height / 2, Math.min(width, height) / 2 - 10];
  let [place, toGoal] = [null, null];
  if (kind === "point") {
    const goals = [...tasks, ...others];
    const [xs, ys] = [0, 1].map((i) => goals.map((goal) => goal[i]));
    const middle = limits ? [0, 0] : [xs, ys].map((v) => (Math.min(...v) + Math.max(...v)) / 2);
    const reach = limits ? limits[1] : Math.max(...goals.map((goal) => Math.hypot(goal[0] - middle[0], goal[1] - middle[1]))) || 1;
    place = (goal) => [cx + ((goal[0] - middle[0]) / reach) * size, cy - ((goal[1] - middle[1]) / reach) * size];
    toGoal = (x, y) => [((x - cx) / size) * reach, ((cy - y) / size) * reach];
  } else if (kind === "direction") {
    place = ([angle]) => [cx + size * 0.9 * Math.cos(angle), cy - size * 0.9 * Math.sin(angle)];
    toGoal = (x, y) => [Math.atan2(cy - y, x - cx)];
  } else {
    const speeds = [...tasks, ...others].map(([v]) => v);
    const [low, high] = limits || [Math.min(0, ...speeds), Math.max(...speeds, 1)];
    place = ([v]) => [14 + ((v - low) / (high - low)) * (width - 28), cy];
    toGoal = (x) => [low + ((x - 14) / (width - 28)) * (high - low)];
    line(g, [[14, cy], [width - 14, cy]], look.text, 1, 0.4);
    for (const v of ticks(low, high, 4)) write(g, number(v, 1), place([v])[0], cy + 26, look.text, { align: "center", alpha: 0.8 });
    write(g, "m/s", width - 12, cy - 16, look.text, { align: "right", alpha: 0.8 });
  }
  if (kind !== "velocity") {
    g.save();
    Object.assign(g, { strokeStyle: look.text, globalAlpha: 0.2 });
    g.beginPath();
    g.arc(cx, cy, kind === "direction" ? size * 0.9 : limits ? size : size + 4, 0, 2 * Math.PI);
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
  const toTask = (px, py) => {
    const far = tasks.map((goal) => Math.hypot(place(goal)[0] - px, place(goal)[1] - py));
    return far.indexOf(Math.min(...far));
  };
  return { toTask, toGoal };
}

// The distribution that the action was drawn from, component by component, and the action itself.
export function drawActions(canvas, seen, size, color, look) {
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
    Object.assign(g, { fillStyle: color, globalAlpha: look.dark ? 0.75 : 0.35 });
    g.fill();
    g.restore();
    line(g, [[x(action), y - 0.4 * row], [x(action), y + 0.4 * row]], look.text, 2.5);
  }
}
