"""Source algorithms: one task in, environment streams out.

The learning history that algorithm distillation needs is what an environment saw while an algorithm learned in it, from
the first clumsy episode to the last good one, in order. Replay buffers and evaluation episodes do not have it.
"""

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from adbook.checks import check_layers, check_positive, check_share, check_whole, is_number
from adbook.droq import DroQ
from adbook.tasks import Task, TaskFamily
from adbook.vectors import Stream, TaskVector


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
    entropy: float = 0.0  # weight of the policy's entropy in the objective; it keeps σ from falling before it is time
    hidden: tuple[int, ...] = (64, 64)  # of the policy and of the value function
    normalize: bool = False  # let PPO see observations and rewards divided by their running scale

    def __post_init__(self):
        """Refuse settings that cannot run."""
        _check(self, at_least_1=("steps", "n_envs", "streams", "n_steps", "batch_size", "n_epochs"))
        _check(self, shares=("gamma", "gae_lambda"))
        if not is_number(self.log_std_init):
            raise ValueError(f"log_std_init={self.log_std_init!r} must be a finite number")
        if not is_number(self.entropy) or self.entropy < 0:
            raise ValueError(f"entropy={self.entropy!r} must be a number of at least 0")
        if type(self.normalize) is not bool:
            raise ValueError(f"normalize={self.normalize!r} must be True or False")
        if self.batch_size < 2:
            raise ValueError("batch_size=1 must be at least 2: PPO normalises the advantages of a batch")
        if (self.n_envs * self.n_steps) % self.batch_size:
            total = self.n_envs * self.n_steps
            raise ValueError(f"batch_size={self.batch_size} must divide n_envs * n_steps = {total}")

    @property
    def steps_each(self) -> int:
        """Steps that each environment takes in whole updates."""
        return -(-self.steps // (self.n_envs * self.n_steps)) * self.n_steps

    def build(self, vector: VecEnv, seed: int) -> BaseAlgorithm:
        """Return the algorithm, ready to learn in `vector`."""
        if self.normalize:
            vector = VecNormalize(vector, gamma=self.gamma)
        return PPO(
            "MlpPolicy",
            vector,
            n_steps=self.n_steps,
            batch_size=self.batch_size,
            n_epochs=self.n_epochs,
            learning_rate=lambda remaining: self.learning_rate * remaining,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            ent_coef=self.entropy,
            policy_kwargs={"log_std_init": self.log_std_init, "net_arch": list(self.hidden)} | _FUSED,
            seed=seed,
            device="cpu",
        )


@dataclass(frozen=True)
class SACConfig:
    """Soft actor-critic (arXiv 1801.01290, 1812.05905) by stable-baselines3, its temperature learned."""

    steps: int = 10_000  # environment steps over all environments
    n_envs: int = 4  # environments that fill one replay buffer; each is one stream
    streams: int = 4  # streams that are recorded, at most n_envs
    updates: int = 1  # gradient steps an environment step
    learning_starts: int = 500  # steps of uniformly random actions at the start
    batch_size: int = 256
    learning_rate: float = 1e-3
    gamma: float = 0.95
    tau: float = 0.01  # the target critics' step towards the critics
    temperature: float = 0.1  # the entropy's weight at the start; from 1 it takes thousands of steps to fall
    hidden: tuple[int, ...] = (64, 64)  # of the policy and of each critic

    def __post_init__(self):
        """Refuse settings that cannot run."""
        _check(self, at_least_1=("steps", "n_envs", "streams", "updates", "batch_size"), shares=("gamma", "tau"))
        check_positive(self, ("temperature",))
        if type(self.learning_starts) is not int or not 0 <= self.learning_starts < self.steps:
            raise ValueError(f"learning_starts={self.learning_starts!r} must be from 0 to below steps={self.steps}")

    @property
    def steps_each(self) -> int:
        """Steps that each environment takes."""
        return -(-self.steps // self.n_envs)

    def build(self, vector: VecEnv, seed: int) -> BaseAlgorithm:
        """Return the algorithm, ready to learn in `vector`."""
        return SAC("MlpPolicy", vector, **self.options(seed))

    def options(self, seed: int) -> dict:
        """Return the settings under the names of stable-baselines3's arguments."""
        return {
            "learning_rate": self.learning_rate,
            "buffer_size": self.steps_each * self.n_envs,
            "learning_starts": self.learning_starts,
            "batch_size": self.batch_size,
            "tau": self.tau,
            "gamma": self.gamma,
            "ent_coef": f"auto_{self.temperature}",
            "train_freq": 1,
            "gradient_steps": self.updates * self.n_envs,
            "policy_kwargs": {"net_arch": list(self.hidden)} | _FUSED,
            "seed": seed,
            "device": "cpu",
        }


@dataclass(frozen=True)
class DroQConfig(SACConfig):
    """DroQ (arXiv 2110.02034): SAC with dropout and layer normalisation in its critics, and many updates a step."""

    steps: int = 3_000
    n_envs: int = 1
    streams: int = 1
    updates: int = 20
    learning_starts: int = 250
    batch_size: int = 128
    dropout: float = 0.01

    def __post_init__(self):
        """Refuse settings that cannot run."""
        super().__post_init__()
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be from 0 to below 1")

    def build(self, vector: VecEnv, seed: int) -> BaseAlgorithm:
        """Return the algorithm, ready to learn in `vector`."""
        options = self.options(seed)
        options["policy_kwargs"] |= {"dropout": self.dropout}
        return DroQ("MlpPolicy", vector, **options)


SourceConfig = PPOConfig | SACConfig | DroQConfig
_FUSED = {"optimizer_kwargs": {"fused": True}}  # one kernel for all weights of a network, so small ones step faster


def _check(config: SourceConfig, at_least_1: tuple[str, ...] = (), shares: tuple[str, ...] = ()) -> None:
    for name in at_least_1:
        check_whole(name, getattr(config, name))
    check_layers(config.hidden)
    check_share(config, shares)
    check_positive(config, ("learning_rate",))
    if config.streams > config.n_envs:
        raise ValueError(f"streams={config.streams} exceeds n_envs={config.n_envs}; record at most every environment")


def source_name(config: SourceConfig) -> str:
    """Return the algorithm's name: "PPO", "SAC" or "DroQ"."""
    return type(config).__name__.removesuffix("Config")


def run_source(
    family: TaskFamily,
    task: Task,
    config: SourceConfig,
    seed: int,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> list[Stream]:
    """Learn `task` with the algorithm of `config` and return the recorded streams, `config.streams` of them.

    `on_steps` is told every now and then how many environment steps have been made. The same arguments give the same
    streams on the same machine. Torch is left on one thread: networks this small run fastest so, and tasks are run in
    parallel.

    Raises:
        ValueError: the settings do not give every environment one whole episode.
    """
    check_horizon(family, config)
    dice = _dice(task, seed)
    recorded = {"capacity": config.steps_each, "streams": config.streams}
    vector = TaskVector(family, [task] * config.n_envs, seed=dice, **recorded)
    learn(vector, config, dice, on_steps=on_steps)
    return vector.streams


def check_horizon(family: TaskFamily, config: SourceConfig) -> None:
    """Raise ValueError unless `config` is a source's settings and gives every environment one whole episode."""
    if not isinstance(config, SourceConfig):
        raise ValueError(f"config={config!r} must be a PPOConfig, SACConfig or DroQConfig, with its brackets")
    if config.steps_each < family.horizon:
        raise ValueError(
            f"steps={config.steps} over {config.n_envs} environments are {config.steps_each} steps each, less than an "
            f"episode of {family.name} ({family.horizon}); raise steps or lower n_envs"
        )


def learn(
    vector: VecEnv,
    config: SourceConfig,
    seed: int,
    *,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> BaseAlgorithm:
    """Let the algorithm of `config` learn in `vector`, close it, and return the algorithm.

    Stable-baselines3 draws from the global generators of random, numpy and torch, which are seeded with `seed`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*GPU.*")  # stable-baselines3's advice on devices
            model = config.build(vector, seed)
        model.set_logger(Logger(folder=None, output_formats=[]))
        model.learn(config.steps_each * config.n_envs, callback=_Tell(on_steps))
    finally:
        torch.set_num_threads(threads)
        vector.close()
    return model


class _Tell(BaseCallback):
    """Tell how many steps have been made, whenever the algorithm has learned from some and goes on playing."""

    def __init__(self, on_steps: Callable[[int], None]):
        super().__init__()
        self.on_steps = on_steps

    def _on_rollout_start(self) -> None:
        self.on_steps(self.num_timesteps)

    def _on_step(self) -> bool:
        return True


def _dice(task: Task, seed: int) -> int:
    """Seed of one run. Each task needs its own: were the noise the same in all, a model would learn it by heart."""
    return int(np.random.SeedSequence([seed, zlib.crc32(repr(task).encode())]).generate_state(1)[0])
