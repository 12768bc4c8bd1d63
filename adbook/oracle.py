"""The oracle of a family: one expert that is shown the goal, trained on goals drawn anew for every episode.

It is what a network that has to find the goal out can at best hope to match, and the 1 of the scale on which sources
are judged. Nothing else in the book ever sees a goal.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn
from tqdm import tqdm

from adbook.sources import PPOConfig, learn
from adbook.stored import load_module, save_module
from adbook.tasks import Task, TaskFamily
from adbook.tasks import family as task_family
from adbook.vectors import TaskVector

FOLDER = Path(__file__).resolve().parents[1] / "artifacts" / "oracles"


class Oracle(nn.Module):
    """Acts from observation and visible goal, without memory; `adbook.rollout` plays it like any policy.

    Args:
        family: name of its task family.
        hidden: widths of its layers.
    """

    def __init__(self, family: str, hidden: Sequence[int]):
        """See the class; the weights are random."""
        super().__init__()
        kind = task_family(family)
        inputs = kind.observation_size + len(goal_features(kind.train_tasks[:1])[0])
        widths = (inputs, *hidden)
        layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths)]
        self.family, self.hidden, self.about = family, tuple(hidden), {}
        self.net = nn.Sequential(*(m for pair in layers for m in pair), nn.Linear(widths[-1], kind.action_size))
        self.log_std = nn.Parameter(torch.zeros(kind.action_size))
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.register_buffer("goals", torch.zeros(0, inputs - kind.observation_size), persistent=False)

    def show(self, tasks: Sequence[Task]) -> "Oracle":
        """Show it the goals of the tasks it plays next, in their order; returns itself.

        Raises:
            ValueError: no task, or one of another family.
        """
        foreign = sorted({task.family for task in tasks} - {self.family})
        if foreign or not tasks:
            told = f"not of {', '.join(foreign)}; load that one's" if foreign else "and no task was given"
            raise ValueError(f"this is the oracle of {self.family}, {told}")
        self.goals = torch.from_numpy(goal_features(tasks)).to(self.mean.device)
        return self

    def init_state(self, n: int) -> None:
        """Remember nothing; check that `n` goals have been shown.

        Raises:
            ValueError: not so many goals have been shown.
        """
        if n != len(self.goals):
            raise ValueError(f"{n} tasks are played but {len(self.goals)} goals shown; call show(tasks) before")

    def act(
        self,
        observation: Tensor,
        reward: Tensor | None,
        start: Tensor,
        state: None,
        *,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, None]:
        """Return actions (n, A) for observations (n, O); reward, start and state are not looked at."""
        seen = (torch.cat((observation, self.goals), 1) - self.mean) / self.scale
        action = self.net(seen.clamp(-10, 10))
        if not deterministic:
            action = action + self.log_std.exp() * torch.randn(action.shape, generator=generator, device=action.device)
        return action, state

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file."""
        about = {"family": self.family, "hidden": self.hidden, "about": self.about}
        return save_module(path, self, about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Oracle":
        """Read an oracle that `save` wrote, or the committed one of a family by its name.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, foreign, or of another schema version.
        """
        file = FOLDER / f"{path}.safetensors" if not Path(path).suffix else Path(path)
        if not file.is_file():
            there = ", ".join(sorted(p.stem for p in FOLDER.glob("*.safetensors"))) or "none"
            told = f"no oracle at {file} (committed: {there})"
            raise FileNotFoundError(f"{told}; train one with python -m adbook oracle --family FAMILY")

        def make(described: dict[str, Any]) -> Oracle:
            oracle = cls(described["family"], described["hidden"])
            oracle.about = described["about"]
            return oracle

        return load_module(file, cls, make)


def goal_features(tasks: Sequence[Task]) -> np.ndarray:
    """What the oracle is shown of goals, (n, 1 or 2) float32: points and speeds as they are, directions as cos, sin."""
    goals = np.array([task.goal for task in tasks])
    if tasks[0].family == "ant-dir":
        goals = np.concatenate((np.cos(goals), np.sin(goals)), 1)
    return goals.astype(np.float32)


class _Shown(TaskVector):
    """Environments whose goals are seen, and drawn anew in every episode, from the whole range, ood tasks' included."""

    def __init__(self, family: TaskFamily, n_envs: int, seed: int):
        self._rng, self._family = np.random.default_rng(seed), family
        self._tasks = list(family.sample_tasks(n_envs, self._rng, ood=True))
        super().__init__(family, self._tasks, seed=seed)
        size = family.observation_size + len(goal_features(self._tasks)[0])
        self.observation_space = Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self) -> np.ndarray:
        return np.concatenate((super().reset(), goal_features(self._tasks)), 1)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        before = goal_features(self._tasks)
        following, rewards, done, infos = super().step_wait()  # draws the next tasks
        for i in np.flatnonzero(done):
            infos[i]["terminal_observation"] = np.concatenate((infos[i]["terminal_observation"], before[i]))
        return np.concatenate((following, goal_features(self._tasks)), 1), rewards, done, infos

    def _restart(self, which: np.ndarray) -> np.ndarray:
        for i, task in zip(which, self._family.sample_tasks(len(which), self._rng, ood=True), strict=True):
            self._tasks[i] = task
            self._simulator.move(i, np.array(task.goal))
        return super()._restart(which)


def train_oracle(family: TaskFamily, config: PPOConfig, seed: int = 0, *, progress: bool = True) -> Oracle:
    """Train the oracle of a family with PPO on freshly drawn tasks, `config.n_envs` at a time.

    Args:
        family: the family; goals are drawn from its whole range.
        config: PPO's settings, with `normalize`; `streams` is not used.
        seed: of everything, from 0 to below 2³².
        progress: show a bar.

    Raises:
        ValueError: another seed, or settings without `normalize`.
    """
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**32 - 1")
    if not config.normalize:
        raise ValueError("normalize=False: an oracle keeps the scale of its observations; set normalize=True")
    with tqdm(
        total=config.steps, unit="step", unit_scale=True, disable=not progress, desc=f"{family.name} oracle"
    ) as bar:
        vector = _Shown(family, config.n_envs, seed)
        model = learn(vector, config, seed, on_steps=lambda steps: bar.update(steps - bar.n))
    return _extract(family, model, {"config": asdict(config), "seed": seed})


def _extract(family: TaskFamily, model: PPO, about: dict[str, Any]) -> Oracle:
    """Take the policy's mean and the observations' scale out of stable-baselines3's objects."""
    oracle = Oracle(family.name, model.policy.net_arch)
    linear = [m for m in model.policy.mlp_extractor.policy_net if isinstance(m, nn.Linear)] + [model.policy.action_net]
    mine = [m for m in oracle.net if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for to, of in zip(mine, linear, strict=True):
            to.load_state_dict(of.state_dict())
        oracle.log_std.copy_(model.policy.log_std)
        normal: VecNormalize = model.get_vec_normalize_env()
        oracle.mean.copy_(torch.from_numpy(normal.obs_rms.mean))
        oracle.scale.copy_(torch.from_numpy(np.sqrt(normal.obs_rms.var + normal.epsilon)))
    oracle.about = about
    return oracle.eval()
