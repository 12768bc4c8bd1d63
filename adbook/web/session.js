// A frozen policy at play on one goal, episode after episode, its memory kept. The reader's experiments are what may be
// changed between two steps: the goal, the memory, the reward, the exploration.

import { normal, uniform } from "./random.js";

const KEPT = 200; // episodes that are remembered for the picture

export class Session {
  // policy: of network.js; environment: of reacher.js or mujoco.js; goal: numbers in the family's unit; seed: a whole
  // number, fixes starts and sampled actions.
  constructor(policy, environment, goal, seed) {
    this.policy = policy;
    this.environment = environment;
    this.starts = uniform(2 * seed);
    this.normal = normal(uniform(2 * seed + 1));
    this.withheld = false; // whether the reward is kept from the policy
    this.deterministic = false; // whether it takes the mean action instead of sampling
    this.newTask(goal);
  }

  // Another goal, an empty memory, an empty record.
  newTask(goal) {
    this.goal = goal;
    this.count = 0; // of finished episodes
    this.episodes = []; // the last of them: {total, goal, fresh, frames}
    this.forget();
  }

  // Move the goal, the memory kept: from the next episode on, as nothing moves within an episode of training.
  moveGoal(goal) {
    this.goal = goal;
    if (this.t === 0) this.begin();
  }

  // Empty the memory and start the episode over.
  forget() {
    this.memory = this.policy.initState();
    this.reward = 0;
    this.fresh = true; // no episode has ended since
    this.begin();
  }

  begin() {
    this.t = 0;
    this.total = 0;
    this.environment.goal = this.goal;
    this.observation = this.environment.reset(this.starts);
    this.frames = [this.environment.qpos()]; // of this episode, before each step and after the last
  }

  // One step; gives the episode that it ends, if it does.
  step() {
    const fed = this.withheld ? null : this.reward;
    const noise = this.deterministic ? null : this.normal;
    const action = this.policy.act(this.observation, fed, this.t === 0, this.memory, noise);
    if (!action.every(Number.isFinite)) throw new Error("The network's action is not a number: the policy is at fault.");
    const { observation, reward } = this.environment.step(action);
    Object.assign(this, { observation, reward, t: this.t + 1, total: this.total + reward });
    this.frames.push(this.environment.qpos());
    return this.t === this.environment.horizon ? this.end() : null;
  }

  end() {
    const { total, fresh, frames } = this;
    const episode = { total, goal: this.environment.goal, fresh, frames };
    if (this.count) this.episodes.at(-1).frames = this.episodes.at(-1).frames.slice(-1); // its end is all that is drawn
    this.episodes = [...this.episodes.slice(1 - KEPT), episode];
    this.count += 1;
    this.fresh = false;
    this.begin();
    return episode;
  }
}
