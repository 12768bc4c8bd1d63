// Half-Cheetah-Vel and Pusher-Goal in the page: MuJoCo's own build for browsers (npm @mujoco/mujoco, Apache-2.0) with the
// robots, rewards and observations of adbook.envs. It comes on demand, 10 MB, and needs a page that may evaluate text
// (Content-Security-Policy: script-src 'self' 'unsafe-eval').

import load from "./mujoco/mujoco.js";
import { normal } from "./random.js";

const norm = (...x) => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0));
const squares = (x) => x.reduce((sum, v) => sum + v * v, 0);
const between = (draw, low, high) => low + (high - low) * draw();

// What all robots share. Views into MuJoCo's memory are taken anew each time: they are lost when it grows.
class Robot {
  constructor(mujoco, xml, frameSkip) {
    this.mujoco = mujoco;
    this.model = mujoco.MjModel.from_xml_string(xml);
    this.data = new mujoco.MjData(this.model);
    this.frameSkip = frameSkip;
    this.start = Array.from(this.data.qpos);
    this.largest = this.model.actuator_ctrlrange[1];
  }

  qpos() {
    return Array.from(this.data.qpos);
  }

  set(qpos, qvel) {
    this.mujoco.mj_resetData(this.model, this.data);
    this.data.qpos.set(qpos);
    this.data.qvel.set(qvel);
    this.mujoco.mj_forward(this.model, this.data);
    return this.observation();
  }

  // Apply the torques that are possible of those that are wanted; gives them.
  advance(wanted) {
    const action = wanted.map((a) => Math.min(this.largest, Math.max(-this.largest, a)));
    this.data.ctrl.set(action);
    for (let i = 0; i < this.frameSkip; i++) this.mujoco.mj_step(this.model, this.data);
    return action;
  }

  place(body) {
    return this.data.xpos.slice(3 * body, 3 * body + 3);
  }

  remove() {
    this.data.delete();
    this.model.delete();
  }
}

class HalfCheetah extends Robot {
  horizon = 200;

  constructor(mujoco, xml) {
    super(mujoco, xml, 5);
  }

  reset(uniform) {
    const gaussian = normal(uniform);
    const qvel = Array.from(this.data.qvel, () => 0.1 * gaussian());
    return this.set(this.start.map((x) => x + between(uniform, -0.1, 0.1)), qvel);
  }

  step(wanted) {
    const before = this.data.qpos[0];
    const action = this.advance(wanted);
    const velocity = (this.data.qpos[0] - before) / 0.05;
    return { observation: this.observation(), reward: -Math.abs(velocity - this.goal[0]) - 0.05 * squares(action) };
  }

  observation() {
    return [...this.data.qpos.slice(1), ...this.data.qvel];
  }
}

class Pusher extends Robot {
  horizon = 100;

  constructor(mujoco, xml) {
    super(mujoco, xml, 5);
    [this.tip, this.object, this.mark] = ["tips_arm", "object", "goal"].map((name) => this.model.body(name).id);
  }

  reset(uniform) {
    const qpos = [...this.start];
    let at;
    do at = [between(uniform, -0.3, 0), between(uniform, -0.2, 0.2)];
    while (norm(...at) <= 0.17);
    qpos.splice(-4, 4, ...at, this.goal[1], this.goal[0]); // MuJoCo's slides are ordered y, x
    const qvel = Array.from(this.data.qvel, () => between(uniform, -0.005, 0.005));
    return this.set(qpos, qvel.fill(0, -4));
  }

  step(wanted) {
    const action = this.advance(wanted);
    const [tip, object, goal] = [this.tip, this.object, this.mark].map((body) => this.place(body));
    const apart = (p, q) => norm(...p.map((x, i) => x - q[i]));
    const reward = -apart(object, goal) - 0.5 * apart(object, tip) - 0.1 * squares(action);
    return { observation: this.observation(), reward };
  }

  observation() {
    const { qpos, qvel } = this.data;
    return [...qpos.slice(0, 7), ...qvel.slice(0, 7), ...this.place(this.tip), ...this.place(this.object)];
  }
}

const ROBOTS = { "half-cheetah-vel": HalfCheetah, "pusher-goal": Pusher };

let loaded = null; // MuJoCo, once for all robots of a page

// The environment of a family; xml: gymnasium's model of its robot.
export async function robot(family, xml) {
  loaded ||= load().catch(() => {
    loaded = null; // so that the next press of the button tries again
    throw new Error("MuJoCo for browsers could not be loaded.");
  });
  return new ROBOTS[family](await loaded, xml);
}
