"""In-context evaluation: a policy with frozen weights meets tasks it does not know, for many episodes.

The only thing that changes from episode to episode is the policy's *state* (the hidden state of an SSM, a
transformer's cache). It is carried across the episodes of a task and starts afresh with each task: what
improves over episodes was learnt in context.

Symbols: ``n`` tasks side by side (one environment each), ``K`` episodes, ``T`` the family's horizon in steps,
``O`` observation size, ``A`` action size, ``nq`` MuJoCo generalised coordinates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from tqdm import tqdm

from adbook.files import write_whole
from adbook.play import Recorder, play

if TYPE_CHECKING:
    from adbook.tasks import Task, TaskFamily

SCHEMA = 1  # version of the file format below; raise it when a stored field changes meaning or shape
_KIND = "adbook.Rollout"
_ARRAYS = ("returns", "rewards", "actions", "qpos")


@dataclass(frozen=True, repr=False, eq=False)  # arrays have no one answer to ==
class Rollout:
    """Many episodes on many tasks with frozen weights; everything a score or the player needs.

    Attributes:
        family: Name of the task family.
        split: Split the tasks come from; several are joined by ``+``.
        tasks: The ``n`` tasks, in the order of the leading axis of every array.
        returns: ``(n, K)`` float32, undiscounted sum of rewards of each episode.
        rewards: ``(n, K, T)`` float32, NaN after an early end.
        actions: ``(n, K, T, A)`` float32, as applied (clipped); NaN after an early end.
        qpos: ``(n, K, T + 1, nq)`` float32, MuJoCo positions (rad and m) before each step and after the last;
            NaN after an early end.
        metadata: How it was made (seed, flags); anything JSON can hold.
    """

    family: str
    split: str
    tasks: tuple[Task, ...]
    returns: np.ndarray
    rewards: np.ndarray
    actions: np.ndarray
    qpos: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the arrays fit each other; raises ValueError naming the first that does not."""
        if self.rewards.ndim != 3:
            raise ValueError(f"rewards has shape {self.rewards.shape}; it must be (tasks, episodes, steps).")
        n, episodes, steps = self.rewards.shape
        _check_shape("returns", self.returns, (n, episodes))
        _check_shape("actions", self.actions, (n, episodes, steps, None))
        _check_shape("qpos", self.qpos, (n, episodes, steps + 1, None))
        if len(self.tasks) != n:
            raise ValueError(f"{len(self.tasks)} tasks were given for arrays of {n}; give one task a row.")
        if not np.isfinite(self.returns).all():
            raise ValueError("returns holds a value that is not finite; every episode must have a return.")
        played = np.isfinite(self.rewards)
        if not played[..., 0].all() or (played[..., 1:] & ~played[..., :-1]).any():
            raise ValueError("rewards holds a gap; NaN may only follow the end of an episode.")

    @property
    def lengths(self) -> np.ndarray:
        """Steps played in each episode, ``(n, K)`` int64; ``T`` unless the episode ended early."""
        return np.isfinite(self.rewards).sum(axis=-1)

    def by_episode(self, values: np.ndarray) -> np.ndarray:
        """Sort what was noted at every step of the rollout, for example by a hook on the policy, by episode.

        Args:
            values: ``(n, steps, ...)``, one entry a task and call of the policy's `act`; real numbers.

        Returns:
            ``(n, K, T, ...)`` float, NaN after an early end.
        """
        sorted_values = np.full((*self.rewards.shape, *values.shape[2:]), np.nan)
        for i, lengths in enumerate(self.lengths):
            for k, start in enumerate(np.cumsum(lengths) - lengths):
                sorted_values[i, k, : lengths[k]] = values[i, start : start + lengths[k]]
        return sorted_values

    @classmethod
    def of(cls, record: Recorder, metadata: dict[str, Any]) -> Rollout:
        """The episodes of a record that every task has finished; there may be none."""
        split = "+".join(sorted({task.split for task in record.tasks}))
        done = slice(int(record.episode.min()))
        rewards, actions, qpos = (x[:, done] for x in (record.rewards, record.actions, record.qpos))
        returns = np.nansum(rewards, axis=-1, dtype=np.float64).astype(np.float32)
        metadata = {"family_split": record.family.split, **metadata}
        return cls(record.family.name, split, record.tasks, returns, rewards, actions, qpos, metadata)

    def __repr__(self) -> str:
        """One line: family, split and the shape of every array."""
        shapes = ", ".join(f"{name}={getattr(self, name).shape}" for name in _ARRAYS)
        return f"Rollout(family={self.family!r}, split={self.split!r}, tasks={len(self.tasks)}, {shapes})"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file with the JSON part in its header; an interrupted write leaves no file.

        Args:
            path: File to write; missing folders are made, an existing file is replaced in one step.

        Returns:
            The path written.
        """
        described = {"family": self.family, "split": self.split, "metadata": self.metadata}
        described["tasks"] = [asdict(task) for task in self.tasks]
        header = {"kind": _KIND, "schema": str(SCHEMA), "json": json.dumps(described)}
        arrays = {name: np.ascontiguousarray(getattr(self, name), dtype=np.float32) for name in _ARRAYS}
        return write_whole(path, lambda file: file.write_bytes(save(arrays, header)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rollout:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, is something else, or has another schema version.
        """
        from adbook.tasks import Task  # not above: it brings gymnasium, which training runs without

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no rollout at {path}; make one with adbook.rollout(...).save.")
        try:
            with safe_open(path, framework="numpy") as file:
                described = _described(path, file.metadata() or {})
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        except SafetensorError as error:
            message = f"{path} is not a complete safetensors file ({error}); delete it and make it again."
            raise ValueError(message) from error
        tasks = tuple(Task(**task) for task in described.pop("tasks"))
        return cls(tasks=tasks, **described, **arrays)


def _described(path: Path, header: dict[str, str]) -> dict[str, Any]:
    """The JSON part of the header, once the file is known to be a rollout of this schema."""
    if header.get("kind") != _KIND:
        kind = header.get("kind", "something else")
        raise ValueError(f"{path} holds {kind!r}, not {_KIND!r}; give a file that Rollout.save wrote.")
    if header.get("schema") != str(SCHEMA):
        raise ValueError(
            f"{path} has rollout schema {header.get('schema')}, this adbook reads schema {SCHEMA}; "
            "run the rollout again."
        )
    return json.loads(header["json"])


def _check_shape(name: str, array: np.ndarray, expected: tuple[int | None, ...]) -> None:
    """Compare a shape with the expected one, in which None stands for any size."""
    if array.ndim != len(expected) or any(e not in (None, s) for s, e in zip(array.shape, expected, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} has shape {array.shape}; to fit rewards it must be ({wanted}).")


class RandomPolicy(nn.Module):
    """Uniformly random actions: the zero of the normalised score.

    Args:
        action_size: ``A``.
        action_scale: Largest action, the same for all of its components; the smallest is its negative.
    """

    def __init__(self, action_size: int, action_scale: float = 1.0) -> None:
        """See the class."""
        super().__init__()
        self.action_size, self.action_scale = action_size, action_scale

    def init_state(self, n: int) -> None:
        """Nothing to remember."""

    def act(
        self,
        observation: Tensor,
        reward: Tensor | None,
        start: Tensor,
        state: None,
        *,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, None]:
        """Draw ``(n, A)`` actions from the generator; nothing else is looked at."""
        shape = len(observation), self.action_size
        uniform = torch.rand(shape, generator=generator, device=observation.device)
        return self.action_scale * (2 * uniform - 1), state


def rollout(
    policy: nn.Module,
    family: TaskFamily,
    tasks: Sequence[Task],
    *,
    episodes: int = 20,
    seed: int = 0,
    deterministic: bool = False,
    withhold_reward: bool = False,
    progress: bool = False,
) -> Rollout:
    """Play many episodes on every task with frozen weights, all tasks side by side.

    Memory and time of a step do not depend on how many episodes went before, because the policy runs in its
    one-step form and its state has a fixed size.

    Args:
        policy: Anything with `init_state` and `act` as `ADPolicy` has them.
        family: Makes the environments.
        tasks: The ``n`` tasks; each gets an environment of its own.
        episodes: ``K``, episodes on each task.
        seed: Fixes the environments' starts and the sampled actions. Task ``i`` starts its episodes in the
            same states whatever the policy does and however many tasks follow it.
        deterministic: Take the mean action instead of sampling (exploration is part of what was distilled).
        withhold_reward: Give the policy None for the reward always (an `ADPolicy` then sees the mean reward of
            its training data); the recorded rewards stay true. A control: without the reward nothing tells the
            goals apart.
        progress: Show a bar that counts episodes.

    Returns:
        The recorded rollout.

    Raises:
        TypeError: `family` is a name.
        ValueError: No task, fewer than one episode, a task of another family, a policy of other sizes, or an
            action that is not finite.
        RuntimeError: A parameter of the policy changed while it ran.
    """
    options = {"deterministic": deterministic, "withhold_reward": withhold_reward}
    with tqdm(total=len(tasks) * episodes, unit="episode", disable=not progress) as bar:
        for record in play(policy, family, tasks, episodes=episodes, seed=seed, **options):
            bar.update(int(record.episode.sum()) - bar.n)
    return Rollout.of(record, {"seed": seed, **options})
