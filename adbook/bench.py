"""Benchmarks as ratios against peers, measured side by side in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from adbook.bench_context import bench_context, training_step
from adbook.bench_exhibit import bench_exhibit
from adbook.bench_player import bench_player
from adbook.bench_scan import bench_gpu, bench_scan, high_water, mambapy_scan
from adbook.bench_sources import bench_droq, bench_sources
from adbook.experiments import evaluate, profile
from adbook.mamba import Mamba, MambaConfig
from adbook.policy import ADPolicy, PolicyConfig, PolicyState

BATCH, LENGTH = 20, 400  # the laptop profile's batches: 8 episodes of 50 steps on 20 tasks


def bench_training(rounds: int = 5) -> dict[str, float | int | str]:
    """Compare training of a 4-layer Mamba of width 64 with the same model on mambapy's parallel scan.

    Forward, backward and AdamW step on batches of 20 × 400 tokens, with the caller's number of torch threads.  The two
    take turns, and the best of the rounds counts for each, so that other load on the machine hits neither alone.

    Args:
        rounds: Timed steps of the peer; ours, being shorter, takes three for each.

    Returns:
        `tokens_per_second` of ours, `mambapy_tokens_per_second`, their `ratio`, and the setting they were measured in.

    Raises:
        ModuleNotFoundError: if mambapy is not installed; the message says how to.
    """
    scan = mambapy_scan()
    config = MambaConfig(d_model=64, n_layers=4, d_state=16)
    torch.manual_seed(0)
    ours = training_step(Mamba(config), BATCH, LENGTH)
    theirs = training_step(_with_scan(Mamba(config), scan), BATCH, LENGTH)
    ours(), theirs()  # compile, allocate
    times = [(min(ours() for _ in range(3)), theirs()) for _ in range(rounds)]
    best_ours, best_theirs = (min(column) for column in zip(*times, strict=True))
    tokens = BATCH * LENGTH
    return {
        "tokens_per_second": tokens / best_ours,
        "mambapy_tokens_per_second": tokens / best_theirs,
        "ratio": best_theirs / best_ours,
        "batch": BATCH,
        "length": LENGTH,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def bench_rollout(episodes: int = 40) -> dict[str, float | int]:
    """Measure whether a step of a rollout costs the same late as early, and whether memory stays flat.

    The laptop profile's network, untrained, on its 16 test tasks, the simulator running.

    Returns:
        Median milliseconds of a network step in episode 2 and in the last one, their ratio, and by how many MiB the
        process's peak memory grew from the end of episode 2 to the end.
    """
    settings = profile("laptop")
    torch.manual_seed(0)
    policy = _Timed(settings.policy)
    evaluate(settings, policy, episodes=episodes)
    steps = np.array(policy.seconds).reshape(episodes, -1) * 1e3
    peaks = np.array(policy.peaks).reshape(episodes, -1)[:, -1] / 2**20
    early, late = float(np.median(steps[1])), float(np.median(steps[-1]))
    growth = float(peaks[-1] - peaks[1])
    return {"episode_2_ms": early, "last_episode_ms": late, "ratio": late / early, "peak_growth_mib": growth}


BENCHMARKS = {
    "scan": bench_scan,
    "gpu": bench_gpu,
    "training": bench_training,
    "rollout": bench_rollout,
    "context": bench_context,
    "sources": bench_sources,
    "player": bench_player,
    "exhibit": bench_exhibit,
    "droq": bench_droq,  # the last, for its peer is the least likely to be installed
}


class _Timed(ADPolicy):
    """A policy that notes how long each step took and the process's peak memory after it, in bytes."""

    def __init__(self, config: PolicyConfig):
        super().__init__(config)
        self.seconds, self.peaks = [], []

    def act(self, *args, **kwargs) -> tuple[Tensor, PolicyState]:
        """Act as the policy does."""
        start = time.perf_counter()
        result = super().act(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        self.peaks.append(high_water())
        return result


def _with_scan(model: Mamba, scan: Callable[..., Tensor]) -> Mamba:
    """Let every layer of the model take the uncompiled path with another scan."""

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        block = layer.mixer
        return x + block.out_proj(block.inner(block.in_proj(layer.norm(x)), scan))

    for layer in model.layers:
        layer.forward = partial(forward, layer)
    return model
