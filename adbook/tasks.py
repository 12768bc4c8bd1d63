"""The four task families: MuJoCo environments whose goal is hidden, and their fixed splits.

A *family* is a set of Markov decision processes that differ in one thing, the goal; the goal enters the reward and
nothing else. It is never in the observation, so an agent has to find it out by acting and reading rewards.

Reward definitions follow PEARL, VariBAD, MACAW and MQL for Half-Cheetah-Vel and Ant-Dir, and gymnasium's Reacher-v5
and Pusher-v5 for the other two (control weight 0.1). Splits are constants: no seed changes them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces, utils
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.pusher_v5 import PusherEnv
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv
from scipy.stats import qmc

N_TRAIN, N_TEST, N_OOD = 128, 16, 16
REACH = 0.2  # m, radius of the disc of Reacher goals (gymnasium's own)
PUSH = 0.15  # m, radius of the disc of Pusher goals around gymnasium's fixed one
MAX_VELOCITY = 3.0  # m/s
HELD_OUT_ARC = (1.75 * math.pi, 2 * math.pi)  # rad, the directions of Ant-Dir that only `ood_tasks` use

Goal = float | Sequence[float]


@dataclass(frozen=True)
class Task:
    """One member of a family.

    Attributes:
        family: the family's name.
        goal: the hidden parameter. Reacher-Goal and Pusher-Goal: (x, y) in m; Half-Cheetah-Vel: (velocity,) in m/s;
            Ant-Dir: (direction,) in rad.
        split: "train", "test", "ood" or "sampled".
        index: position in its split.
    """

    family: str
    goal: tuple[float, ...]
    split: str
    index: int

    def __str__(self) -> str:
        """Family, split and index, as in file names."""
        return f"{self.family}/{self.split}-{self.index:03d}"


def _checked_goal(goal: Goal, size: int, low: float, high: float, what: str) -> np.ndarray:
    """Return `goal` as a float64 vector, or say what is wrong with it; `low` and `high` bound its norm or value."""
    try:
        vector = np.atleast_1d(np.array(goal, dtype=np.float64))  # a copy: the caller's may change
    except (TypeError, ValueError):  # text, or lists of unequal lengths
        vector = np.empty(0)
    value = vector[0] if vector.size == 1 else float(np.linalg.norm(vector))
    if vector.shape != (size,) or not (np.isfinite(vector).all() and low <= value <= high):
        raise ValueError(f"goal={goal!r} is not {what}; pass {size} finite number{'s' * (size > 1)} in that range")
    return vector


class _HiddenGoal:
    """What the four environments share: a goal that may be moved between two episodes, ``env.unwrapped.goal = (x, y)``.

    Attributes:
        goal_size: length of the goal.
        goal_range: smallest and largest value of it, or of its norm if it has two numbers.
    """

    goal_size: int
    goal_range: tuple[float, float]
    _allowed: str

    @property
    def goal(self) -> np.ndarray:
        """The goal, (goal_size,) float64; setting another raises ValueError where it is out of range."""
        return self._goal

    @goal.setter
    def goal(self, goal: Goal) -> None:
        self._goal = _checked_goal(goal, self.goal_size, *self.goal_range, self._allowed)


class ReacherGoalEnv(_HiddenGoal, ReacherEnv):
    """Reacher-v5 with a hidden goal.

    Observation (8): cos q0, cos q1, sin q0, sin q1, q̇0, q̇1 (rad/s), fingertip x, y (m). Action (2): joint torques in
    [-1, 1]. Reward: -‖fingertip - goal‖ - 0.1 ‖a‖². Gymnasium's observation also holds the target and its offset from
    the fingertip: both would give the goal away.
    """

    goal_size, goal_range = 2, (0.0, 0.25)
    _allowed = "a point (x, y) at most 0.25 m from the base"

    def __init__(self, goal: Goal = (0.1, -0.1), **kwargs):
        """Place the hidden goal at `goal`, (x, y) in m, at most 0.25 m from the arm's base."""
        self.goal = goal
        super().__init__(reward_control_weight=0.1, **kwargs)
        utils.EzPickle.__init__(self, goal=goal, **kwargs)
        self.observation_space = spaces.Box(-np.inf, np.inf, (8,), np.float64)
        self._tip = self.data.xpos[self.model.body("fingertip").id]  # a view that MuJoCo keeps current

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply two torques for 0.02 s."""
        self.do_simulation(action, self.frame_skip)
        distance = math.hypot(self._tip[0] - self.goal[0], self._tip[1] - self.goal[1])
        control = self._reward_control_weight * float(np.dot(action, action))
        if self.render_mode == "human":
            self.render()
        info = {"distance": distance, "reward_dist": -distance, "reward_ctrl": -control}
        return self._get_obs(), -distance - control, False, False, info

    def reset_model(self) -> np.ndarray:
        """Start near the straight arm; the target body is moved to the goal for drawing only."""
        noise = self.np_random.uniform(-0.1, 0.1, self.model.nq), self.np_random.uniform(-0.005, 0.005, self.model.nv)
        position, velocity = self.init_qpos + noise[0], self.init_qvel + noise[1]
        position[-2:], velocity[-2:] = self.goal, 0.0
        self.set_state(position, velocity)
        return self._get_obs()

    def _get_obs(self) -> np.ndarray:
        angle = self.data.qpos[:2]
        return np.concatenate((np.cos(angle), np.sin(angle), self.data.qvel[:2], self._tip[:2]))


class PusherGoalEnv(_HiddenGoal, PusherEnv):
    """Pusher-v5 with a hidden goal, `goal` = (x, y) in m relative to the table's centre mark.

    Observation (20): 7 joint angles, 7 joint velocities, fingertip xyz, object xyz. Action (7): torques in [-2, 2].
    Reward: -‖object - goal‖ - 0.5 ‖object - fingertip‖ - 0.1 ‖a‖². The object's start is random in every episode and
    does not depend on the goal: a start kept away from the goal would give it away.
    """

    goal_size, goal_range = 2, (0.0, 0.25)
    _allowed = "a point (x, y) at most 0.25 m from the table's mark"

    def __init__(self, goal: Goal = (0.0, 0.0), **kwargs):
        """Place the hidden goal at `goal`, (x, y) in m, at most 0.25 m from the table's centre mark."""
        self.goal = goal
        super().__init__(**kwargs)
        utils.EzPickle.__init__(self, goal=goal, **kwargs)
        self.observation_space = spaces.Box(-np.inf, np.inf, (20,), np.float64)

    def reset_model(self) -> np.ndarray:
        """Draw the object's start as Pusher-v5 does, at least 0.17 m from the table's centre mark."""
        position = self.init_qpos.copy()
        position[-4:-2] = self._object_start()
        position[-2:] = self.goal[1], self.goal[0]  # MuJoCo's slides are ordered y, x
        velocity = self.init_qvel + self.np_random.uniform(-0.005, 0.005, self.model.nv)
        velocity[-4:] = 0.0
        self.set_state(position, velocity)
        return self._get_obs()

    def _object_start(self) -> np.ndarray:
        while True:
            start = np.array([self.np_random.uniform(-0.3, 0.0), self.np_random.uniform(-0.2, 0.2)])
            if np.linalg.norm(start) > 0.17:
                return start

    def _get_obs(self) -> np.ndarray:
        joints = self.data.qpos[:7], self.data.qvel[:7]
        return np.concatenate((*joints, self.get_body_com("tips_arm"), self.get_body_com("object")))


class HalfCheetahVelEnv(_HiddenGoal, HalfCheetahEnv):
    """HalfCheetah-v5 that is asked for a hidden forward velocity, `goal` in m/s.

    Observation (17) and action (6) are HalfCheetah-v5's. Reward: -|v_x - goal| - 0.05 ‖a‖². Never terminates.
    """

    goal_size, goal_range = 1, (-3.0, 5.0)
    _allowed = "a velocity from -3 to 5 m/s"

    def __init__(self, goal: Goal = 1.0, **kwargs):
        """Ask for the forward velocity `goal`, in m/s, from -3 to 5."""
        self.goal = goal
        super().__init__(**kwargs)
        utils.EzPickle.__init__(self, goal=goal, **kwargs)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """Load the model without MuJoCo's remark, and log file, on a deprecated attribute of gymnasium's XML."""
        handler = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda message: None)
        try:
            return super()._initialize_simulation()
        finally:
            mujoco.set_mju_user_warning(handler)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply six torques for 0.05 s."""
        observation, _, terminated, truncated, info = super().step(action)
        error = abs(float(info["x_velocity"]) - self.goal[0])
        control = 0.05 * float(np.dot(action, action))
        info |= {"velocity_error": error, "reward_forward": -error, "reward_ctrl": -control}
        return observation, -error - control, terminated, truncated, info


class AntDirEnv(_HiddenGoal, AntEnv):
    """Ant-v5 that is paid for velocity along a hidden direction, `goal` in rad.

    Observation (27, without contact forces) and action (8) are Ant-v5's. Reward: v · (cos goal, sin goal) - 0.5 ‖a‖²
    - contact cost + 1 while healthy; the episode ends when the torso's height leaves [0.2, 1.0] m.
    """

    goal_size, goal_range = 1, (0.0, 2 * math.pi)
    _allowed = "a direction from 0 to 2π rad"

    def __init__(self, goal: Goal = 0.0, **kwargs):
        """Pay for moving along `goal`, an angle in rad from 0 to 2π."""
        self.goal = goal
        super().__init__(include_cfrc_ext_in_observation=False, **kwargs)
        utils.EzPickle.__init__(self, goal=goal, **kwargs)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply eight torques for 0.05 s."""
        observation, reward, terminated, truncated, info = super().step(action)
        direction = math.cos(self.goal[0]), math.sin(self.goal[0])
        forward = float(np.dot(direction, (info["x_velocity"], info["y_velocity"])))
        reward = float(reward - info["reward_forward"] + forward)
        return observation, reward, terminated, truncated, info | {"reward_forward": forward}


def _disc(radius: float) -> Callable[[np.ndarray], list[tuple[float, ...]]]:
    """Map points of the unit square onto a disc, area to area."""

    def place(points: np.ndarray) -> list[tuple[float, ...]]:
        r, angle = radius * np.sqrt(points[:, 0]), 2 * np.pi * points[:, 1]
        return [(float(x), float(y)) for x, y in zip(r * np.cos(angle), r * np.sin(angle), strict=True)]

    return place


def _ring(inner: float, outer: float) -> list[tuple[float, ...]]:
    """`N_OOD` points between two radii, evenly spread in angle, alternating in radius."""
    steps = np.arange(N_OOD)
    r = np.where(steps % 2, outer, (inner + outer) / 2)
    angle = 2 * np.pi * (steps + 0.5) / N_OOD
    return [(float(x), float(y)) for x, y in zip(r * np.cos(angle), r * np.sin(angle), strict=True)]


def _interval(low: float, high: float) -> Callable[[np.ndarray], list[tuple[float, ...]]]:
    return lambda points: [(float(low + (high - low) * u),) for u in points[:, 0]]


def _evenly(*intervals: tuple[float, float]) -> list[tuple[float, ...]]:
    """`N_OOD` values at the midpoints of equal cells of the intervals."""
    each = N_OOD // len(intervals)
    return [(low + (high - low) * (i + 0.5) / each,) for low, high in intervals for i in range(each)]


@dataclass(frozen=True)
class _Spec:
    """How a family is made: environment, episode length, goal distribution, goals outside of it, MACAW's split."""

    id: str
    env: type[gymnasium.Env]
    horizon: int
    place: Callable[[np.ndarray], list[tuple[float, ...]]]  # unit square -> goals
    ood: list[tuple[float, ...]]
    everywhere: Callable[[np.ndarray], list[tuple[float, ...]]]  # unit square -> goals, those of `ood` among them
    macaw: tuple[tuple[float, ...], frozenset[int]] | None = None


# MACAW's Half-Cheetah-Vel tasks are this grid. Its 50 Ant directions were random draws shipped with its data; here they
# are the 50 equal divisions of the circle, with the same test indices.
_CHEETAH_MACAW = tuple(np.linspace(0.075, 3.0, 40).tolist()), frozenset({2, 7, 15, 23, 26})
_ANT_MACAW = tuple((2 * np.pi * np.arange(50) / 50).tolist()), frozenset({6, 17, 23, 30, 41})

_SPECS = {
    "reacher-goal": _Spec("adbook/ReacherGoal-v0", ReacherGoalEnv, 50, _disc(REACH), _ring(REACH, 0.24), _disc(0.24)),
    "pusher-goal": _Spec("adbook/PusherGoal-v0", PusherGoalEnv, 100, _disc(PUSH), _ring(PUSH, 0.2), _disc(0.2)),
    "half-cheetah-vel": _Spec(
        "adbook/HalfCheetahVel-v0",
        HalfCheetahVelEnv,
        200,
        _interval(0.0, MAX_VELOCITY),
        _evenly((-1.0, 0.0), (MAX_VELOCITY, 4.0)),
        _interval(-1.0, 4.0),
        _CHEETAH_MACAW,
    ),
    "ant-dir": _Spec(
        "adbook/AntDir-v0",
        AntDirEnv,
        200,
        _interval(0.0, HELD_OUT_ARC[0]),
        _evenly(HELD_OUT_ARC),
        _interval(0.0, 2 * math.pi),
        _ANT_MACAW,
    ),
}
FAMILIES = tuple(_SPECS)
SPLITS = ("default", "macaw")

for _each in _SPECS.values():  # by name, so that a dataset can keep the environment's specification as JSON
    gymnasium.register(_each.id, f"{__name__}:{_each.env.__name__}", max_episode_steps=_each.horizon)


@dataclass(frozen=True)
class TaskFamily:
    """A set of tasks that differ in a hidden goal, with a fixed split.

    Attributes:
        name: one of `FAMILIES`.
        split: "default" or "macaw".
        horizon: steps an episode.
        observation_size: length of the observation vector.
        action_size: length of the action vector.
        action_scale: the largest action, in every component; the smallest is its negative.
        train_tasks: in a spread-out order, so that any first n cover the range evenly ("default": 128).
        test_tasks: from the same range, never trained on ("default": 16).
        ood_tasks: outside the range of the training tasks (16; none for MACAW's Ant-Dir, which has the whole circle).
    """

    name: str
    split: str
    horizon: int
    observation_size: int
    action_size: int
    action_scale: float
    train_tasks: tuple[Task, ...]
    test_tasks: tuple[Task, ...]
    ood_tasks: tuple[Task, ...]

    def make(self, task: Task, *, render_mode: str | None = None) -> gymnasium.Env:
        """Make the environment of one task; its episodes are truncated at the family's horizon.

        Raises:
            ValueError: `task` belongs to another family.
        """
        if task.family != self.name:
            raise ValueError(f"{task} is not a task of {self.name!r}; use adbook.family({task.family!r})")
        spec = _SPECS[self.name]
        return gymnasium.make(spec.id, goal=task.goal, render_mode=render_mode, disable_env_checker=True)

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise ValueError unless there is a task, and all are this family's, with goals in its range."""
        if not tasks:
            raise ValueError("tasks is empty; give at least one, for example family.train_tasks")
        env = _SPECS[self.name].env
        for task in tasks:
            if not isinstance(task, Task):
                raise ValueError(
                    f"{task!r} is not a task; take tasks from a family, for example family.train_tasks[:2]"
                )
            if task.family != self.name:
                raise ValueError(f"tasks of {task.family} given with family {self.name!r}; use its own")
            _checked_goal(task.goal, env.goal_size, *env.goal_range, env._allowed)

    def sample_tasks(self, n: int, rng: np.random.Generator, *, ood: bool = False) -> tuple[Task, ...]:
        """Draw `n` fresh tasks from the distribution of the training and test tasks; `ood` widens it to `ood_tasks`."""
        spec = _spec(self.name, self.split)
        return _tasks(self.name, "sampled", (spec.everywhere if ood else spec.place)(rng.random((n, 2))))

    def __repr__(self) -> str:
        """Name the split and count its tasks."""
        sizes = f"{len(self.train_tasks)} train, {len(self.test_tasks)} test, {len(self.ood_tasks)} ood tasks"
        return f"TaskFamily({self.name!r}, split={self.split!r}: {sizes}; horizon {self.horizon})"


def family(name: str, split: str = "default") -> TaskFamily:
    """Return a task family.

    Args:
        name: "reacher-goal", "pusher-goal", "half-cheetah-vel" or "ant-dir".
        split: "default": training goals are a low-discrepancy sequence, test goals fixed uniform draws; "macaw": the
            split of MACAW (Half-Cheetah-Vel and Ant-Dir only).

    Raises:
        ValueError: unknown family or split.
    """
    if name not in _SPECS:
        close = get_close_matches(str(name), FAMILIES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown task family {name!r}{hint}; choose one of {', '.join(FAMILIES)}")
    spec = _spec(name, split)
    allowed = SPLITS if spec.macaw else SPLITS[:1]
    if split not in allowed:
        raise ValueError(f"unknown split {split!r} of {name!r}; choose one of {', '.join(allowed)}")
    train, test = _macaw_goals(spec) if split == "macaw" else _default_goals(spec)
    env = spec.env()
    sizes = env.observation_space.shape[0], env.action_space.shape[0], float(env.action_space.high[0])
    env.close()
    splits = (_tasks(name, kind, goals) for kind, goals in (("train", train), ("test", test), ("ood", spec.ood)))
    return TaskFamily(name, split, spec.horizon, *sizes, *splits)


def _spec(name: str, split: str) -> _Spec:
    if (name, split) == ("ant-dir", "macaw"):  # goes all the way round: no direction is outside of it
        return replace(_SPECS[name], place=_interval(0.0, 2 * math.pi), ood=[])
    return _SPECS[name]


def _tasks(name: str, split: str, goals: Sequence[tuple[float, ...]]) -> tuple[Task, ...]:
    return tuple(Task(name, goal, split, i) for i, goal in enumerate(goals))


def _default_goals(spec: _Spec) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    train = qmc.Halton(2, scramble=False).random(N_TRAIN + 1)[1:]  # the sequence's first point is the corner (0, 0)
    test = np.random.default_rng(20250613).random((N_TEST, 2))
    return spec.place(train), spec.place(test)


def _macaw_goals(spec: _Spec) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    goals, held_out = spec.macaw
    train = [(g,) for i, g in enumerate(goals) if i not in held_out]
    return train, [(g,) for i, g in enumerate(goals) if i in held_out]
