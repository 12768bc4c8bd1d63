"""A meta-trained MACAW at play: the inner step on a batch that it is given, or on what it has seen itself."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adbook.baselines.macaw import MACAW, Layers, Transitions, check_transitions, mlp, returns_and_steps
from adbook.baselines.seen import Seen
from adbook.checks import check_whole


class AdaptingState(NamedTuple):
    """What an `AdaptingMACAW` carries from step to step."""

    each: list[Layers]  # of the policy's body and mean, of each task
    stacked: Layers  # the same with a leading axis of tasks
    waiting: Tensor  # (n,) bool, the tasks that have not adapted yet
    seen: Seen  # while any waits


class AdaptingMACAW(nn.Module):
    """A meta-trained MACAW at play; `adbook.rollout` plays it like any policy.

    Either it is given a batch of each task, as in the paper, and adapts before the first step; or it plays as it was
    meta-trained, with noise, and adapts when an episode starts and it has seen as many transitions itself. The adapted
    weights are part of the state: what was meta-trained stays as it is.
    """

    def __init__(self, macaw: MACAW, batches: Sequence[Transitions | None] | None = None):
        """Wrap `macaw`; `batches` are transitions of the tasks that are played next, in their order.

        Where one is None the task is played as it was meta-trained, to the end.

        Raises:
            ValueError: a batch of other sizes than the model's, of fewer than two transitions, or not finite.
        """
        super().__init__()
        for i, batch in enumerate(batches or []):
            if batch is not None:
                check_transitions(batch, macaw.config, f"batch {i}")
                check_whole(f"the length of batch {i}", len(batch.returns), 2)
        self.macaw, self.config, self.batches = macaw, macaw.config, batches

    def init_state(self, n: int) -> AdaptingState:
        """Start `n` tasks.

        Raises:
            ValueError: batches of another number of tasks were given.
        """
        if self.batches is not None and len(self.batches) != n:
            raise ValueError(f"{n} tasks are played but {len(self.batches)} batches given; give one of each task")
        each = [self._adapted(batch) for batch in self.batches or [None] * n]
        seen = Seen.nothing(n, self.config.observation_size, self.config.action_size)
        return AdaptingState(each, _stacked(each), torch.full((n,), self.batches is None), seen)

    def act(
        self,
        observation: Tensor,
        reward: Tensor | None,
        start: Tensor,
        state: AdaptingState,
        *,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, AdaptingState]:
        """Return actions (n, A), and the state with what was seen; tasks that are due adapt first."""
        if state.waiting.any() and state.seen.steps:
            state = state._replace(seen=state.seen.rewarded(reward))
            if state.seen.steps >= self.config.batch and (state.waiting & start).any():
                state = self._adapt(state, state.waiting & start, generator)
        action = mlp(state.stacked, self.macaw.normalised_observations(observation).unsqueeze(1)).squeeze(1).tanh()
        noisy = state.waiting if deterministic else torch.ones_like(start)  # means alone say nothing of other actions
        noise = self.config.std * torch.randn(action.shape, generator=generator)
        action = action + noise * noisy.unsqueeze(1)
        action = self.config.action_scale * action.clamp(-1, 1)
        if state.waiting.any():
            state = state._replace(seen=state.seen.acted(observation, action, start))
        return action, state

    def _adapt(self, state: AdaptingState, due: Tensor, generator: torch.Generator | None) -> AdaptingState:
        """Adapt the tasks that are due to transitions drawn from what they have seen."""
        each = list(state.each)
        for i in due.nonzero().flatten().tolist():
            rewards, episodes = state.seen.rewards[i].numpy(), state.seen.episodes(i)
            numbers = map(torch.from_numpy, returns_and_steps(rewards, episodes, self.config.discount))
            numbers = (x.float() for x in numbers)
            seen = Transitions(state.seen.observations[i], state.seen.actions[i], *numbers)
            rows = torch.randperm(state.seen.steps, generator=generator)[: self.config.batch]
            each[i] = self._adapted(Transitions(*(x[rows] for x in seen)))
        return state._replace(each=each, stacked=_stacked(each), waiting=state.waiting & ~due)

    def _adapted(self, batch: Transitions | None) -> Layers:
        """The policy's layers after a step on a batch, or as they were meta-trained."""
        with torch.inference_mode(False):  # a rollout infers; this step needs gradients, and copies of what it is given
            if batch is None:
                layers = self.macaw.policy()
            else:
                layers = self.macaw.adapted(self.macaw.normalised(Transitions(*(x.clone() for x in batch))))[1]
            return [weights.detach() for weights in layers[:-2]]  # without the head that guesses advantages


def _stacked(each: list[Layers]) -> Layers:
    return [torch.stack(layer) for layer in zip(*each, strict=True)]
