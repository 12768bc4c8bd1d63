"""The rollout player: watch frozen networks learn, episode by episode, with a kernel or without one.

An anywidget whose whole data lie in its state. papermill stores that state in the notebook and the page
embeds it, so that the same JavaScript (``player.js``) serves JupyterLab and the static book.
"""

from __future__ import annotations

import base64
import html
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import anywidget
import numpy as np
import traitlets
from numpy.typing import ArrayLike

from adbook.files import write_whole
from adbook.look import style
from adbook.rollout import Rollout
from adbook.scene import scene
from adbook.tasks import Task, family

MOST_BYTES = 240_000  # of a recording in a page, where bytes are text and four of them carry three
_STRIDES = (1, 2, 3, 4, 5)  # steps between two stored frames
_INT16 = 2**15 - 1
_REWARD_LEVELS, _INSIGHT_LEVELS = 4000, 250  # from nothing to the largest: finer than a reader can see


class RolloutPlayer(anywidget.AnyWidget):
    """A player for rollouts of one to four agents on the same tasks.

    It draws the robot from recorded coordinates, a time line over all episodes, a map of the tasks, and, for agents
    of which it is told, what the network saw and did.  Coordinates are kept in 16 bits over their range; where all
    of it would be more than 240 kB in a page, fewer frames are kept and those between are interpolated.

    Args:
        rollouts: A rollout, or several by the agent's name, all of the same tasks and numbers of episodes.
        references: Returns to draw as horizontal lines, by name ("random", "source"): ``(n,)``, one a task.
        insight: By agent, what `adbook.Watched.insight` gives for its rollout.

    Attributes:
        task: Index of the task shown; set it to move the player, as with `episode` and `step`.
        episode: Index of the episode shown, from 0.
        step: Index of the frame shown: 0 before the first step, ``T`` after the last.

    Raises:
        ValueError: No rollout or more than four, rollouts that do not fit each other, their family's robot or the
            references, or more data than a page should carry.
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")

    shape = traitlets.List(traitlets.Int()).tag(sync=True)  # A, n, K, T
    scene = traitlets.Dict().tag(sync=True)  # of adbook.scene
    agents = traitlets.List().tag(sync=True)  # name and color of each
    tasks = traitlets.List().tag(sync=True)  # label and goal of each
    others = traitlets.List().tag(sync=True)  # goals of the training tasks
    returns = traitlets.List().tag(sync=True)  # (A, n, K)
    lengths = traitlets.List().tag(sync=True)  # (A, n, K) steps
    references = traitlets.List().tag(sync=True)  # pairs of a name and (n,) returns
    stride = traitlets.Int().tag(sync=True)  # steps from one stored frame to the next
    frames = traitlets.Bytes().tag(sync=True)  # (A, n, K, F, Q), packed; x = low + unit (2**15 + stored)
    low = traitlets.List().tag(sync=True)  # (Q,)
    unit = traitlets.List().tag(sync=True)  # (Q,)
    rewards = traitlets.Bytes().tag(sync=True)  # (A, n, K, T), packed, in units of `reward_unit`
    reward_unit = traitlets.Float().tag(sync=True)
    insight = traitlets.Dict().tag(sync=True)  # names, units, actions, agents; empty if there is none
    seen = traitlets.Bytes().tag(sync=True)  # (A, n, K, T, names), packed
    task = traitlets.Int().tag(sync=True)
    episode = traitlets.Int().tag(sync=True)
    step = traitlets.Int().tag(sync=True)

    def __init__(
        self,
        rollouts: Rollout | Mapping[str, Rollout],
        *,
        references: Mapping[str, ArrayLike] | None = None,
        insight: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    ) -> None:
        """See the class."""
        rollouts = {"mamba": rollouts} if isinstance(rollouts, Rollout) else dict(rollouts)
        _check(rollouts)
        first = next(iter(rollouts.values()))
        described = scene(family(first.family))
        n, _, steps = first.rewards.shape
        if described["coordinates"] != first.qpos.shape[-1]:
            raise ValueError(
                f"qpos has {first.qpos.shape[-1]} coordinates and {first.family}'s robot {described['coordinates']}; "
                "give a rollout of that family."
            )
        rewards = np.stack([r.rewards for r in rollouts.values()])
        unit = float(np.nanmax(np.abs(rewards))) / _REWARD_LEVELS or 1.0
        data = {
            "rewards": _pack(np.round(np.nan_to_num(rewards) / unit)[..., None]),
            **_insight(insight or {}, rollouts),
        }
        room = MOST_BYTES * 3 // 4 - sum(len(x) for x in data.values() if isinstance(x, bytes))
        data |= _frames(np.stack([r.qpos for r in rollouts.values()])[..., described["used"]], room)
        super().__init__(
            shape=[len(rollouts), *first.rewards.shape],
            scene=described,
            agents=[{"name": name, "color": style(name, i).color} for i, name in enumerate(rollouts)],
            tasks=[{"label": _label(task), "goal": list(task.goal)} for task in first.tasks],
            others=[[round(x, 4) for x in task.goal] for task in family(first.family).train_tasks],
            returns=[np.round(r.returns.astype(float), 4).tolist() for r in rollouts.values()],
            lengths=[r.lengths.tolist() for r in rollouts.values()],
            references=[[name, _per_task(name, values, n)] for name, values in (references or {}).items()],
            reward_unit=unit,
            step=steps,  # the first picture shows a whole attempt
            **data,
        )

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one file that shows the player in any browser, from the disk and without a network.

        Args:
            path: File to write; missing folders are made, an existing file is replaced in one step.

        Returns:
            The path written.
        """
        state = {name: getattr(self, name) for name in RolloutPlayer.class_own_traits(sync=True)}
        names = [name for name, value in state.items() if isinstance(value, bytes)]
        state |= {name: base64.b64encode(state[name]).decode() for name in names}
        page = Template(Path(__file__).with_suffix(".html").read_text()).substitute(
            title=html.escape(repr(self)),
            css=Path(__file__).with_suffix(".css").read_text(),
            esm=Path(__file__).with_suffix(".js").read_text(),
            state=_script(state),
            bytes=_script(names),
        )
        return write_whole(path, lambda file: file.write_text(page))

    def __repr__(self) -> str:
        """What it holds; also the text that stands for it where widgets cannot be shown."""
        _, n, episodes, steps = self.shape
        names = ", ".join(agent["name"] for agent in self.agents)
        return f"RolloutPlayer({names}: {n} tasks, {episodes} episodes, {steps} steps)"

    @traitlets.validate("task", "episode", "step")
    def _in_range(self, proposal: traitlets.Bunch) -> int:
        limits = dict(zip(("task", "episode", "step"), self.shape[1:], strict=True))
        name, value = proposal.trait.name, proposal.value
        highest = limits[name] - (name != "step")
        if not 0 <= value <= highest:
            raise ValueError(f"{name} is {value}; it must lie between 0 and {highest}.")
        return value


def _script(value: object) -> str:
    """As a literal inside a script element, which it must not close."""
    return json.dumps(value).replace("</", "<\\/")


def _check(rollouts: Mapping[str, Rollout]) -> None:
    if not 1 <= len(rollouts) <= 4:
        raise ValueError(f"{len(rollouts)} rollouts were given; the player shows one to four.")
    (name, first), *others = rollouts.items()
    for other, rollout in others:
        for what in ("family", "tasks"):
            if getattr(rollout, what) != getattr(first, what):
                raise ValueError(f"The rollouts {name!r} and {other!r} have different {what}; play them on the same.")
        if rollout.rewards.shape != first.rewards.shape:
            raise ValueError(
                f"The rollouts {name!r} and {other!r} have {first.rewards.shape} and {rollout.rewards.shape} tasks, "
                "episodes and steps; play both for the same number of episodes."
            )


def _frames(qpos: np.ndarray, room: int) -> dict[str, Any]:
    """Coordinates (A, n, K, T + 1, Q) in so many frames as there is room for; after an early end the last stays."""
    low, high = np.nanmin(qpos, axis=(0, 1, 2, 3)), np.nanmax(qpos, axis=(0, 1, 2, 3))
    unit = np.maximum(high - low, 1e-9) / (2 * _INT16)
    steps = qpos.shape[-2] - 1
    stored = np.round((_held(qpos) - low) / unit) - _INT16 - 1
    for stride in _STRIDES:
        at = np.minimum(np.arange(-(-steps // stride) + 1) * stride, steps)
        packed = _pack(stored[..., at, :])
        if len(packed) <= room:
            return {"frames": packed, "stride": stride, "low": low.tolist(), "unit": unit.tolist()}
    raise ValueError(
        f"The recording takes {4 * len(packed) // 3000} kB in a page besides rewards; at most {MOST_BYTES // 1000} kB "
        "are left in all. Show fewer tasks or episodes."
    )


def _held(x: np.ndarray) -> np.ndarray:
    """X with every NaN along the second to last axis replaced by the last number before it."""
    there = np.isfinite(x).all(-1)
    last = np.maximum.accumulate(np.where(there, np.arange(x.shape[-2]), 0), axis=-1)
    return np.take_along_axis(x, last[..., None], axis=-2)


def _pack(x: np.ndarray) -> bytes:
    """Whole numbers (..., rows, width) in 16 bits: differences along the rows, low bytes then high bytes, deflated."""
    x = x.astype(np.int64)
    differences = np.diff(x, axis=-2, prepend=np.zeros_like(x[..., :1, :])).astype("<i2")
    return zlib.compress(differences.reshape(-1).view(np.uint8).reshape(-1, 2).T.tobytes(), 9)


def _insight(insight: Mapping[str, Mapping[str, np.ndarray]], rollouts: Mapping[str, Rollout]) -> dict[str, Any]:
    """What networks saw, (A, n, K, T, names), in steps of the largest of each; actions in units of the largest one."""
    unknown = sorted(set(insight) - set(rollouts))
    if unknown:
        raise ValueError(f"insight is given for {unknown[0]!r}, which is not among the rollouts {', '.join(rollouts)}.")
    if not insight:
        return {"insight": {}, "seen": b""}
    first = next(iter(insight.values()))
    names = [name for name, values in first.items() if np.isfinite(values).any()]
    shape = next(iter(rollouts.values())).rewards.shape
    columns = []
    for agent in rollouts:
        given = insight.get(agent, {})
        columns.append(np.stack([np.broadcast_to(given.get(name, 0.0), shape) for name in names], -1))
    values = np.nan_to_num(np.stack(columns))
    units = np.abs(values).max(axis=(0, 1, 2, 3)) / _INSIGHT_LEVELS
    units[units == 0] = 1.0
    described = {
        "names": names,
        "units": units.tolist(),
        "actions": sum(name.startswith("mean ") for name in names),
        "agents": [agent in insight for agent in rollouts],
    }
    return {"insight": described, "seen": _pack(np.round(values / units))}


def _label(task: Task) -> str:
    numbers = [f"{v:+.2f}".replace("-", "−") for v in task.goal]
    goal = {
        "half-cheetah-vel": f"{task.goal[0]:.2f} m/s",
        "ant-dir": f"{np.degrees(task.goal[0]):.0f}°",
    }.get(task.family, f"({', '.join(numbers)}) m")
    return f"{task.split} {task.index + 1}: {goal}"


def _per_task(name: str, values: ArrayLike, n: int) -> list[float]:
    values = np.asarray(values, float)
    if values.shape != (n,):
        raise ValueError(f"references[{name!r}] has shape {values.shape}; it must be ({n},), one return a task.")
    return np.round(values, 4).tolist()
