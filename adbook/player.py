"""The rollout player: watch frozen networks learn, episode by episode, with a kernel or without one.

An anywidget whose whole data lie in its state. papermill stores that state in the notebook and the page
embeds it, so that the same JavaScript (``player.js``) serves JupyterLab and the static book.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import traitlets
from numpy.typing import ArrayLike

from adbook.embedded import WEB, Embedded, script
from adbook.look import style
from adbook.recording import check, recording
from adbook.rollout import Rollout
from adbook.scene import scene
from adbook.tasks import Task, family


class OutOfRangeError(traitlets.TraitError, ValueError):
    """A trait was set to what it cannot be."""


class RolloutPlayer(Embedded):
    """A player for rollouts of one to four agents on the same tasks.

    It draws the robot from recorded coordinates, a time line over all episodes, a map of the tasks, and, for agents
    of which it is told, what the network saw and did.  Coordinates are kept in 16 bits over their range; where all
    of it would be more than 210 kB in a page, fewer frames are kept and those between are interpolated.

    Args:
        rollouts: A rollout, or several by the agent's name, all of the same tasks and numbers of episodes.
        references: Returns to draw as horizontal lines, by name ("random", "source"): ``(n,)``, one a task.
        insight: By agent, what `adbook.Watched.insight` gives for its rollout.

    Attributes:
        task: Index of the task shown; set it to move the player, as with `episode` and `step`.
        episode: Index of the episode shown, from 0.
        step: Index of the frame shown: 0 before the first step, ``T`` after the last.
        rollouts: What is shown, by the agent's name.

    Raises:
        ValueError: No rollout or more than four, rollouts that do not fit each other, their family's robot or the
            references, or more data than a page should carry.
    """

    _esm = script("player_data", "player_draw", "player")
    _css = (WEB / "player.css").read_text()

    shape = traitlets.List(traitlets.Int()).tag(sync=True)  # A, n, K, T
    scene = traitlets.Dict().tag(sync=True)  # of adbook.scene
    agents = traitlets.List().tag(sync=True)  # name and color of each; of a source also which episodes of how many
    tasks = traitlets.List().tag(sync=True)  # label and goal of each
    others = traitlets.List().tag(sync=True)  # goals of the training tasks
    returns = traitlets.List().tag(sync=True)  # (A, n, K)
    lengths = traitlets.List().tag(sync=True)  # (A, n, K) steps
    references = traitlets.List().tag(sync=True)  # pairs of a name and (n,) returns
    stride = traitlets.Int().tag(sync=True)  # steps from one stored frame to the next
    frames = traitlets.Bytes().tag(sync=True)  # (A, n, K, F, Q), packed; x = low + unit stored
    low = traitlets.List().tag(sync=True)  # (Q,)
    unit = traitlets.List().tag(sync=True)  # (Q,)
    insight = traitlets.Dict().tag(sync=True)  # names, units, actions, agents; empty if there is none
    seen = traitlets.Bytes().tag(sync=True)  # (names, A, n, K, T), packed
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
        check(rollouts)
        first = next(iter(rollouts.values()))
        n, episodes, steps = first.rewards.shape
        kind = family(first.family)
        described = scene(kind)
        super().__init__(
            scene=described,
            agents=[_agent(name, i, rollout) for i, (name, rollout) in enumerate(rollouts.items())],
            tasks=[{"label": _label(task), "goal": list(task.goal)} for task in first.tasks],
            others=[[round(x, 4) for x in task.goal] for task in kind.train_tasks],
            references=[[name, _per_task(name, values, n)] for name, values in (references or {}).items()],
            step=steps if episodes else 0,  # the first picture shows a whole attempt
            **recording(rollouts, insight or {}, described),
        )
        self.rollouts = rollouts

    def save_video(
        self,
        path: str | os.PathLike[str],
        *,
        task: int | None = None,
        episodes: Sequence[int] | None = None,
        width: int = 480,
        height: int = 360,
        speed: float = 1.0,
    ) -> Path:
        """Render the agents side by side with MuJoCo's own renderer.

        Args:
            path: File to write, ``.mp4`` or ``.gif``; it is replaced in one step.
            task: Index of the task; the one shown if not given.
            episodes: Indices of the episodes, in this order; all if not given.
            width: Of an agent's picture, pixels.
            height: Of the pictures, pixels.
            speed: Times real time.

        Returns:
            The path written.

        Raises:
            ValueError: Another suffix, an index or a number out of range.
            RuntimeError: There is no renderer; the message says what to install.
        """
        from adbook.video import write_video  # imageio is needed here alone

        task = self.task if task is None else task
        return write_video(path, self.rollouts, task=task, episodes=episodes, width=width, height=height, speed=speed)

    def __repr__(self) -> str:
        """What it holds; also the text that stands for it where widgets cannot be shown."""
        _, n, episodes, steps = self.shape
        names = ", ".join(agent["name"] for agent in self.agents)
        return f"{type(self).__name__}({names}: {n} tasks, {episodes} episodes, {steps} steps)"

    @traitlets.validate("task", "episode", "step")
    def _in_range(self, proposal: traitlets.Bunch) -> int:
        n, _, steps = self.shape[1:]
        name, value = proposal.trait.name, proposal.value
        highest = {"task": n - 1, "episode": max(self._episodes_shown() - 1, 0), "step": steps}[name]
        if not 0 <= value <= highest:
            raise OutOfRangeError(f"{name} is {value}; it must lie between 0 and {highest}.")
        return value

    def set_state(self, sync_data: dict) -> None:
        """Take over what the page sends; where it cannot be, tell the page what is."""
        try:
            super().set_state(sync_data)
        except traitlets.TraitError:
            self.send_state(list(sync_data))
            raise

    def _episodes_shown(self) -> int:
        return self.shape[2]


def _agent(name: str, position: int, rollout: Rollout) -> dict[str, Any]:
    """An agent as the page knows it; a source's rollout says which of its many episodes it holds, task by task."""
    numbers = {key: rollout.metadata[key] for key in ("episodes", "of")} if "of" in rollout.metadata else {}
    return {"name": name, "color": style(name, position).color, **numbers}


def _label(task: Task) -> str:
    numbers = [f"{v:.2f}".replace("-", "−") for v in task.goal]
    goal = {
        "half-cheetah-vel": f"{task.goal[0]:.2f} m/s",
        "ant-dir": f"{np.degrees(task.goal[0]):.0f}°",
    }.get(task.family, f"{', '.join(numbers)} m")
    return f"{task.split} {task.index + 1}: {goal}"


def _per_task(name: str, values: ArrayLike, n: int) -> list[float]:
    values = np.asarray(values, float)
    if values.shape != (n,):
        raise ValueError(f"references[{name!r}] has shape {values.shape}; it must be ({n},), one return a task.")
    if not np.isfinite(values).all():
        raise ValueError(f"references[{name!r}] holds {values[~np.isfinite(values)][0]}; every return must be finite.")
    return np.round(values, 4).tolist()
