// Reacher-Goal without MuJoCo: the two-link arm of gymnasium's reacher.xml, the reward and the observation of
// adbook.envs.ReacherGoalEnv. None of the arm's geoms collides, gravity is along its hinges, and only the elbow has limits,
// so that rigid-body dynamics in closed form and one constraint force are all there is. A test holds it against MuJoCo.

// What MuJoCo compiles from reacher.xml. A link is a capsule; the forearm below is the second one with the fingertip's ball.
const LINK = 0.1; // m, from shoulder to elbow
const TIP = 0.11; // m, from elbow to fingertip
const CAPSULE = { mass: 0.03560471674068432, inertia: 3.9175660390264734e-5, centre: 0.05 };
const BALL = { mass: 0.004188790204786391, inertia: 1.6755160819145565e-7, centre: TIP };
const ARMATURE = 1; // kg m², of a hinge
const DAMPING = 1; // N m s, of a hinge
const GEAR = 200; // N m at an action of 1
const LIMIT = 3; // rad, of the elbow to either side
const INVERSE_WEIGHT = 0.9998211549602818; // of the elbow, at the straight arm: MuJoCo scales the softness of a limit with it
const STEP = 0.01; // s; two of them make a step of the environment

const moment = (part) => part.inertia + part.mass * part.centre ** 2; // about the part's own hinge
const FOREARM = { mass: CAPSULE.mass + BALL.mass, first: CAPSULE.mass * CAPSULE.centre + BALL.mass * BALL.centre };
const ELBOW = moment(CAPSULE) + moment(BALL); // kg m², of the forearm about the elbow
const SHOULDER = moment(CAPSULE) + FOREARM.mass * LINK ** 2 + ELBOW; // kg m², without what depends on the elbow's angle

export class Reacher {
  horizon = 50; // steps of an episode
  goal = [0.1, -0.1]; // [x, y] in m

  constructor() {
    this.q = [0, 0]; // rad
    this.v = [0, 0]; // rad/s
    this.tip = [LINK + TIP, 0]; // m, where rewards and observations see the fingertip
  }

  // Start near the straight arm; uniform() gives a number in [0, 1).
  reset(uniform) {
    this.q = this.q.map(() => 0.2 * uniform() - 0.1);
    this.v = this.v.map(() => 0.01 * uniform() - 0.005);
    this.tip = fingertip(this.q);
    return this.observation();
  }

  // Apply two torques, cut to [-1, 1], for 0.02 s; gives the observation and the reward.
  step(wanted) {
    const action = wanted.map((a) => Math.min(1, Math.max(-1, a)));
    const torques = action.map((a) => GEAR * a);
    rungeKutta(this, torques);
    rungeKutta(this, torques);
    const distance = Math.hypot(this.tip[0] - this.goal[0], this.tip[1] - this.goal[1]);
    const control = action.reduce((sum, a) => sum + a * a, 0);
    return { observation: this.observation(), reward: -distance - 0.1 * control };
  }

  qpos() {
    return [...this.q, ...this.goal];
  }

  observation() {
    const [q, v] = [this.q, this.v];
    return [Math.cos(q[0]), Math.cos(q[1]), Math.sin(q[0]), Math.sin(q[1]), v[0], v[1], this.tip[0], this.tip[1]];
  }
}

function fingertip([q0, q1]) {
  return [LINK * Math.cos(q0) + TIP * Math.cos(q0 + q1), LINK * Math.sin(q0) + TIP * Math.sin(q0 + q1)];
}

// One step of classical Runge-Kutta. MuJoCo leaves the fingertip where the last of the four stages has put it, and
// gymnasium reads it there: a fraction of a millimetre off the new angles'.
function rungeKutta(arm, torques) {
  const along = (x, rate, h) => x.map((value, i) => value + h * rate[i]);
  const stages = [[arm.v, acceleration(arm.q, arm.v, torques)]]; // rates of q and of v
  let q;
  for (const h of [STEP / 2, STEP / 2, STEP]) {
    const [dq, dv] = stages.at(-1);
    const v = along(arm.v, dv, h);
    q = along(arm.q, dq, h);
    stages.push([v, acceleration(q, v, torques)]);
  }
  const weighted = (part) => [0, 1].map((i) => stages.reduce((sum, stage, s) => sum + [1, 2, 2, 1][s] * stage[part][i], 0));
  arm.tip = fingertip(q);
  arm.q = along(arm.q, weighted(0), STEP / 6);
  arm.v = along(arm.v, weighted(1), STEP / 6);
}

function acceleration(q, v, torques) {
  const coupling = LINK * FOREARM.first * Math.cos(q[1]);
  const m00 = SHOULDER + 2 * coupling + ARMATURE;
  const m01 = ELBOW + coupling;
  const m11 = ELBOW + ARMATURE;
  const det = m00 * m11 - m01 * m01;
  const swing = LINK * FOREARM.first * Math.sin(q[1]); // Coriolis and centrifugal torques
  const f0 = torques[0] - DAMPING * v[0] + swing * v[1] * (2 * v[0] + v[1]);
  const f1 = torques[1] - DAMPING * v[1] - swing * v[0] * v[0];
  const a1 = (m00 * f1 - m01 * f0) / det;
  const push = limitForce(q[1], v[1], a1, m00 / det);
  return [(m11 * f0 - m01 * (f1 + push)) / det, a1 + (m00 / det) * push];
}

// The torque of the elbow's soft limit, from MuJoCo's constraint model with its default solref (0.02, 1) and solimp
// (0.9, 0.95, 0.001, 0.5, 2): https://mujoco.readthedocs.io/en/stable/modeling.html#solver-parameters
function limitForce(angle, velocity, free, inverse) {
  const side = Math.sign(angle);
  const depth = Math.abs(angle) - LIMIT;
  if (depth <= 0) return 0;
  const x = Math.min(1, depth / 0.001);
  const impedance = 0.9 + 0.05 * (x <= 0.5 ? 2 * x * x : 1 - 2 * (1 - x) ** 2);
  const stiffness = 1 / (0.95 * 0.02) ** 2;
  const damping = 2 / (0.95 * 0.02);
  const wanted = damping * velocity * side + stiffness * impedance * depth; // acceleration away from the limit
  const softness = ((1 - impedance) / impedance) * INVERSE_WEIGHT;
  return -side * Math.max(0, (wanted + side * free) / (inverse + softness));
}
