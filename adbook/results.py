"""Results that take longer than a reader should wait for: made by one command each, kept as JSON in the repository.

    python -m adbook results      every agent with three training seeds on the held-out tasks, and controls
    python -m adbook ablations    one factor at a time, three seeds each, trained for a shorter time
    python -m adbook sources      the source algorithms' ends (`adbook.source_scores`)

Each file says with which settings, by which commit, on which machine and when it was made, and those of training hold
seeds and raw returns; every figure and number in the book is drawn from these files or made on the page.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adbook import experiments
from adbook.checkpoints import published_policy, trained_policy
from adbook.controls import ShuffledContext, reset_every_episode
from adbook.experiments import AGENTS, Profile, References, as_agent, describe, evaluate, provenance, references
from adbook.files import write_whole
from adbook.oracle import Oracle
from adbook.policy import ADPolicy
from adbook.rollout import Rollout
from adbook.source_scores import task_bounds
from adbook.windows import WindowConfig


def in_context(settings: Profile, seeds: Sequence[int] = (0, 1, 2), agents: Sequence[str] = AGENTS) -> dict[str, Any]:
    """Roll every agent out on held-out tasks with frozen weights, and Mamba with its controls.

    Policies are the repository's where it has them, else those of `adbook.checkpoints.trained_policy`.

    Args:
        settings: a profile with a Mamba.
        seeds: of training, one policy each.
        agents: of `adbook.experiments.AGENTS`.

    Returns:
        JSON: "returns" by split ("test", "ood" and, where the family has it, "macaw") and method as (seeds, tasks,
        episodes), the controls among the methods; "references" by split (test and ood); "bounds" by split: "random"
        and "oracle", mean returns (tasks,); "within" by method: reward by episode and step, mean over seeds and test
        tasks (episodes, steps); "training" and "weights" by agent; "settings" and where it was made.
    """
    _check_seeds(seeds)
    kinds = {agent: as_agent(settings, agent) for agent in agents}
    trained = {agent: [published_policy(replace(kind, seed=seed)) for seed in seeds] for agent, kind in kinds.items()}
    policies = {agent: [policy for policy, _ in made] for agent, made in trained.items()}
    oracle, returns, within, bounds = Oracle.load(settings.family.name), {}, {}, {}
    for split in ("test", "ood", *(["macaw"] if settings.macaw_tasks else [])):
        played = {agent: _play(settings, seeds, policies[agent], split) for agent in agents}
        returns[split] = {agent: [one.returns for one in rollouts] for agent, rollouts in played.items()}
        if split != "macaw":
            returns[split] |= _controls(settings, seeds, policies["mamba"], split)
        if split == "test":
            within = {agent: _by_step(rollouts) for agent, rollouts in played.items()}
        bounds[split] = task_bounds(oracle, getattr(settings, f"{split}_tasks"))
    logs = {agent: [log for _, log in made] for agent, made in trained.items()}
    speed = {
        agent: [{"minutes": log.seconds / 60, "tokens_per_second": log.tokens_per_second} for log in made]
        for agent, made in logs.items()
    }
    weights = {agent: sum(p.numel() for p in made[0].parameters()) for agent, made in policies.items()}
    parts = {"seeds": list(seeds), "returns": returns, "within": within, "bounds": bounds, "weights": weights}
    return _result(settings, **parts, training=speed, references=_references(settings))


def _play(
    settings: Profile, seeds: Sequence[int], policies: Sequence[nn.Module], split: str, **options: bool
) -> list[Rollout]:
    """One rollout a policy and seed."""
    runs = zip(policies, seeds, strict=True)
    return [evaluate(replace(settings, seed=seed), policy, split, **options) for policy, seed in runs]


def _controls(
    settings: Profile, seeds: Sequence[int], policies: Sequence[ADPolicy], split: str
) -> dict[str, list[np.ndarray]]:
    """Returns by control (seeds, tasks, episodes); "untrained" is one network before training."""
    shuffled = [ShuffledContext(policy, seed) for policy, seed in zip(policies, seeds, strict=True)]
    played = {
        "reward withheld": _play(settings, seeds, policies, split, withhold_reward=True),
        "deterministic": _play(settings, seeds, policies, split, deterministic=True),
        "context shuffled": _play(settings, seeds, shuffled, split),
        "untrained": _play(settings, seeds[:1], [_untrained(settings, policies[0])], split),
    }
    tasks = getattr(settings, f"{split}_tasks")
    reset = [
        reset_every_episode(policy, settings.family, tasks, episodes=settings.episodes, seed=seed)
        for policy, seed in zip(policies, seeds, strict=True)
    ]
    return {name: [one.returns for one in rollouts] for name, rollouts in played.items()} | {"context reset": reset}


def _by_step(rollouts: Sequence[Rollout]) -> np.ndarray:
    """Mean reward by episode and step over seeds and tasks, of those still playing (episodes, steps)."""
    rewards = np.concatenate([one.rewards for one in rollouts])  # (seeds × tasks, K, T)
    played = np.isfinite(rewards).sum(0)
    return np.nansum(rewards, 0) / np.maximum(played, 1)


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


def variants(settings: Profile) -> list[tuple[str, str, dict[str, Any]]]:
    """Return what `ablations` compares: (factor, value, changed fields of the profile)."""
    full = settings.window
    shorter = [n for n in (1, 2, 4) if n < full.episodes]
    context = [(n, _shorter_context(settings, n)) for n in shorter] + [(full.episodes, {})]
    denser = [k for k in (1, 3) if k < full.every]
    thinning = [(k, {"window": WindowConfig(full.episodes, k, span=False)}) for k in denser] + [(full.every, {})]
    tasks = [(n, {"n_tasks": n}) for n in (16, 32, 64) if n < settings.n_tasks] + [(settings.n_tasks, {})]
    attention = as_agent(settings, "transformer")
    return [
        *(("context", f"{n} episodes", changes) for n, changes in context),
        *(("downsampling", f"1 in {k}", changes) for k, changes in thinning),
        *(("head", head, {"head": head}) for head in ("mse", "gaussian")),
        *(("training tasks", str(n), changes) for n, changes in tasks),
        ("backbone", "transformer", {"backbone": attention.backbone, "training": attention.training}),
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
    text = json.dumps(as_written(result), separators=(",", ":")) + "\n"
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
    statistics = trained.state_dict().keys() - dict(trained.named_parameters()).keys()
    policy.load_state_dict(policy.state_dict() | {name: trained.state_dict()[name] for name in statistics})
    return policy


def _references(settings: Profile, splits: Sequence[str] = ("test", "ood")) -> dict[str, Any]:
    return {split: vars(references(settings, split)) for split in splits}


def _result(settings: Profile, **parts: Any) -> dict[str, Any]:
    return {"settings": describe(settings), "made": provenance()} | parts


def as_written(value: Any) -> Any:
    """Turn arrays and tuples into lists and round every float to 4 decimals, as `save_result` does."""
    if isinstance(value, dict):
        return {key: as_written(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return as_written(value.tolist())
    if isinstance(value, list | tuple):
        return [as_written(item) for item in value]
    return round(value, 4) if isinstance(value, float | np.floating) else value
