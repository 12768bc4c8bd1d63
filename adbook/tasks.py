"""The four task families: environments that differ in a hidden goal, and their fixed splits.

A *family* is a set of Markov decision processes that differ in one thing, the goal, which enters the reward and nothing
else (`adbook.envs`). Splits are constants: no seed changes them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import gymnasium
import numpy as np
from scipy.stats import qmc

from adbook.checks import check_known
from adbook.envs import AntDirEnv, HalfCheetahVelEnv, HiddenGoal, PusherGoalEnv, ReacherGoalEnv

N_TRAIN, N_TEST, N_OOD = 128, 16, 16
REACH = 0.2  # m, radius of the disc of Reacher goals (gymnasium's own)
PUSH = 0.15  # m, radius of the disc of Pusher goals around gymnasium's fixed one
MAX_VELOCITY = 3.0  # m/s
HELD_OUT_ARC = (1.75 * math.pi, 2 * math.pi)  # rad, the directions of Ant-Dir that only `ood_tasks` use


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

    def __post_init__(self):
        """Keep the goal as plain floats: it is part of the name and the seed of a task's runs, however it was given.

        Raises:
            ValueError: the goal is neither a number nor several of them in a row.
        """
        goal = np.array(self.goal, ndmin=1)
        if goal.ndim != 1 or goal.dtype.kind not in "iuf":
            raise ValueError(f"goal={self.goal!r} must be a number, or several in a row such as (0.1, -0.1)")
        object.__setattr__(self, "goal", tuple(goal.astype(float).tolist()))

    def __str__(self) -> str:
        """Family, split and index, as in file names."""
        return f"{self.family}/{self.split}-{self.index:03d}"


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
    env: type[HiddenGoal]  # and a gymnasium.Env
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
MACAW = tuple(name for name, spec in _SPECS.items() if spec.macaw)  # families that have its split

for _each in _SPECS.values():  # by name, so that a dataset can keep the environment's specification as JSON
    gymnasium.register(_each.id, f"{_each.env.__module__}:{_each.env.__name__}", max_episode_steps=_each.horizon)


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
            env.check_goal(task.goal)

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
    check_known("task family", name, FAMILIES)
    spec = _spec(name, split)
    allowed = SPLITS if spec.macaw else SPLITS[:1]
    check_known("split", split, allowed)
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
