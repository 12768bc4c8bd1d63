"""Trained policies: those that the repository holds, and those that are trained here."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from adbook import experiments, generation, metrics
from adbook.experiments import ROOT, Profile, describe, provenance, source_histories
from adbook.files import content_hash, write_whole
from adbook.policy import ADPolicy
from adbook.sources import source_name
from adbook.training import TrainingLog, train
from adbook.training_cuda import Training, train_side_by_side
from adbook.vectors import SIMULATORS
from adbook.windows import Windows

CHECKPOINTS = ROOT / "artifacts" / "checkpoints"


def trained_policy(
    settings: Profile, *, recompute: bool = False, progress: bool = True
) -> tuple[ADPolicy, TrainingLog]:
    """Load the policy of these settings: one that was trained here, or the repository's; if there is none, train it.

    A training that was interrupted goes on from its last checkpoint. The policy is on the CPU, wherever it was trained:
    a step of a rollout is too little work for a GPU to pay.

    Args:
        settings: the profile.
        recompute: leave the repository's policies aside.
        progress: show bars.
    """
    folder = _own(settings)
    if (folder / "config.json").exists():
        print(f"policy: loaded {_shown(folder)}")
        return _load(folder)
    if not recompute and is_published(settings):
        print(f"policy: loaded artifacts/checkpoints/{published_at(settings).name}")
        return _load(published_at(settings))
    made = provenance()  # of the code that runs now, whatever is committed meanwhile
    windows = Windows(source_histories(settings, progress=progress), settings.window, settings.family.horizon)
    torch.manual_seed(settings.seed)
    policy = ADPolicy(settings.policy)
    training = replace(settings.training, seed=settings.seed)
    checkpoint = folder / "training.safetensors"
    log = train(policy, windows, training, checkpoint=checkpoint, progress=progress)
    policy.save_pretrained(folder, about={"settings": describe(settings), "log": asdict(log)} | made)
    checkpoint.unlink(missing_ok=True)
    print(f"policy: trained {len(log.losses)} updates in {log.seconds / 60:.1f} minutes, saved as {_shown(folder)}")
    return policy.cpu(), log


def train_on_gpu(wanted: Sequence[Profile]) -> None:
    """Train what is missing of some policies, all of the same data, side by side on a GPU, as `trained_policy` would.

    Args:
        wanted: the profiles; those whose policies are here or in the repository are left alone.

    Raises:
        ValueError: the profiles are not of the same data.
        FloatingPointError: the loss of a training was not finite.
    """
    data = {(p.family.name, p.family.split, p.train_tasks, p.source, p.source_seeds, p.kept, p.images) for p in wanted}
    if len(data) > 1:
        raise ValueError("policies that are trained side by side must be of the same data; train these in turn")
    missing = [one for one in wanted if not is_published(one) and not (_own(one) / "config.json").exists()]
    if not missing:
        return
    made, histories = provenance(), source_histories(missing[0])
    trainings = []
    for one in missing:
        torch.manual_seed(one.seed)
        windows, training = Windows(histories, one.window, one.family.horizon), replace(one.training, seed=one.seed)
        # In 32 bits attention has no fast kernel, and takes three times as long; the scan is no quicker in 16.
        half = one.policy.backbone_name == "transformer"
        trainings.append(Training(ADPolicy(one.policy), windows, training, half))
    try:
        for i, log in tqdm(train_side_by_side(trainings), total=len(missing), unit="policy"):
            about = {"settings": describe(missing[i]), "log": asdict(log)} | made
            trainings[i].policy.save_pretrained(_own(missing[i]), about=about)
    except FloatingPointError as error:
        order = ", ".join(f"{i}: {one.agent}, seed {one.seed}" for i, one in enumerate(missing))
        raise FloatingPointError(f"{error}; what has ended is kept, so ask for the others alone ({order})") from error


def published_at(settings: Profile) -> Path:
    """Folder in which the repository keeps a policy; that of the profile "laptop" and seed 0 has the plain name."""
    profile = "" if settings.name == "laptop" else f"-{settings.name}"
    seed = f"-seed{settings.seed}" if settings.seed else ""
    return CHECKPOINTS / f"{settings.family.name}-{settings.agent}{profile}{seed}"


def is_published(settings: Profile) -> bool:
    """Whether the repository holds the policy of exactly these settings, whichever simulator its data come from."""
    config = published_at(settings) / "config.json"
    hashes = (_training_hash(settings, stepped_by) for stepped_by in SIMULATORS)
    return config.is_file() and json.loads(config.read_text())["about"].get("training") in hashes


def published_policy(settings: Profile) -> tuple[ADPolicy, TrainingLog]:
    """Load the repository's policy, and only if it has none, `trained_policy`'s."""
    return _load(published_at(settings)) if is_published(settings) else trained_policy(settings)


def publish(settings: Profile) -> Path:
    """Put the policy of these settings into the repository, with weights of 16 bits; train it first if need be."""
    if not is_published(settings):
        policy, log = trained_policy(settings)
        kept = asdict(log) | {"losses": [round(loss, 4) for loss in log.losses]}
        made = json.loads((_own(settings) / "config.json").read_text())["about"] | {"log": kept}
        policy.save_pretrained(published_at(settings), about=made | {"training": _training_hash(settings)}, half=True)
    return published_at(settings)


_CARD = """---
license: mit
library_name: adbook
pipeline_tag: reinforcement-learning
tags: [in-context-reinforcement-learning, algorithm-distillation, {backbone}]
---
# {name}

A policy that learns in context: with frozen weights it gets better at a task of {family} that it has never seen, from
episode to episode. It imitates learning histories of {source} (algorithm distillation).

    policy = adbook.ADPolicy.from_pretrained("artifacts/checkpoints/{name}")
    adbook.rollout(policy, adbook.family("{family}"), adbook.family("{family}").test_tasks, episodes={episodes})

| | |
|---|---|
| data | {n_tasks} training tasks, {streams} histories each of {source}, {steps:,} environment steps a task{thinned} |
| window | {window} |
| network | {agent}, {weights:,} weights, kept in 16 bits |
| training | {updates:,} updates of {batch:,} tokens in {minutes:.0f} minutes on {machine}, seed {seed} |
| made | {date}, commit {commit}, torch {torch}{note} |

Score on {n_test} test tasks (0: random actions, 1: the end of {source} on the same task; interquartile mean):
{first:.2f} in episode 1, **{last:.2f}** in the last five of {episodes}{all_seeds}.{reread}

Limits: one family of tasks, one simulator (MuJoCo, gymnasium v5); actions are to be sampled, not taken at their means;
beyond {window_episodes} episodes it does what no training has corrected. All settings are in `config.json`, all numbers
in `artifacts/results`.
"""


def write_card(settings: Profile, result: dict[str, Any]) -> Path:
    """Write the model card of a policy of the repository, with its scores.

    Args:
        settings: of the policy.
        result: of `adbook.results.in_context`, with this agent and seed.
    """
    about = json.loads((published_at(settings) / "config.json").read_text())["about"]
    ends = (np.array(result["references"]["test"][end]) for end in ("random", "source"))
    scores = metrics.normalized_score(result["returns"]["test"][settings.agent], *ends)  # (seeds, tasks, episodes)
    own = scores[result["seeds"].index(settings.seed)][None]
    window, training = settings.window, settings.training
    spread = "one of each equal stretch of a history" if window.every is None else f"one in {window.every}"
    shown = f"{window.episodes} whole episodes, {spread}"
    if window.hold:
        shown += f", and the last {window.hold} from the last {window.every} of a history"
    if window.strays:
        shown += f"; but for the last, {window.strays:.0%} of them give way to strays, of any task"
    text = _CARD.format(
        **{key: about[key] for key in ("machine", "date", "commit", "torch")},
        note=f"; {about['note']}" if "note" in about else "",
        name=published_at(settings).name,
        family=settings.family.name,
        backbone=settings.policy.backbone_name,
        agent=settings.agent,
        source=source_name(settings.source),
        steps=settings.source.steps,
        streams=settings.source.streams * len(settings.source_seeds),
        n_tasks=settings.n_tasks,
        n_test=settings.n_test,
        thinned=(f"; at most {settings.kept} episodes kept of each" if settings.kept else "")
        + ("; with their turned and mirrored images" if settings.images else ""),
        window=shown,
        window_episodes=window.episodes,
        weights=result["weights"][settings.agent],
        updates=training.updates,
        batch=training.batch_size * window.episodes * settings.family.horizon,
        minutes=about["log"]["seconds"] / 60,
        seed=settings.seed,
        episodes=settings.episodes,
        first=metrics.iqm(own[..., 0]),
        last=metrics.iqm(own[..., -5:].mean(-1)),
        all_seeds=f"; all {len(scores)} seeds together: {metrics.iqm(scores[..., -5:].mean(-1)):.2f}"
        if len(scores) > 1
        else "",
        reread=_reread(settings, result),
    )
    return write_whole(published_at(settings) / "README.md", lambda file: file.write_text(text))


def _reread(settings: Profile, result: dict[str, Any]) -> str:
    """What the card says of a policy that was also played with its last episodes read anew; else nothing."""
    returns = result["returns"]["test"].get(f"{settings.agent}, reread")
    if returns is None:
        return ""
    ends = (np.array(result["references"]["test"][end]) for end in ("random", "source"))
    own = metrics.normalized_score(returns, *ends)[result["seeds"].index(settings.seed), :, -5:].mean(-1)
    how = f"`adbook.controls.Rereading(policy, {experiments.reread_episodes(settings)})`"
    return f"\nWith its last episodes read anew before each ({how}): {metrics.iqm(own[None]):.2f}."


def _own(settings: Profile) -> Path:
    name = f"{settings.family.name}-{settings.name}-{settings.agent}-seed{settings.seed}"
    return experiments.RUNS / "policies" / f"{name}-{_training_hash(settings)}"


def _shown(folder: Path) -> Path:
    return folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder


def _load(folder: Path) -> tuple[ADPolicy, TrainingLog]:
    policy = ADPolicy.from_pretrained(folder)
    return policy, TrainingLog(**json.loads((folder / "config.json").read_text())["about"]["log"])


def _training_hash(settings: Profile, stepped_by: str | None = None) -> str:
    """Hash of all that shapes the weights: data, model, training, seed; not the profile's name or its evaluation."""
    of = {"seeds": settings.source_seeds, "stepped_by": stepped_by}
    paths = generation.run_paths(settings.family, settings.train_tasks, settings.source, **of)
    window = {k: v for k, v in asdict(settings.window).items() if k != "strays" or v}  # newer than some policies
    parts = [asdict(settings.policy), window, asdict(settings.training)]
    if settings.kept is not None:
        parts.append([True, settings.kept])
    if settings.images:
        parts.append("images")
    return content_hash([path.name for path in paths], *parts, settings.policy.backbone_name, settings.seed)
