"""Context windows: what a sequence model is shown of learning histories in training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adbook.histories import LearningHistory


@dataclass(frozen=True)
class WindowConfig:
    """How context windows are cut: one episode in `every`, `episodes` of them, from the history's start or anywhere.

    With `every=None` a window covers its history whole, however long that is: of as many equal stretches of the history
    as the window has episodes, each gives one, and any of its own.

    The last `hold` of a window's episodes are drawn from the history's last `every`, so that a window does not end as
    soon as the source has learnt, but shows for a while what it then does.
    """

    episodes: int = 8  # kept episodes in a window
    every: int | None = 10  # keep one episode in so many; None: one of each equal stretch
    span: bool = True  # start among a history's first `every` episodes, to show how it began; else anywhere
    hold: int = 0  # how many of the kept episodes are of the history's end

    def __post_init__(self):
        """Refuse settings that cannot be cut."""
        for name, value in (("episodes", self.episodes), ("every", 1 if self.every is None else self.every)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if type(self.span) is not bool:
            raise ValueError(f"span={self.span!r} must be True or False")
        if self.every is None and (not self.span or self.hold):
            raise ValueError("every=None covers a history whole; it goes with span=True and hold=0")
        if type(self.hold) is not int or not 0 <= self.hold < self.episodes:
            raise ValueError(f"hold={self.hold!r} must be a whole number from 0 to below episodes={self.episodes}")

    @property
    def needed(self) -> int:
        """Episodes that a history must have."""
        return (self.episodes - self.hold) * (self.every or 1)


class Windows:
    """Draws training windows from histories: whole kept episodes, side by side, cut or padded to one length.

    The phase of the downsampling is random, so that every episode is used and no two epochs see the same windows.
    """

    def __init__(self, histories: Sequence[LearningHistory], config: WindowConfig, horizon: int):
        """Prepare to draw from `histories`; `horizon` is the most steps an episode can have.

        Raises:
            ValueError: no history was given, one is too short for the context, or an episode is longer than `horizon`.
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
                    f"a context of {config.episodes - config.hold} episodes, one in {config.every}, needs "
                    f"{config.needed} episodes, but {history!r} has {len(episodes)}; lower episodes or every, or "
                    "record longer histories"
                )
        self.histories = list(histories)

    def sample(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw `n` windows of length `L = episodes * horizon`.

        Returns:
            observations (n, L, O), actions (n, L, A) and rewards (n, L) float32; starts (n, L) bool, first step of an
            episode; valid (n, L) bool, False for padding behind windows with short episodes.
        """
        history, index, starts, valid = self.draw(n, rng)
        rows = list(zip((self.histories[i] for i in history), index, strict=True))
        names = "observations", "actions", "rewards"
        fields = {name: np.stack([getattr(one, name)[steps] for one, steps in rows]) for name in names}
        return fields | {"starts": starts, "valid": valid}

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Draw `n` windows as `sample` does, and return where they are.

        Returns:
            Number of the history (n,) and of its steps (n, L); starts and valid (n, L) bool.
        """
        histories = rng.integers(len(self.histories), size=n)
        return histories, *(np.stack(x) for x in zip(*(self._one(int(i), rng) for i in histories), strict=True))

    def _one(self, i: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, starts and valid of one window of history i, (L,) each."""
        chosen = self._chosen(self._episodes[i], rng)
        index = np.concatenate([np.arange(e.start, e.stop) for e in chosen])
        starts = np.zeros(self.length, bool)
        starts[np.cumsum([0, *(e.stop - e.start for e in chosen[:-1])])] = True
        valid = np.arange(self.length) < len(index)
        return np.pad(index, (0, self.length - len(index)), mode="edge"), starts, valid

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
