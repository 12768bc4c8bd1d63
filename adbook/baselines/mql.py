"""MQL, meta-Q-learning (Fakoor et al., arXiv 1910.00125): TD3 over all training tasks, with a recurrent context.

This module meta-trains; `adbook.baselines.mql_adaptation` fits the result to a task that it does not know. Actor and
critics see, beside the observation, the last state of a GRU that has read the last ``H`` transitions of the episode.

Symbols of shapes are those of `adbook.baselines.mql_replay`.
"""

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from adbook.baselines.mql_replay import Batch, MQLConfig, Replay, no_past, remembered
from adbook.files import content_hash
from adbook.play import check_fits, one_thread
from adbook.stored import load_training, save_training
from adbook.tasks import Task, TaskFamily
from adbook.vectors import TaskVector

CHECKPOINT_EVERY = 20_000  # steps over all tasks


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Context(nn.Module):
    """What a GRU makes of the last transitions."""

    def __init__(self, config: MQLConfig):
        """See the class."""
        super().__init__()
        self.gru = nn.GRU(config.observation_size + config.action_size + 1, config.memory, batch_first=True)

    def forward(self, past: Tensor) -> Tensor:
        """(B, H, F) -> (B, memory)."""
        return self.gru(past)[1][0]


class Actor(nn.Module):
    """Deterministic actions from observation and context."""

    def __init__(self, config: MQLConfig):
        """See the class."""
        super().__init__()
        self.scale, self.context = config.action_scale, Context(config)
        self.net = _mlp((config.observation_size + config.memory, *config.hidden, config.action_size))

    def forward(self, past: Tensor, observations: Tensor) -> Tensor:
        """(B, H, F), (B, O) -> (B, A)."""
        return self.scale * self.net(torch.cat((observations, self.context(past)), 1)).tanh()


class Critics(nn.Module):
    """Two estimates of the return, which share a context."""

    def __init__(self, config: MQLConfig):
        """See the class."""
        super().__init__()
        self.context = Context(config)
        inputs = config.observation_size + config.memory + config.action_size
        self.nets = nn.ModuleList(_mlp((inputs, *config.hidden, 1)) for _ in range(2))

    def forward(self, past: Tensor, observations: Tensor, actions: Tensor) -> Tensor:
        """(B, H, F), (B, O), (B, A) -> (2, B)."""
        seen = torch.cat((observations, self.context(past), actions), 1)
        return torch.stack([net(seen).squeeze(1) for net in self.nets])


class MQL(nn.Module):
    """Actor and critics."""

    def __init__(self, config: MQLConfig):
        """Weights are drawn from `config.seed`."""
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(config.seed)
            self.actor, self.critics = Actor(config), Critics(config)


class Learner:
    """TD3 on an `MQL`: targets, optimisers, and one update at a time."""

    def __init__(self, model: MQL, seed: int = 0, learning_rate: float | None = None):
        """Start with fresh optimisers and with targets that equal `model`, which is changed in place."""
        rate = model.config.learning_rate if learning_rate is None else learning_rate
        self.model, self.target = model, copy.deepcopy(model).requires_grad_(False)
        self.optimizers = [
            torch.optim.Adam(net.parameters(), lr=rate, fused=True) for net in (model.critics, model.actor)
        ]
        self.generator = torch.Generator().manual_seed(seed)
        self.updates = 0

    def update(self, batch: Batch, weights: Tensor | None = None, *, anchor: MQL | None = None, pull: float = 0.0):
        """Make one update of the critics, and every `policy_delay`-th time, from the first, one of actor and targets.

        Args:
            batch: transitions.
            weights: (B,) of the transitions in both losses; all equal if not given.
            anchor: the proximal term draws both networks towards this one.
            pull: λ of that term, λ / 2 · ‖θ − θ_anchor‖².
        """
        model, config = self.model, self.model.config
        weights = torch.ones(len(batch.rewards)) if weights is None else weights
        errors = model.critics(batch.past, batch.observations, batch.actions) - self.wanted(batch)
        loss = (weights * errors.square().sum(0)).mean() + proximal(model.critics, anchor and anchor.critics, pull)
        self._step(0, loss)
        self.updates += 1
        if (self.updates - 1) % config.policy_delay:
            return
        actions = model.actor(batch.past, batch.observations)
        values = model.critics(batch.past, batch.observations, actions)[0]
        self._step(1, -(weights * values).mean() + proximal(model.actor, anchor and anchor.actor, pull))
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, config.tau)

    @torch.no_grad()
    def wanted(self, batch: Batch) -> Tensor:
        """Targets of the critics, (B,): reward and the smaller estimate of what follows, at a slightly noisy action."""
        config, target = self.model.config, self.target
        actions = target.actor(batch.next_past, batch.next_observations)
        noise = config.policy_noise * torch.randn(actions.shape, generator=self.generator)
        noise = config.action_scale * noise.clamp(-config.noise_clip, config.noise_clip)
        actions = (actions + noise).clamp(-config.action_scale, config.action_scale)
        following = target.critics(batch.next_past, batch.next_observations, actions).amin(0)
        return batch.rewards + config.discount * (1 - batch.terminated) * following

    def _step(self, which: int, loss: Tensor) -> None:
        self.optimizers[which].zero_grad()
        loss.backward(inputs=[p for group in self.optimizers[which].param_groups for p in group["params"]])
        self.optimizers[which].step()


def proximal(net: nn.Module, anchor: nn.Module | None, pull: float) -> Tensor | float:
    """λ / 2 · ‖θ − θ_anchor‖² over all parameters."""
    if anchor is None or not pull:
        return 0.0
    pairs = zip(net.parameters(), anchor.parameters(), strict=True)
    return pull / 2 * sum((p - a.detach()).square().sum() for p, a in pairs)


@one_thread()
def meta_train(
    model: MQL,
    family: TaskFamily,
    tasks: Sequence[Task],
    *,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[Replay, float]:
    """Meta-train in the environments of the training tasks, all side by side.

    Args:
        model: is changed in place.
        family: of the tasks.
        tasks: training tasks; steps are counted over all of them.
        checkpoint: a file to keep the state in; meta-training goes on from it if it is there, with fresh episodes.
        progress: show a bar.

    Returns:
        All that was seen, which adaptation goes on to use, and the seconds that it took.

    Raises:
        ValueError: a task that is not for training; a family of other sizes than the model's; a checkpoint that is
            damaged or of another training.
        FloatingPointError: the actor's actions stopped being finite.
    """
    family.check(tasks)
    check_fits(model, family)
    foreign = sorted({task.split for task in tasks} - {"train"})
    if foreign:
        raise ValueError(f"tasks of split {', '.join(foreign)} given; meta-training is for training tasks")
    config, n = model.config, len(tasks)
    rng, learner, last = np.random.default_rng(config.seed), Learner(model, config.seed), -(-config.steps // n)
    replay, past, since_start = Replay(n, last, config), no_past(n, config), np.zeros(n)
    identity = content_hash(asdict(config), family.name, [task.goal for task in tasks])
    due, before = 0.0, 0.0
    if checkpoint is not None and Path(checkpoint).exists():
        due, before = _resume(checkpoint, learner, replay, rng, identity)
    first, began = replay.steps, time.perf_counter()
    vector = TaskVector(family, tasks, seed=config.seed + first)
    try:
        observations = vector.reset()
        for step in tqdm(range(first, last), initial=first, total=last, unit="step", disable=not progress):
            actions = _explore(model, past, observations, rng, random=step * n < config.random_steps)
            following, rewards, done, infos = vector.step(actions)
            true_next = following.copy()
            for i in np.flatnonzero(done):
                true_next[i] = infos[i]["terminal_observation"]
            terminated = [done[i] and not infos[i]["TimeLimit.truncated"] for i in range(n)]
            row = {"observations": observations, "actions": actions, "rewards": rewards, "terminated": terminated}
            replay.add(**row, next_observations=true_next, since_start=since_start)
            past = remembered(past, *(torch.from_numpy(x) for x in (observations, actions, rewards)))
            past[torch.from_numpy(done)] = 0.0
            since_start, observations = np.where(done, 0, since_start + 1), following
            due += config.updates_per_step * n * (step * n >= config.random_steps)
            while due >= 1:
                learner.update(replay.sample(config.batch, rng))
                due -= 1
            if checkpoint is not None and (step + 1) * n % CHECKPOINT_EVERY < n:
                _save(checkpoint, learner, replay, rng, identity, due, before + time.perf_counter() - began)
    finally:
        vector.close()
    return replay, before + time.perf_counter() - began


def _save(
    path: str | os.PathLike,
    learner: Learner,
    replay: Replay,
    rng: np.random.Generator,
    identity: str,
    due: float,
    seconds: float,
) -> None:
    log = {"steps": replay.steps, "updates": learner.updates, "due": due, "seconds": seconds}
    log |= {"rng": rng.bit_generator.state, "generator": learner.generator.get_state().tolist()}
    save_training(path, nn.ModuleList((learner.model, learner.target, replay)), learner.optimizers, identity, log)


def _resume(
    path: str | os.PathLike, learner: Learner, replay: Replay, rng: np.random.Generator, identity: str
) -> tuple[float, float]:
    """Set everything to what `_save` wrote; updates that are due, and seconds that it took so far."""
    parts = nn.ModuleList((learner.model, learner.target, replay))
    log = load_training(path, parts, learner.optimizers, identity)
    replay.steps, learner.updates = log["steps"], log["updates"]
    rng.bit_generator.state = log["rng"]
    learner.generator.set_state(torch.tensor(log["generator"], dtype=torch.uint8))
    return log["due"], log["seconds"]


def _explore(
    model: MQL, past: Tensor, observations: np.ndarray, rng: np.random.Generator, *, random: bool
) -> np.ndarray:
    config, shape = model.config, (len(observations), model.config.action_size)
    scale = config.action_scale
    if random:
        return rng.uniform(-scale, scale, shape).astype(np.float32)
    with torch.inference_mode():
        actions = model.actor(past, torch.from_numpy(observations)).numpy()
    if not np.isfinite(actions).all():
        raise FloatingPointError("the actor's actions are not finite any more; lower learning_rate")
    noise = config.exploration * scale * rng.standard_normal(shape)
    return np.clip(actions + noise, -scale, scale).astype(np.float32)
