"""Recipes of the data set: the settings of each source on each family, and how much of its histories is kept.

The settings were tuned on training tasks, until a source solved (almost) every one of them or the time that one may
wait was up. Chapter 3 shows what they come to.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adbook.checks import check_known
from adbook.datasets import BEST, HISTORIES, SPLITS, data_path, thinned, write_packed
from adbook.files import check_writable
from adbook.generation import record
from adbook.histories import read_histories
from adbook.sources import DroQConfig, PPOConfig, SACConfig, SourceConfig
from adbook.tasks import family as task_family


@dataclass(frozen=True)
class Recipe:
    """What the data set holds of one source on one family."""

    config: SourceConfig
    train: int = 30  # training tasks, the first of the family's
    test: int = 16  # test tasks
    streams: int = 1  # of each run
    episodes: int = 20  # kept of each stream at most, at equal distances


# The other three want a longer view ahead than Reacher-Goal, and rewards brought to one scale.
_FAR = PPOConfig(steps=400_000, streams=4, n_steps=100, batch_size=400, learning_rate=1e-3, gamma=0.98, normalize=True)

_NEAR = SACConfig(batch_size=128, gamma=0.9, tau=0.02, temperature=0.02)
_FREE = SACConfig(n_envs=1, streams=1, batch_size=128, gamma=0.98, temperature=1.0)  # a gait is found by exploring

RECIPES: dict[str, dict[str, Recipe]] = {
    "reacher-goal": {
        "ppo": Recipe(PPOConfig(), train=128, streams=4),
        "sac": Recipe(replace(_NEAR, steps=8_000, n_envs=2, streams=2), streams=2),
        "droq": Recipe(DroQConfig(steps=1_500, gamma=0.9, temperature=0.02)),
    },
    "pusher-goal": {"ppo": Recipe(replace(_FAR, steps=240_000), train=40, streams=2)},
    "half-cheetah-vel": {
        "ppo": Recipe(replace(_FAR, steps=500_000, log_std_init=-1.0), train=40),
        "sac": Recipe(replace(_FREE, steps=40_000), test=8, episodes=10),
        "droq": Recipe(DroQConfig(steps=6_000, gamma=0.98, learning_starts=400, temperature=1.0), test=8, episodes=10),
    },
    "ant-dir": {
        "ppo": Recipe(replace(_FAR, steps=600_000, n_steps=50, gamma=0.97, gae_lambda=0.9, log_std_init=-0.4), train=40)
    },
}


def recipe(family: str, source: str | None = None) -> Recipe:
    """Return the recipe of a source on a family; by default that of the source that serves it best.

    Raises:
        ValueError: unknown family, or a source that the data set does not have for it.
    """
    check_known("task family", family, RECIPES)
    source = BEST[family] if source is None else str(source).lower()
    check_known(f"source for {family}", source, RECIPES[family])
    return RECIPES[family][source]


_ORACLE = PPOConfig(
    n_envs=64, n_steps=50, batch_size=800, learning_rate=1e-3, gamma=0.98, hidden=(128, 128), normalize=True
)
_ORACLES = {
    "reacher-goal": replace(_ORACLE, steps=3_000_000, gamma=0.95),
    "pusher-goal": replace(_ORACLE, steps=5_000_000),
    "half-cheetah-vel": replace(_ORACLE, steps=6_000_000),
    "ant-dir": replace(
        _ORACLE,
        steps=7_000_000,
        n_envs=32,
        batch_size=400,
        n_epochs=5,
        learning_rate=5e-4,
        gamma=0.97,
        gae_lambda=0.9,
        log_std_init=-0.4,
        entropy=0.005,  # without, σ is down to 0.01 long before the gait is found
    ),
}


def oracle_config(family: str) -> PPOConfig:
    """Return the settings of a family's oracle.

    Raises:
        ValueError: unknown family.
    """
    check_known("task family", family, _ORACLES)
    return _ORACLES[family]


def check_request(family: str, source: str | None, split: str, tasks: int | None = None) -> None:
    """Raise ValueError for what `follow` cannot do, before any run."""
    check_known("split", split, SPLITS)
    wanted = getattr(recipe(family, source), split)
    if tasks is not None and (type(tasks) is not int or not 1 <= tasks <= wanted):
        raise ValueError(f"tasks={tasks!r} must be from 1 to {wanted}, this recipe's tasks of the split {split!r}")


def follow(
    family: str,
    source: str | None = None,
    split: str = "train",
    *,
    tasks: int | None = None,
    folder: str | Path = "runs/histories",
    into: str | Path = HISTORIES,
    made: dict[str, Any] | None = None,
    n_jobs: int = -1,
) -> Path | None:
    """Record the histories of a recipe in full, then keep its part of them in the data set.

    Args:
        family: name of the family.
        source: "ppo", "sac" or "droq"; by default the one that serves the family best.
        split: "train" or "test".
        tasks: record only so many, and leave the data set alone.
        folder: for the whole histories.
        into: folder of the data set.
        made: where and when, kept in the file.
        n_jobs: processes; -1 for one a core.

    Returns:
        The data set's file, or None if only some tasks were asked for.

    Raises:
        ValueError: as `recipe`, an unknown split, or more tasks than the recipe has.
    """
    check_request(family, source, split, tasks)
    source = (source or BEST[family]).lower()
    if tasks is None:
        check_writable(data_path(family, source, split, into).parent)
    chosen, kind = recipe(family, source), task_family(family)
    members = getattr(kind, f"{split}_tasks")[: tasks or getattr(chosen, split)]
    paths = record(kind, members, chosen.config, folder=folder, n_jobs=n_jobs)
    if tasks is not None:
        return None
    kept = [
        thinned(history, chosen.episodes, phase=i / chosen.streams)
        for path in paths
        for i, history in enumerate(read_histories(path)[: chosen.streams])
    ]
    return write_packed(data_path(family, source, split, into), kept, made or {})
