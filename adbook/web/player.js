// The rollout player's page elements and behaviour. All it shows is in the model, so that it needs neither a kernel nor a
// network; where a kernel answers, a live player can also be run.

import { clamp, decode, number, status, withCurrent } from "./player_data.js";
import { drawActions, drawMap, drawRobot, drawTimeline } from "./player_draw.js";

const HOLD = 0.5; // seconds of rest at the end of an episode while playing
const SPEEDS = [0.25, 0.5, 1, 2, 4, 8];
const ICONS = {
  play: "M4 2 14 8 4 14z", pause: "M3 2h4v12H3zM9 2h4v12H9z",
  back: "M12 2 5 8l7 6z", forward: "M4 2l7 6-7 6z",
  previous: "M2 2h2v12H2zM14 2 5 8l9 6z", next: "M12 2h2v12h-2zM2 2l9 6-9 6z",
};

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

// The numbers in which a reader types a goal: what is written before and after each, and what it is in the goal's own unit.
const FIELDS = {
  point: [["x", "m", 1, 0.01], ["y", "m", 1, 0.01]],
  velocity: [["velocity", "m/s", 1, 0.1]],
  direction: [["direction", "°", 180 / Math.PI, 5]],
};

function build(model, data) {
  const live = Boolean(model.get("limits"));
  const ui = {
    task: make("select", { "aria-label": "Task" }),
    map: make("canvas", { class: "adp-map", role: "img", "aria-label": "Map of tasks", title: live ? "" : "Click a task" }),
    hint: make("p", { class: "adp-hint" }),
    panels: model.get("agents").map(({ name, color }) => {
      const canvas = make("canvas", { class: "adp-robot", role: "img", "aria-label": name });
      const [note, total, now] = [1, 2, 3].map(() => make("span", { class: "adp-value" }));
      const swatch = make("span", { class: "adp-swatch", style: `background:${color}` });
      const head = make("header", {}, swatch, make("b", {}, name), note, make("span", {}, "return ", total), now);
      return { name, color, canvas, note, total, now, root: make("div", { class: "adp-panel" }, head, make("div", { class: "adp-stage" }, canvas)) };
    }),
    timeline: make("canvas", { class: "adp-timeline", role: "slider", tabindex: 0, "aria-label": "Time line" }),
    previous: button("previous", "Previous episode", "Page Up"),
    back: button("back", "Step back", "←"),
    play: button("play", "Play", "space"),
    forward: button("forward", "Step forward", "→"),
    next: button("next", "Next episode", "Page Down"),
    speed: make("select", { "aria-label": "Speed" }),
    said: make("p", { class: "adp-said", role: "status" }),
    watched: make("select", { "aria-label": "Network" }),
    actions: make("canvas", { class: "adp-actions", role: "img", "aria-label": "Actions" }),
    sees: make("dl", { class: "adp-sees" }),
    nothing: make("p", { class: "adp-hint" }, "Nothing yet: its memory is empty."),
  };
  model.get("tasks").forEach(({ label }, i) => ui.task.append(make("option", { value: i }, label)));
  SPEEDS.forEach((s) => ui.speed.append(make("option", { value: s }, `${s}×`)));
  ui.speed.value = 1;
  const watched = (data.insight.agents || []).flatMap((names, a) => (names ? [a] : []));
  watched.forEach((a) => ui.watched.append(make("option", { value: a }, ui.panels[a].name)));
  const insight = data.insight.names
    ? [make("details", { class: "adp-insight", open: "" }, make("summary", {}, "What the network sees and does"),
      ...(watched.length > 1 ? [make("label", {}, "Network ", ui.watched)] : []),
      ui.nothing, make("div", {}, ui.actions, ui.sees))]
    : [];
  const choice = live ? buildLive(ui, data) : [make("label", {}, "Task ", ui.task), ui.map];
  if (!live) ui.hint.textContent = "Large: the goals played here; small: goals of training. Drag a robot to look around.";
  ui.root = make("div", { class: "adbook-player", role: "group", tabindex: 0, "aria-label": "Rollout player" },
    make("div", { class: "adp-main" },
      make("div", { class: `adp-side${live ? " adp-live" : ""}` }, ...choice, ui.hint),
      make("div", { class: `adp-panels adp-${ui.panels.length}` }, ...ui.panels.map(({ root }) => root))),
    make("div", { class: "adp-line" }, ui.timeline, ...(live ? [ui.follow] : [])),
    make("div", { class: "adp-controls" }, ui.previous, ui.back, ui.play, ui.forward, ui.next,
      make("label", {}, "Speed ", ui.speed), ui.said),
    ...insight);
  return ui;
}

// What a live player has in place of a choice of tasks.
function buildLive(ui, data) {
  ui.fields = FIELDS[data.scene.view.goal].map(([name, , , step]) =>
    make("input", { type: "number", step, "aria-label": `Goal: ${name}` }));
  ui.episodes = make("input", { type: "number", min: 1, max: 200, step: 1, "aria-label": "Episodes to run" });
  ui.run = make("button", { type: "button", class: "adp-wide adp-run" }, "Run");
  ui.forget = make("button", { type: "button", class: "adp-wide", title: "Empty the memories and start afresh" }, "Forget");
  ui.follow = make("button", { type: "button", class: "adp-wide" }, "Back to live");
  ui.trouble = make("p", { class: "adp-trouble", role: "alert" });
  ui.speed.append(make("option", { value: 0 }, "no waiting"));
  const kind = FIELDS[data.scene.view.goal];
  const fields = kind.map(([name], j) => make("label", {}, `${name} `, ui.fields[j]));
  ui.running = make("div", { class: "adp-fields" }, ui.run, make("label", {}, ui.episodes, " episodes"), ui.forget);
  return [make("div", { class: "adp-fields" }, ...fields, kind[0][1]), ui.map, ui.running, ui.trouble];
}

// ---------------------------------------------------------------------------------------------------------------
// behaviour

async function render({ model, el }) {
  let recorded;
  try {
    recorded = await decode(model);
  } catch (error) {
    el.append(make("div", { class: "adbook-player adp-error", role: "alert" }, `${error.message} Make the player again.`));
    return () => {};
  }
  let data = withCurrent(recorded, model);
  const live = Boolean(model.get("limits"));
  const ui = build(model, data);
  el.append(ui.root);
  const { n, T, A } = data;
  const tasks = model.get("tasks").map(({ goal }) => goal);
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  const turn = { azimuth: 0, elevation: 0 };
  const state = () => ({ task: model.get("task"), episode: clamp(model.get("episode"), 0, Math.max(data.K - 1, 0)), step: model.get("step") });
  const planned = () => Math.max(data.K, model.get("planned") || (answered && model.get("episodes")) || 0); // episodes on the time line
  const goalOf = (task, k) => (live ? model.get("goals")[k] || model.get("goal") : tasks[task]);
  const running = () => live && model.get("running");
  let look = {};
  let phase = 0; // the part of a step that has passed while playing
  let playing = 0; // the running animation frame, or 0
  let wanted = 0; // a frame that has been asked for
  let toPosition = () => 0;
  let map = {};
  let answered = false; // whether a kernel is there
  let met = false; // whether one has been

  function readLook() {
    const css = getComputedStyle(ui.root);
    const value = (name) => css.getPropertyValue(`--adp-${name}`).trim();
    look = { text: css.color, font: css.fontFamily, dark: css.colorScheme.includes("dark") };
    for (const name of ["goal", "ends", "object", "frame", "dot"]) look[name] = value(name);
  }

  const length = (episode, task) => Math.max(...Array.from({ length: A }, (_, a) => data.length(a, task, episode)));

  function show() {
    wanted = 0;
    if (!data.K || !ui.root.clientWidth) return; // nothing yet, or hidden: the size's observer will ask again
    const { task, episode, step } = state();
    const t = step + phase;
    const goal = goalOf(task, episode);
    const moved = live ? model.get("goals").slice(0, episode).findLast((g) => String(g) !== String(goal)) : undefined;
    const next = answered && String(model.get("goal")) !== String(goal) ? model.get("goal") : undefined;
    const said = [];
    ui.task.value = task;
    ui.panels.forEach((panel, a) => {
      const over = data.length(a, task, episode);
      const now = status(data, a, task, episode, Math.min(t, over), goal);
      Object.assign(panel, drawRobot(panel.canvas, data, { a, task, k: episode, t: Math.min(t, over), goal, next, moved, turn, color: panel.color }, look));
      const early = t > over && !(running() && episode === data.K - 1);
      const own = sourceEpisode(model.get("agents")[a], task, episode);
      panel.note.textContent = own;
      panel.total.textContent = number(data.total(a, task, episode));
      if (early) now.value = now.text = `ended at step ${over}`;
      panel.now.textContent = now.value;
      panel.canvas.setAttribute("aria-label", `${panel.name} in episode ${episode + 1}, step ${step}: ${now.text}.`);
      said.push(`${A > 1 ? `${panel.name}${own && ` (${own})`}: ` : ""}${now.text}`);
    });
    const at = `Episode ${episode + 1} of ${planned()}, step ${step} of ${T}`;
    const which = n > 1 ? ` Task: ${model.get("tasks")[task].label}.` : "";
    ui.said.textContent = `${at}. ${said.join("; ")}.${which}`;
    ui.timeline.setAttribute("aria-valuemax", planned() * T);
    ui.timeline.setAttribute("aria-valuemin", 0);
    ui.timeline.setAttribute("aria-valuenow", episode * T + step);
    ui.timeline.setAttribute("aria-valuetext", at);
    const goals = live ? model.get("goals") : [];
    toPosition = drawTimeline(ui.timeline, {
      curves: ui.panels.map(({ color }, a) => ({ color, values: data.returns(a, task) })),
      references: model.get("references").map(([name, values]) => [name, values[task]]),
      moves: goals.flatMap((g, k) => (k && String(g) !== String(goals[k - 1]) ? [k] : [])),
      episodes: planned(), current: episode, position: episode + t / T,
    }, look);
    const places = live ? { tasks: [answered ? model.get("goal") : goal], task: 0, limits: model.get("limits") } : { tasks, task };
    map = drawMap(ui.map, { kind: data.scene.view.goal, others: model.get("others"), ...places }, look);
    ui.map.setAttribute("aria-label", live ? "Map of all goals; the numbers above say where the goal is." : `Map of ${n} tasks; task ${task + 1} is shown.`);
    if (live) showLive(answered ? model.get("goal") : goal);
    if (data.insight.names) showInsight(task, episode, step);
  }

  function showInsight(task, episode, step) {
    const a = Number(ui.watched.value);
    const s = clamp(step, 0, Math.max(data.length(a, task, episode) - 1, 0));
    const seen = data.seen(a, task, episode, s);
    ui.nothing.hidden = Boolean(seen);
    ui.actions.parentNode.hidden = !seen;
    if (!seen) return; // before the first step of a live player
    const size = data.insight.actions;
    drawActions(ui.actions, seen, size, ui.panels[a].color, look);
    ui.actions.setAttribute("aria-label", Array.from({ length: size }, (_, j) =>
      `action ${j + 1}: mean ${number(seen[`mean ${j + 1}`])}, taken ${number(seen[`action ${j + 1}`])}`).join("; "));
    let before = 0;
    for (let e = 0; e < episode; e++) before += data.length(a, task, e);
    const remembered = Math.min(before + s, data.insight.contexts[a] ?? Infinity);
    const rows = [
      ["Agent", ui.panels[a].name],
      ["Steps in its memory", remembered.toLocaleString("en")],
      ["Reward of the step before", s ? number(data.seen(a, task, episode, s - 1).reward, 3) : "–"],
    ];
    if ("change" in seen) rows.push(["Change of its memory", `${number(100 * seen.change, 1)} %`]);
    ui.sees.replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  }

  const ask = () => { wanted ||= requestAnimationFrame(show); };

  function setPlaying(on) {
    cancelAnimationFrame(playing);
    playing = 0;
    phase = 0;
    ui.play.setAttribute("aria-label", on ? "Pause" : "Play");
    ui.play.querySelector("path").setAttribute("d", on ? ICONS.pause : ICONS.play);
    ui.said.setAttribute("aria-live", on || running() ? "off" : "polite"); // a stream of it would drown a screen reader
    if (on) start();
    else model.save_changes();
    ask();
  }

  function move(change) {
    for (const [name, value] of Object.entries(change)) model.set(name, value);
    ask();
  }

  // Moves, or sets something else, and tells the kernel.
  function set(change) {
    move(change);
    model.save_changes();
  }

  function start() {
    unfollow();
    const { episode, step } = state();
    if (episode === data.K - 1 && step >= T) move({ episode: 0, step: 0 });
    else if (step >= T) move({ step: 0 });
    let last = performance.now();
    let rest = 0; // seconds of rest left
    const tick = (time) => {
      const passed = Math.max(0, time - last) / 1000;
      last = time;
      rest = rest > 0 ? rest - passed : advance(passed * (Number(ui.speed.value) || 64));
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
    if (episode === data.K - 1) {
      setPlaying(false);
      if (running()) set({ follow: true }); // it has caught up
    } else move({ episode: episode + 1, step: still.matches ? length(episode + 1, task) : 0 });
    return still.matches ? 2 * HOLD : 0; // with reduced motion: from end to end, without movement in between
  }

  function choose(change) {
    if (playing) setPlaying(false);
    unfollow();
    phase = 0;
    set(change);
  }

  // To a position in steps since the beginning.
  const seek = (at) => {
    const all = clamp(Math.round(at), 0, data.K * T);
    const episode = Math.min(Math.floor(all / T), data.K - 1);
    choose({ episode, step: all - episode * T });
  };
  const step = (by) => {
    const now = state();
    seek(now.episode * T + now.step + by);
  };
  const toEpisode = (episode) => choose({ episode: clamp(episode, 0, data.K - 1), step: 0 });
  const nextTask = (by) => choose({ task: (state().task + by + n) % n });
  const faster = (by) => {
    ui.speed.selectedIndex = clamp(ui.speed.selectedIndex + by, 0, ui.speed.length - 1);
    ui.speed.onchange?.();
  };

  ui.task.onchange = () => choose({ task: Number(ui.task.value) });
  ui.previous.onclick = () => toEpisode(state().episode - (state().step === 0));
  ui.next.onclick = () => toEpisode(state().episode + 1);
  ui.back.onclick = () => step(-1);
  ui.forward.onclick = () => step(1);
  ui.play.onclick = () => setPlaying(!playing);
  ui.watched.onchange = ask;
  const drag = (node, begin, moved, ended = () => {}) => {
    node.onpointerdown = (event) => {
      node.setPointerCapture(event.pointerId);
      const instead = begin(event); // what this drag does, if not what it usually does
      node.onpointermove = instead || moved;
    };
    node.onpointerup = node.onpointercancel = () => {
      node.onpointermove = null;
      ended();
    };
  };
  const scrub = (event) => { seek(toPosition(event.offsetX) * T); };
  drag(ui.timeline, scrub, scrub);
  for (const panel of ui.panels) {
    drag(panel.canvas, (event) => grab(panel, event), (event) => {
      turn.azimuth -= 0.4 * event.movementX;
      turn.elevation += 0.3 * event.movementY;
      ask();
    }, () => model.save_changes());
    panel.canvas.ondblclick = () => {
      Object.assign(turn, { azimuth: 0, elevation: 0 });
      ask();
    };
  }
  const keys = {
    " ": () => setPlaying(!playing), ArrowLeft: () => step(-1), ArrowRight: () => step(1),
    PageUp: () => ui.previous.onclick(), PageDown: () => ui.next.onclick(), Home: () => seek(0), End: () => seek(data.K * T),
    ArrowUp: () => nextTask(-1), ArrowDown: () => nextTask(1), "+": () => faster(1), "-": () => faster(-1),
  };
  ui.root.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("select, summary, input") || (event.key === " " && event.target.matches("button"))) {
      event.stopPropagation(); // its own, and not JupyterLab's
      return;
    }
    if (!keys[event.key]) return;
    event.preventDefault();
    event.stopPropagation(); // JupyterLab has shortcuts of its own
    keys[event.key]();
  };

  // ---------------------------------------------------------------------------------------------------------------
  // a live player: the goal, and the kernel that runs it

  const writeGoal = (goal) => FIELDS[data.scene.view.goal].forEach(([, , factor], j) => {
    ui.fields[j].value = Number((goal[j] * factor).toFixed(factor > 1 ? 1 : 3));
  });

  function showLive(goal) {
    if (!ui.fields.includes(document.activeElement)) writeGoal(goal);
    if (document.activeElement !== ui.episodes) ui.episodes.value = model.get("episodes");
    ui.speed.value = model.get("pace");
    ui.run.textContent = running() ? "Stop" : "Run";
    for (const field of ui.fields) field.disabled = !answered;
    ui.running.hidden = !answered;
    ui.follow.hidden = !running() || model.get("follow");
    ui.trouble.textContent = model.get("trouble");
    ui.hint.textContent = answered
      ? `Drag the goal, or type. It moves when the next episode begins (until then dashed); the memory stays.${data.scene.view.goal === "point" ? " Grey: where it was before. Green: where episodes ended." : ""}`
      : met ? "The kernel does not answer. If it was restarted, run the cell again."
        : "A recording of a live run. In JupyterLab you can move the goal yourself and run the networks.";
    ui.map.parentNode.classList.toggle("adp-answered", answered);
    ui.map.title = answered ? "Drag the goal" : "";
  }

  function unfollow() {
    if (running() && model.get("follow")) model.set("follow", false);
  }

  function setGoal(goal, save = true) { // a drag saves when it ends: an episode may begin in its midst
    const [low, high] = model.get("limits");
    if (!answered || !goal.every(Number.isFinite)) return;
    if (data.scene.view.goal === "point") {
      const far = Math.max(1, Math.hypot(...goal) / (0.999 * high));
      goal = goal.map((x) => x / far);
    } else if (data.scene.view.goal === "direction") goal = goal.map((x) => ((x % high) + high) % high);
    else goal = goal.map((x) => clamp(x, low, high));
    model.set("goal", goal.map((x) => Number(x.toFixed(4))));
    if (save) model.save_changes();
    ask();
  }

  // A drag that begins at the goal moves it instead of the camera.
  function grab(panel, event) {
    if (!live || !answered || data.scene.view.goal !== "point") return null;
    const mark = panel.ofPoint(model.get("goal"));
    if (Math.hypot(mark.x - event.offsetX, mark.y - event.offsetY) > 24) return null;
    return ({ offsetX, offsetY }) => setGoal(panel.toPoint(offsetX, offsetY), false);
  }

  // Takes up what the kernel has sent; a recording is read before what is played after it.
  let reading = Promise.resolve();
  const takeCurrent = () => {
    if (model.get("shape")[2] !== recorded.K) return; // a longer recording is being read: this follows then
    data = withCurrent(recorded, model);
    ask();
  };
  const takeRecording = () => {
    reading = reading.catch(() => {}).then(async () => { // what could not be read is replaced by what can
      recorded = await decode(model);
      takeCurrent();
    });
  };
  let patience = 0; // a timer
  const greet = () => {
    clearTimeout(patience);
    patience = setTimeout(() => { answered = false; ask(); }, 5000); // it has gone, or is busy and will answer later
    model.send({ do: "hello" });
  };
  const told = () => {
    clearTimeout(patience);
    answered = met = true;
    ask();
  };
  const switched = () => setPlaying(false);
  const heard = { "change:task": ask, "change:episode": ask, "change:step": ask };
  if (live) {
    const toGoal = (event) => setGoal(map.toGoal(event.offsetX, event.offsetY), false);
    drag(ui.map, toGoal, toGoal, () => model.save_changes());
    let edited = false;
    const typed = () => {
      const goal = FIELDS[data.scene.view.goal].map(([, , factor], j) => ui.fields[j].valueAsNumber / factor);
      if (edited) setGoal(goal);
      edited = false;
      writeGoal(model.get("goal")); // as it was taken
    };
    for (const field of ui.fields) {
      field.oninput = () => { edited = true; };
      field.onkeyup = ({ key }) => { if (["Enter", "ArrowUp", "ArrowDown"].includes(key)) typed(); };
      field.onblur = (event) => { if (!ui.fields.includes(event.relatedTarget)) typed(); }; // not between x and y
    }
    ui.run.onclick = () => {
      set({ follow: true, running: !running() });
      greet();
    };
    ui.forget.onclick = () => model.send({ do: "forget" });
    ui.follow.onclick = () => set({ follow: true });
    ui.episodes.onchange = () => {
      set({ episodes: clamp(Math.round(Number(ui.episodes.value)) || 1, 1, 200) });
      ui.episodes.value = model.get("episodes");
    };
    ui.speed.onchange = () => set({ pace: Number(ui.speed.value) });
    Object.assign(heard, {
      "change:frames": takeRecording, "change:current": takeCurrent, "change:running": switched, "msg:custom": told,
      ...Object.fromEntries(["goal", "goals", "pace", "episodes", "planned", "follow", "trouble"].map((name) => [`change:${name}`, ask])),
    });
  } else ui.map.onclick = (event) => choose({ task: map.toTask(event.offsetX, event.offsetY) });

  const refresh = () => { readLook(); ask(); };
  for (const [event, act] of Object.entries(heard)) model.on(event, act);
  const resized = new ResizeObserver(refresh);
  resized.observe(ui.root);
  const themed = new MutationObserver(() => { refresh(); setTimeout(refresh, 250); }); // the book's theme switch, JupyterLab's
  const attributeFilter = ["class", "data-theme", "data-jp-theme-light"];
  for (const node of [document.documentElement, document.body]) themed.observe(node, { attributeFilter });
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", refresh);
  readLook();
  show();
  if (live) greet();

  return () => {
    cancelAnimationFrame(playing);
    cancelAnimationFrame(wanted);
    clearTimeout(patience);
    for (const [event, act] of Object.entries(heard)) model.off(event, act);
    resized.disconnect();
    themed.disconnect();
    scheme.removeEventListener("change", refresh);
  };
}

// Which of a source's own episodes one on the time line is.
function sourceEpisode(agent, task, k) {
  return agent.episodes ? `its episode ${agent.episodes[task][k] + 1} of ${agent.of[task]}` : "";
}

export default { render };
