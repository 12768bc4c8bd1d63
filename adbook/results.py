"""Results that take longer than a reader should wait for: made by one command each, kept as JSON in the repository.

    python -m adbook results      three training seeds on the held-out tasks, with controls
    python -m adbook ablations    one factor at a time, three seeds each, trained for a shorter time
    python -m adbook sources      the source algorithms' ends, between random actions and the oracle

Each file says with which settings, by which commit, on which machine and when it was made, and those of training hold
seeds and raw returns; every figure and number in the book is drawn from these files or made on the page.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adbook import experiments, metrics
from adbook.datasets import HISTORIES, SPLITS, data_path, load_histories
from adbook.experiments import Profile, References, describe, evaluate, provenance, references, trained_policy
from adbook.files import write_whole
from adbook.histories import LearningHistory
from adbook.oracle import Oracle
from adbook.policy import ADPolicy
from adbook.recipes import RECIPES
from adbook.rollout import RandomPolicy, rollout
from adbook.tasks import family
from adbook.transformer import TransformerConfig
from adbook.windows import WindowConfig

SOLVED = 0.9  # the score, between random actions and the oracle, from which on a source has solved its task
_CARD_MARKS = "<!-- numbers: written by `python -m adbook sources` -->", "<!-- end of numbers -->"
CONTROLS = {"mamba": {}, "reward withheld": {"withhold_reward": True}, "deterministic": {"deterministic": True}}


def in_context(settings: Profile, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Train one policy a seed and roll each out on test and out-of-distribution tasks, with controls.

    Returns:
        JSON: "returns" by split and method as (seeds, tasks, episodes), "references" by split, "settings" and where it
        was made. "untrained" is the same network before training.
    """
    _check_seeds(seeds)
    runs = [replace(settings, seed=seed) for seed in seeds]
    trained = [trained_policy(run) for run in runs]
    policies, returns = [policy for policy, _ in trained], {}
    for split in ("test", "ood"):
        returns[split] = {
            method: [
                evaluate(run, policy, split, **options).returns for run, policy in zip(runs, policies, strict=True)
            ]
            for method, options in CONTROLS.items()
        }
        returns[split]["untrained"] = [evaluate(run, _untrained(run, policies[0]), split).returns for run in runs[:1]]
    speed = [{"minutes": log.seconds / 60, "tokens_per_second": log.tokens_per_second} for _, log in trained]
    return _result(settings, seeds=list(seeds), returns=returns, training=speed, references=_references(settings))


def ablations(settings: Profile, updates: int, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Train variants that differ from the profile in one factor, all for the same `updates`, and roll them out.

    Returns:
        JSON: "variants", a list of {"factor", "value", "returns" (seeds, tasks, episodes), "minutes" (seeds,)}; the
        profile's own value is in the list once a factor. The test tasks are measured here and nothing is chosen by
        them.
    """
    _check_seeds(seeds)
    rows = []
    for factor, value, changes in variants(settings):
        returns, minutes = [], []
        for seed in seeds:
            run = replace(settings, seed=seed, **changes)
            run = replace(run, training=replace(run.training, updates=updates))
            policy, log = trained_policy(run)
            returns.append(evaluate(run, policy).returns)
            minutes.append(log.seconds / 60)
        rows.append({"factor": factor, "value": value, "returns": returns, "minutes": minutes})
    references = _references(settings, ("test",))
    return _result(settings, updates=updates, seeds=list(seeds), variants=rows, references=references)


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
    uniform = RandomPolicy(kind.action_size, kind.action_scale)
    scores: dict[str, Any] = {"random": {}, "oracle": {}, "sources": {}}
    for split in SPLITS:
        tasks = getattr(kind, f"{split}_tasks")[: max(getattr(RECIPES[name][s], split) for s, _ in there)]
        plays = {"random": uniform, "oracle": oracle.show(tasks)}
        for end, policy in plays.items():
            played = rollout(policy, kind, tasks, episodes=episodes, deterministic=end == "oracle")
            scores[end][split] = played.returns.mean(1)
    for (source, split), histories in there.items():
        runs = source_returns(histories)
        start = np.array([np.mean([r[: max(1, len(r) // 10)].mean() for r in streams]) for streams in runs])
        end = np.array([np.mean([r[-max(1, len(r) // 10) :].mean() for r in streams]) for streams in runs])
        ends = (scores[bound][split][: len(runs)] for bound in ("random", "oracle"))
        numbers = {"end": end, "score": metrics.normalized_score(end, *ends), "start": start}
        scores["sources"].setdefault(source, {"config": histories[0].metadata["config"]})[split] = numbers
    return scores


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


def variants(settings: Profile) -> list[tuple[str, str, dict[str, Any]]]:
    """Return what `ablations` compares: (factor, value, changed fields of the profile)."""
    full = settings.window
    shorter = [n for n in (1, 2, 4) if n < full.episodes]
    context = [(n, _shorter_context(settings, n)) for n in shorter] + [(full.episodes, {})]
    denser = [k for k in (1, 3) if k < full.every]
    thinning = [(k, {"window": WindowConfig(full.episodes, k, span=False)}) for k in denser] + [(full.every, {})]
    tasks = [(n, {"n_tasks": n}) for n in (16, 32, 64) if n < settings.n_tasks] + [(settings.n_tasks, {})]
    attention = TransformerConfig(
        d_model=settings.backbone.d_model,
        n_layers=settings.backbone.n_layers,
        context=full.episodes * settings.family.horizon,
    )
    slower = replace(settings.training, learning_rate=settings.training.learning_rate / 2)  # as attention needs
    return [
        *(("context", f"{n} episodes", changes) for n, changes in context),
        *(("downsampling", f"1 in {k}", changes) for k, changes in thinning),
        *(("head", head, {"head": head}) for head in ("mse", "gaussian")),
        *(("training tasks", str(n), changes) for n, changes in tasks),
        ("backbone", "transformer", {"backbone": attention, "training": slower}),
        ("backbone", "mamba", {}),
    ]


def _shorter_context(settings: Profile, episodes: int) -> dict[str, Any]:
    """Windows of fewer episodes from anywhere in a history, and as many more of them in a batch."""
    batch_size = settings.training.batch_size * settings.window.episodes // episodes
    window = WindowConfig(episodes, settings.window.every, span=False)
    return {"window": window, "training": replace(settings.training, batch_size=batch_size)}


def load_references(result: dict[str, Any], split: str = "test") -> References:
    """Return the two ends of the score that a result was measured with."""
    return References(**{name: np.array(values) for name, values in result["references"][split].items()})


def save_result(name: str, result: dict[str, Any], folder: str | os.PathLike = experiments.RESULTS) -> Path:
    """Write `folder/name.json`, under a temporary name first; numbers are rounded to 4 decimals."""
    text = json.dumps(_rounded(result), separators=(",", ":")) + "\n"
    return write_whole(Path(folder) / f"{name}.json", lambda file: file.write_text(text))


def load_result(name: str, folder: str | os.PathLike = experiments.RESULTS) -> dict[str, Any]:
    """Read `folder/name.json`.

    Raises:
        FileNotFoundError: it has not been made; the message names the results that are there and the command.
        ValueError: the file is damaged.
    """
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in Path(folder).glob("*.json"))) or "none"
        raise FileNotFoundError(
            f"no result {name!r} in {folder} (there: {there}); make it with `python -m adbook results` (or ablations, "
            "or bench) with the same --profile and --family"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch or make it again") from error


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**63:
        raise ValueError(f"seeds={tuple(seeds)} must be different whole numbers from 0 to below 2**63, one or more")


def _untrained(settings: Profile, trained: ADPolicy) -> ADPolicy:
    """Return the network as it was before training, with the trained one's normalisation."""
    torch.manual_seed(settings.seed)
    policy = ADPolicy(settings.policy)
    policy.load_state_dict(policy.state_dict() | dict(trained.named_buffers()))
    return policy


def _references(settings: Profile, splits: Sequence[str] = ("test", "ood")) -> dict[str, Any]:
    return {split: vars(references(settings, split)) for split in splits}


def _result(settings: Profile, **parts: Any) -> dict[str, Any]:
    return {"settings": describe(settings), "made": provenance()} | parts


def _rounded(value: Any) -> Any:
    """Turn arrays into lists and round every float to 4 decimals."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _rounded(value.tolist())
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float | np.floating) else value
