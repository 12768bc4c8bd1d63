"""What a network saw and did at every step of a rollout: for the player, to connect behaviour and mechanism."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from adbook.policy import ADPolicy, PolicyState
from adbook.rollout import Rollout


class Watched(nn.Module):
    """A policy that acts as the one it is given and notes what that did; roll it out once, then ask for `insight`.

    Args:
        policy: With a Gaussian head or a deterministic one.
    """

    def __init__(self, policy: ADPolicy) -> None:
        """See the class."""
        super().__init__()
        self.policy, self.config = policy, policy.config
        self._means: list[Tensor] = []
        self._stds: list[Tensor] = []
        self._changes: list[Tensor] = []

    def init_state(self, n: int) -> PolicyState:
        """The policy's own."""
        return self.policy.init_state(n)

    def act(self, observation: Tensor, reward: Tensor | None, start: Tensor, state: PolicyState, **options):
        """Act as the policy does."""
        hidden = []
        hook = self.policy.head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
        try:
            action, after = self.policy.act(observation, reward, start, state, **options)
        finally:
            hook.remove()
        mean, log_std = self.policy._head(hidden[0])
        std = log_std.exp() if self.config.head == "gaussian" else torch.zeros_like(mean)
        self._means.append(mean.cpu())
        self._stds.append(std.cpu())
        self._changes.append(_change(state.backbone, after.backbone).cpu())
        return action, after

    def insight(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """What was noted in that rollout, sorted by episode.

        Returns:
            By name, each ``(n, K, T)``: "mean 1", "std 1", "action 1" and so on for every component of the action,
            in units of the largest action; and "change", by how much the state changed at that step relative to its
            size (NaN for a transformer, whose state grows instead).
        """
        noted = {"mean": self._means, "std": self._stds}
        values = {name: rollout.by_episode(torch.stack(x, 1).numpy()) for name, x in noted.items()}
        values["action"] = rollout.actions / self.config.action_scale
        columns = {f"{name} {j + 1}": values[name][..., j] for j in range(self.config.action_size) for name in values}
        return columns | {"change": rollout.by_episode(torch.stack(self._changes, 1).numpy())}


def _change(before: object, after: object) -> Tensor:
    """The change of a Mamba's state relative to its size, (n,)."""
    if not isinstance(after, tuple) or not hasattr(after[0], "ssm"):
        return torch.full((len(after.caches[0].keys),), torch.nan)
    states = [(old.ssm.flatten(1), new.ssm.flatten(1)) for old, new in zip(before, after, strict=True)]
    moved = sum((new - old).square().sum(1) for old, new in states)
    size = sum(new.square().sum(1) for _, new in states)
    return (moved / size.clamp(min=1e-12)).sqrt()
