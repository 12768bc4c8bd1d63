"""What an agent that adapts has seen of its tasks so far."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """Steps of `n` tasks side by side, `t` of each; of the last one the reward is not known until the next step.

    Methods return a longer copy.
    """

    observations: Tensor  # (n, t, O)
    actions: Tensor  # (n, t, A)
    rewards: Tensor  # (n, t or t - 1)
    starts: Tensor  # (n, t) bool, whether an episode starts there

    @classmethod
    def nothing(cls, n: int, observation_size: int, action_size: int) -> "Seen":
        """Before the first step."""
        empty = torch.zeros(n, 0)
        return cls(torch.zeros(n, 0, observation_size), torch.zeros(n, 0, action_size), empty, empty.bool())

    @property
    def steps(self) -> int:
        """`t`."""
        return self.actions.shape[1]

    def rewarded(self, rewards: Tensor | None) -> "Seen":
        """Add the rewards (n,) of the last step; zeros where they are withheld."""
        rewards = torch.zeros(len(self.starts)) if rewards is None else rewards
        return self._replace(rewards=_longer(self.rewards, rewards))

    def acted(self, observations: Tensor, actions: Tensor, starts: Tensor) -> "Seen":
        """Add a step (n, …)."""
        now = {"observations": observations, "actions": actions, "starts": starts}
        return self._replace(**{name: _longer(getattr(self, name), value) for name, value in now.items()})

    def episodes(self, i: int) -> list[slice]:
        """The steps of each episode of a task, in order."""
        bounds = [*self.starts[i].nonzero().flatten().tolist(), self.steps]
        return [slice(a, b) for a, b in pairwise(bounds)]


def _longer(seen: Tensor, now: Tensor) -> Tensor:
    return torch.cat((seen, now.unsqueeze(1)), 1)
