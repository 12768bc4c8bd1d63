"""Benchmarks of the source algorithms: how fast they are, and whether DroQ is DroQ."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor

from adbook.recipes import RECIPES, recipe
from adbook.sources import learn, run_source
from adbook.tasks import family as task_family
from adbook.vectors import TaskVector, simulator

DEFAULT_UPDATES = 3  # of stable-baselines3's defaults in a round, 2048 steps each


def bench_sources(updates: int = 6, rounds: int = 2) -> dict[str, Any]:
    """Measure environment steps a second of PPO on one core, learning included, beside stable-baselines3's defaults.

    Both learn the first training task of each family; ours with the data set's settings and recorded, the defaults with
    one gymnasium environment, 2048 steps an update, batches of 64 and no recording. They take turns, and the best round
    counts.

    Args:
        updates: of ours in a round.
        rounds: of each.

    Returns:
        By family: `steps_per_second`, `default_steps_per_second`, their `ratio` and the `simulator`.
    """
    torch.set_num_threads(1)
    measured: dict[str, Any] = {"cores": 1}
    for name in RECIPES:
        config, kind = recipe(name, "ppo").config, task_family(name)
        short = replace(config, steps=updates * config.n_envs * config.n_steps)
        ours, theirs = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            run_source(kind, kind.train_tasks[0], short, seed=0)
            ours.append(short.steps / (time.perf_counter() - start))
            start = time.perf_counter()
            with closing(kind.make(kind.train_tasks[0])) as env:
                model = PPO("MlpPolicy", env, device="cpu", seed=0)
                model.learn(DEFAULT_UPDATES * model.n_steps)
            theirs.append(model.num_timesteps / (time.perf_counter() - start))
        speeds = {"steps_per_second": max(ours), "default_steps_per_second": max(theirs)}
        measured[name] = speeds | {"ratio": max(ours) / max(theirs), "simulator": simulator(name)}
    return measured


def bench_droq(seeds: Sequence[int] = (0, 1, 2), steps: int = 6_000) -> dict[str, Any]:
    """Compare the learning curves of our DroQ and of sbx-rl's on one Half-Cheetah-Vel task, with the same settings.

    One difference remains: sbx-rl's policy follows the smaller of the critics, ours their mean, as the paper's does.
    Seconds are of one torch thread and of JAX with its compilation, so they are no comparison of the programs.

    Returns:
        "returns" and "sbx_returns", (seeds, episodes); the mean over seeds and the last quarter of episodes of each,
        `end` and `sbx_end`; and each one's `seconds` a seed.

    Raises:
        ModuleNotFoundError: if sbx-rl is not installed; the message says how to.
    """
    try:
        import sbx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the peer is missing; pip install sbx-rl==0.28.0 (it brings JAX)") from error
    kind = task_family("half-cheetah-vel")
    task = kind.train_tasks[5]
    config = replace(recipe(kind.name, "droq").config, steps=steps, hidden=(64, 64))
    curves: dict[str, list] = {"returns": [], "sbx_returns": []}
    seconds = {"seconds": 0.0, "sbx_seconds": 0.0}
    for seed in seeds:
        start = time.perf_counter()
        vector = TaskVector(kind, [task], seed=seed, capacity=steps, streams=1)
        learn(vector, config, seed)
        curves["returns"].append(_episode_returns(vector.streams[0]["rewards"], kind.horizon))
        seconds["seconds"] += (time.perf_counter() - start) / len(seeds)
        start = time.perf_counter()
        with closing(Monitor(kind.make(task))) as monitor:
            options = config.options(seed)
            regularised = {"dropout_rate": config.dropout, "layer_norm": True}
            options["policy_kwargs"] = {"net_arch": list(config.hidden)} | regularised
            peer = sbx.SAC("MlpPolicy", monitor, policy_delay=config.updates, **options)
            peer.learn(steps)
            curves["sbx_returns"].append(monitor.get_episode_rewards())
        seconds["sbx_seconds"] += (time.perf_counter() - start) / len(seeds)
    last = {name: float(np.array(c)[:, -max(1, len(c[0]) // 4) :].mean()) for name, c in curves.items()}
    return curves | {"end": last["returns"], "sbx_end": last["sbx_returns"]} | seconds | {"task": str(task)}


def _episode_returns(rewards: np.ndarray, horizon: int) -> list[float]:
    return rewards.reshape(-1, horizon).sum(1).astype(float).tolist()
