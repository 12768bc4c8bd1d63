"""Controls of in-context learning: the same frozen policy, with something taken from its context."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adbook.policy import ADPolicy, PolicyState
from adbook.rollout import rollout
from adbook.tasks import Task, TaskFamily


class ShuffledState(NamedTuple):
    """What a `ShuffledContext` carries."""

    inner: PolicyState
    tokens: Tensor  # (n, t, token): all tokens so far, row by row in the order in which the policy has read them last
    generator: torch.Generator


class ShuffledContext(nn.Module):
    """A policy whose past is put into random order before every episode.

    When a task begins an episode, all of its earlier tokens are shuffled, across steps and episodes, and the policy
    reads them anew from an empty state. What it knows of its past is then complete, each transition with its reward,
    but what came after what is lost: an improvement that is read from the order of things goes, one that is read from
    single transitions stays.
    """

    def __init__(self, policy: ADPolicy, seed: int = 0):
        """Wrap `policy`; `seed` is that of the shuffling."""
        super().__init__()
        self.policy, self.config, self.seed = policy, policy.config, seed
        self.train(policy.training)

    def init_state(self, n: int) -> ShuffledState:
        """The state before the first step of `n` tasks."""
        token = self.policy.embed[0].in_features
        nothing = self.policy.observation_mean.new_zeros(n, 0, token)
        return ShuffledState(self.policy.init_state(n), nothing, torch.Generator().manual_seed(self.seed))

    def act(
        self, observation: Tensor, reward: Tensor | None, start: Tensor, state: ShuffledState, **options
    ) -> tuple[Tensor, ShuffledState]:
        """Act as the policy does, on a shuffled past."""
        inner, tokens, generator = state
        if tokens.shape[1] and start.any():
            orders = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)  # (n, t)
            for row in start.nonzero().flatten():
                orders[row] = torch.randperm(tokens.shape[1], generator=generator)
            tokens = tokens.gather(1, orders.to(tokens.device).unsqueeze(-1).expand_as(tokens))
            inner = inner._replace(backbone=self.policy.backbone.prefill(self.policy.embed(tokens))[1])
        read: list[Tensor] = []
        hook = self.policy.embed.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            action, inner = self.policy.act(observation, reward, start, inner, **options)
        finally:
            hook.remove()
        return action, ShuffledState(inner, torch.cat((tokens, read[0].unsqueeze(1)), 1), generator)


def reset_every_episode(
    policy: nn.Module, family: TaskFamily, tasks: Sequence[Task], *, episodes: int, seed: int = 0
) -> np.ndarray:
    """Play first episodes only: returns (tasks, episodes), every one of them from an empty context."""
    dice = np.random.SeedSequence(seed).generate_state(episodes)  # seed + k would be another seed's, an episode later
    alone = [rollout(policy, family, tasks, episodes=1, seed=int(each)).returns for each in dice]
    return np.concatenate(alone, axis=1)
