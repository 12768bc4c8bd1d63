"""What steps would have been paid on another task of their family, from what was observed alone.

Tasks of a family differ in the reward only, and only in the part of it that the goal enters (`adbook.envs`). Where that
part can be read from observations, a history of one task tells what its every step would have earned on any other:
hindsight relabelling (Andrychowicz et al. 2017, arXiv 1707.01495), here for whole episodes. Needs no simulator.
"""

from collections.abc import Callable, Sequence

import numpy as np

from adbook.checks import check_known

_Part = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _mean_speed(before: np.ndarray, after: np.ndarray, where: slice) -> np.ndarray:
    """The simulator pays for distance over a step's time, which the mean speed of the step's two ends estimates."""
    return (before[:, where] + after[:, where]) / 2


def _distance(place: np.ndarray, goal: np.ndarray) -> np.ndarray:
    return -np.linalg.norm(place - goal, axis=1)


PUSHER_MARK = np.array([0.45, -0.05, -0.323])  # m, where the table's centre mark lies in the observation's coordinates
# The part of the reward with the goal in it, from observations before and after a step, (T, O) each, and the goal.
_PARTS: dict[str, _Part] = {
    "reacher-goal": lambda before, after, goal: _distance(after[:, 6:8], goal),
    "pusher-goal": lambda before, after, goal: _distance(after[:, 17:20] - PUSHER_MARK, np.append(goal, 0)),
    "half-cheetah-vel": lambda before, after, goal: -abs(_mean_speed(before, after, slice(8, 9)) - goal)[:, 0],
    "ant-dir": lambda before, after, goal: (
        _mean_speed(before, after, slice(13, 15)) @ np.array([np.cos(goal[0]), np.sin(goal[0])])
    ),
}


def repaid(
    family: str,
    observations: np.ndarray,
    next_observations: np.ndarray,
    rewards: np.ndarray,
    goal: Sequence[float],
    other: Sequence[float],
) -> np.ndarray:
    """Return rewards as another task of the family would have paid them.

    Exact for Reacher-Goal and Pusher-Goal. Half-Cheetah-Vel and Ant-Dir pay for a step's mean velocity, which is taken
    from its two ends.

    Args:
        family: name of the task family.
        observations: before each step, (T, O).
        next_observations: after each step, (T, O).
        rewards: on the task that was played, (T,).
        goal: of the task that was played.
        other: goal of the other task.

    Returns:
        (T,), of the dtype of `rewards`; `rewards` itself where the goals are the same.

    Raises:
        ValueError: unknown family, or goals of different sizes.
    """
    check_known("task family", family, _PARTS)
    if len(goal) != len(other):
        raise ValueError(f"goals {tuple(goal)} and {tuple(other)} must be of one size")
    if tuple(goal) == tuple(other):
        return rewards
    mine, others = (_PARTS[family](observations, next_observations, np.array(g)) for g in (goal, other))
    return (rewards + others - mine).astype(rewards.dtype)
