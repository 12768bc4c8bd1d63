"""The rollout player: scrub through in-context episodes, with a kernel or without one.

An anywidget whose whole data lie in its state. papermill stores that state in the notebook and the page
embeds it, so that the same few hundred lines of JavaScript (``player.js``) serve JupyterLab and the static
book.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from numpy.typing import ArrayLike

from adbook.rollout import Rollout

SUPPORTED = ("reacher-goal",)
_INT16 = 2**15


class Player(anywidget.AnyWidget):
    """A player for one rollout: task picker, episode and step sliders, the arm, the return curve.

    What it keeps is what it draws: the two joint angles, wrapped to one turn, in 16 bits (steps of π/32768
    rad, so the fingertip is off by at most 0.016 mm), rewards in 16 bits (1/32767 of the largest), returns in
    full. That is 6 bytes a step: 100 kB for 16 tasks of 20 episodes.

    Args:
        rollout: A rollout of Reacher-Goal.
        references: Returns to draw as horizontal lines, by name ("random", "source"): ``(n,)``, one a task.

    Attributes:
        task: Index of the task shown; set it to move the player, as with `episode` and `step`.
        episode: Index of the episode shown, from 0.
        step: Index of the frame shown: 0 before the first step, ``T`` after the last.

    Raises:
        ValueError: The rollout is of a family that the player cannot draw, or a reference has another length.
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")

    shape = traitlets.List(traitlets.Int()).tag(sync=True)  # n, K, T
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)  # of the tasks, (n,)
    goals = traitlets.List().tag(sync=True)  # (n, 2), m
    returns = traitlets.List().tag(sync=True)  # (n, K)
    references = traitlets.List().tag(sync=True)  # pairs of a name and (n,) returns
    angles = traitlets.Bytes().tag(sync=True)  # (n, K, T + 1, 2) little-endian int16, in units of π/32768 rad
    rewards = traitlets.Bytes().tag(sync=True)  # (n, K, T) little-endian int16, in units of `reward_unit`
    reward_unit = traitlets.Float().tag(sync=True)
    task = traitlets.Int().tag(sync=True)
    episode = traitlets.Int().tag(sync=True)
    step = traitlets.Int().tag(sync=True)

    def __init__(self, rollout: Rollout, *, references: Mapping[str, ArrayLike] | None = None) -> None:
        """See the class."""
        if rollout.family not in SUPPORTED:
            raise ValueError(
                f"The player cannot draw {rollout.family!r} yet; it draws {', '.join(map(repr, SUPPORTED))}. "
                "Plot the returns instead: adbook.plots.in_context_curve."
            )
        n, _, steps = rollout.rewards.shape
        unit = float(np.abs(rollout.rewards).max()) / (_INT16 - 1) or 1.0
        super().__init__(
            shape=list(rollout.rewards.shape),
            labels=[_label(task.split, task.index, task.goal) for task in rollout.tasks],
            goals=[list(task.goal) for task in rollout.tasks],
            returns=np.round(rollout.returns.astype(float), 4).tolist(),
            references=[[name, _per_task(name, values, n)] for name, values in (references or {}).items()],
            angles=_angles(rollout.qpos[..., :2]),
            rewards=np.round(rollout.rewards / unit).astype("<i2").tobytes(),
            reward_unit=unit,
            step=steps,  # the first picture shows a whole attempt
        )

    def __repr__(self) -> str:
        """What it holds; also the text that stands for it where widgets cannot be shown."""
        n, episodes, steps = self.shape
        return f"Player({n} tasks, {episodes} episodes, {steps} steps)"

    @traitlets.validate("task", "episode", "step")
    def _in_range(self, proposal: traitlets.Bunch) -> int:
        limits = dict(zip(("task", "episode", "step"), self.shape, strict=True))
        name, value = proposal.trait.name, proposal.value
        highest = limits[name] - (name != "step")
        if not 0 <= value <= highest:
            raise ValueError(f"{name} is {value}; it must lie between 0 and {highest}.")
        return value


def _angles(q: np.ndarray) -> bytes:
    """Angles (rad) as int16 fractions of half a turn; overflow drops whole turns, which no picture shows."""
    return np.round(q.astype(float) * (_INT16 / math.pi)).astype(np.int64).astype("<i2").tobytes()


def _label(split: str, index: int, goal: tuple[float, ...]) -> str:
    x, y = (f"{v:+.2f}".replace("-", "−") for v in goal)
    return f"{split} {index + 1}: goal ({x}, {y}) m"


def _per_task(name: str, values: ArrayLike, n: int) -> list[float]:
    values = np.asarray(values, float)
    if values.shape != (n,):
        raise ValueError(f"references[{name!r}] has shape {values.shape}; it must be ({n},), one return a task.")
    return np.round(values, 4).tolist()
