"""Benchmarks of the source algorithms: how fast they are, and whether DroQ is DroQ."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor

from adbook.recipes import RECIPES, recipe
from adbook.sources import PPOConfig, SourceConfig, learn, run_source
from adbook.tasks import TaskFamily
from adbook.tasks import family as task_family
from adbook.vectors import TaskVector, simulator

PEERS = {"ppo": (PPO, 6_144), "sac": (SAC, 600)}  # stable-baselines3's defaults, and the steps they make in a round
STEPS = {"ppo": 6_000, "sac": 1_000, "droq": 400}  # of ours in a round


def bench_sources(rounds: int = 2) -> dict[str, Any]:
    """Measure environment steps a second of each source on one core, learning included, beside the defaults of SB3.

    All learn the first training task of a family: ours with the data set's settings and recorded, the defaults in one
    gymnasium environment and not recorded. They take turns, and the best round counts. stable-baselines3 (SB3) has no
    DroQ.

    Args:
        rounds: of each.

    Returns:
        By family: its `simulator`, and by source `steps_per_second`, `default_steps_per_second` and their `ratio`.
    """
    torch.set_num_threads(1)
    measured: dict[str, Any] = {"cores": 1}
    for name, recipes in RECIPES.items():
        kind = task_family(name)
        measured[name] = {"simulator": simulator(name)}
        for source, chosen in recipes.items():
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(_own_speed(kind, chosen.config, STEPS[source]))
                if source in PEERS:
                    theirs.append(_default_speed(kind, *PEERS[source]))
            speeds = {"steps_per_second": max(ours)}
            if theirs:
                speeds |= {"default_steps_per_second": max(theirs), "ratio": max(ours) / max(theirs)}
            measured[name][source] = speeds
    return measured


def _own_speed(kind: TaskFamily, config: SourceConfig, steps: int) -> float:
    if isinstance(config, PPOConfig):
        update = config.n_envs * config.n_steps
        short = replace(config, steps=update * -(-steps // update))
    else:
        short = replace(config, steps=steps, learning_starts=0)  # hardly any step without its update
    start = time.perf_counter()
    run_source(kind, kind.train_tasks[0], short, seed=0)
    return short.steps / (time.perf_counter() - start)


def _default_speed(kind: TaskFamily, algorithm: type[BaseAlgorithm], steps: int) -> float:
    start = time.perf_counter()
    with closing(kind.make(kind.train_tasks[0])) as env:
        model = algorithm("MlpPolicy", env, device="cpu", seed=0).learn(steps)
    return model.num_timesteps / (time.perf_counter() - start)  # PPO finishes its update, so it may make more


def bench_droq(seeds: Sequence[int] = (0, 1, 2), steps: int = 6_000) -> dict[str, Any]:
    """Compare the learning curves of our DroQ and of sbx-rl's on one Half-Cheetah-Vel task, with the same settings.

    Two differences remain: sbx-rl's policy follows the smaller of the critics, ours their mean, as the paper's does,
    and its first weights are Flax's, ours torch's.

    Returns:
        "returns" and "sbx_returns", (seeds, episodes); the mean over seeds and the last quarter of episodes of each,
        `end` and `sbx_end`.

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
    for seed in seeds:
        vector = TaskVector(kind, [task], seed=seed, capacity=steps, streams=1)
        learn(vector, config, seed)
        curves["returns"].append(_episode_returns(vector.streams[0]["rewards"], kind.horizon))
        with closing(Monitor(kind.make(task))) as monitor:
            options = config.options(seed)
            regularised = {"dropout_rate": config.dropout, "layer_norm": True}
            options["policy_kwargs"] = {"net_arch": list(config.hidden)} | regularised
            peer = sbx.SAC("MlpPolicy", monitor, policy_delay=config.updates, **options)
            peer.learn(steps)
            curves["sbx_returns"].append(monitor.get_episode_rewards())
    last = {name: float(np.array(c)[:, -max(1, len(c[0]) // 4) :].mean()) for name, c in curves.items()}
    return curves | {"end": last["returns"], "sbx_end": last["sbx_returns"]} | {"task": str(task)}


def _episode_returns(rewards: np.ndarray, horizon: int) -> list[float]:
    return rewards.reshape(-1, horizon).sum(1).astype(float).tolist()
