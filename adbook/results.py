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
from joblib import Parallel, delayed
from torch import nn
from tqdm import tqdm

from adbook import experiments
from adbook.checkpoints import published_policy, trained_policy
from adbook.checks import check_known
from adbook.controls import Rereading, ShuffledContext, reset_every_episode
from adbook.experiments import AGENTS, Profile, References, as_agent, describe, evaluate, provenance, references
from adbook.files import content_hash, write_whole
from adbook.oracle import Oracle
from adbook.policy import ADPolicy
from adbook.source_scores import misled_returns, task_bounds

# How a policy itself is played in the controls that do not put another one in its place.
_PLAYED_AS: dict[str, dict[str, bool]] = {
    "reward withheld": {"withhold_reward": True},
    "deterministic": {"deterministic": True},
    "context reset": {},
}


def in_context(
    settings: Profile,
    seeds: Sequence[int] = (0, 1, 2),
    agents: Sequence[str] = AGENTS,
    once: Sequence[str] = (),
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Roll every agent out on held-out tasks with frozen weights, and Mamba with its controls.

    Attention whose window is shorter than the rollout is played twice: with the window that slides, and as method
    "<agent>, reread", which before every episode reads anew as many of the last as leave room for one more.

    Policies are the repository's where it has them, else those of `adbook.checkpoints.trained_policy`.

    Args:
        settings: a profile with a Mamba.
        seeds: of training, one policy each.
        agents: of `adbook.experiments.AGENTS`.
        once: those of them that have the first seed alone.
        known: such a result; its references are taken over if they are of the same source and tasks.

    Returns:
        JSON: "returns" by split ("test", "ood" and, where the family has it, "macaw") and method as (seeds, tasks,
        episodes), the controls among the methods; "references" by split (test and ood); "bounds" by split, mean returns
        (tasks,): "random", "oracle" and "misled", the oracle shown another goal; "within" by method: reward by episode
        and step, mean over seeds and test tasks (episodes, steps); "training" and "weights" by agent; "settings" and
        where it was made.
    """
    check_seeds(seeds)
    check_agents(agents, once)
    made, oracle = provenance(), Oracle.load(settings.family.name)
    kinds = {agent: as_agent(settings, agent) for agent in agents}
    trained: dict[str, list] = {agent: [] for agent in agents}
    for agent, seed in with_seeds(agents, seeds, once):
        trained[agent].append(published_policy(replace(kinds[agent], seed=seed)))
    policies = {agent: [policy for policy, _ in each] for agent, each in trained.items()}
    splits = ("test", "ood", *(["macaw"] if settings.macaw_tasks else []))
    plays = {(split, agent): policies[agent] for split in splits for agent in agents}
    plays |= {
        (split, f"{agent}, reread"): [Rereading(policy, room) for policy in policies[agent]]
        for split in splits
        for agent in agents
        if (room := experiments.reread_episodes(kinds[agent]))
    }
    for split in ("test", "ood"):
        controls = _controls(settings, seeds, policies["mamba"])
        plays |= {(split, control): players for control, players in controls.items()}
    played = _played(settings, seeds, plays)
    returns = {split: {m: [r for r, _ in played[s, m]] for s, m in plays if s == split} for split in splits}
    within = {agent: _by_step([rewards for _, rewards in played["test", agent]]) for agent in agents}
    bounds = {}
    for split in splits:
        tasks = settings.tasks(split)
        bounds[split] = task_bounds(oracle, tasks) | {"misled": misled_returns(oracle, tasks)}
    logs = {agent: [log for _, log in each] for agent, each in trained.items()}
    speed = {
        agent: [{"minutes": log.seconds / 60, "tokens_per_second": log.tokens_per_second} for log in each]
        for agent, each in logs.items()
    }
    weights = {agent: sum(p.numel() for p in each[0].parameters()) for agent, each in policies.items()}
    parts = {"seeds": list(seeds), "returns": returns, "within": within, "bounds": bounds}
    parts |= {"weights": weights, "training": speed}
    return {"settings": describe(settings), "made": made} | parts | {"references": _references(settings, known=known)}


def _controls(settings: Profile, seeds: Sequence[int], policies: Sequence[ADPolicy]) -> dict[str, list[nn.Module]]:
    """Who plays in each control, a seed each; "untrained" is one network before training."""
    return {
        **{name: list(policies) for name in _PLAYED_AS},
        "context shuffled": [ShuffledContext(policy, seed) for policy, seed in zip(policies, seeds, strict=True)],
        "untrained": [_untrained(settings, policies[0])],
    }


def _played(
    settings: Profile, seeds: Sequence[int], plays: dict[tuple[str, str], list[nn.Module]]
) -> dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray | None]]]:
    """What `_play` returns, a seed each, by split and method; on all cores."""
    runs = [
        (key, seed, policy) for key, policies in plays.items() for seed, policy in zip(seeds, policies, strict=False)
    ]
    jobs = (delayed(_play)(replace(settings, seed=seed), policy, *key) for key, seed, policy in runs)
    played: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray | None]]] = {key: [] for key in plays}
    done = Parallel(n_jobs=-1, return_as="generator")(jobs)
    for (key, *_), one in zip(runs, tqdm(done, total=len(runs), unit="rollout"), strict=True):
        played[key].append(one)
    return played


def _play(settings: Profile, policy: nn.Module, split: str, method: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns (tasks, episodes), and rewards (tasks, episodes, steps), None where episodes are not played in a row."""
    if method == "context reset":
        tasks, options = settings.tasks(split), {"episodes": settings.episodes, "seed": settings.seed}
        return reset_every_episode(policy, settings.family, tasks, **options), None
    rollout = evaluate(settings, policy, split, **_PLAYED_AS.get(method, {}))
    return rollout.returns, rollout.rewards


def _by_step(rewards: Sequence[np.ndarray]) -> np.ndarray:
    """Mean reward by episode and step over seeds and tasks, of those still playing (episodes, steps)."""
    together = np.concatenate(rewards)  # (seeds × tasks, K, T)
    played = np.isfinite(together).sum(0)
    return np.nansum(together, 0) / np.maximum(played, 1)


def ablations(settings: Profile, updates: int, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Train variants that differ from the profile in one factor, all for the same `updates`, and roll them out.

    Returns:
        JSON: "variants", a list of {"factor", "value", "returns" (seeds, tasks, episodes), "minutes" (seeds,)}; the
        profile's own value is in the list once a factor. The test tasks are measured here and nothing is chosen by
        them.
    """
    check_seeds(seeds)
    rows, made = [], provenance()
    changed = [(factor, value, replace(settings, **changes)) for factor, value, changes in variants(settings)]
    for factor, value, variant in changed:
        returns, minutes = [], []
        for seed in seeds:
            run = replace(variant, seed=seed, training=replace(variant.training, updates=updates))
            policy, log = trained_policy(run)
            returns.append(evaluate(run, policy).returns)
            minutes.append(log.seconds / 60)
        rows.append({"factor": factor, "value": value, "returns": returns, "minutes": minutes})
    references = _references(settings, ("test",))
    described = {"settings": describe(settings), "made": made, "updates": updates, "seeds": list(seeds)}
    return described | {"variants": rows, "references": references}


def variants(settings: Profile) -> list[tuple[str, str, dict[str, Any]]]:
    """Return what `ablations` compares: (factor, value, changed fields of the profile).

    Windows that do not span a history hold nothing of its end back, whatever the profile's do.
    """
    full = replace(settings.window, every=_spacing(settings))
    shorter = [n for n in (1, 2, 4) if n < full.episodes]
    context = [(n, _shorter_context(settings, n)) for n in shorter] + [(full.episodes, {})]
    denser = [k for k in (1, 3) if k < full.every]
    thinning = [(k, {"window": replace(full, every=k, span=False, hold=0)}) for k in denser] + [(full.every, {})]
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


def _spacing(settings: Profile) -> int:
    """Episodes from one that a window keeps to the next."""
    episodes = settings.kept or settings.stream_episodes
    return settings.window.every or episodes // settings.window.episodes


def _shorter_context(settings: Profile, episodes: int) -> dict[str, Any]:
    """Windows of fewer episodes from anywhere in a history, and as many more of them in a batch."""
    batch_size = settings.training.batch_size * settings.window.episodes // episodes
    window = replace(settings.window, episodes=episodes, every=_spacing(settings), span=False, hold=0)
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
            "baselines or bench) with the same --profile and --family"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch or make it again") from error


def known_result(name: str) -> dict[str, Any] | None:
    """Read a result of the repository; None where there is none, or one that is damaged and to be made again."""
    try:
        return load_result(name, experiments.RESULTS)
    except (FileNotFoundError, ValueError):
        return None


def with_seeds(agents: Sequence[str], seeds: Sequence[int], once: Sequence[str] = ()) -> list[tuple[str, int]]:
    """Pair each agent with its seeds: all of them, or the first alone where it is in `once`.

    Raises:
        ValueError: one of `once` is none of the agents.
    """
    for agent in once:
        check_known("agent", agent, agents)
    return [(agent, seed) for agent in agents for seed in (seeds[:1] if agent in once else seeds)]


def check_agents(agents: Sequence[str], once: Sequence[str] = ()) -> None:
    """Raise ValueError if `agents` are not what `in_context` needs."""
    if "mamba" not in agents:
        raise ValueError(f"agents {' '.join(agents)} lack mamba, whose controls the result holds; add it")
    if "mamba" in once:
        raise ValueError("mamba's controls are played with every seed; leave it out of those that have one alone")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError if `seeds` are none, not different, or not seeds."""
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(s) is int and 0 <= s < 2**63 for s in seeds):
        raise ValueError(f"seeds={tuple(seeds)} must be different whole numbers from 0 to below 2**63, one or more")


def check_replaces(name: str, seeds: Sequence[int], agents: Sequence[str] = (), once: Sequence[str] = ()) -> None:
    """Raise ValueError if `artifacts/results/name.json` holds agents or seeds that one in its place would lack."""
    there = known_result(name)
    if there is None:
        return
    lost = [agent for agent in there.get("weights", ()) if agent not in agents]
    lost += [f"seed {seed}" for seed in there["seeds"] if seed not in seeds]
    lost += [f"{agent}'s other seeds" for agent in once if len(there["returns"]["test"].get(agent, ())) > 1]
    if lost:
        path = experiments.RESULTS / f"{name}.json"
        raise ValueError(f"{path} would lose {', '.join(lost)}; name them too, or move the file away first")


def _untrained(settings: Profile, trained: ADPolicy) -> ADPolicy:
    """Return the network as it was before training, with the trained one's normalisation."""
    torch.manual_seed(settings.seed)
    policy = ADPolicy(settings.policy)
    statistics = trained.state_dict().keys() - dict(trained.named_parameters()).keys()
    policy.load_state_dict(policy.state_dict() | {name: trained.state_dict()[name] for name in statistics})
    return policy


def _references(
    settings: Profile, splits: Sequence[str] = ("test", "ood"), known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What `adbook.experiments.references` measures, by split; on some tasks it has to record the source's runs."""
    described = describe(settings)
    if known is not None and all(
        content_hash(known["settings"][key]) == content_hash(described[key])
        for key in ("family", "split", "n_test", "source")
    ):
        return {split: known["references"][split] for split in splits}
    return {split: vars(references(settings, split)) for split in splits}


def as_written(value: Any) -> Any:
    """As `save_result` writes it: arrays and tuples as lists, floats rounded to 4 decimals; "settings" as they are."""
    if isinstance(value, dict):
        return {key: item if key == "settings" else as_written(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return as_written(value.tolist())
    if isinstance(value, list | tuple):
        return [as_written(item) for item in value]
    return round(value, 4) if isinstance(value, float | np.floating) else value
