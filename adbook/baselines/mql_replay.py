"""What MQL has seen: transitions in order, and the contexts that its networks read.

Symbols of shapes: ``n`` tasks, ``B`` transitions, ``H`` length of a context, ``O`` observation size, ``A`` action size,
``F`` = O + A + 1, a transition as the GRU reads it: observation, action, reward.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adbook.checks import check_layers, check_positive, check_seed, check_share, check_whole


@dataclass(frozen=True)
class MQLConfig:
    """Shape and meta-training; the defaults are published for Half-Cheetah-Vel, but `steps` and `updates_per_step`."""

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
        if isinstance(self.hidden, list):  # JSON knows lists only
            object.__setattr__(self, "hidden", tuple(self.hidden))
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
        check_whole("random_steps", self.random_steps, 0)
        check_seed(self.seed)
        check_positive(self, ("action_scale", "tau", "learning_rate", "updates_per_step"))
        check_positive(self, ("exploration", "policy_noise", "noise_clip"), or_zero=True)
        check_share(self, ("discount", "tau"))
        check_layers(self.hidden, 1)
        if self.random_steps >= self.steps:
            raise ValueError(f"random_steps={self.random_steps} must be less than steps={self.steps}")


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

        Raises:
            ValueError: a task has no such stretch, or none is wanted.
        """
        check_whole("episodes", episodes)
        length, kept = self.config.horizon, []
        for starts in (self.since_start[: self.steps] == 0).T:  # one row a task
            possible = starts.nonzero().flatten()
            possible = possible[(possible >= skip) & (possible <= self.steps - length)]
            if not len(possible):
                told = f"no episode of {length} steps begins and ends after the first {skip} of {self.steps} steps"
                raise ValueError(f"{told} of a task; raise steps or lower random_steps")
            chosen = possible[torch.linspace(0, len(possible) - 1, episodes).long()]
            kept.append((chosen.unsqueeze(1) + torch.arange(length)).flatten())
        rows = torch.stack(kept, 1)  # (steps, tasks)
        replay = Replay(rows.shape[1], len(rows), self.config)
        for name, values in self.named_buffers():
            getattr(replay, name).copy_(values[rows, torch.arange(rows.shape[1])])
        replay.steps = len(rows)
        return replay


def no_past(n: int, config: MQLConfig) -> Tensor:
    """The contexts (n, H, F) at the start of episodes."""
    return torch.zeros(n, config.context, config.observation_size + config.action_size + 1)


def remembered(past: Tensor, observations: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
    """The contexts (n, H, F) after one more transition of each."""
    now = torch.cat((observations, actions, rewards.unsqueeze(1)), 1)
    return torch.cat((past[:, 1:], now.unsqueeze(1)), 1)
