"""Frozen agents at play on one goal, a step at a time; between two episodes the goal may move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from adbook.insight import Watched
from adbook.play import Recorder, play
from adbook.rollout import Rollout
from adbook.tasks import Task, TaskFamily


class Session:
    """Every agent in an environment of its own with the same starts, its memory kept from the first step to the last.

    Args:
        agents: By name, as `adbook.rollout` wants a policy.
        family: Whose environments these are.
        goal: Of the first episode.
        episodes: How many there may be at most.
        seed: Of environments and actions.

    Attributes:
        goals: The goals of the episodes that have begun.

    Raises:
        ValueError: A policy of another family's sizes, or a goal out of the family's range.
    """

    def __init__(
        self, agents: Mapping[str, nn.Module], family: TaskFamily, goal: Sequence[float], episodes: int, seed: int
    ) -> None:
        """Put every agent before its first step."""
        task = Task(family.name, goal, "sampled", 0)
        self.goals = [list(goal)]
        self._agents, self._seed = agents, seed
        self._plays = {
            name: play(agent, family, [task], episodes=episodes, seed=seed) for name, agent in agents.items()
        }
        self._records: dict[str, Recorder] = {name: next(steps) for name, steps in self._plays.items()}

    @property
    def episode(self) -> int:
        """How many episodes all agents have finished."""
        return min(int(record.episode[0]) for record in self._records.values())

    @property
    def fresh(self) -> bool:
        """Whether no step has been made."""
        return not any(record.t.any() or record.episode.any() for record in self._records.values())

    def step(self, goal: Sequence[float]) -> bool:
        """Make a step of every agent that is still in this episode.

        Args:
            goal: Of the episode, if it begins with this step and is not the first; else it is not looked at.

        Returns:
            Whether the episode is over for all.
        """
        episode = self.episode
        if len(self.goals) == episode:
            for record in self._records.values():
                record.envs[0].unwrapped.goal = goal
            self.goals.append(list(goal))
        for name, record in self._records.items():
            if record.episode[0] == episode:
                next(self._plays[name])
        return self.episode > episode

    def finished(self) -> dict[str, Rollout]:
        """The finished episodes of every agent."""
        about = {"seed": self._seed, "goals": self.goals[: self.episode]}
        return {name: Rollout.of(record, about) for name, record in self._records.items()}

    def insight(self, rollouts: Mapping[str, Rollout]) -> dict[str, dict[str, np.ndarray]]:
        """What the watched agents saw in the finished episodes."""
        return {name: a.insight(rollouts[name]) for name, a in self._agents.items() if isinstance(a, Watched)}

    def current(self, used: Sequence[int], names: Sequence[str]) -> tuple[list[int], bytes]:
        """The episode that is being played, unless all agents are between two.

        Args:
            used: Which coordinates are wanted, ``Q`` of them.
            names: What is wanted of `Watched.noted`, and "reward".

        Returns:
            The steps ``t`` of every agent, and, agent by agent, its coordinates ``(t + 1, Q)``, rewards ``(t,)`` and,
            if it is watched, what it saw ``(t, names)``, as float32; nothing at all between two episodes.
        """
        if all(record.over[0] for record in self._records.values()):
            return [], b""
        parts = [part for name in self._records for part in self._played(name, used, names)]
        steps = [int(record.t[0]) for record in self._records.values()]
        return steps, b"".join(part.astype("<f4").tobytes() for part in parts)

    def close(self) -> None:
        """Close the environments, and give the policies their modes back."""
        for steps in reversed(list(self._plays.values())):  # the last to begin had the last word on a shared policy
            steps.close()

    def _played(self, name: str, used: Sequence[int], names: Sequence[str]) -> Iterator[np.ndarray]:
        agent, record, episode = self._agents[name], self._records[name], self.episode
        t = int(record.t[0])
        yield record.qpos[0, episode, : t + 1][:, used]
        yield record.rewards[0, episode, :t]
        if isinstance(agent, Watched) and t:
            noted = agent.noted(-t) | {"reward": record.rewards[:, episode, :t]}
            nothing = np.zeros((1, t))
            yield np.stack([noted.get(name, nothing)[0] for name in names], -1)
