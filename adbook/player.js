// The rollout player: everything it shows is in the model, so it needs neither kernel nor network.
// Axes: n tasks, K episodes, T steps. Positions are in metres, angles in radians, x to the right and y up.

const LINKS = [0.1, 0.11]; // lengths of the two links, to the elbow and on to the fingertip
const VIEW = 0.262; // half of the width of the drawn plane
const STEPS_PER_SECOND = 50; // Reacher's control step is 0.02 s
const HOLD = 0.5; // seconds of rest at the end of an episode while playing
const SPEEDS = [0.25, 0.5, 1, 2, 5];
const PLAY = "M4 2 14 8 4 14z"; // the buttons' outlines
const PAUSE = "M3 2h4v12H3zM9 2h4v12H9z";
const INT16_ANGLE = Math.PI / 32768; // angles arrive as multiples of this

export function joints(q0, q1) {
  const elbow = [LINKS[0] * Math.cos(q0), LINKS[0] * Math.sin(q0)];
  const tip = [elbow[0] + LINKS[1] * Math.cos(q0 + q1), elbow[1] + LINKS[1] * Math.sin(q0 + q1)];
  return { elbow, tip };
}

export function decode(model) {
  const [n, K, T] = model.get("shape");
  const int16 = (name) => {
    const view = model.get(name); // a DataView
    return new Int16Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  };
  const angles = int16("angles");
  const rewards = int16("rewards");
  const unit = model.get("reward_unit");
  return {
    n, K, T,
    goal: (i) => model.get("goals")[i],
    returns: (i) => model.get("returns")[i],
    references: (i) => model.get("references").map(([name, values]) => [name, values[i]]),
    pose: (i, k, t) => {
      const at = 2 * ((i * K + k) * (T + 1) + t);
      return joints(angles[at] * INT16_ANGLE, angles[at + 1] * INT16_ANGLE);
    },
    rewardsOf: (i) => Array.from(rewards.subarray(i * K * T, (i + 1) * K * T), (r) => r * unit),
    reward: (i, k, t) => rewards[(i * K + k) * T + t] * unit, // of the step from frame t to t + 1
  };
}

const extent = (values) => [Math.min(...values), Math.max(...values)];
const number = (x, digits = 2) => x.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");

// ---------------------------------------------------------------------------------------------------------------
// page elements

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function slider(label, max) {
  const input = make("input", { type: "range", min: 0, max, step: 1, "aria-label": label });
  const output = make("output", {});
  return { row: make("label", { class: "adp-slider" }, make("span", {}, label), input, output), input, output };
}

function chooser(label, options) {
  const select = make("select", { "aria-label": label });
  options.forEach(([text, value]) => select.append(make("option", { value }, text)));
  return { row: make("label", { class: "adp-chooser" }, make("span", {}, label), select), select };
}

function stat(label) {
  const output = make("output", { "aria-label": label });
  return { row: make("div", {}, make("span", {}, label), output), output };
}

function build(model, data) {
  const ui = {
    task: chooser("Task", model.get("labels").map((label, i) => [label, i])),
    speed: chooser("Speed", SPEEDS.map((s) => [`${s}×`, s])),
    episode: slider("Episode", data.K - 1),
    step: slider("Step", data.T),
    play: make("button", { type: "button", class: "adp-play" }),
    arm: make("canvas", { role: "img", class: "adp-arm" }),
    curve: make("canvas", { role: "img", class: "adp-chart", title: "Click to go to an episode" }),
    rewards: make("canvas", { role: "img", class: "adp-chart", title: "Click to go to a step" }),
    total: stat("Episode return"),
    reward: stat("Step reward"),
    distance: stat("Tip to goal"),
  };
  ui.speed.select.value = 0.5;
  const key = (name, text) => make("span", { class: `adp-key adp-${name}` }, text);
  const legend = make("div", { class: "adp-legend" },
    key("goal", "goal (hidden from the agent)"), key("trace", "fingertip"), key("ends", "where earlier episodes ended"));
  ui.root = make("div", { class: "adbook-player", role: "group", "aria-label": "Rollout player" },
    make("div", { class: "adp-head" }, ui.task.row,
      make("div", { class: "adp-stats" }, ui.total.row, ui.reward.row, ui.distance.row)),
    make("div", { class: "adp-stage" },
      make("div", { class: "adp-left" }, ui.arm, legend),
      make("div", { class: "adp-right" }, ui.curve, ui.rewards)),
    make("div", { class: "adp-controls" }, ui.play,
      make("div", { class: "adp-sliders" }, ui.episode.row, ui.step.row), ui.speed.row));
  return ui;
}

// ---------------------------------------------------------------------------------------------------------------
// drawing

// A context in CSS pixels, cleared, sharp on any screen.
function context(canvas, colors) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  g.font = `12px ${colors.font}`;
  g.lineJoin = "round";
  return { g, width, height };
}

function line(g, points, { color, width = 1, alpha = 1, dash = [], cap = "round" }) {
  g.save();
  Object.assign(g, { strokeStyle: color, lineWidth: width, globalAlpha: alpha, lineCap: cap });
  g.setLineDash(dash);
  g.beginPath();
  points.forEach(([x, y], i) => (i ? g.lineTo(x, y) : g.moveTo(x, y)));
  g.stroke();
  g.restore();
}

function disc(g, [x, y], radius, { fill, stroke, width = 1, alpha = 1 }) {
  g.save();
  g.globalAlpha = alpha;
  g.beginPath();
  g.arc(x, y, radius, 0, 2 * Math.PI);
  if (fill) { g.fillStyle = fill; g.fill(); }
  if (stroke) { g.strokeStyle = stroke; g.lineWidth = width; g.stroke(); }
  g.restore();
}

function write(g, text, x, y, color, { align = "left", base = "alphabetic", alpha = 1 } = {}) {
  g.save();
  Object.assign(g, { fillStyle: color, textAlign: align, textBaseline: base, globalAlpha: alpha });
  g.fillText(text, x, y);
  g.restore();
}

function drawArm(canvas, data, { task, episode, step }, colors) {
  const { g, width, height } = context(canvas, colors);
  const scale = Math.min(width, height) / (2 * VIEW); // pixels a metre
  const px = ([x, y]) => [width / 2 + x * scale, height / 2 - y * scale];
  const reach = LINKS[0] + LINKS[1];
  disc(g, px([0, 0]), reach * scale, { fill: colors.text, alpha: 0.045 });
  for (const r of [0.1, reach]) disc(g, px([0, 0]), r * scale, { stroke: colors.text, alpha: 0.16 });
  const bar = [[14, height - 14], [14 + 0.1 * scale, height - 14]];
  line(g, bar, { color: colors.text, alpha: 0.6, width: 2 });
  write(g, "0.1 m", (bar[0][0] + bar[1][0]) / 2, height - 20, colors.text, { align: "center", alpha: 0.75 });

  for (let k = 0; k < episode; k++) { // the later, the stronger
    const alpha = 0.2 + 0.6 * ((k + 1) / episode);
    disc(g, px(data.pose(task, k, data.T).tip), 3.2, { fill: colors.ends, alpha });
  }
  const goal = px(data.goal(task));
  const { elbow, tip } = data.pose(task, episode, step);
  for (let t = 0; t < step; t++) { // the trace fades into the past
    const ends = [data.pose(task, episode, t).tip, data.pose(task, episode, t + 1).tip].map(px);
    line(g, ends, { color: colors.tip, width: 3.5, alpha: 0.15 + 0.8 * ((t + 1) / step), cap: "butt" });
  }
  line(g, [px(tip), goal], { color: colors.goal, width: 1.5, alpha: 0.8, dash: [3, 5] });
  line(g, [px([0, 0]), px(elbow)], { color: colors.arm, width: 0.017 * scale });
  line(g, [px(elbow), px(tip)], { color: colors.arm, width: 0.013 * scale });
  disc(g, px([0, 0]), 0.014 * scale, { fill: colors.arm });
  for (const [at, r] of [[[0, 0], 0.0065], [elbow, 0.0052]]) disc(g, px(at), r * scale, { fill: colors.joint });
  disc(g, goal, 0.017 * scale, { stroke: colors.goal, width: 3 });
  const cross = 0.024 * scale;
  line(g, [[goal[0] - cross, goal[1]], [goal[0] + cross, goal[1]]], { color: colors.goal, width: 1.5 });
  line(g, [[goal[0], goal[1] - cross], [goal[0], goal[1] + cross]], { color: colors.goal, width: 1.5 });
  disc(g, px(tip), 0.0095 * scale, { fill: colors.tip, stroke: colors.joint, width: 2 });
}

// About five round numbers from low to high.
function ticks(low, high, most = 5) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / size - 1e-9) * size; v <= high + 1e-9 * size; v += size) found.push(v);
  return found;
}

// A line chart with a marked position; returns the map from a pixel to an index for clicks.
function drawChart(canvas, { values, range, current, title, xTitle, references = [], dots }, colors) {
  const { g, width, height } = context(canvas, colors);
  const span = range[1] - range[0] || 1;
  const [low, high] = [range[0] - 0.08 * span, range[1] + 0.08 * span];
  const area = { left: 44, right: width - 12, top: 26, bottom: height - 32 };
  const n = values.length;
  const x = (i) => area.left + (n > 1 ? i / (n - 1) : 0.5) * (area.right - area.left);
  const y = (v) => area.bottom - ((v - low) / (high - low)) * (area.bottom - area.top);

  write(g, title, 2, 14, colors.text);
  for (const v of ticks(low, high, 4)) {
    line(g, [[area.left, y(v)], [area.right, y(v)]], { color: colors.text, alpha: 0.13 });
    write(g, number(v, span < 1 ? 1 + (span < 0.3) : 0), area.left - 7, y(v), colors.text, { align: "right", base: "middle", alpha: 0.75 });
  }
  for (const v of ticks(1, n, 6).filter(Number.isInteger)) {
    write(g, v, x(v - 1), area.bottom + 14, colors.text, { align: "center", alpha: 0.75 });
  }
  write(g, xTitle, area.right, height - 3, colors.text, { align: "right", alpha: 0.75 });
  for (const [name, v] of references) {
    line(g, [[area.left, y(v)], [area.right, y(v)]], { color: colors.text, alpha: 0.55, dash: [6, 5] });
    const below = v > (low + high) / 2 ? 14 : -5; // towards the middle, where there is room
    const early = Math.abs(values[0] - v) > Math.abs(values[n - 1] - v); // at the end where the curve is further away
    write(g, name, early ? area.left + 4 : area.right, y(v) + below, colors.text, { align: early ? "left" : "right", alpha: 0.75 });
  }
  const points = values.map((v, i) => [x(i), y(v)]);
  line(g, points, { color: colors.tip, width: 2, alpha: dots ? 0.6 : 1 });
  if (dots) points.forEach((p) => disc(g, p, 3, { fill: colors.tip }));
  if (current >= 0) {
    line(g, [[x(current), area.top], [x(current), area.bottom]], { color: colors.goal, width: 1.5 });
    disc(g, points[current], 6, { fill: colors.goal, stroke: colors.joint, width: 2 });
  }
  return (pixel) => Math.max(0, Math.min(n - 1, Math.round(((pixel - area.left) / (area.right - area.left)) * (n - 1))));
}

// ---------------------------------------------------------------------------------------------------------------
// behaviour

function render({ model, el }) {
  const data = decode(model);
  const ui = build(model, data);
  el.append(ui.root);
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  const state = () => ({ task: model.get("task"), episode: model.get("episode"), step: model.get("step") });
  const move = (change) => Object.entries(change).forEach(([name, value]) => model.set(name, value));
  const rewardRange = Array.from({ length: data.n }, (_, i) => extent(data.rewardsOf(i))); // one scale a task
  const toIndex = {}; // by canvas, from a pixel to an episode or step
  let colors = {};
  let playing = 0; // the running animation frame, or 0
  let fresh = true; // nobody has moved anything yet

  function readColors() {
    const css = getComputedStyle(ui.root);
    const value = (name) => css.getPropertyValue(`--adp-${name}`).trim();
    colors = { text: css.color, font: css.fontFamily };
    for (const name of ["tip", "goal", "arm", "joint", "ends"]) colors[name] = value(name);
  }

  function show() {
    const now = state();
    const { task, episode, step } = now;
    const returns = data.returns(task);
    const rewards = Array.from({ length: data.T }, (_, t) => data.reward(task, episode, t));
    const { tip } = data.pose(task, episode, step);
    const goal = data.goal(task);
    const distance = 100 * Math.hypot(tip[0] - goal[0], tip[1] - goal[1]);
    ui.task.select.value = task;
    ui.episode.input.value = episode;
    ui.step.input.value = step;
    ui.episode.output.value = `${episode + 1} of ${data.K}`;
    ui.step.output.value = `${step} of ${data.T}`;
    ui.episode.input.setAttribute("aria-valuetext", ui.episode.output.value);
    ui.step.input.setAttribute("aria-valuetext", ui.step.output.value);
    ui.total.output.value = number(returns[episode]);
    ui.reward.output.value = step ? number(rewards[step - 1], 3) : "–";
    ui.distance.output.value = `${number(distance, 1)} cm`;
    ui.arm.setAttribute("aria-label",
      `Two-link arm in episode ${episode + 1}, step ${step}: the fingertip is ${number(distance, 1)} cm from the goal.`);
    ui.curve.setAttribute("aria-label",
      `Return by episode: ${number(returns[0])} in episode 1, ${number(returns[data.K - 1])} in episode ${data.K}; ` +
      `${number(returns[episode])} in this one.`);
    ui.rewards.setAttribute("aria-label",
      `Reward by step in episode ${episode + 1}: ${number(rewards[0], 3)} at first, ${number(rewards[data.T - 1], 3)} at the end.`);
    drawArm(ui.arm, data, now, colors);
    const references = data.references(task);
    toIndex.episode = drawChart(ui.curve, {
      values: returns, range: extent([...returns, ...references.map(([, value]) => value)]), current: episode,
      title: "Return (sum of rewards)", xTitle: "episode", references, dots: true,
    }, colors);
    toIndex.step = drawChart(ui.rewards, {
      values: rewards, range: rewardRange[task], current: step - 1,
      title: `Reward in episode ${episode + 1}`, xTitle: "step",
    }, colors);
  }

  function setPlaying(on) {
    cancelAnimationFrame(playing);
    playing = 0;
    ui.play.setAttribute("aria-label", on ? "Pause" : "Play");
    ui.play.innerHTML = `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${on ? PAUSE : PLAY}"/></svg>`;
    // Sliders say their own values; a stream of them while playing would drown a screen reader.
    for (const part of [ui.episode, ui.step, ui.total, ui.reward, ui.distance]) {
      part.output.setAttribute("aria-live", on ? "off" : "polite");
    }
    if (on) start();
    else model.save_changes();
  }

  function start() {
    const { episode, step } = state();
    const over = episode === data.K - 1 && step === data.T;
    if (over) move({ episode: 0, step: 0 });
    else if (fresh) move({ step: 0 });
    fresh = false;
    let last = performance.now();
    let due = 0; // steps owed since the last frame
    const tick = (time) => {
      due += (STEPS_PER_SECOND * Number(ui.speed.select.value) * Math.max(0, time - last)) / 1000;
      last = time;
      due = advance(due);
      if (playing) playing = requestAnimationFrame(tick);
    };
    playing = requestAnimationFrame(tick);
  }

  // Moves on by whole steps and returns the rest; with reduced motion, by whole episodes without movement in between.
  function advance(due) {
    const { episode, step } = state();
    const left = data.T - step;
    const rest = HOLD * STEPS_PER_SECOND;
    if (left > 0 && !still.matches) {
      const done = Math.min(left, Math.floor(due));
      if (done) move({ step: step + done });
      return due - done;
    }
    if (left > 0) move({ step: data.T });
    if (due < (still.matches ? data.T : rest)) return due;
    if (episode === data.K - 1) setPlaying(false);
    else move({ episode: episode + 1, step: still.matches ? data.T : 0 });
    return 0;
  }

  const choose = (change) => {
    fresh = false;
    if (playing) setPlaying(false);
    move(change);
    model.save_changes();
  };
  ui.task.select.onchange = () => choose({ task: Number(ui.task.select.value) });
  ui.episode.input.oninput = () => choose({ episode: Number(ui.episode.input.value) });
  ui.step.input.oninput = () => choose({ step: Number(ui.step.input.value) });
  ui.play.onclick = () => setPlaying(!playing);
  ui.curve.onclick = (event) => choose({ episode: toIndex.episode(event.offsetX) });
  ui.rewards.onclick = (event) => choose({ step: toIndex.step(event.offsetX) + 1 });

  const refresh = () => { readColors(); show(); };
  const names = ["change:task", "change:episode", "change:step"];
  names.forEach((name) => model.on(name, show));
  const resized = new ResizeObserver(refresh);
  resized.observe(ui.root);
  const themed = new MutationObserver(refresh); // the book's theme switch, JupyterLab's
  const attributeFilter = ["class", "data-theme", "data-jp-theme-light"];
  for (const node of [document.documentElement, document.body]) themed.observe(node, { attributeFilter });
  setPlaying(false);
  refresh();

  return () => {
    cancelAnimationFrame(playing);
    names.forEach((name) => model.off(name, show));
    resized.disconnect();
    themed.disconnect();
  };
}

export default { render };
