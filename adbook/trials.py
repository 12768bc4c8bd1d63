"""Trying settings: train one policy with some settings changed, and measure it on tasks drawn for that alone.

    python -m adbook trial --family half-cheetah-vel window.hold=4 training.observation_noise=0.1

The tasks are fresh draws from the family's distribution, neither trained on nor among the test tasks, so that nothing
is tuned on what results are measured with. No source has been run on them; scores are between random actions and the
oracle. What was tried is kept in one file, good or bad: `artifacts/results/trials.json`.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from adbook import experiments
from adbook.checkpoints import trained_policy
from adbook.experiments import Profile, completed, describe, provenance
from adbook.oracle import Oracle
from adbook.results import load_result, save_result
from adbook.rollout import rollout
from adbook.source_scores import task_bounds

NAME = "trials"
N_TASKS, TASK_SEED = 16, 777


def changed(settings: Profile, changes: Sequence[str]) -> Profile:
    """Apply changes such as "training.updates=3000" or "n_tasks=20" to a profile; values are JSON, or plain text.

    Raises:
        ValueError: a change that is no assignment, or one of a field that there is not.
    """
    wanted: dict[str, Any] = {}  # nested as the settings are: what fits only together is set together
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} is not a change; write for example training.updates=3000")
        *parts, name = path.split(".")
        inner = wanted
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[name] = _value(value)  # the last of two that set the same
    return _with(settings, wanted)


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _with(part: Any, wanted: dict[str, Any]) -> Any:
    allowed = [f.name for f in fields(part)] if is_dataclass(part) else []
    for name in wanted:
        if name not in allowed:
            raise ValueError(f"there is no setting {name!r} here; choose from {', '.join(allowed) or 'none'}")
        if is_dataclass(getattr(part, name)) and not isinstance(wanted[name], dict):
            inner = ", ".join(f"{name}.{f.name}" for f in fields(getattr(part, name)))
            raise ValueError(f"{name!r} has settings of its own; choose from {inner}")
    values = {n: _with(getattr(part, n), value) if isinstance(value, dict) else value for n, value in wanted.items()}
    return replace(part, **values)


def trial(settings: Profile, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Train with changed settings and roll out on `N_TASKS` fresh tasks, two episodes more than a window has.

    Returns:
        JSON: "changes", "settings", "returns" (tasks, episodes), "bounds" with "random" and "oracle" (tasks,),
        "minutes" of training, "loss" of its last tenth, and where it was made.
    """
    run, made, oracle = changed(settings, changes), provenance(), Oracle.load(settings.family.name)
    policy, log = trained_policy(run)
    tasks = run.family.sample_tasks(N_TASKS, np.random.default_rng(TASK_SEED))
    played = rollout(policy, run.family, tasks, episodes=run.window.episodes + 2, seed=run.seed)
    bounds = task_bounds(oracle, tasks)
    loss = float(np.mean(log.losses[-max(1, len(log.losses) // 10) :]))
    measured = {"returns": played.returns, "bounds": bounds, "minutes": log.seconds / 60, "loss": loss}
    described = {"family": run.family.name, "agent": run.agent, "seed": run.seed, "changes": list(changes)}
    return described | measured | {"settings": describe(run), "made": made}


def keep(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a trial to the file, in place of an earlier one of the same settings; returns all that were tried."""
    folder = experiments.RESULTS
    tried = load_result(NAME, folder)["trials"] if (folder / f"{NAME}.json").is_file() else []
    tried = [other for other in tried if _same(other["settings"]) != _same(row["settings"])]
    save_result(NAME, {"trials": [*tried, row]}, folder)
    return load_result(NAME, folder)["trials"]


def _same(settings: dict[str, Any]) -> Any:
    """Settings in the form in which those of old and new files are equal."""
    return json.loads(json.dumps(completed(settings)))
