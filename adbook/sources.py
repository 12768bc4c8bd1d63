"""Source algorithms: one task in, environment streams out.

The learning history that algorithm distillation needs is what an environment saw while an algorithm learned in it, from
the first clumsy episode to the last good one, in order. Replay buffers and evaluation episodes do not have it.
"""

import warnings
import zlib
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from adbook.tasks import Task, TaskFamily

Stream = dict[str, np.ndarray]
"""One environment's steps in order; keys and shapes are those of `adbook.LearningHistory`."""


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation (arXiv 1707.06347) by stable-baselines3, on several environments at once."""

    steps: int = 40_000  # environment steps over all environments; rounded up to whole updates
    n_envs: int = 16  # environments that learn together; each is one stream
    streams: int = 8  # streams that are recorded, at most n_envs
    n_steps: int = 50  # steps of each environment between updates; whole episodes learn most steadily
    batch_size: int = 200
    n_epochs: int = 10  # passes over the steps in an update
    learning_rate: float = 3e-3  # at the start; falls linearly to 0
    gamma: float = 0.95
    gae_lambda: float = 0.95
    log_std_init: float = -0.7  # log σ of the Gaussian policy at the start, in the action's own unit
    hidden: tuple[int, ...] = (64, 64)  # of the policy and of the value function

    def __post_init__(self):
        """Refuse settings that cannot run."""
        for name in ("steps", "n_envs", "streams", "n_steps", "batch_size", "n_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.learning_rate < np.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be a positive number")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if not np.isfinite(self.log_std_init):
            raise ValueError(f"log_std_init={self.log_std_init} must be a finite number")
        if self.streams > self.n_envs:
            raise ValueError(f"streams={self.streams} exceeds n_envs={self.n_envs}; record at most every environment")
        if (self.n_envs * self.n_steps) % self.batch_size:
            total = self.n_envs * self.n_steps
            raise ValueError(f"batch_size={self.batch_size} must divide n_envs * n_steps = {total}")


class Recorder(gymnasium.Wrapper):
    """Keep every step of an environment, beneath any vectorisation (which hides the last observation)."""

    def __init__(self, env: gymnasium.Env, capacity: int):
        """Record up to `capacity` steps of `env`."""
        super().__init__(env)
        shapes = (env.observation_space.shape, env.action_space.shape)
        names = ("observations", "actions", "rewards", "next_observations")
        sizes = (*shapes, (), shapes[0])
        self._stream = {n: np.empty((capacity, *s), np.float32) for n, s in zip(names, sizes, strict=True)}
        self._stream |= {n: np.empty(capacity, bool) for n in ("terminated", "truncated")}
        self._count = 0
        self._observation = None

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        """Reset the environment; what follows starts a new episode."""
        self._observation, info = self.env.reset(**kwargs)
        return self._observation, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Step the environment and record the step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        row = (self._observation, action, reward, observation, terminated, truncated)
        for values, value in zip(self._stream.values(), row, strict=True):
            values[self._count] = value
        self._count += 1
        self._observation = observation
        return observation, reward, terminated, truncated, info

    @property
    def stream(self) -> Stream:
        """What was recorded, cut after the last finished episode."""
        ends = np.flatnonzero(self._stream["terminated"][: self._count] | self._stream["truncated"][: self._count])
        length = int(ends[-1]) + 1 if len(ends) else 0
        return {name: values[:length] for name, values in self._stream.items()}


def run_ppo(family: TaskFamily, task: Task, config: PPOConfig, seed: int) -> list[Stream]:
    """Learn `task` with PPO and return the recorded streams, `config.streams` of them.

    The same arguments give the same streams on the same machine. Torch is left on one thread: networks this small
    run fastest so, and tasks are run in parallel.
    """
    torch.set_num_threads(1)
    per_update = config.n_envs * config.n_steps
    updates = -(-config.steps // per_update)
    recorders = [Recorder(family.make(task), updates * config.n_steps) for _ in range(config.streams)]
    plain = [family.make(task) for _ in range(config.n_envs - config.streams)]
    vector = DummyVecEnv([lambda env=env: env for env in (*recorders, *plain)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU.*")  # stable-baselines3's advice on devices
        model = _ppo(vector, config, _dice(task, seed))
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.learn(updates * per_update)
    vector.close()
    return [recorder.stream for recorder in recorders]


def _dice(task: Task, seed: int) -> int:
    """Seed of one run. Each task needs its own: were the noise the same in all, a model would learn it by heart."""
    return int(np.random.SeedSequence([seed, zlib.crc32(repr(task).encode())]).generate_state(1)[0])


def _ppo(vector: DummyVecEnv, config: PPOConfig, seed: int) -> PPO:
    return PPO(
        "MlpPolicy",
        vector,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        learning_rate=lambda remaining: config.learning_rate * remaining,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        policy_kwargs={"log_std_init": config.log_std_init, "net_arch": list(config.hidden)},
        seed=seed,
        device="cpu",
    )
