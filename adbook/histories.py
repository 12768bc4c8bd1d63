"""Learning histories: what they are, thinned out, stored and read.

This module needs numpy and safetensors only, so that a machine without the simulator can train from files.
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from adbook.files import write_whole

SCHEMA = 1  # of the file format below; raise it when a stored field changes meaning or shape
_KIND = "adbook.LearningHistory"
_AXES = {"observations": 2, "actions": 2, "rewards": 1, "next_observations": 2, "terminated": 1, "truncated": 1}
_FIELDS = tuple(_AXES)


class HistoryFileError(ValueError):
    """A file that does not hold learning histories this version can read."""


@dataclass(frozen=True, repr=False, eq=False)
class LearningHistory:
    """One source run on one task, in the order it happened. `T` steps, `O` observation size, `A` action size.

    Attributes:
        observations: (T, O) float32.
        actions: (T, A) float32, as applied (clipped to the action space).
        rewards: (T,) float32.
        next_observations: (T, O) float32; at the end of an episode the true last one, not the next episode's first.
        terminated: (T,) bool, the episode ended in a terminal state.
        truncated: (T,) bool, the episode ended at the horizon.
        metadata: family, task, source, configuration, seeds and versions; anything JSON can hold.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    metadata: dict[str, Any]

    def __post_init__(self):
        """Check types, lengths and values.

        Raises:
            ValueError: a field of another type or number of axes, arrays of different lengths, no step, an unfinished
                last episode, or a value that is not finite.
        """
        for name, axes in _AXES.items():
            array, flags = getattr(self, name), name in ("terminated", "truncated")
            if not isinstance(array, np.ndarray) or array.ndim != axes or array.dtype.kind != ("b" if flags else "f"):
                given = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                wanted = f"{'bool' if flags else 'floats'} of shape {'(T,)' if axes == 1 else '(T, size)'}"
                raise ValueError(f"{name} is {given}; it must be an array of {wanted}")
        if not isinstance(self.metadata, dict):
            raise ValueError(f"metadata={self.metadata!r} must be a dictionary, if an empty one")
        if self.observations.shape[1] != self.next_observations.shape[1]:
            widths = self.observations.shape, self.next_observations.shape
            raise ValueError(f"observations {widths[0]} and next_observations {widths[1]} differ in size")
        lengths = {name: len(getattr(self, name)) for name in _FIELDS}
        if len(set(lengths.values())) != 1 or not lengths["rewards"]:
            raise ValueError(f"every field needs the same number of steps, at least one; got {lengths}")
        if not (self.terminated[-1] or self.truncated[-1]):
            raise ValueError("the last episode has not ended; cut the history after its last finished episode")
        for name in _FIELDS[:4]:
            finite = np.isfinite(getattr(self, name))
            if not finite.all():
                step = int(np.argwhere(~finite)[0][0])
                raise ValueError(f"{name} holds NaN or infinity, first at step {step} of {self._name}; record it again")

    @property
    def _name(self) -> str:
        return f"{self.metadata.get('task', 'an unnamed history')}"

    @property
    def episodes(self) -> tuple[slice, ...]:
        """The steps of each episode, in order."""
        ends = np.flatnonzero(self.terminated | self.truncated) + 1
        return tuple(slice(int(a), int(b)) for a, b in zip((0, *ends[:-1]), ends, strict=True))

    @property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of each episode, (episodes,) float64."""
        return np.array([self.rewards[e].sum(dtype=np.float64) for e in self.episodes])

    def every(self, k: int, phase: int = 0) -> "LearningHistory":
        """Keep whole episodes `phase`, `phase + k`, `phase + 2k`, …; steps inside an episode are never dropped.

        Raises:
            TypeError: k or phase is no whole number.
            ValueError: k < 1, phase outside [0, k), or no episode is left.
        """
        k, phase = index(k), index(phase)
        if k < 1 or not 0 <= phase < k:
            raise ValueError(f"every(k={k}, phase={phase}) needs k >= 1 and 0 <= phase < k")
        kept = self.episodes[phase::k]
        if not kept:
            raise ValueError(f"every(k={k}, phase={phase}) keeps none of the {len(self.episodes)} episodes; lower them")
        steps = np.concatenate([np.arange(e.start, e.stop) for e in kept])
        already, first = self.metadata.get("every", 1), self.metadata.get("phase", 0)
        thinning = {"every": k * already, "phase": first + phase * already}  # in episodes of the source run
        fields = {name: getattr(self, name)[steps] for name in _FIELDS}
        return replace(self, **fields, metadata=self.metadata | thinning)

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file; see `save_histories`."""
        return save_histories(path, [self])

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LearningHistory":
        """Read a file that holds one history; see `read_histories`."""
        histories = read_histories(path)
        if len(histories) != 1:
            raise HistoryFileError(f"{path} holds {len(histories)} histories; read it with adbook.read_histories")
        return histories[0]

    def to_minari(self, dataset_id: str):
        """Register the history as a Minari dataset, the standard form of offline reinforcement learning.

        Its episodes are numbered from 0 in their order. The description names task, source and seed, and of a history
        that was thinned out also the episodes kept: `phase`, `phase + every`, …

        Args:
            dataset_id: Minari's name, for example "reacher-goal/ppo-v0".

        Returns:
            The `minari.MinariDataset`, stored in Minari's own folder.

        Raises:
            ValueError: not such a name, one that is taken, or a history without the metadata that `record` writes.
            OSError: too little space is left on the disk.
        """
        import minari  # here alone: nothing else needs it
        from minari.data_collector import EpisodeBuffer
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.storage import get_dataset_path

        from adbook.tasks import Task, family

        try:  # Minari itself finds a bad name only after it has made folders
            parse_dataset_id(str(dataset_id))
        except (TypeError, ValueError) as error:  # the first, where the version is missing
            told = f"dataset_id={dataset_id!r} must be a name with a version, such as 'reacher-goal/ppo-v0'"
            raise ValueError(told) from error
        lacking = {"task", "family_split", "source", "seed"} - set(self.metadata)
        if lacking:
            raise ValueError(f"metadata lack {', '.join(sorted(lacking))}; give a history that record made")
        needed = sum(getattr(self, name).nbytes for name in _FIELDS) + 16_384 * len(self.episodes)  # what HDF5 adds
        if shutil.disk_usage(get_dataset_path()).free < needed:  # HDF5 takes the process down with it on a full disk
            told = f"Minari's folder {get_dataset_path()} lacks space for {needed / 1e3:.0f} kB; free some"
            raise OSError(errno.ENOSPC, told)
        buffers = [
            EpisodeBuffer(
                id=i,
                observations=np.concatenate((self.observations[e], self.next_observations[e][-1:])),
                actions=self.actions[e],
                rewards=self.rewards[e].tolist(),
                terminations=self.terminated[e].tolist(),
                truncations=self.truncated[e].tolist(),
            )
            for i, e in enumerate(self.episodes)
        ]
        about = self.metadata["task"]
        task = Task(**about)
        env = family(task.family, self.metadata["family_split"]).make(task)
        told = [f"Learning history of {self.metadata['source']} on {task}, seed {self.metadata['seed']}"]
        told += [f"{name} {self.metadata[name]}" for name in ("stream", "every", "phase") if name in self.metadata]
        described = {"algorithm_name": self.metadata["source"], "description": ", ".join(told) + "."}
        with warnings.catch_warnings():  # Minari misses an author; the reader can add one to what it stores
            warnings.filterwarnings("ignore", message="`(code_permalink|author|author_email)` is set to None")
            return minari.create_dataset_from_buffers(dataset_id, buffers, env=env, eval_env=env.spec, **described)

    def __repr__(self) -> str:
        """Name the task and the shapes."""
        shapes = ", ".join(f"{name} {getattr(self, name).shape}" for name in _FIELDS[:3])
        return f"LearningHistory({self._name}: {len(self.episodes)} episodes; {shapes})"


def save_histories(path: str | os.PathLike, histories: Sequence[LearningHistory]) -> Path:
    """Write histories to one safetensors file, their metadata in its header; an interrupted write leaves no file.

    Inside an episode the next observation is the following step's observation, so only each episode's last one is
    stored: the file is half the size and nothing is lost.

    Raises:
        ValueError: no history, or one whose next observations do not continue its observations.
    """
    histories = list(histories)
    if not histories:
        raise ValueError("no history was given; there is nothing to save")
    arrays = {}
    for i, history in enumerate(histories):
        arrays |= {f"{i}/{name}": np.ascontiguousarray(array) for name, array in _stored(history).items()}
    header = {"kind": _KIND, "schema": str(SCHEMA), "json": json.dumps([h.metadata for h in histories])}
    return write_whole(path, lambda file: file.write_bytes(save(arrays, header)))


def check_continuous(history: LearningHistory) -> None:
    """Raise ValueError if, inside an episode, an observation is not the next one of the step before."""
    inside = ~(history.terminated | history.truncated)[:-1]
    if not np.array_equal(history.next_observations[:-1][inside], history.observations[1:][inside]):
        raise ValueError(f"next_observations do not continue observations in {history!r}; give whole episodes in order")


def _stored(history: LearningHistory) -> dict[str, np.ndarray]:
    check_continuous(history)
    ends = history.terminated | history.truncated
    stored = {name: getattr(history, name) for name in _FIELDS if name != "next_observations"}
    return stored | {"last_observations": history.next_observations[ends]}


def read_histories(path: str | os.PathLike) -> list[LearningHistory]:
    """Read the histories of a file that `save_histories` wrote; the file is mapped, nothing is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        HistoryFileError: the file is truncated, foreign (also one of the data set), or of another schema version.
    """
    path = Path(path)
    if path.suffix == ".npz":
        raise HistoryFileError(f"{path} is not a recording; histories of the data set come from adbook.load_histories")
    if not path.is_file():
        raise FileNotFoundError(f"no histories at {path}; record them with adbook.record")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = _read_header(path, file.metadata() or {})
            return [_restored(file, i, m) for i, m in enumerate(metadata)]
    except (HistoryFileError, OSError, MemoryError):  # the last two say nothing of the file
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise HistoryFileError(
            f"{path} is truncated, damaged or not a history file ({error!r}); delete it and record it again"
        ) from error


def _read_header(path: Path, header: dict[str, str]) -> list[dict[str, Any]]:
    if header.get("kind") != _KIND:
        raise HistoryFileError(f"{path} is not a file of learning histories; give one that save_histories wrote")
    if header["schema"] != str(SCHEMA):
        raise HistoryFileError(
            f"{path} has schema version {header['schema']}, this version reads {SCHEMA}; record the histories again"
        )
    metadata = json.loads(header["json"])
    if not isinstance(metadata, list) or not metadata:
        raise HistoryFileError(f"{path} holds no history; delete it and record it again")
    return metadata


def _restored(file: Any, i: int, metadata: dict[str, Any]) -> LearningHistory:
    fields = {name: file.get_tensor(f"{i}/{name}") for name in _FIELDS if name != "next_observations"}
    following = np.roll(fields["observations"], -1, axis=0)
    ends = np.flatnonzero(fields["terminated"] | fields["truncated"])
    last = file.get_tensor(f"{i}/last_observations")
    if len(last) != len(ends):
        raise ValueError(f"{len(last)} last observations of {len(ends)} episodes")
    following[ends] = last
    return LearningHistory(**fields, next_observations=following, metadata=metadata)
