// What the exhibit draws beside the robot: the returns and the memory.

import { context, line, ticks, write } from "./player_draw.js";
import { clamp, number, placeOf } from "./player_data.js";

// A session as the recording that the player draws: one agent, one task; where some earlier episodes ended, then this one,
// or, of whole episodes, the one that has just ended.
export function asRecording(scene, session, whole) {
  const past = session.episodes.slice(-30);
  const frames = whole && session.t === 0 && past.length ? past.at(-1).frames : session.frames;
  const qpos = (t) => frames[clamp(Math.round(t), 0, frames.length - 1)];
  return {
    scene,
    k: past.length,
    t: frames.length - 1,
    length: (a, task, k) => (k < past.length ? 0 : frames.length - 1),
    place: (a, task, k, t) => placeOf(scene, k < past.length ? past[k].frames.at(-1) : qpos(t)),
    qpos: (a, task, k, t) => qpos(t),
  };
}

// Returns of the last of `count` episodes, with levels to compare them with: [[name, return], ...].
export function drawReturns(canvas, look, { episodes, count, levels }) {
  const { g, width, height } = context(canvas, look);
  const [left, right, top, bottom] = [42, width - 8, 8, height - 20];
  const totals = episodes.map(({ total }) => total);
  const all = [...totals, ...levels.map(([, level]) => level)];
  const [low, high] = all.length ? [Math.min(...all), Math.max(...all)] : [-10, 0];
  const margin = 0.12 * (high - low || 1);
  const [gone, span] = [count - episodes.length, Math.max(20, episodes.length)];
  const x = (k) => left + ((k + 0.5) / span) * (right - left);
  const y = (value) => bottom - ((value - low + margin) / (high - low + 2 * margin)) * (bottom - top);
  for (const value of ticks(low - margin, high + margin, 4)) {
    line(g, [[left, y(value)], [right, y(value)]], look.text, 1, 0.13);
    write(g, number(value, 0), left - 6, y(value), look.text, { align: "right", base: "middle", alpha: 0.8 });
  }
  for (const k of ticks(gone + 1, gone + span, 6, 1)) write(g, k, x(k - gone - 1), bottom + 14, look.text, { align: "center", alpha: 0.8 });
  episodes.forEach(({ goal, fresh }, k) => {
    const moved = k > 0 && goal.some((value, i) => value !== episodes[k - 1].goal[i]);
    if (k > 0 && (fresh || moved)) line(g, [[x(k - 0.5), top], [x(k - 0.5), bottom]], moved ? look.goal : look.text, 1.5, 0.8, [2, 4]);
  });
  for (const [name, level] of levels) {
    line(g, [[left, y(level)], [right, y(level)]], look.text, 1.5, 0.55, [6, 5]);
    const early = level > (low + high) / 2; // returns come there late, to the low levels early
    write(g, name, early ? left + 4 : right, y(level) - 5, look.text, { align: early ? "left" : "right", alpha: 0.8 });
  }
  line(g, totals.map((total, k) => [x(k), y(total)]), look.agent, 2, 0.9);
  g.fillStyle = look.agent;
  totals.forEach((total, k) => {
    g.beginPath();
    g.arc(x(k), y(total), span > 60 ? 2 : 3.5, 0, 2 * Math.PI);
    g.fill();
  });
}

// The hidden state, a row of pixels for each layer and each of its N numbers a channel: blue below 0, orange above.
export function drawMemory(canvas, look, memory, { d_inner: D, d_state: N }) {
  const height = memory.layers.length * (N + 1) - 1; // a line between two layers
  if (canvas.width !== D || canvas.height !== height) Object.assign(canvas, { width: D, height });
  const image = new ImageData(D, height);
  memory.layers.forEach(({ ssm }, i) => {
    ssm.forEach((h, at) => {
      const strength = Math.min(1, Math.sqrt(Math.abs(h)));
      image.data.set([...(h < 0 ? look.below : look.above), 255 * strength], 4 * (i * (N + 1) * D + at));
    });
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}
