"""How far the sources of the data set came, on the line from random actions (0) to the oracle (1).

python -m adbook sources      measures them, and writes the numbers into `artifacts/results` and the data set's card
"""

import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from adbook import metrics
from adbook.datasets import HISTORIES, SPLITS, data_path, load_histories
from adbook.experiments import provenance
from adbook.files import write_whole
from adbook.histories import LearningHistory
from adbook.oracle import Oracle
from adbook.recipes import RECIPES
from adbook.rollout import RandomPolicy, rollout
from adbook.tasks import Task, family

SOLVED = 0.9  # the score, between random actions and the oracle, from which on a source has solved its task
_CARD_MARKS = "<!-- numbers: written by `python -m adbook sources` -->", "<!-- end of numbers -->"


def source_scores(episodes: int = 20, *, folder: str | os.PathLike = HISTORIES) -> dict[str, Any]:
    """Put the end of every source run of the data set on the line from random actions (0) to the oracle (1).

    Args:
        episodes: played on each task by random actions and by the oracle, whose actions are the means.
        folder: of the data set.

    Returns:
        JSON: "families" by family, each with "random" and "oracle" by split, mean returns (tasks,); "sources" by
        source and split: "start" and "end", mean returns of the first and last tenth of episodes of a run's streams
        (tasks,), "score" of the end (tasks,), and the "config" that the histories were made with.

    Raises:
        FileNotFoundError: there are no histories at all, or a family lacks its oracle.
    """
    read: dict[str, dict[tuple[str, str], list[LearningHistory]]] = {}  # all of it before the first episode is played
    for name, recipes in RECIPES.items():
        for source, split in product(recipes, SPLITS):
            if data_path(name, source, split, folder).is_file():
                histories = load_histories(name, source=source, split=split, folder=folder)
                read.setdefault(name, {})[source, split] = histories
    if not read:
        raise FileNotFoundError(f"no histories in {folder}; make some with python -m adbook histories")
    oracles = {name: Oracle.load(name) for name in read}
    families = {name: _family_scores(name, oracles[name], there, episodes) for name, there in read.items()}
    return {"episodes": episodes, "families": families, "made": provenance()}


def _family_scores(
    name: str, oracle: Oracle, there: dict[tuple[str, str], list[LearningHistory]], episodes: int
) -> dict[str, Any]:
    kind = family(name)
    scores: dict[str, Any] = {"random": {}, "oracle": {}, "sources": {}}
    for split in SPLITS:
        tasks = getattr(kind, f"{split}_tasks")[: max(getattr(RECIPES[name][s], split) for s, _ in there)]
        for end, returns in task_bounds(oracle, tasks, episodes).items():
            scores[end][split] = returns
    for (source, split), histories in there.items():
        runs = source_returns(histories)
        start = np.array([np.mean([r[: max(1, len(r) // 10)].mean() for r in streams]) for streams in runs])
        end = np.array([np.mean([r[-max(1, len(r) // 10) :].mean() for r in streams]) for streams in runs])
        ends = (scores[bound][split][: len(runs)] for bound in ("random", "oracle"))
        numbers = {"end": end, "score": metrics.normalized_score(end, *ends), "start": start}
        scores["sources"].setdefault(source, {"config": histories[0].metadata["config"]})[split] = numbers
    return scores


def task_bounds(oracle: Oracle, tasks: Sequence[Task], episodes: int = 20) -> dict[str, np.ndarray]:
    """Measure the two bounds of tasks: mean returns (tasks,) of "random" actions and of the "oracle"'s mean actions."""
    kind = family(oracle.family)
    uniform = RandomPolicy(kind.action_size, kind.action_scale)
    best = rollout(oracle.show(tasks), kind, tasks, episodes=episodes, deterministic=True)
    return {"random": rollout(uniform, kind, tasks, episodes=episodes).returns.mean(1), "oracle": best.returns.mean(1)}


def misled_returns(oracle: Oracle, tasks: Sequence[Task], episodes: int = 20) -> np.ndarray:
    """Mean returns (tasks,) of the oracle where it is shown the goal of the next task instead of its own.

    Where they are as high as those of the right goal, returns do not depend on the goal, and a rise of returns says
    nothing about whether an agent has found it out.
    """
    shown = [*tasks[1:], tasks[0]]
    return rollout(
        oracle.show(shown), family(oracle.family), tasks, episodes=episodes, deterministic=True
    ).returns.mean(1)


def update_card(scores: dict[str, Any], folder: str | os.PathLike = HISTORIES) -> Path:
    """Write the numbers of `source_scores` into the data set's card, README.md, between its two marks."""
    card = Path(folder) / "README.md"
    before, _, rest = card.read_text().partition(_CARD_MARKS[0])
    _, closed, after = rest.partition(_CARD_MARKS[1])
    if not closed:
        raise ValueError(f"{card} has lost the marks of its table; put these two lines back: {' '.join(_CARD_MARKS)}")
    names, numbers = ["family", "source", "split"], ["tasks", "histories", "kept", "MB", "end: mean", "worst"]
    rows = [[*names, *numbers, "score: mean", "solved"], ["---"] * 3 + ["---:"] * 8]
    for name, found in scores["families"].items():
        for source, splits in found["sources"].items():
            for split in (s for s in SPLITS if s in splits):
                loaded = load_histories(name, source=source, split=split, folder=folder)
                end, score = splits[split]["end"], splits[split]["score"]
                rows.append([name, source, split, str(len(end)), str(len(loaded))])
                rows[-1] += [f"{sum(len(h.episodes) for h in loaded):,}"]
                rows[-1] += [f"{data_path(name, source, split, folder).stat().st_size / 1e6:.1f}"]
                rows[-1] += [f"{np.mean(end):.1f}", f"{np.min(end):.1f}", f"{np.mean(score):.2f}"]
                rows[-1] += [f"{np.mean(np.array(score) >= SOLVED):.0%}"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = f"{before}{_CARD_MARKS[0]}\n{table}\n{_CARD_MARKS[1]}{after}"
    return write_whole(card, lambda file: file.write_text(text))


def source_returns(histories: Sequence[LearningHistory]) -> list[list[np.ndarray]]:
    """Return the returns of all episodes of the data set's source runs: by task in order, by stream, (episodes,).

    Where episodes can end early, streams differ in their number.
    """
    runs: dict[int, list[np.ndarray]] = {}
    for history in histories:
        runs.setdefault(history.metadata["task"]["index"], []).append(np.array(history.metadata["source_returns"]))
    return [runs[task] for task in sorted(runs)]


def source_curves(histories: Sequence[LearningHistory], points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Put the returns of the data set's source runs on one axis of environment steps.

    Args:
        histories: of one source and split.
        points: of the axis.

    Returns:
        Steps of all environments of a run (points,), and returns (histories, points): each the mean of the episodes
        that ended in the stretch before it, or the last before that, where none did (the first of all, before it ends).
    """
    config = histories[0].metadata["config"]
    made = max(config["n_envs"] * sum(history.metadata["source_lengths"]) for history in histories)
    steps = max(config["steps"], made) * (1 + np.arange(points)) / points
    curves = np.empty((len(histories), points))
    for curve, history in zip(curves, histories, strict=True):
        returns, lengths = (np.array(history.metadata[f"source_{name}"]) for name in ("returns", "lengths"))
        ended = np.searchsorted(steps, config["n_envs"] * lengths.cumsum() - 1e-9)  # the stretch of each episode
        for i in range(points):
            before = np.flatnonzero(ended <= i)
            here = returns[ended == i]
            curve[i] = here.mean() if len(here) else returns[before[-1]] if len(before) else returns[0]
    return steps, curves
