"""The baselines with the settings of an experiment: meta-trained once, kept, and played on the agents' tasks.

python -m adbook baselines --family half-cheetah-vel      to `artifacts/baselines` and `artifacts/results`
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import nn
from tqdm import tqdm

from adbook import experiments
from adbook.baselines.macaw import MACAW, MACAWConfig, Transitions, meta_train, transitions
from adbook.baselines.macaw_adaptation import AdaptingMACAW
from adbook.baselines.mql import MQL
from adbook.baselines.mql import meta_train as meta_train_mql
from adbook.baselines.mql_adaptation import AdaptationConfig, AdaptingMQL
from adbook.baselines.mql_replay import MQLConfig
from adbook.checks import check_known
from adbook.datasets import BEST, data_path, load_histories
from adbook.experiments import ROOT, Profile, describe, evaluate, provenance, shown, source_histories
from adbook.files import content_hash
from adbook.histories import LearningHistory
from adbook.results import as_written, check_seeds
from adbook.tasks import Task

METHODS = ("macaw", "macaw-online", "mql")
BASELINES = ROOT / "artifacts" / "baselines"

# Published for an Ant-Dir of two directions, forwards and backwards; what is published for Half-Cheetah-Vel is the
# default, also of the other families.
_MQL_ANT = {"context": 25, "memory": 30, "learning_rate": 3e-4, "policy_noise": 0.4, "policy_delay": 4}
_MQL_ANT |= {"exploration": 0.2, "random_steps": 60_000}
_ADAPTATION_ANT = AdaptationConfig(new_updates=5, old_updates=400, l2=0.05, beta_max=3.3)
# What a profile's machine can do.
_MACAW_SCALE = {
    "smoke": {"hidden": (16, 16), "latent": 4, "batch": 64, "tasks": 2, "updates": 4},
    "laptop": {"updates": 10_000},
    "paper": {"updates": 200_000},
}
_MQL_SCALE = {
    "smoke": {"hidden": (16, 16), "batch": 32, "updates_per_step": 0.02},
    "laptop": {"steps": 400_000, "updates_per_step": 0.125},
    "paper": {"steps": 2_000_000, "updates_per_step": 1.0},
}
_REPLAY_EPISODES = 6  # that are kept of each task's meta-training, for adaptation


def macaw_config(settings: Profile) -> MACAWConfig:
    """Return MACAW's settings for a family and a profile."""
    return MACAWConfig(**_sizes(settings), **_MACAW_SCALE[settings.name], seed=settings.seed)


def mql_config(settings: Profile) -> tuple[MQLConfig, AdaptationConfig]:
    """Return MQL's settings for a family and a profile, and those of its adaptation."""
    ant = settings.family.name == "ant-dir"
    adaptation = _ADAPTATION_ANT if ant else AdaptationConfig()
    if settings.name == "smoke":
        adaptation = AdaptationConfig(steps=50, new_updates=1, old_updates=2, old_batch=32, samples=50)
    own = (_MQL_ANT if ant else {}) | _MQL_SCALE[settings.name]
    if settings.name == "smoke":  # four episodes of each task, two of them random
        each = settings.n_tasks * settings.family.horizon
        own |= {"steps": 4 * each, "random_steps": 2 * each}
    return MQLConfig(**_sizes(settings), horizon=settings.family.horizon, **own, seed=settings.seed), adaptation


def _sizes(settings: Profile) -> dict[str, Any]:
    return {name: getattr(settings.family, name) for name in ("observation_size", "action_size", "action_scale")}


def trained_macaw(settings: Profile, *, recompute: bool = False, progress: bool = True) -> MACAW:
    """Load MACAW as meta-trained on the data set's histories of the training tasks; if it is not there, meta-train it.

    Args:
        settings: the profile; its data, its seed.
        recompute: leave the repository's aside; what `runs/` holds is used again.
        progress: show bars.
    """
    config = macaw_config(settings)
    path = _path("macaw", settings, config, recompute)
    if path.is_file():
        return MACAW.load(path)
    made, macaw = provenance(), MACAW(config)
    tasks, checkpoint = list(by_task(settings, "train", config.discount).values()), path.with_suffix(".training")
    losses, seconds = meta_train(macaw, tasks, checkpoint=checkpoint, progress=progress)
    about = {"settings": describe(settings), "minutes": seconds / 60, "losses": _thinned(losses)}
    trained = MACAW.load(macaw.save(path, about | made))
    checkpoint.unlink(missing_ok=True)
    return trained


def trained_mql(settings: Profile, *, recompute: bool = False, progress: bool = True) -> AdaptingMQL:
    """Load MQL as meta-trained in the environments of the training tasks; if it is not there, meta-train it.

    The arguments are those of `trained_macaw`.
    """
    config, adaptation = mql_config(settings)
    path = _path("mql", settings, (config, adaptation), recompute)
    if path.is_file():
        return AdaptingMQL.load(path)
    made, model, checkpoint = provenance(), MQL(config), path.with_suffix(".training")
    replay, seconds = meta_train_mql(
        model, settings.family, settings.train_tasks, checkpoint=checkpoint, progress=progress
    )
    kept = replay.thinned(_REPLAY_EPISODES, skip=-(-config.random_steps // settings.n_tasks))
    about = {"settings": describe(settings), "minutes": seconds / 60}
    trained = AdaptingMQL.load(AdaptingMQL(model, kept, adaptation, settings.seed).save(path, about | made))
    checkpoint.unlink(missing_ok=True)
    return trained


_TRAINED = {"macaw": trained_macaw, "mql": trained_mql}


def by_task(settings: Profile, split: str, discount: float) -> dict[tuple[float, ...], Transitions]:
    """Return the transitions of a split's tasks by goal.

    They are those of the data set, of the source that serves the family best; for MACAW's own tasks they are recorded.

    Raises:
        ValueError: tasks of which the data set holds nothing.
    """
    goals = {task.goal for task in settings.tasks(split)}
    if split == "macaw":
        histories = source_histories(settings, split)
    else:
        histories = load_histories(settings.family.name, split=split)
        histories = [history for history in histories if _goal(history) in goals]
        histories = shown(settings, histories) if split == "train" else histories
    grouped: dict[tuple[float, ...], list[LearningHistory]] = {}
    for history in histories:
        grouped.setdefault(_goal(history), []).append(history)
    if missing := goals - set(grouped):
        raise ValueError(f"the data set holds no histories of {len(missing)} of {len(goals)} {split} tasks; use fewer")
    return {goal: transitions(each, discount) for goal, each in grouped.items()}


def _goal(history: LearningHistory) -> tuple[float, ...]:
    return Task(**history.metadata["task"]).goal


def agent(settings: Profile, method: str, split: str, *, recompute: bool = False) -> nn.Module:
    """Return a method as a policy that plays the tasks of a split.

    Raises:
        ValueError: unknown method, a split without tasks, or "macaw" on tasks of which there are no histories.
    """
    check_known("method", method, METHODS)
    settings.family.check(settings.tasks(split))
    if (method, split) == ("macaw", "ood"):
        raise ValueError("macaw adapts to recorded histories, and there are none of split 'ood'; use macaw-online")
    if method == "mql":
        return trained_mql(settings, recompute=recompute)
    macaw = trained_macaw(settings, recompute=recompute)
    if method == "macaw-online":
        return AdaptingMACAW(macaw)
    there, rng = by_task(settings, split, macaw.config.discount), np.random.default_rng(settings.seed)
    batches = []
    for task in settings.tasks(split):
        rows = torch.from_numpy(rng.choice(len(there[task.goal].returns), macaw.config.batch, replace=False))
        batches.append(Transitions(*(x[rows] for x in there[task.goal])))
    return AdaptingMACAW(macaw, batches)


def baselines(
    settings: Profile,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = METHODS,
    known: dict[str, Any] | None = None,
    *,
    recompute: bool = False,
    n_jobs: int = -1,
) -> dict[str, Any]:
    """Meta-train each method with each seed, and play it on the held-out tasks of `adbook.results.in_context`.

    Actions are at their means, but for MACAW's before it adapts: neither method is meant to be played with dice.

    Args:
        settings: the profile.
        seeds: of meta-training.
        methods: of `METHODS`.
        known: such a result; the seeds that it holds are taken from it, if it is one of the same settings.
        recompute: leave the repository's networks aside; what `runs/` holds is used again.
        n_jobs: processes that meta-train side by side, one thread each; -1: one a core.

    Returns:
        JSON: "each", by seed {"returns" by split and method (tasks, episodes), "minutes" of meta-training by method,
        "made", where it was made}; "settings", "configs", "methods", "seeds".

    Raises:
        ValueError: unknown methods, or seeds that are none or not different.
    """
    check_seeds(seeds)
    for method in methods:
        check_known("method", method, METHODS)
    configs = {"macaw": asdict(macaw_config(settings)), "mql": [asdict(config) for config in mql_config(settings)]}
    described = as_written({"settings": describe(settings), "configs": configs, "methods": methods})
    same = known is not None and all(content_hash(known.get(key)) == content_hash(described[key]) for key in described)
    there = dict(zip(known["seeds"], known["each"], strict=True)) if same else {}
    new = [replace(settings, seed=seed) for seed in seeds if seed not in there]
    kinds = sorted({method.removesuffix("-online") for method in methods})
    Parallel(n_jobs)(delayed(_train)(one, kind, recompute) for one in new for kind in kinds)
    made = {one.seed: _with_seed(one, methods, recompute) for one in new}
    each = [(there | made)[seed] for seed in seeds]
    return described | {"seeds": list(seeds), "each": each}


def _train(settings: Profile, kind: str, recompute: bool) -> None:
    """Have a method meta-trained, and found by the next who asks."""
    _TRAINED[kind](settings, recompute=recompute)


def _with_seed(settings: Profile, methods: Sequence[str], recompute: bool) -> dict[str, Any]:
    """A seed's part of `baselines`."""
    made, splits = provenance(), ("test", "ood", *(["macaw"] if settings.macaw_tasks else []))
    trained = {method: _TRAINED[method.removesuffix("-online")](settings, recompute=recompute) for method in methods}
    plays = [(split, method) for split in splits for method in methods if (method, split) != ("macaw", "ood")]
    # All before the first is played: to record what MACAW adapts to is a parallel job of its own.
    agents = [agent(settings, method, split, recompute=recompute) for split, method in plays]
    jobs = (delayed(_play)(settings, one, split) for one, (split, _) in zip(agents, plays, strict=True))
    done = Parallel(n_jobs=-1, return_as="generator")(jobs)
    returns: dict[str, dict[str, np.ndarray]] = {split: {} for split in splits}
    for (split, method), played in zip(plays, tqdm(done, total=len(plays), unit="rollout"), strict=True):
        returns[split][method] = played
    minutes = {method: one.about["minutes"] for method, one in trained.items()}
    return {"returns": returns, "minutes": minutes, "made": made}


def returns(result: dict[str, Any], split: str) -> dict[str, np.ndarray]:
    """Returns (seeds, tasks, episodes) of each method that a result of `baselines` holds on a split."""
    parts = [one["returns"][split] for one in result["each"]]
    return {method: np.array([part[method] for part in parts]) for method in parts[0]}


def publish(settings: Profile) -> list[Path]:
    """Put both methods of these settings into the repository, with weights of 16 bits; meta-train them first."""
    written = []
    for method, config, trained in (
        ("macaw", macaw_config(settings), trained_macaw(settings)),
        ("mql", mql_config(settings), trained_mql(settings)),
    ):
        path = BASELINES / _path(method, settings, config, recompute=True).name
        if not path.is_file():
            trained.save(path, trained.about, half=True)
        written.append(path)
    return written


def _play(settings: Profile, policy: nn.Module, split: str) -> np.ndarray:
    return evaluate(settings, policy, split, deterministic=True).returns


def _thinned(losses: np.ndarray, most: int = 200) -> list[list[float]]:
    """Means over equal stretches of the updates, for a figure."""
    return [piece.mean(0).round(4).tolist() for piece in np.array_split(losses, min(most, len(losses)))]


def _path(method: str, settings: Profile, config: Any, recompute: bool) -> Path:
    """Where a meta-trained method is: in the repository, else among the runs; the name holds all that shapes it."""
    tasks = [task.goal for task in settings.train_tasks]
    parts = [asdict(part) for part in (config if isinstance(config, tuple) else (config,))]
    if method == "macaw":  # learns from the data set; MQL in environments, which are alike in either simulator
        stored = data_path(settings.family.name, BEST[settings.family.name], "train")
        parts.append(hashlib.blake2b(stored.read_bytes()).hexdigest())
    hashed = content_hash(method, settings.family.name, tasks, settings.kept, settings.images, *parts)
    name = f"{method}-{settings.family.name}-{settings.name}-seed{settings.seed}-{hashed}.safetensors"
    committed = BASELINES / name
    return committed if committed.is_file() and not recompute else experiments.RUNS / "baselines" / name
