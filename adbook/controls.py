"""Controls of in-context learning: the same frozen policy, with something taken from its context."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adbook.checks import check_whole
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
        action, inner, token = _acted(self.policy, observation, reward, start, inner, **options)
        return action, ShuffledState(inner, torch.cat((tokens, token.unsqueeze(1)), 1), generator)


class RereadingState(NamedTuple):
    """What a `Rereading` carries of one task."""

    inner: PolicyState
    past: tuple[Tensor, ...]  # tokens (steps, token) of the last whole episodes, in order
    now: tuple[Tensor, ...]  # those of the episode that is played, (1, token) each


class Rereading(nn.Module):
    """A policy that before every episode reads its last whole episodes anew, from an empty state.

    Attention was trained on windows that begin with nothing before them. In a window that slides, the oldest tokens
    have themselves read older ones, layer by layer, which no training showed; here they have not. What is older than
    those episodes is lost.

    Tasks are played one by one, since the lengths of their episodes may differ.
    """

    def __init__(self, policy: ADPolicy, episodes: int):
        """Wrap `policy`; it reads `episodes` before each."""
        super().__init__()
        check_whole("episodes", episodes)
        self.policy, self.config, self.episodes = policy, policy.config, episodes
        self.train(policy.training)

    def init_state(self, n: int) -> tuple[RereadingState, ...]:
        """The state before the first step of `n` tasks."""
        return tuple(RereadingState(self.policy.init_state(1), (), ()) for _ in range(n))

    def act(
        self, observation: Tensor, reward: Tensor | None, start: Tensor, state: tuple[RereadingState, ...], **options
    ) -> tuple[Tensor, tuple[RereadingState, ...]]:
        """Act as the policy does, on its last episodes."""
        actions, states = [], []
        for i, (inner, past, now) in enumerate(state):
            if start[i] and now:
                past, now = (*past, torch.cat(now))[-self.episodes :], ()
                tokens = torch.cat(past).unsqueeze(0)
                inner = inner._replace(backbone=self.policy.backbone.prefill(self.policy.embed(tokens))[1])
            row = slice(i, i + 1)
            paid = reward if reward is None else reward[row]
            action, inner, token = _acted(self.policy, observation[row], paid, start[row], inner, **options)
            actions.append(action)
            states.append(RereadingState(inner, past, (*now, token)))
        return torch.cat(actions), tuple(states)


def _acted(
    policy: ADPolicy, observation: Tensor, reward: Tensor | None, start: Tensor, state: PolicyState, **options
) -> tuple[Tensor, PolicyState, Tensor]:
    """What the policy's `act` returns, and the token (n, token) that it read."""
    read: list[Tensor] = []
    hook = policy.embed.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        action, state = policy.act(observation, reward, start, state, **options)
    finally:
        hook.remove()
    return action, state, read[0]


def reset_every_episode(
    policy: nn.Module, family: TaskFamily, tasks: Sequence[Task], *, episodes: int, seed: int = 0
) -> np.ndarray:
    """Play first episodes only: returns (tasks, episodes), every one of them from an empty context."""
    dice = np.random.SeedSequence(seed).generate_state(episodes)  # seed + k would be another seed's, an episode later
    alone = [rollout(policy, family, tasks, episodes=1, seed=int(each)).returns for each in dice]
    return np.concatenate(alone, axis=1)
