"""The committed data set: learning histories to train on without a simulator, thinned out, in half precision.

One file a family, source and split, `artifacts/histories/<family>/<source>-<split>.npz`: a compressed zip of numpy
arrays that `numpy.load` opens. Reading needs no simulator. How the files were made: artifacts/histories/README.md.

Symbols: `H` histories, `K` episodes of all of them, `S` steps of all of them, `O` and `A` as in `LearningHistory`.
"""

import json
import os
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from adbook.checks import check_known
from adbook.files import write_whole
from adbook.histories import HistoryFileError, LearningHistory, check_continuous

HISTORIES = Path(__file__).resolve().parents[1] / "artifacts" / "histories"
SPLITS = ("train", "test")
BEST = {  # the source whose histories serve a family best; why: chapter 3
    "reacher-goal": "ppo",
    "pusher-goal": "ppo",
    "half-cheetah-vel": "ppo",
    "ant-dir": "ppo",
}
SCHEMA = 1  # of the file format below; raise it when a stored array changes meaning or shape
_KIND = "adbook.histories"
_HALVES = ("observations", "last_observations", "actions", "rewards")  # stored as float16, see `_shuffled`


def load_histories(
    family: str, *, source: str | None = None, split: str = "train", folder: str | os.PathLike = HISTORIES
) -> list[LearningHistory]:
    """Return committed learning histories, thinned out already.

    `metadata["every"]` and `["phase"]` of each tell which episodes of its stream were kept, and
    `metadata["source_returns"]` and `["source_lengths"]` the returns and steps of all of them.

    Args:
        family: name of a task family, for example "ant-dir".
        source: "ppo", "sac" or "droq"; by default the one that serves the family best.
        split: "train" or "test". Test histories are there to compare with; they are never trained on.
        folder: where the data set is.

    Raises:
        ValueError: unknown family, source or split.
        FileNotFoundError: the data set does not have this combination; the message lists what it has.
        HistoryFileError: the file is damaged or foreign, or of another schema version, family, source or split.
    """
    check_known("task family", family, BEST)
    source = BEST[family] if source is None else str(source).lower()
    check_known("source", source, ("ppo", "sac", "droq"))
    check_known("split", split, SPLITS)
    path = data_path(family, source, split, folder)
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.npz"))
        raise FileNotFoundError(
            f"no histories of {source} on {family} ({split}) in {folder}; there are: {', '.join(there) or 'none'}. "
            "The data set comes with the repository, not with an installed package. Other sources can be recorded with "
            "adbook.record"
        )
    histories = read_packed(path)
    for history in histories:
        task = history.metadata["task"]
        held = task["family"], history.metadata["source"].lower(), task["split"]
        if held != (family, source, split):
            raise HistoryFileError(f"{path} holds histories of {' '.join(held)}; fetch or make it again")
    return histories


def data_path(family: str, source: str, split: str, folder: str | os.PathLike = HISTORIES) -> Path:
    """Return the file of one family, source and split, whether or not it is there."""
    return Path(folder) / family / f"{source}-{split}.npz"


def thinned(history: LearningHistory, episodes: int, phase: float = 0.0) -> LearningHistory:
    """Keep up to `episodes` whole episodes at equal distances, and the returns and lengths of all episodes.

    Args:
        history: a whole history, as recorded.
        episodes: how many to keep at most, 1 or more.
        phase: from 0 to below 1, which share of the distance lies before the first one.
    """
    episodes = index(episodes)
    if episodes < 1 or not 0 <= phase < 1:
        raise ValueError(f"episodes={episodes} must be at least 1, and phase={phase} from 0 to below 1")
    total = len(history.episodes)
    every = -(-total // episodes)
    kept = history.every(every, int(phase * every))
    kept.metadata["source_returns"] = [round(float(r), 2) for r in history.episode_returns]
    kept.metadata["source_lengths"] = [e.stop - e.start for e in history.episodes]
    return kept


def write_packed(
    path: str | os.PathLike, histories: Sequence[LearningHistory], made: dict[str, Any] | None = None
) -> Path:
    """Write histories into one compressed file, rounded to half precision; `made` says where and when, in JSON.

    Raises:
        ValueError: no history, one whose next observations do not continue its observations, a value too large for
            half precision (65,504), or more than 65,535 steps in an episode or episodes in a history.
    """
    histories = list(histories)
    if not histories:
        raise ValueError("no history was given; there is nothing to write")
    for history in histories:
        check_continuous(history)
    ends = [history.terminated | history.truncated for history in histories]
    arrays = {name: np.concatenate([getattr(h, name) for h in histories]) for name in ("observations", "actions")}
    arrays["rewards"] = np.concatenate([h.rewards for h in histories])[:, None]  # (S, 1)
    last = [h.next_observations[e] for h, e in zip(histories, ends, strict=True)]
    arrays["last_observations"] = np.concatenate(last)  # (K, O)
    stored: dict[str, np.ndarray] = {name: _shuffled(name, array) for name, array in arrays.items()}
    stored["lengths"] = _counts(np.concatenate([np.diff(np.flatnonzero(e), prepend=-1) for e in ends]))  # (K,)
    for name in ("terminated", "truncated"):
        stored[name] = np.concatenate([getattr(h, name)[e] for h, e in zip(histories, ends, strict=True)])  # (K,)
    stored["episodes"] = _counts(np.array([e.sum() for e in ends]))  # (H,)
    about = {"kind": _KIND, "schema": SCHEMA, "made": made or {}, "histories": [h.metadata for h in histories]}
    stored["json"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    return write_whole(path, lambda file: _savez(file, stored))


def _counts(numbers: np.ndarray) -> np.ndarray:
    if numbers.max() > np.iinfo(np.uint16).max:
        raise ValueError(
            f"{numbers.max()} steps in an episode, or episodes in a history, are too many (65,535); cut it"
        )
    return numbers.astype(np.uint16)


def _savez(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with file.open("wb") as opened:  # given a name, numpy would add a suffix to it
        np.savez_compressed(opened, **arrays)


def read_packed(path: str | os.PathLike) -> list[LearningHistory]:
    """Read the histories of a file that `write_packed` wrote, as float32; no pickle is loaded.

    Raises:
        HistoryFileError: the file is damaged, foreign, or of another schema version.
    """
    with Path(path).open("rb") as opened:
        try:
            with np.load(opened, allow_pickle=False) as file:
                about = json.loads(file["json"].tobytes())
                _check_kind(Path(path), about)
                stored = {name: file[name] for name in (*_HALVES, "lengths", "terminated", "truncated", "episodes")}
            return _unpacked(stored | {name: _restored(stored[name]) for name in _HALVES}, about["histories"])
        except HistoryFileError:
            raise
        except Exception as error:  # a damaged zip can raise nearly anything
            told = f"{path} is truncated, damaged or not a file of learning histories ({error}); fetch or make it again"
            raise HistoryFileError(told) from error


def _check_kind(path: Path, about: dict[str, Any]) -> None:
    if about.get("kind") != _KIND:
        raise HistoryFileError(f"{path} holds {about.get('kind')!r}, not {_KIND!r}; give a file of the data set")
    if about["schema"] != SCHEMA:
        raise HistoryFileError(
            f"{path} has schema version {about['schema']}, this version reads {SCHEMA}; fetch or make it again"
        )


def _unpacked(stored: dict[str, np.ndarray], metadata: list[dict[str, Any]]) -> list[LearningHistory]:
    lengths, episodes = stored["lengths"].astype(int), stored["episodes"].astype(int)  # (K,), (H,)
    if lengths.min() < 1 or lengths.sum() != len(stored["observations"]) or episodes.sum() != len(lengths):
        raise ValueError("its counts of steps and episodes do not add up")
    ends = lengths.cumsum()  # (K,), one past each episode's last step
    terminated, truncated = np.zeros((2, ends[-1]), bool)
    terminated[ends - 1], truncated[ends - 1] = stored["terminated"], stored["truncated"]
    following = np.roll(stored["observations"], -1, axis=0)
    following[ends - 1] = stored["last_observations"]
    fields = {name: stored[name] for name in ("observations", "actions")}
    fields |= {"rewards": stored["rewards"][:, 0], "next_observations": following}
    fields |= {"terminated": terminated, "truncated": truncated}
    borders = [0, *ends[episodes.cumsum() - 1]]  # (H + 1,), in steps
    parts = zip(borders[:-1], borders[1:], metadata, strict=True)
    return [LearningHistory(**{n: v[a:b] for n, v in fields.items()}, metadata=about) for a, b, about in parts]


def _shuffled(name: str, values: np.ndarray) -> np.ndarray:
    """(n, columns) numbers as (2, columns, n) bytes, the lower ones first: side by side, like compresses with like."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(f"{name} reach {np.abs(values).max():.0f}, too large for half precision (65,504)")
    return np.ascontiguousarray(halves.view(np.uint8).reshape(*values.shape, 2).transpose(2, 1, 0))


def _restored(planes: np.ndarray) -> np.ndarray:
    halves = np.ascontiguousarray(planes.transpose(2, 1, 0)).view(np.float16)[..., 0]  # (n, columns)
    return halves.astype(np.float32)
