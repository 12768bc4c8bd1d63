"""The source algorithm's own learning as a `Rollout`, so that the player shows it beside the distilled network.

A history holds what the source saw, not the positions that MuJoCo had. They are in the observations, more or less:

- Reacher-Goal: both angles are exact, whole turns included.
- Pusher-Goal: the joints are exact. The object lies where it was seen, which is one of MuJoCo's own steps (10 ms)
  before the joints were: `step` reads it before MuJoCo has brought it up to date.
- Half-Cheetah-Vel: all is exact but the way along x, which is summed up from the reward: it tells how far the mean
  velocity of a step was from the goal, and the observed velocities tell on which side. Where the reward leaves that
  open, because the velocity was near the goal, up to 11 cm of error have been seen to add up over 10 s.
- Ant-Dir: all is exact but the way along x and y, which is the integral of the observed velocities by the trapezoidal
  rule. Over 10 s of random actions up to 10 cm of error have been seen to add up.

"Exact" is as float32 has it. A way that is summed up starts at 0, wherever the episode did (within 0.1 m of it).

Symbols: ``n`` tasks, ``K`` episodes, ``T`` steps, ``O`` observation size, ``A`` action size, ``nq`` coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np

from adbook.histories import LearningHistory
from adbook.rollout import Rollout
from adbook.tasks import Task, TaskFamily
from adbook.tasks import family as task_family

_CHEETAH_CONTROL = 0.05  # weight of ‖a‖² in Half-Cheetah-Vel's reward


def source_rollout(histories: Sequence[LearningHistory], *, episodes: int = 20) -> Rollout:
    """Show each history by so many of its episodes, evenly spread from its first to its last.

    Args:
        histories: the ``n`` source runs, one a task, all of one family; a file of several streams holds several of
            one task, of which one is to be chosen.
        episodes: ``K``, at least 2.

    Returns:
        Their rewards, actions and positions. `metadata` holds `source`, the algorithm's name; `episodes`, for each task
        the ``K`` numbers, from 0, of the episodes shown; and `of`, for each task how many there were by the last one
        of the history. Both count all episodes of the source run, those of the environments beside this one too, and
        those thinned out.

    Raises:
        ValueError: no history, one that names no task, several families, two histories of one task, or fewer episodes
            than asked for.
    """
    tasks = _tasks(histories)
    family = task_family(tasks[0].family)
    model, dt = _model(family, tasks[0])
    picked = [_spread(history, episodes) for history in histories]
    rewards = np.full((len(tasks), episodes, family.horizon), np.nan, np.float32)
    actions = np.full((*rewards.shape, family.action_size), np.nan, np.float32)
    qpos = np.full((*rewards.shape[:2], family.horizon + 1, model.nq), np.nan, np.float32)
    returns = np.empty(rewards.shape[:2], np.float32)
    for i, (task, history) in enumerate(zip(tasks, histories, strict=True)):
        slices = history.episodes
        returns[i] = history.episode_returns[picked[i]]
        for k, number in enumerate(picked[i]):
            episode = _Episode(task, history, slices[number], model, dt)
            rewards[i, k, : episode.steps] = episode.rewards
            actions[i, k, : episode.steps] = episode.actions
            qpos[i, k, : episode.steps + 1] = _POSITIONS[family.name](episode)
    split = "+".join(sorted({task.split for task in tasks}))
    return Rollout(family.name, split, tuple(tasks), returns, rewards, actions, qpos, _metadata(histories, picked))


class _Episode:
    """One episode of ``T`` steps of a history, in float64.

    Attributes:
        task: What was to be done.
        steps: ``T``.
        rewards: ``(T,)``.
        actions: ``(T, A)``.
        seen: ``(T + 1, O)``, the observation before each step and after the last.
        model: MuJoCo's model of the robot.
        dt: s, duration of a step.
    """

    def __init__(self, task: Task, history: LearningHistory, at: slice, model: mujoco.MjModel, dt: float) -> None:
        self.task, self.model, self.dt, self.steps = task, model, dt, at.stop - at.start
        self.rewards, self.actions = history.rewards[at].astype(float), history.actions[at].astype(float)
        self.seen = np.concatenate((history.observations[at], history.next_observations[at][-1:])).astype(float)

    def everywhere(self, values: Sequence[float]) -> np.ndarray:
        """Coordinates that stay what they are, ``(T + 1, len(values))``."""
        return np.tile(np.asarray(values, float), (self.steps + 1, 1))

    def mean_velocity(self, column: int, size: int) -> np.ndarray:
        """Observed velocities from `column` on, averaged over the ends of each step, ``(T, size)``."""
        velocity = self.seen[:, column : column + size]
        return (velocity[:-1] + velocity[1:]) / 2

    def way(self, velocity: np.ndarray) -> np.ndarray:
        """Positions ``(T + 1, size)`` from mean velocities ``(T, size)``, starting at 0."""
        return np.vstack((np.zeros_like(velocity[:1]), np.cumsum(self.dt * velocity, axis=0)))


def _reacher(episode: _Episode) -> np.ndarray:
    """Angles from cos and sin; an episode starts within 0.1 rad of 0, so that its first angles are no others."""
    cosine, sine = episode.seen[:, 0:2], episode.seen[:, 2:4]
    # Full torque from rest (200 N m on 1 kg m², damped by 1 N m s) turns a joint by 2.5 rad in the last step: turns can
    # be counted, for that is less than half of one.
    angles = np.unwrap(np.arctan2(sine, cosine), axis=0)
    return np.hstack((angles, episode.everywhere(episode.task.goal)))


def _pusher(episode: _Episode) -> np.ndarray:
    """Joints as seen; the slides of the object and the goal are ordered y, x and count from the bodies' places."""
    x_y = episode.seen[:, 17:19] - episode.model.body("object").pos[:2]
    return np.hstack((episode.seen[:, :7], x_y[:, ::-1], episode.everywhere(episode.task.goal[::-1])))


def _cheetah(episode: _Episode) -> np.ndarray:
    """Height, pitch and joints as seen; x from the mean velocity that reward = -|velocity - goal| - control tells."""
    control = _CHEETAH_CONTROL * np.square(episode.actions).sum(axis=1)
    distance = np.maximum(-episode.rewards - control, 0)  # rounding may take it below
    sides = episode.task.goal[0] + np.stack((-distance, distance), axis=1)  # (T, 2)
    nearest = np.abs(sides - episode.mean_velocity(8, 1)).argmin(axis=1)
    velocity = np.take_along_axis(sides, nearest[:, None], axis=1)
    return np.hstack((episode.way(velocity), episode.seen[:, :8]))


def _ant(episode: _Episode) -> np.ndarray:
    """Height, orientation and joints as seen; x and y from velocities: the reward holds an unknown contact cost."""
    return np.hstack((episode.way(episode.mean_velocity(13, 2)), episode.seen[:, :13]))


# A family's function takes an episode and gives its positions, (T + 1, nq).
_POSITIONS = {"reacher-goal": _reacher, "pusher-goal": _pusher, "half-cheetah-vel": _cheetah, "ant-dir": _ant}


def _tasks(histories: Sequence[LearningHistory]) -> list[Task]:
    if not histories:
        raise ValueError("no history was given; give one a task, recorded with adbook.record")
    for i, history in enumerate(histories):
        if "task" not in history.metadata:
            raise ValueError(f"history {i} names no task in its metadata; give histories that record made")
    about = [history.metadata["task"] for history in histories]
    tasks = [Task(**task) for task in about]
    families = sorted({task.family for task in tasks})
    if len(families) > 1:
        raise ValueError(f"histories of {', '.join(families)} were given; give those of one family")
    twice = next((task for i, task in enumerate(tasks) if task in tasks[:i]), None)
    if twice:
        raise ValueError(f"two histories of {twice} were given; give one a task, such as the first stream of each run")
    return tasks


def _model(family: TaskFamily, task: Task) -> tuple[mujoco.MjModel, float]:
    env = family.make(task)
    model, dt = env.unwrapped.model, env.unwrapped.dt
    env.close()
    return model, dt


def _spread(history: LearningHistory, episodes: int) -> np.ndarray:
    """Indices of `episodes` episodes, from the first to the last."""
    there = len(history.episodes)
    if episodes < 2:
        raise ValueError(f"episodes={episodes} must be at least 2: the first episode and the last")
    if episodes > there:
        raise ValueError(f"{episodes} episodes are asked for and {history!r} has {there}; lower episodes")
    return np.arange(episodes) * (there - 1) // (episodes - 1)  # whole numbers: no two round to the same


def _metadata(histories: Sequence[LearningHistory], picked: Sequence[np.ndarray]) -> dict[str, object]:
    shown, of = [], []
    for history, indices in zip(histories, picked, strict=True):
        every, phase = history.metadata.get("every", 1), history.metadata.get("phase", 0)
        beside = history.metadata.get("config", {}).get("n_envs", 1)  # environments that learn together
        rounds = phase + every * indices
        shown.append((beside * rounds + history.metadata.get("stream", 0)).tolist())
        of.append(int(beside * (rounds[-1] + 1)))
    source = "+".join(sorted({str(history.metadata.get("source", "unknown")) for history in histories}))
    return {"source": source, "episodes": shown, "of": of}
