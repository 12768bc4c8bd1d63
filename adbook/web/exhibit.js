// The exhibit: a frozen network learns to reach a goal that the reader moves, live in the page.

import { Policy } from "./network.js";
import { asRecording, drawMemory, drawReturns } from "./pictures.js";
import { clamp, number } from "./player_data.js";
import { drawRobot } from "./player_draw.js";
import { Session } from "./session.js";
import { sentence } from "./told.js";

const PACES = [1, 2, 4, 8, 16, 32, 64]; // times real time
const BUDGET = 12; // ms of a picture's time that may be spent on playing
const NUDGES = { point: 0.01, velocity: 0.1 }; // m and m/s that an arrow key moves a goal by
const UNITS = { point: "m", velocity: "m/s" };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
const FINGER = 40; // pixels around the goal within which a finger takes hold of it instead of scrolling

// Show the exhibit of a family in an element. load() gives a promise of {header, weights, environment}: what
// adbook.export wrote, and the robot's physics; it is called when the reader asks for it. Gives a function that takes the
// exhibit away.
export function exhibit(root, family, load, { seed = 0, goal = null } = {}) {
  const shown = new Exhibit(root, family, load, seed, goal);
  return () => shown.remove();
}

class Exhibit {
  constructor(root, family, load, seed, goal) {
    Object.assign(this, { family, load, seed, first: goal });
    this.ui = elements(root);
    this.still = window.matchMedia("(prefers-reduced-motion: reduce)");
    this.session = null;
    this.levels = []; // to compare returns with
    this.tasks = 0; // how many have been begun
    this.running = false;
    this.visible = true; // whether any of it is on the screen
    this.held = null; // the goal while it is being moved
    this.pointer = null; // that holds it
    this.mapped = null; // of drawRobot: pixels to points and the reverse
    this.frame = 0; // the animation frame that has been asked for, or 0
    this.last = 0; // ms, when the last picture was drawn
    this.owed = 0; // steps still to be played, a fraction
    this.forgetListeners = listen(this);
    this.tell("ready");
    this.ask();
  }

  async start() {
    const { ui } = this;
    ui.start.disabled = true;
    ui.root.classList.remove("adl-error");
    this.tell("loading");
    let loaded = null;
    try {
      loaded = await this.load();
      if (this.removed) return loaded.environment.remove?.();
      this.open(loaded);
    } catch (error) {
      loaded?.environment.remove?.();
      ui.start.disabled = false;
      this.fail(`${error.message} The exhibit cannot start.`);
      return;
    }
    this.tell("start");
    this.run(true);
    if (ui.root.contains(document.activeElement) || document.activeElement === document.body) {
      ui.run.focus({ preventScroll: true }); // the button that was pressed is gone
    }
  }

  open({ header, weights, environment }) {
    const { ui } = this;
    const policy = new Policy(header, weights);
    const { goals, limits, scene, measured } = header.about;
    if (!(goals && limits && scene && measured)) {
      throw new Error("The network's file lacks what the exhibit must know of its robot: write it with adbook.exhibit.stage.");
    }
    Object.assign(this, { header, scene, kind: scene.view.goal });
    this.session = new Session(policy, environment, this.first || goals[this.tasks++], this.seed);
    this.levels = levelsAt(header, this.session.goal);
    ui.controls.hidden = false;
    ui.root.classList.add("adl-ready", `adl-${this.kind}`);
    Object.assign(ui.slider, { min: limits[0], max: limits[1], step: "any" });
    ui.stage.setAttribute("tabindex", 0);
    ui.memoryNote.textContent = sizeOfMemory(this.session);
  }

  remove() {
    this.removed = true;
    cancelAnimationFrame(this.frame);
    this.forgetListeners();
    this.session?.environment.remove?.();
    this.ui.root.remove();
  }

  fail(message) {
    this.ui.told.textContent = message;
    this.ui.root.classList.add("adl-error");
  }

  tell(event) {
    this.ui.told.textContent = sentence(event, this.family, this.session);
  }

  run(on) {
    this.running = on;
    this.ui.run.textContent = on ? "Pause" : "Run";
    this.last = this.owed = 0;
    this.ask();
  }

  // Ask for a picture, and with it for the steps that are due.
  ask() {
    if (!this.removed) this.frame ||= requestAnimationFrame((now) => this.picture(now));
  }

  picture(now) {
    this.frame = 0;
    try {
      const playing = this.running && this.visible;
      const ended = playing && this.play(now);
      if (ended || !playing || !this.still.matches) this.draw();
      if (playing) this.ask();
    } catch (error) {
      this.run(false);
      cancelAnimationFrame(this.frame); // or it would fail again
      this.frame = 0;
      this.fail(`${error.message} Press New task or load the page again.`);
    }
  }

  // Play the steps that are due; whether an episode has ended.
  play(now) {
    const pace = Number(this.ui.pace.value);
    this.owed += this.last ? (Math.min(100, now - this.last) / 1000 / this.scene.dt) * pace : 1;
    this.last = now;
    const until = performance.now() + BUDGET;
    let ended = false;
    for (; this.owed >= 1 && performance.now() < until && !(ended && this.still.matches); this.owed -= 1) {
      ended = Boolean(this.session.step()) || ended;
    }
    this.owed %= Math.max(1, pace); // what the budget does not allow is not made up for
    return ended;
  }

  draw() {
    const { ui, session, levels, held } = this;
    if (!ui.root.clientWidth) return; // hidden: the size's observer asks again
    const look = lookOf(ui.root);
    drawReturns(ui.returns, look, { episodes: session?.episodes || [], count: session?.count || 0, levels });
    if (!session) return;
    const data = asRecording(this.scene, session, this.still.matches);
    const [now, next] = [session.environment.goal, held || session.goal];
    const differs = now.some((x, i) => x !== next[i]);
    const shown = { a: 0, task: 0, k: data.k, t: data.t, turn: { azimuth: 0, elevation: 0 }, color: look.agent };
    this.mapped = drawRobot(ui.stage, data, { ...shown, goal: now, next: differs ? next : undefined }, look);
    drawMemory(ui.memory, look, session.memory, this.header.shape);
    this.describe(next);
  }

  describe(goal) {
    const { ui, session, levels } = this;
    const last = session.episodes.slice(-10).map(({ total }) => number(total, 1));
    ui.now.textContent = `Episode ${session.count + 1}, step ${session.t}${last.length ? `, return of the last: ${last.at(-1)}` : ""}`;
    const place = `${goal.map((x) => number(x)).join(", ")} ${UNITS[this.kind]}`;
    ui.goal.textContent = place;
    ui.slider.value = goal[0];
    ui.slider.setAttribute("aria-valuetext", place);
    ui.stage.setAttribute("aria-label", `The robot. Goal: ${place}. Arrow keys move it.`);
    const compared = levels.map(([name, level]) => `${name} ${number(level, 1)}`).join(", ");
    ui.returns.setAttribute("aria-label", `Returns of the last episodes: ${last.join(", ") || "none yet"}. ${compared}.`);
  }

  moveGoal(goal) {
    this.let();
    this.session.moveGoal(goal);
    this.levels = levelsAt(this.header, goal);
    this.tell(this.session.fresh ? "start" : "moved");
    this.ask();
  }

  newTask() {
    this.let();
    this.ui.root.classList.remove("adl-error");
    const { goals } = this.header.about;
    this.session.newTask(goals[this.tasks++ % goals.length]);
    this.levels = levelsAt(this.header, this.session.goal);
    this.tell("newTask");
    this.ask();
  }

  forget() {
    this.session.forget();
    this.tell("forgot");
    this.ask();
  }

  choose() {
    const { session, ui } = this;
    const { withheld, deterministic } = session;
    session.withheld = ui.withheld.checked;
    session.deterministic = ui.mean.checked;
    if (withheld !== session.withheld) this.tell(session.withheld ? "withheld" : "paid");
    if (deterministic !== session.deterministic) this.tell(session.deterministic ? "mean" : "sampled");
  }

  // The goal as near to the given one as goals of training lie.
  possible(goal) {
    const [low, high] = this.header.about.limits;
    if (goal.length === 1) return [clamp(goal[0], low, high)];
    const distance = Math.hypot(...goal);
    return distance > high ? goal.map((x) => (x * high) / distance) : goal;
  }

  // Take hold of the goal, move it, drop it: with the first finger or the main button, on a robot's floor.
  grasp(event) {
    if (!this.mapped || this.kind !== "point" || !event.isPrimary || event.button) return;
    this.ui.stage.setPointerCapture(event.pointerId);
    this.pointer = event.pointerId;
    this.drag(event);
  }

  drag(event) {
    if (event.pointerId !== this.pointer) return;
    const { clientWidth, clientHeight } = this.ui.stage;
    const [x, y] = [clamp(event.offsetX, 0, clientWidth), clamp(event.offsetY, 0, clientHeight)];
    this.held = this.possible(this.mapped.toPoint(x, y));
    this.ask();
  }

  drop(event) {
    if (event.pointerId === this.pointer) this.moveGoal(this.held);
  }

  let() {
    this.held = this.pointer = null;
    this.ask();
  }

  // A finger near the goal takes hold of it; elsewhere it scrolls the page, and a tap puts the goal there.
  touch(event) {
    if (!this.mapped || this.kind !== "point") return;
    const box = this.ui.stage.getBoundingClientRect();
    const { x, y } = this.mapped.ofPoint(this.session.goal);
    const { clientX, clientY } = event.touches[0];
    if (Math.hypot(clientX - box.x - x, clientY - box.y - y) < FINGER) event.preventDefault();
  }

  slide() {
    this.held = [Number(this.ui.slider.value)];
    this.ask();
  }

  nudge(event) {
    const by = ARROWS[event.key];
    if (!by || !this.session) return;
    event.preventDefault(); // the page would scroll
    const { goal } = this.session;
    const steps = goal.length === 1 ? [by[0] + by[1]] : by;
    this.moveGoal(this.possible(goal.map((x, i) => x + NUDGES[this.kind] * steps[i])));
  }

  away() {
    if (!document.hidden || !this.running) return;
    this.run(false);
    this.tell("away");
  }

  see(visible) {
    this.visible = visible;
    this.last = 0;
    this.ask();
  }
}

// Let the exhibit hear of everything that concerns it; gives a function that ends it.
function listen(shown) {
  const { ui } = shown;
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const heard = [
    [ui.start, "click", () => shown.start()],
    [ui.run, "click", () => shown.run(!shown.running)],
    [ui.newTask, "click", () => shown.newTask()],
    [ui.forget, "click", () => shown.forget()],
    [ui.withheld, "change", () => shown.choose()],
    [ui.mean, "change", () => shown.choose()],
    [ui.stage, "pointerdown", (event) => shown.grasp(event)],
    [ui.stage, "pointermove", (event) => shown.drag(event)],
    [ui.stage, "pointerup", (event) => shown.drop(event)],
    [ui.stage, "pointercancel", () => shown.let()],
    [ui.stage, "touchstart", (event) => shown.touch(event)],
    [ui.stage, "keydown", (event) => shown.nudge(event)],
    [ui.slider, "input", () => shown.slide()],
    [ui.slider, "change", () => shown.moveGoal([Number(ui.slider.value)])],
    [ui.slider, "blur", () => shown.let()],
    [document, "visibilitychange", () => shown.away()],
    [scheme, "change", () => shown.ask()],
  ];
  for (const [target, event, act] of heard) target.addEventListener(event, act, { passive: false });
  const sizes = new ResizeObserver(() => shown.ask());
  sizes.observe(ui.root);
  const sights = new IntersectionObserver((entries) => shown.see(entries.at(-1).isIntersecting));
  sights.observe(ui.root);
  const themes = new MutationObserver(() => shown.ask()); // the book's switch and JupyterLab's
  const attributeFilter = ["data-theme", "data-jp-theme-light"];
  for (const node of [document.documentElement, document.body]) themes.observe(node, { attributeFilter });
  return () => {
    for (const [target, event, act] of heard) target.removeEventListener(event, act);
    for (const observer of [sizes, sights, themes]) observer.disconnect();
  };
}

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function elements(root) {
  const button = (text, title) => element("button", { type: "button", title }, text);
  const canvas = (name, role, label) => element("canvas", { class: `adl-${name}`, role, "aria-label": label });
  const box = () => element("input", { type: "checkbox" });
  const ui = {
    stage: canvas("stage", "application", "The robot"),
    returns: canvas("returns", "img", "Returns of the episodes"),
    memory: canvas("memory", "img", "The network's memory: a strip of colours that change with every step"),
    memoryNote: element("span"),
    start: element("button", { type: "button", class: "adl-start" }, "Let it learn"),
    run: button("Run", "Run or pause"),
    pace: element("select", { "aria-label": "Speed" }, ...PACES.map((x) => element("option", { value: x }, `${x}×`))),
    newTask: button("New task", "Another goal, and an empty memory"),
    forget: button("Forget", "The same goal, and an empty memory"),
    withheld: box(),
    mean: box(),
    slider: element("input", { type: "range", "aria-label": "Goal" }),
    goal: element("span", { class: "adl-place" }),
    told: element("p", { class: "adl-told", role: "status" }),
    now: element("p", { class: "adl-now" }),
  };
  ui.pace.value = 4;
  ui.controls = element("div", { class: "adl-controls", hidden: "" }, ui.run, ui.pace, ui.newTask, ui.forget,
    element("label", {}, ui.withheld, " withhold the reward"), element("label", {}, ui.mean, " no exploration"));
  const goal = element("label", { class: "adl-goal" }, "Goal ", ui.slider, ui.goal);
  ui.root = element("section", { class: "adbook-live", "aria-label": "A network that learns as you watch" },
    element("div", { class: "adl-pictures" },
      element("div", { class: "adl-left" }, ui.stage, ui.start, goal),
      element("div", { class: "adl-right" }, element("p", {}, element("b", {}, "Return of each episode")), ui.returns,
        element("p", {}, element("b", {}, "Its memory "), ui.memoryNote), ui.memory)),
    ui.controls, ui.told, ui.now);
  root.replaceChildren(ui.root);
  return ui;
}

function sizeOfMemory({ memory }) {
  const numbers = memory.layers.reduce((sum, { ssm }) => sum + ssm.length, 0);
  return `(the hidden state: ${numbers.toLocaleString("en")} numbers)`;
}

// What random actions and the source reach at a goal: of the three nearest goals at which they were measured, weighted by
// nearness.
function levelsAt(header, goal) {
  const { goals, ...methods } = header.about.measured;
  const near = goals.map((other, i) => [1 / (1e-4 + Math.hypot(...other.map((x, j) => x - goal[j]))), i]);
  const three = near.sort((a, b) => b[0] - a[0]).slice(0, 3);
  const all = three.reduce((sum, [weight]) => sum + weight, 0);
  const mean = (values) => three.reduce((sum, [weight, i]) => sum + weight * values[i], 0) / all;
  return Object.entries(methods).map(([name, values]) => [name, mean(values)]);
}

function lookOf(root) {
  const css = getComputedStyle(root);
  const value = (name) => css.getPropertyValue(`--adl-${name}`).trim();
  const look = { text: css.color, font: css.fontFamily, dark: css.colorScheme.includes("dark") };
  for (const name of ["agent", "goal", "ends", "object", "frame"]) look[name] = value(name);
  for (const name of ["below", "above"]) look[name] = value(name).split(" ").map(Number);
  return look;
}
