"""What a context costs: Mamba and a transformer of the same size, in training and at play, as the context grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adbook.experiments import as_agent, profile
from adbook.mamba import Mamba
from adbook.transformer import Transformer

TOKENS = 16_000  # of a training step: sequences × length
TASKS = 16  # side by side in a rollout


def bench_context(
    lengths: Sequence[int] = (30, 60, 125, 250, 500, 1000, 2000, 4000, 8000, 16_000),
    remembered: Sequence[int] = (1000, 3000, 10_000, 30_000, 100_000),
    rounds: int = 5,
) -> dict[str, Any]:
    """Compare the backbones of the laptop profile at contexts of many lengths.

    The transformer attends to all of a context. The two take turns, and the best of the rounds counts for each.

    Args:
        lengths: contexts in tokens (environment steps), increasing.
        remembered: steps after which a rollout's memory is weighed.
        rounds: timed repetitions.

    Returns:
        "lengths"; "training" by backbone, tokens a second, forward, backward and an AdamW step on batches of `TOKENS`;
        "rollout" by backbone, steps a second of one task, `TASKS` side by side, of a network whose context is full;
        "crossing" of each of the two, the length from which on Mamba is quicker (None if there is none);
        "remembered", and "memory" by backbone, bytes a task carries after so many steps.
    """
    timers = {"training": (_training, TOKENS), "rollout": (_playing, TASKS)}
    speeds: dict[str, dict[str, list[float]]] = {kind: {"mamba": [], "transformer": []} for kind in timers}
    for length in lengths:
        models = _models(length)
        for kind, (timed, work) in timers.items():
            steps = {name: timed(model, length) for name, model in models.items()}
            [step() for step in steps.values()]  # compile, allocate
            times = np.array([[step() for step in steps.values()] for _ in range(rounds)]).min(0)
            for name, seconds in zip(steps, times, strict=True):
                speeds[kind][name].append(work / seconds)
    crossing = {kind: _crossing(lengths, found["mamba"], found["transformer"]) for kind, found in speeds.items()}
    memory = {name: [_bytes(_models(n)[name]) for n in remembered] for name in ("mamba", "transformer")}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in _models(1).items()}
    measured = {"lengths": list(lengths), **speeds, "crossing": crossing, "weights": sizes}
    return measured | {"remembered": list(remembered), "memory": memory, "threads": torch.get_num_threads()}


def _models(context: int) -> dict[str, Mamba | Transformer]:
    settings = profile("laptop")
    attention = replace(as_agent(settings, "transformer").backbone, context=context)
    torch.manual_seed(0)
    return {"mamba": Mamba(settings.backbone), "transformer": Transformer(attention)}


def _training(model: Mamba | Transformer, length: int) -> Callable[[], float]:
    """A function that makes one training step and returns its seconds, as if for `TOKENS` tokens."""
    batch = max(1, TOKENS // length)
    step = training_step(model, batch, length)
    return lambda: step() * TOKENS / (batch * length)


def training_step(model: Mamba | Transformer, batch: int, length: int) -> Callable[[], float]:
    """Return a function that makes one training step on random data and returns its seconds."""
    tokens, target = torch.randn(2, batch, length, model.config.d_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        (model(tokens) - target).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def _playing(model: Mamba | Transformer, length: int, steps: int = 10) -> Callable[[], float]:
    """A function that returns the seconds of one step of `TASKS` tasks, in one thread, with a full context."""
    state = model.init_state(TASKS)
    if isinstance(model, Transformer):
        state.position = length  # the cache counts as full; what is in it costs the same
    token = torch.randn(TASKS, model.config.d_model)

    @torch.inference_mode()
    def step() -> float:
        threads, carried = torch.get_num_threads(), state
        torch.set_num_threads(1)
        try:
            start = time.perf_counter()
            for _ in range(steps):
                _, carried = model.step(token, carried)
            return (time.perf_counter() - start) / steps
        finally:
            torch.set_num_threads(threads)

    return step


def _crossing(lengths: Sequence[int], mamba: Sequence[float], transformer: Sequence[float]) -> float | None:
    """Length from which on Mamba stays quicker, between measured lengths by a power law; None if it never does."""
    ahead = np.log(mamba) - np.log(transformer)
    behind = np.flatnonzero(ahead <= 0)
    if not len(behind):
        return float(lengths[0])
    i = int(behind[-1])
    if i == len(lengths) - 1:
        return None
    part = ahead[i] / (ahead[i] - ahead[i + 1])
    return float(np.exp(np.log(lengths[i]) * (1 - part) + np.log(lengths[i + 1]) * part))


def _bytes(model: Mamba | Transformer) -> int:
    """Size of all tensors that one task's state holds."""
    if isinstance(model, Transformer):
        held: list[Tensor] = [x for cache in model.init_state(1).caches for x in (cache.keys, cache.values)]
    else:
        held = [x for layer in model.init_state(1) for x in (layer.conv, layer.ssm)]
    return sum(x.numel() * x.element_size() for x in held)
