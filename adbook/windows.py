"""Context windows: what a sequence model is shown of learning histories in training."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from adbook.checks import check_whole, is_number
from adbook.histories import LearningHistory
from adbook.relabel import repaid


@dataclass(frozen=True)
class WindowConfig:
    """How context windows are cut: one episode in `every`, `episodes` of them, from the history's start or anywhere.

    With `every=None` a window covers its history whole, however long that is: of as many equal stretches of the history
    as the window has episodes, each gives one, and any of its own.

    The last `hold` of a window's episodes are drawn from the history's last `every`, so that a window does not end as
    soon as the source has learnt, but shows for a while what it then does.

    With `strays`, episodes of any histories, nearly always of other tasks, take the place of some: the wrong thing
    done, and paid for as what it is on the window's own task. They are shown and not imitated. In a source's own
    history what it does tells where the goal is, and a network can copy it; after a stray only the rewards tell.
    """

    episodes: int = 8  # kept episodes in a window
    every: int | None = 10  # keep one episode in so many; None: one of each equal stretch
    span: bool = True  # start among a history's first `every` episodes, to show how it began; else anywhere
    hold: int = 0  # how many of the kept episodes are of the history's end
    strays: float = 0.0  # chance that an episode, unless it is the last, gives way to any one of any history

    def __post_init__(self):
        """Refuse settings that cannot be cut."""
        check_whole("episodes", self.episodes)
        check_whole("every", 1 if self.every is None else self.every)
        if type(self.span) is not bool:
            raise ValueError(f"span={self.span!r} must be True or False")
        if self.every is None and (not self.span or self.hold):
            raise ValueError("every=None covers a history whole; it goes with span=True and hold=0")
        if type(self.hold) is not int or not 0 <= self.hold < self.episodes:
            raise ValueError(f"hold={self.hold!r} must be a whole number from 0 to below episodes={self.episodes}")
        if not is_number(self.strays) or not 0 <= self.strays < 1:
            raise ValueError(f"strays={self.strays!r} must be a number from 0 to below 1")

    @property
    def context(self) -> str:
        """The episodes that are to show how the source learnt, in words for an error."""
        learning = f"{self.episodes - self.hold} episodes"
        return learning if self.every is None else f"{learning}, one in {self.every},"

    @property
    def needed(self) -> int:
        """Episodes that a history must have."""
        return (self.episodes - self.hold) * (self.every or 1)


@dataclass(frozen=True)
class _Piece:
    """An episode of a window: number of its history, steps there, and whether it is of the window's own history."""

    history: int
    steps: slice
    own: bool

    def __len__(self) -> int:
        return self.steps.stop - self.steps.start


class Windows:
    """Draws training windows from histories: whole kept episodes, side by side, cut or padded to one length.

    The phase of the downsampling is random, so that every episode is used and no two epochs see the same windows.
    """

    def __init__(self, histories: Sequence[LearningHistory], config: WindowConfig, horizon: int):
        """Prepare to draw from `histories`; `horizon` is the most steps an episode can have.

        Raises:
            ValueError: no history was given, one is too short for the context, an episode is longer than `horizon`, or
                strays are wanted of histories that do not say which tasks of one family they are of.
        """
        if not histories:
            raise ValueError("no history was given; record some with adbook.record")
        self.config, self.length = config, config.episodes * horizon
        self._episodes = [history.episodes for history in histories]
        for history, episodes in zip(histories, self._episodes, strict=True):
            longest = max(e.stop - e.start for e in episodes)
            if longest > horizon:
                raise ValueError(f"horizon={horizon} is shorter than an episode of {longest} steps of {history!r}")
            if len(episodes) < config.needed:
                raise ValueError(
                    f"a context of {config.context} needs {config.needed} episodes, but {history!r} has "
                    f"{len(episodes)}; lower episodes or every, or record longer histories"
                )
        self.histories = list(histories)
        self.offsets = np.cumsum([0, *(len(history.rewards) for history in histories[:-1])])
        if config.strays:
            tasks = [history.metadata.get("task") for history in histories]
            if not all(isinstance(task, dict) and {"family", "goal"} <= task.keys() for task in tasks):
                raise ValueError("strays need histories whose metadata name the task, with its family and goal")
            families = {task["family"] for task in tasks}
            if len(families) > 1:
                raise ValueError(f"strays need histories of tasks of one family; these are of {', '.join(families)}")

    def sample(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw `n` windows of length `L = episodes * horizon`.

        Returns:
            observations (n, L, O), actions (n, L, A) and rewards (n, L) float32; starts (n, L) bool, first step of an
            episode; valid (n, L) bool, False for padding behind windows with short episodes; imitated (n, L) bool,
            valid and of no stray.
        """
        windows = self._pieces(n, rng)
        fields = {
            name: np.stack(
                [self._joined([getattr(self.histories[p.history], name)[p.steps] for p in w]) for w in windows]
            )
            for name in ("observations", "actions")
        }
        return fields | {"rewards": self._rewards(windows)} | self._flags(windows)

    def draw(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw `n` windows as `sample` does, and return where they are.

        Returns:
            As `sample`, but in place of observations and actions: places (n, L), numbers of steps in all histories one
            after the other; history i begins at `offsets[i]`.
        """
        windows = self._pieces(n, rng)
        steps = [[self.offsets[p.history] + np.arange(p.steps.start, p.steps.stop) for p in w] for w in windows]
        places = np.stack([self._joined(each) for each in steps])
        return {"places": places, "rewards": self._rewards(windows)} | self._flags(windows)

    def _pieces(self, n: int, rng: np.random.Generator) -> list[list[_Piece]]:
        """The episodes of `n` windows."""
        windows = []
        for i in rng.integers(len(self.histories), size=n).tolist():
            pieces = [_Piece(i, steps, True) for steps in self._chosen(self._episodes[i], rng)]
            if self.config.strays:
                which = np.flatnonzero(rng.random(len(pieces) - 1) < self.config.strays)
                for k, j in zip(which, rng.integers(len(self.histories), size=len(which)).tolist(), strict=True):
                    pieces[k] = _Piece(j, self._episodes[j][rng.integers(len(self._episodes[j]))], False)
            windows.append(pieces)
        return windows

    def _joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Put the episodes of a window side by side, and repeat the last step to the window's length."""
        missing = self.length - sum(len(part) for part in parts)
        return np.concatenate((*parts, np.repeat(parts[-1][-1:], missing, axis=0)))

    def _rewards(self, windows: Sequence[Sequence[_Piece]]) -> np.ndarray:
        """What the steps were paid, or in strays would have been, (n, L)."""
        return np.stack(
            [self._joined([self._paid(piece, window[-1].history) for piece in window]) for window in windows]
        )

    def _paid(self, piece: _Piece, own: int) -> np.ndarray:
        history, e = self.histories[piece.history], piece.steps
        if piece.own:
            return history.rewards[e]
        task, other = history.metadata["task"], self.histories[own].metadata["task"]
        fields = (getattr(history, name)[e] for name in ("observations", "next_observations", "rewards"))
        return repaid(task["family"], *fields, task["goal"], other["goal"])

    def _flags(self, windows: Sequence[Sequence[_Piece]]) -> dict[str, np.ndarray]:
        """Starts, valid and imitated of windows, (n, L) each."""
        flags = {name: np.zeros((len(windows), self.length), bool) for name in ("starts", "valid", "imitated")}
        for i, window in enumerate(windows):
            borders = np.cumsum([0, *(len(piece) for piece in window)])
            flags["starts"][i, borders[:-1]] = True
            flags["valid"][i, : borders[-1]] = True
            for piece, (begin, end) in zip(window, pairwise(borders), strict=True):
                flags["imitated"][i, begin:end] = piece.own
        return flags

    def _chosen(self, episodes: Sequence[slice], rng: np.random.Generator) -> list[slice]:
        """The episodes of one window, of all of a history."""
        config = self.config
        if config.every is None:
            borders = len(episodes) * np.arange(config.episodes + 1) // config.episodes
            return [episodes[k] for k in rng.integers(borders[:-1], borders[1:])]
        kept = episodes[int(rng.integers(config.every)) :: config.every]
        learning = config.episodes - config.hold
        first = 0 if config.span else int(rng.integers(len(kept) - learning + 1))
        chosen = list(kept[first : first + learning])
        if config.hold:
            ends = episodes[-config.every :]
            picked = rng.choice(len(ends), config.hold, replace=config.hold > len(ends))
            chosen += (ends[j] for j in sorted(picked))
        return chosen


def window_returns(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return of every episode in windows that `Windows.sample` drew: (n, episodes)."""
    episode = batch["starts"].cumsum(axis=1) - 1  # (n, L)
    rewards = np.where(batch["valid"], batch["rewards"], 0)
    return np.stack([np.bincount(e, r) for e, r in zip(episode, rewards, strict=True)])
