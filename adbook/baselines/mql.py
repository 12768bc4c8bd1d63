"""MQL, meta-Q-learning (Fakoor et al., arXiv 1910.00125): TD3 over all training tasks, with a recurrent context.

This module meta-trains; `adbook.baselines.mql_adaptation` fits the result to a task that it does not know. Actor and
critics see, beside the observation, the last state of a GRU that has read the last ``H`` transitions of the episode.

Symbols of shapes: ``n`` tasks, ``B`` transitions, ``H`` length of a context, ``O`` observation size, ``A`` action size,
``F`` = O + A + 1, a transition as the GRU reads it: observation, action, reward.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from adbook.checks import check_positive, check_whole
from adbook.tasks import Task, TaskFamily
from adbook.vectors import TaskVector


@dataclass(frozen=True)
class MQLConfig:
    """Shape and meta-training; the defaults are the published ones for Half-Cheetah-Vel, with fewer updates a step."""

    observation_size: int
    action_size: int
    action_scale: float = 1.0
    horizon: int = 200  # of an episode; one that is shorter has ended in a terminal state
    hidden: tuple[int, ...] = (300, 300)
    context: int = 20  # H, transitions
    memory: int = 15  # size of the GRU's state
    discount: float = 0.99
    tau: float = 0.005  # share of the networks that their targets take on in an update
    batch: int = 256
    learning_rate: float = 1e-3
    exploration: float = 0.3  # Gaussian noise of the actions that are taken; like the next two in units of action_scale
    policy_noise: float = 0.3  # of the actions that the targets are computed with
    noise_clip: float = 0.5
    policy_delay: int = 2  # updates of the critics for one of the actor
    random_steps: int = 20_000  # of uniform actions, over all tasks, before the first update
    steps: int = 1_000_000  # over all tasks
    updates_per_step: float = 0.25
    seed: int = 0

    def __post_init__(self):
        """Refuse settings that cannot run, ValueError."""
        object.__setattr__(self, "hidden", tuple(self.hidden))  # JSON knows lists only
        for name in (
            "observation_size",
            "action_size",
            "horizon",
            "context",
            "memory",
            "batch",
            "policy_delay",
            "steps",
        ):
            check_whole(name, getattr(self, name))
        for name in ("random_steps", "seed"):
            check_whole(name, getattr(self, name), 0)
        check_positive(self, ("action_scale", "tau", "learning_rate", "policy_noise", "noise_clip", "updates_per_step"))


class Batch(NamedTuple):
    """Transitions with the contexts before and after them, (B, …)."""

    past: Tensor  # (B, H, F), zeros before the start of the episode
    observations: Tensor  # (B, O)
    actions: Tensor  # (B, A)
    rewards: Tensor  # (B,)
    next_past: Tensor  # (B, H, F)
    next_observations: Tensor  # (B, O)
    terminated: Tensor  # (B,), 1.0 where the episode ended in a terminal state


class Replay(nn.Module):
    """Steps of several tasks side by side, in order, so that the context of any of them can be cut out."""

    def __init__(self, n_tasks: int, capacity: int, config: MQLConfig):
        """Keep up to `capacity` steps of each task."""
        super().__init__()
        observation, action = (config.observation_size,), (config.action_size,)
        shapes = {"observations": observation, "actions": action, "rewards": ()}
        shapes |= {"next_observations": observation, "terminated": (), "since_start": ()}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(capacity, n_tasks, *shape))
        self.config, self.steps = config, 0

    def add(self, **row: np.ndarray) -> None:
        """Add one step of every task; `since_start` (n,) counts the steps before it in its episode."""
        for name, values in self.named_buffers():
            values[self.steps] = torch.as_tensor(row[name])
        self.steps += 1

    def sample(self, n: int, rng: np.random.Generator) -> Batch:
        """Draw `n` transitions evenly, with replacement."""
        return self.at(rng.integers(self.steps, size=n), rng.integers(self.rewards.shape[1], size=n))

    def at(self, steps: np.ndarray, tasks: np.ndarray) -> Batch:
        """Return the transitions at given steps of given tasks, (B,) each."""
        steps, tasks = torch.from_numpy(steps), torch.from_numpy(tasks)
        offsets = torch.arange(-self.config.context, 1)
        window = (steps[:, None] + offsets).clamp(min=0), tasks[:, None]  # the last one is the transition itself
        parts = self.observations[window], self.actions[window], self.rewards[window].unsqueeze(-1)
        seen = torch.cat(parts, -1)  # (B, H + 1, F)
        seen = seen * (self.since_start[steps, tasks][:, None] + offsets >= 0).unsqueeze(-1)
        now = (x[steps, tasks] for x in (self.observations, self.actions, self.rewards))
        after = (x[steps, tasks] for x in (self.next_observations, self.terminated))
        return Batch(seen[:, :-1], *now, seen[:, 1:], *after)

    def thinned(self, episodes: int, skip: int = 0) -> "Replay":
        """Keep so many stretches of the horizon's length of each task, each from the start of an episode.

        Args:
            episodes: stretches of a task, evenly spread over the steps.
            skip: steps of each task at the beginning that are left out.
        """
        length, kept = self.config.horizon, []
        for starts in (self.since_start[: self.steps] == 0).T:  # one row a task
            possible = starts.nonzero().flatten()
            possible = possible[(possible >= skip) & (possible <= self.steps - length)]
            chosen = possible[torch.linspace(0, len(possible) - 1, episodes).long()]
            kept.append((chosen.unsqueeze(1) + torch.arange(length)).flatten())
        rows = torch.stack(kept, 1)  # (steps, tasks)
        replay = Replay(rows.shape[1], len(rows), self.config)
        for name, values in self.named_buffers():
            getattr(replay, name).copy_(values[rows, torch.arange(rows.shape[1])])
        replay.steps = len(rows)
        return replay


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
        self._optimizers = [torch.optim.Adam(net.parameters(), lr=rate) for net in (model.critics, model.actor)]
        self._generator = torch.Generator().manual_seed(seed)
        self._updates = 0

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
        self._updates += 1
        if (self._updates - 1) % config.policy_delay:
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
        noise = config.policy_noise * torch.randn(actions.shape, generator=self._generator)
        noise = config.action_scale * noise.clamp(-config.noise_clip, config.noise_clip)
        actions = (actions + noise).clamp(-config.action_scale, config.action_scale)
        following = target.critics(batch.next_past, batch.next_observations, actions).amin(0)
        return batch.rewards + config.discount * (1 - batch.terminated) * following

    def _step(self, which: int, loss: Tensor) -> None:
        self._optimizers[which].zero_grad()
        loss.backward()
        self._optimizers[which].step()


def proximal(net: nn.Module, anchor: nn.Module | None, pull: float) -> Tensor | float:
    """λ / 2 · ‖θ − θ_anchor‖² over all parameters."""
    if anchor is None or not pull:
        return 0.0
    pairs = zip(net.parameters(), anchor.parameters(), strict=True)
    return pull / 2 * sum((p - a.detach()).square().sum() for p, a in pairs)


def no_past(n: int, config: MQLConfig) -> Tensor:
    """The contexts (n, H, F) at the start of episodes."""
    return torch.zeros(n, config.context, config.observation_size + config.action_size + 1)


def remembered(past: Tensor, observations: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
    """The contexts (n, H, F) after one more transition of each."""
    now = torch.cat((observations, actions, rewards.unsqueeze(1)), 1)
    return torch.cat((past[:, 1:], now.unsqueeze(1)), 1)


def meta_train(model: MQL, family: TaskFamily, tasks: Sequence[Task], *, progress: bool = True) -> Replay:
    """Meta-train in the environments of the training tasks, all side by side.

    Args:
        model: is changed in place.
        family: of the tasks.
        tasks: training tasks; steps are counted over all of them.
        progress: show a bar.

    Returns:
        All that was seen, which adaptation goes on to use.

    Raises:
        ValueError: a task that is not for training.
        FloatingPointError: the actor's actions stopped being finite.
    """
    foreign = sorted({task.split for task in tasks} - {"train"})
    if foreign or not tasks:
        raise ValueError(f"tasks of split {', '.join(foreign) or 'none'} given; meta-training is for training tasks")
    config, n = model.config, len(tasks)
    rng, learner = np.random.default_rng(config.seed), Learner(model, config.seed)
    replay, past, due = Replay(n, -(-config.steps // n), config), no_past(n, config), 0.0
    since_start = np.zeros(n)
    vector = TaskVector(family, tasks, seed=config.seed)
    try:
        observations = vector.reset()
        for step in tqdm(range(-(-config.steps // n)), unit="step", disable=not progress):
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
    finally:
        vector.close()
    return replay


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
