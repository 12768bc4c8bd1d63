"""A policy with frozen weights at play, step by step: the loop under `adbook.rollout` and the live player.

Symbols as there: ``n`` tasks side by side, ``K`` episodes, ``T`` the family's horizon, ``A`` action size, ``nq``
coordinates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from adbook.checks import check_whole

if TYPE_CHECKING:
    import gymnasium

    from adbook.tasks import Task, TaskFamily


def play(
    policy: nn.Module,
    family: TaskFamily,
    tasks: Sequence[Task],
    *,
    episodes: int,
    seed: int = 0,
    deterministic: bool = False,
    withhold_reward: bool = False,
) -> Iterator[Recorder]:
    """Do what `adbook.rollout` does, one step of all tasks at a time.

    Yields the record before the first step and after every step. Where an episode is `over`, the goal of the next one
    may be moved then, ``record.envs[i].unwrapped.goal = ...``; the policy's state is kept. Until the play is exhausted
    or closed, the policy is in evaluation mode and the environments are open.

    Args:
        policy: As for `rollout`, like all that follow.
        family: Makes the environments.
        tasks: The ``n`` tasks.
        episodes: ``K``.
        seed: Of environments and actions.
        deterministic: Take the mean action.
        withhold_reward: Give the policy None for the reward.

    Raises:
        ValueError: As `rollout`, before the first step.
        RuntimeError: A parameter of the policy has changed by the end; not where the play is closed before it.
    """
    episodes, seed = (int(x) if isinstance(x, np.integer) else x for x in (episodes, seed))
    _check_request(policy, family, tasks, episodes, seed)
    children = np.random.SeedSequence(seed).spawn(len(tasks) + 1)
    policy_seed, *env_seeds = (int(child.generate_state(1)[0]) for child in children)
    device = next((p.device for p in policy.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(policy_seed)
    was_training, before = policy.training, checksum(policy)
    policy.eval()
    with ExitStack() as stack:
        stack.callback(policy.train, was_training)
        envs = []
        for task in tasks:
            envs.append(family.make(task))
            stack.callback(envs[-1].close)
        record = Recorder(envs, env_seeds, family, tasks, episodes)
        state, reward = policy.init_state(len(tasks)), np.zeros(len(tasks), np.float32)
        while True:
            yield record
            record.begin()
            if not record.active.any():
                break
            with one_thread(), torch.inference_mode():  # not around the yield: it would follow the caller home
                batch = (torch.from_numpy(x.copy()).to(device) for x in (record.observation, reward, record.start))
                observation, fed, start = batch
                fed = None if withhold_reward else fed
                action, state = policy.act(
                    observation, fed, start, state, deterministic=deterministic, generator=generator
                )
            reward = record.step(action.float().cpu().numpy())
    if checksum(policy) != before:
        raise RuntimeError("The policy's parameters changed during the rollout; they must stay frozen.")


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch work in one thread: small work is not worth sharing, and threads that wait stall on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Recorder:
    """The environments of a rollout: steps those still active and writes down what happens.

    Attributes:
        envs: One a task.
        episode: ``(n,)``, the episode that each plays or, where it is `over`, plays next.
        t: ``(n,)``, steps made in the episode.
        over: ``(n,)`` bool, whether the last step ended an episode (False before the first).
        active: ``(n,)`` bool, whether there are episodes left.
        rewards: ``(n, K, T)``, NaN where nothing has happened yet; `actions` and `qpos` likewise, as in `Rollout`.
    """

    def __init__(
        self,
        envs: Sequence[gymnasium.Env],
        seeds: Sequence[int],
        family: TaskFamily,
        tasks: Sequence[Task],
        episodes: int,
    ) -> None:
        """Put every environment at the start of its first episode; seeds are for that one, the others follow."""
        n, horizon, action_size = len(envs), family.horizon, family.action_size
        self.envs, self.family, self.tasks = envs, family, tuple(tasks)
        self.observation = np.zeros((n, family.observation_size), np.float32)  # (n, O), what the policy sees
        self.start = np.ones(n, bool)  # (n,), whether that observation opens an episode
        self.active, self.over = np.ones(n, bool), np.zeros(n, bool)
        self.episode, self.t = np.zeros(n, int), np.zeros(n, int)
        self.rewards = np.full((n, episodes, horizon), np.nan, np.float32)
        self.actions = np.full((n, episodes, horizon, action_size), np.nan, np.float32)
        nq = len(_qpos(envs[0]))
        self.qpos = np.full((n, episodes, horizon + 1, nq), np.nan, np.float32)
        for i, seed in enumerate(seeds):
            self._reset(i, seed)

    def begin(self) -> None:
        """Start the next episode where one is over and another is left."""
        for i in np.flatnonzero(self.over & self.active):
            self._reset(i)

    def step(self, actions: np.ndarray) -> np.ndarray:
        """Apply ``(n, A)`` actions; returns the rewards ``(n,)``, 0 for a task that has finished."""
        rewards = np.zeros(len(self.envs), np.float32)
        self.start[:] = False
        for i in np.flatnonzero(self.active):
            rewards[i] = self._step_one(i, actions[i])
        return rewards

    def _step_one(self, i: int, action: np.ndarray) -> float:
        if not np.isfinite(action).all():
            raise ValueError(
                f"The action for task {i} is {action} in episode {self.episode[i]}, step {self.t[i]}; "
                "it must be finite. Check the checkpoint and the scale of the observations."
            )
        space = self.envs[i].action_space
        action = np.clip(action, space.low, space.high)
        observation, reward, terminated, truncated, _ = self.envs[i].step(action)
        at = (i, self.episode[i], self.t[i])
        self.actions[at], self.rewards[at] = action, reward
        self.observation[i] = observation
        self.t[i] += 1
        self.qpos[i, self.episode[i], self.t[i]] = _qpos(self.envs[i])
        if terminated or truncated:
            self._end_episode(i)
        return reward

    def _end_episode(self, i: int) -> None:
        self.over[i] = True
        self.episode[i] += 1
        if self.episode[i] == self.rewards.shape[1]:  # its row is fed zeros until the other tasks have finished
            self.active[i], self.observation[i] = False, 0

    def _reset(self, i: int, seed: int | None = None) -> None:
        self.observation[i], _ = self.envs[i].reset(seed=seed)
        self.start[i], self.over[i], self.t[i] = True, False, 0
        self.qpos[i, self.episode[i], 0] = _qpos(self.envs[i])


def _qpos(env: gymnasium.Env) -> np.ndarray:
    return env.unwrapped.data.qpos.astype(np.float32)


def _check_request(policy: nn.Module, family: TaskFamily, tasks: Sequence[Task], episodes: int, seed: int) -> None:
    """Refuse what cannot work before any environment is made."""
    if isinstance(family, str):
        raise TypeError(f"family is a name; give adbook.family({family!r})")
    family.check(tasks)
    check_whole("episodes", episodes)
    check_whole("seed", seed, 0)
    check_fits(policy, family)


def check_fits(policy: nn.Module, family: TaskFamily) -> None:
    """Raise ValueError if a policy is made for observations, actions or episodes of other sizes than the family's."""
    config = getattr(policy, "config", None)  # a RandomPolicy fits every observation and has none
    for size in ("observation_size", "action_size", "action_scale", "horizon"):
        its, wanted = (getattr(x, size, None) for x in (config, family))  # few policies depend on the horizon
        if None not in (its, wanted) and its != wanted:
            told = f"The policy has {size} {its}, {family.name} has {wanted}"
            raise ValueError(f"{told}; give a policy that was trained on this family.")


def checksum(policy: nn.Module) -> str:
    """Digest of every parameter and buffer."""
    digest = hashlib.blake2b()
    for name, tensor in policy.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
