"""Environments side by side, every step recorded beneath whatever learns from them.

Where EnvPool is installed (arXiv 2206.10558), it steps them in compiled code; elsewhere gymnasium does, one by one.
EnvPool is used for a family only if the same steps in both give the same results, which is tried once a process.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from adbook.tasks import Task, TaskFamily
from adbook.tasks import family as task_family

Stream = dict[str, np.ndarray]
"""One environment's steps in order; keys and shapes are those of `adbook.LearningHistory`."""

TOLERANCE = 1e-5  # by which an observation or a reward of EnvPool may differ from gymnasium's after one step


class TaskVector(VecEnv):
    """Environments side by side as stable-baselines3 wants them; an episode that ends is followed by a new one at once.

    What they return is written down here, before an episode's last observation is replaced by the next one's first, and
    before a wrapper such as `VecNormalize` rescales it.
    """

    def __init__(self, family: TaskFamily, tasks: Sequence[Task], *, seed: int, capacity: int = 0, streams: int = 0):
        """Make one environment a task (repeat a task for copies of it); record `capacity` steps of the first `streams`.

        Raises:
            ValueError: no task, one of another family, or one with an impossible goal.
        """
        family.check(tasks)
        n_envs = len(tasks)
        self._simulator = SIMULATORS[simulator(family.name)](family, tasks, seed)
        space = family.observation_size, family.action_size
        super().__init__(
            n_envs,
            gymnasium.spaces.Box(-np.inf, np.inf, space[:1], np.float32),
            gymnasium.spaces.Box(-family.action_scale, family.action_scale, space[1:], np.float32),
        )
        shapes = {"observations": space[:1], "actions": space[1:], "rewards": (), "next_observations": space[:1]}
        self._record = {name: np.empty((capacity, streams, *shape), np.float32) for name, shape in shapes.items()}
        self._record |= {name: np.empty((capacity, streams), bool) for name in ("terminated", "truncated")}
        self._count = 0

    def reset(self) -> np.ndarray:
        """Start an episode in every environment and return the first observations, (n_envs, O) float32."""
        self._observations = self._simulator.reset(np.arange(self.num_envs)).astype(np.float32)
        return self._observations.copy()

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Step every environment, and reset those whose episode has ended."""
        following, rewards, terminated, truncated = self._simulator.step(self._actions)
        following = following.astype(np.float32)
        row = (self._observations, self._actions, rewards, following, terminated, truncated)
        if self._count < len(self._record["rewards"]):
            for values, value in zip(self._record.values(), row, strict=True):
                values[self._count] = value[: values.shape[1]]
            self._count += 1
        ended = np.flatnonzero(terminated | truncated)
        infos = [{} for _ in range(self.num_envs)]
        for i in ended:
            infos[i] = {"terminal_observation": following[i], "TimeLimit.truncated": not terminated[i]}
        if ended.size:
            following = following.copy()
            following[ended] = self._restart(ended)
        self._observations = following
        return following.copy(), rewards.astype(np.float32), terminated | truncated, infos

    def _restart(self, which: np.ndarray) -> np.ndarray:
        """Start the next episode in some environments and return their first observations."""
        return self._simulator.reset(which)

    @property
    def streams(self) -> list[Stream]:
        """What the recorded environments saw, each cut after its last finished episode."""
        ends = self._record["terminated"] | self._record["truncated"]
        lengths = [max(np.flatnonzero(row[: self._count]) + 1, default=0) for row in ends.T]
        return [{name: v[:length, i] for name, v in self._record.items()} for i, length in enumerate(lengths)]

    def close(self) -> None:
        """Free the environments."""
        self._simulator.close()

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Change nothing: the seed was given when the environments were made."""
        return [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Tell stable-baselines3, the only one to ask, that nothing is drawn."""
        if attr_name != "render_mode":
            raise AttributeError(f"a vector of tasks has no attribute {attr_name!r}")
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuse: there is nothing to set."""
        raise NotImplementedError(f"a vector of tasks has no attribute {attr_name!r} to set")

    def env_method(self, method_name: str, *args, indices: Any = None, **kwargs) -> list[Any]:
        """Refuse: there is nothing to call."""
        raise NotImplementedError(f"a vector of tasks has no method {method_name!r} to call")

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: Any = None) -> list[bool]:
        """Say that no environment is wrapped."""
        return [False] * self.num_envs


class _Gymnasium:
    """Gymnasium environments, stepped one after the other."""

    def __init__(self, family: TaskFamily, tasks: Sequence[Task], seed: int):
        self._envs = [family.make(task) for task in tasks]
        self._seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(len(tasks))]

    def move(self, i: int, goal: np.ndarray) -> None:
        self._envs[i].unwrapped.goal = goal

    def reset(self, which: np.ndarray) -> np.ndarray:
        observations = np.stack([self._envs[i].reset(seed=self._seeds[i])[0] for i in which])
        for i in which:
            self._seeds[i] = None  # later episodes go on with the generator
        return observations

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        results = [env.step(action)[:4] for env, action in zip(self._envs, actions, strict=True)]
        return tuple(np.array(column) for column in zip(*results, strict=True))

    def close(self) -> None:
        for env in self._envs:
            env.close()


class _EnvPool:
    """An EnvPool of one thread; goals, rewards and what is observed are ours."""

    def __init__(self, family: TaskFamily, tasks: Sequence[Task], seed: int):
        import envpool

        self._spec, self._horizon = _ENVPOOL[family.name], family.horizon
        self._goals = np.array([task.goal for task in tasks])
        options = {"num_envs": len(tasks), "num_threads": 1, "seed": seed % 2**31, "max_episode_steps": 2**31 - 1}
        self._pool = envpool.make(self._spec.id, "gymnasium", **options)
        self._steps = np.zeros(len(tasks), int)

    def move(self, i: int, goal: np.ndarray) -> None:
        self._goals[i] = goal

    def reset(self, which: np.ndarray) -> np.ndarray:
        self._steps[which] = 0
        self.raw = self._pool.reset(which.astype(np.int32))[0]
        return self._spec.observe(self.raw)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        self.raw, _, _, _, info = self._pool.step(actions.astype(np.float64))
        self._steps += 1
        rewards = self._spec.reward(self.raw, info, self._goals) - self._spec.cost * (actions**2).sum(1)
        never = np.zeros(len(self.raw), bool)  # no family that EnvPool steps has terminal states
        return self._spec.observe(self.raw), rewards, never, self._steps >= self._horizon

    def close(self) -> None:
        self._pool.close()


SIMULATORS = {"gymnasium": _Gymnasium, "envpool": _EnvPool}


@functools.cache
def simulator(name: str) -> str:
    """Return what steps a family's environments here: "envpool" where it is installed and exact, else "gymnasium"."""
    if name not in _ENVPOOL or importlib.util.find_spec("envpool") is None:
        return "gymnasium"
    return "envpool" if disagreement(name) <= TOLERANCE else "gymnasium"


def disagreement(name: str) -> float:
    """Play an episode of actions in EnvPool, and each of its steps in gymnasium from the same state.

    Returns:
        The largest difference that a single step makes in an observation or in a reward; NaN if one is NaN.
    """
    kind, spec = task_family(name), _ENVPOOL[name]
    rng = np.random.default_rng(0)
    tasks = kind.train_tasks[:1] * 4
    pool, singles = _EnvPool(kind, tasks, 0), [kind.make(task).unwrapped for task in tasks]
    try:
        pool.reset(np.arange(4))
        for single in singles:
            single.reset(seed=0)
        worst = []
        for t in range(kind.horizon):
            if t % 5 == 0:  # held for a while, actions reach further
                actions = rng.uniform(-kind.action_scale, kind.action_scale, (4, kind.action_size))
            before = pool.raw
            observations, rewards, *_ = pool.step(actions)
            for i, (raw, single) in enumerate(zip(before, singles, strict=True)):
                single.set_state(*spec.state(raw, single.data.qpos.copy(), 0 * single.data.qvel))
                observation, reward, *_ = single.step(actions[i])
                worst += [np.abs(observation - observations[i]).max(), abs(reward - rewards[i])]
    finally:
        for each in (pool, *singles):
            each.close()
    return float(np.max(worst))


@dataclass(frozen=True)
class _PoolSpec:
    """How EnvPool's environment becomes ours; `raw` is its observation, (n_envs, …)."""

    id: str
    cost: float  # of a squared action
    observe: Callable[[np.ndarray], np.ndarray]  # raw -> observations
    reward: Callable[[np.ndarray, dict, np.ndarray], np.ndarray]  # raw, info, goals -> rewards before the action's cost
    # one environment's raw observation, its qpos a step ago, qvel to be filled in -> the state it shows
    state: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _norm(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt((vectors**2).sum(1))


def _fingertip(raw: np.ndarray) -> np.ndarray:
    """Reacher-v5 observes the target, raw[4:6], and the fingertip's offset from it."""
    return raw[:, 8:10] + raw[:, 4:6]


def _reacher_state(raw: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arctan2(raw[2:4], raw[:2])
    qpos[:2] += (angle - qpos[:2] + np.pi) % (2 * np.pi) - np.pi  # the same number of turns as a step ago
    qvel[:2] = raw[6:8]
    return qpos, qvel


def _cheetah_state(raw: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    qpos[1:], qvel[:] = raw[:8], raw[8:]
    return qpos, qvel


# Two are not here. EnvPool's MuJoCo is older than gymnasium's and treats contacts differently: one step of Ant differs
# by 3e-5 in the median and by up to 0.7, Pusher's step of first contact with the object by up to 1e-3.
_ENVPOOL = {
    "reacher-goal": _PoolSpec(
        "Reacher-v5",
        0.1,
        lambda raw: np.concatenate((raw[:, :4], raw[:, 6:8], _fingertip(raw)), 1),
        lambda raw, info, goals: -_norm(_fingertip(raw) - goals),
        _reacher_state,
    ),
    "half-cheetah-vel": _PoolSpec(
        "HalfCheetah-v5",
        0.05,
        lambda raw: raw,
        lambda raw, info, goals: -np.abs(info["x_velocity"] - goals[:, 0]),
        _cheetah_state,
    ),
}
