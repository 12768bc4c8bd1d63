"""What a network saw and did at every step of a rollout: for the player, to connect behaviour and mechanism."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adbook.policy import ADPolicy, PolicyState
from adbook.rollout import Rollout


class Watched(nn.Module):
    """A policy that acts as the one it is given and notes what that did; roll it out once, then ask for `insight`.

    What is noted begins anew with every `init_state`.

    Args:
        policy: With a Gaussian head or a deterministic one.
    """

    def __init__(self, policy: ADPolicy) -> None:
        """See the class."""
        super().__init__()
        self.policy, self.config = policy, policy.config
        self.train(policy.training)
        self._steps: list[dict[str, Tensor]] = []

    def init_state(self, n: int) -> PolicyState:
        """The policy's own."""
        self._steps.clear()
        return self.policy.init_state(n)

    def act(self, observation: Tensor, reward: Tensor | None, start: Tensor, state: PolicyState, **options):
        """Act as the policy does."""
        hidden, thread = [], threading.get_ident()

        def note(_: nn.Module, inputs: tuple[Tensor]) -> None:
            if threading.get_ident() == thread:  # another may have the same policy play elsewhere
                hidden.append(inputs[0])

        hook = self.policy.head.register_forward_pre_hook(note)
        try:
            action, after = self.policy.act(observation, reward, start, state, **options)
        finally:
            hook.remove()
        mean, log_std = self.policy._head(hidden[0])
        std = log_std.exp() if self.config.head == "gaussian" else torch.zeros_like(mean)
        noted = {"mean": mean, "std": std, "action": action / self.config.action_scale}
        if self.context is None:
            noted["change"] = _change(state.backbone, after.backbone)
        self._steps.append({name: value.cpu() for name, value in noted.items()})
        return action, after

    @property
    def context(self) -> int | None:
        """How many steps the policy can remember; None for a state that no length is built into."""
        return getattr(self.config.backbone, "context", None)

    def noted(self, first: int = 0) -> dict[str, np.ndarray]:
        """What was noted from a step on, in the order of the steps.

        Returns:
            By name, each ``(n, steps)``: "mean 1", "std 1", "action 1" and so on for every component of the action, in
            units of the largest action; and "change", by how much the state changed at that step relative to its size,
            unless the policy is a transformer, whose state grows instead.
        """
        steps = self._steps[first:]
        size = self.config.action_size
        columns = {f"{name} {j + 1}": (name, j) for j in range(size) for name in ("mean", "std", "action")}
        change = ["change"] if self.context is None else []
        if not steps:
            return dict.fromkeys([*columns, *change], np.zeros((1, 0)))
        values = {name: torch.stack([step[name] for step in steps], 1).numpy() for name in steps[0]}
        return {column: values[name][..., j] for column, (name, j) in columns.items()} | {n: values[n] for n in change}

    def insight(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """What was noted in that rollout, sorted by episode.

        Returns:
            As `noted`, but each ``(n, K, T)``; and "context" ``()``, the steps that the policy can remember, unless no
            length is built into it.

        Raises:
            ValueError: These are not the actions that were noted: it is another rollout.
        """
        noted = self.noted()
        self._check(rollout, noted)
        limit = {} if self.context is None else {"context": np.array(self.context)}
        return {name: rollout.by_episode(values) for name, values in noted.items()} | limit

    def _check(self, rollout: Rollout, noted: dict[str, np.ndarray]) -> None:
        wanted = len(rollout.tasks), int(rollout.lengths.sum(1).max(initial=0))
        n, steps = noted["action 1"].shape
        if wanted[1] and (n != wanted[0] or steps < wanted[1]):
            raise ValueError(
                f"the rollout has {wanted} tasks and steps, noted were {(n, steps)}; give the one watched last"
            )
        for j in range(self.config.action_size):
            played = rollout.actions[..., j] / self.config.action_scale
            if not np.allclose(rollout.by_episode(noted[f"action {j + 1}"]), played, atol=1e-5, equal_nan=True):
                raise ValueError("the rollout's actions are not those that were noted; give the one watched last")


def _change(before: Sequence[Any], after: Sequence[Any]) -> Tensor:
    """The change of a Mamba's state relative to its size, (n,)."""
    states = [(old.ssm.flatten(1), new.ssm.flatten(1)) for old, new in zip(before, after, strict=True)]
    moved = sum((new - old).square().sum(1) for old, new in states)
    size = sum(new.square().sum(1) for _, new in states)
    return (moved / size.clamp(min=1e-12)).sqrt()
