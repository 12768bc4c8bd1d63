"""MACAW, offline meta-reinforcement learning by advantage-weighted regression (Mitchell et al., arXiv 2008.06043).

Nothing is learned in context here: at a new task one gradient step changes the weights. What is meta-trained, from
learning histories, is where that step starts and how long it is.

| symbol     | what it is                                                                        | in the paper |
|------------|-----------------------------------------------------------------------------------|--------------|
| ``V``      | value network: from observation and step the return that is still to come         | φ            |
| ``policy`` | mean of a Gaussian over actions, and a head that guesses the advantage of any one | θ            |
| ``R``      | Monte-Carlo return, discounted, in units of its standard deviation                | R            |
| ``T``      | temperature of the weights exp((R − V) / T)                                       | T            |

Two things are not in the paper's formulas. Returns end with the episode, so V is told the step; else half of Ant-Dir's
"advantage" would be the clock. And advantages are standardised in each batch before they become weights, as in the
authors' own experiments: T then means the same on every family.

Symbols of shapes: ``n`` tasks, ``B`` transitions, ``O`` observation size, ``A`` action size.
"""

import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor, nn
from torch.func import grad, vmap
from tqdm import tqdm

from adbook.checks import check_layers, check_positive, check_seed, check_share, check_whole
from adbook.files import content_hash
from adbook.histories import LearningHistory
from adbook.play import one_thread
from adbook.stored import load_module, load_training, save_module, save_training

CHECKPOINT_EVERY = 1000  # updates
Layers = list[Tensor]  # of each layer the weights (…, out, in + 1), the last column the bias


@dataclass(frozen=True)
class MACAWConfig:
    """Shape and meta-training of MACAW.

    Hidden widths, temperature, largest weight and batch are the published ones; latent size, advantage head, stretches,
    rates and updates are ours.
    """

    observation_size: int
    action_size: int
    action_scale: float = 1.0
    hidden: tuple[int, ...] = (100, 100, 100)
    latent: int = 32  # numbers that each layer's weights are generated from
    std: float = 0.2  # of the actions, in units of action_scale
    discount: float = 0.99
    temperature: float = 1.0
    max_weight: float = 20.0  # of a transition in the regression
    advantage: float = 0.01  # weight of the advantage head's loss, in the inner loop only
    batch: int = 256  # transitions of an inner step; as many others measure it in the outer loop
    stretches: float = 0.5  # of the inner batches are one stretch of a history each; the others are from everywhere
    tasks: int = 5  # of an update
    updates: int = 20_000
    learning_rate: float = 1e-4
    inner_rate: float = 1e-2  # where the learned rates of the inner step start
    rate_learning_rate: float = 1e-3  # at which their logarithms are learned
    seed: int = 0

    def __post_init__(self):
        """Refuse settings that cannot run, ValueError."""
        if isinstance(self.hidden, list):  # JSON knows lists only
            object.__setattr__(self, "hidden", tuple(self.hidden))
        for name in ("observation_size", "action_size", "latent", "tasks", "updates"):
            check_whole(name, getattr(self, name))
        check_whole("batch", self.batch, 2)  # advantages are standardised in it
        check_seed(self.seed)
        rates = "learning_rate", "inner_rate", "rate_learning_rate"
        check_positive(self, ("action_scale", "std", "temperature", "max_weight", *rates))
        check_positive(self, ("advantage",), or_zero=True)
        check_share(self, ("discount", "stretches"))
        check_layers(self.hidden, 1)


class Transitions(NamedTuple):
    """Steps in any order; a leading axis of tasks may come before."""

    observations: Tensor  # (B, O)
    actions: Tensor  # (B, A)
    returns: Tensor  # (B,), discounted, from that step to the end of its episode
    steps: Tensor  # (B,), how many came before in the episode


def returns_to_come(rewards: np.ndarray, discount: float) -> np.ndarray:
    """Discounted return from each step of one episode to its end, (T,) float64."""
    return lfilter([1.0], [1.0, -discount], rewards[::-1].astype(np.float64))[::-1]


def returns_and_steps(rewards: np.ndarray, episodes: Sequence[slice], discount: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns to come and number in its episode of each step of consecutive episodes, (T,) each."""
    returns = [returns_to_come(rewards[e], discount) for e in episodes]
    return np.concatenate(returns), np.concatenate([np.arange(len(r)) for r in returns])


def transitions(histories: Sequence[LearningHistory], discount: float) -> Transitions:
    """Join the steps of histories, of one task, in their order.

    Raises:
        ValueError: histories of several tasks.
    """
    goals = {tuple(h.metadata["task"]["goal"]) for h in histories if "task" in h.metadata}
    if len(goals) > 1:
        raise ValueError(f"histories of {len(goals)} tasks given; give those of one")
    numbers = [returns_and_steps(h.rewards, h.episodes, discount) for h in histories]
    joined = (np.concatenate([getattr(h, name) for h in histories]) for name in ("observations", "actions"))
    arrays = (*joined, *map(np.concatenate, zip(*numbers, strict=True)))
    return Transitions(*(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)) for x in arrays))


def mlp(layers: Layers, x: Tensor) -> Tensor:
    """Apply layers with ReLU in between to (…, B, in)."""
    for i, weights in enumerate(layers):
        x = x @ weights[..., :-1].mT + weights[..., -1].unsqueeze(-2)
        if i < len(layers) - 1:
            x = x.relu()
    return x


def check_transitions(batch: Transitions, config: MACAWConfig, name: str) -> None:
    """Raise ValueError if transitions are not of the sizes of `config`, of one length and finite."""
    if not isinstance(batch, Transitions) or not all(isinstance(x, Tensor) for x in batch):
        raise ValueError(f"{name} is {type(batch).__name__}, not Transitions of tensors; make them with transitions()")
    n = len(batch.returns) if batch.returns.ndim else 0
    wanted = Transitions((n, config.observation_size), (n, config.action_size), (n,), (n,))
    for part, x, shape in zip(Transitions._fields, batch, wanted, strict=True):
        if tuple(x.shape) != shape:
            raise ValueError(f"{part} of {name} are of shape {tuple(x.shape)}; they must be {shape}")
        if not torch.isfinite(x).all():
            raise ValueError(f"{part} of {name} are not all finite; drop the steps that are not")


class GeneratedLayers(nn.Module):
    """Layers whose weights w = G z are a linear function of a latent vector (the paper's weight transform).

    A gradient step on generator G and latent z changes a weight matrix by more than the outer product of one batch.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], latent: int, generator: torch.Generator):
        """Draw weights so that the generated ones have a variance of 1 / (3 in), as those of `nn.Linear`.

        Args:
            sizes: (in, out) of each layer.
            latent: numbers in a latent vector.
            generator: of the dice.
        """
        super().__init__()
        self.latents, self.generators = nn.ParameterList(), nn.ParameterList()
        self.shapes = [(outputs, inputs + 1) for inputs, outputs in sizes]
        for inputs, outputs in sizes:
            self.latents.append(torch.randn(latent, generator=generator))
            drawn = torch.randn(outputs * (inputs + 1), latent, generator=generator)
            self.generators.append(drawn / math.sqrt(3 * inputs * latent))

    def forward(self) -> Layers:
        """Generate the layers."""
        pairs = zip(self.generators, self.latents, self.shapes, strict=True)
        return [(generator @ latent).view(shape) for generator, latent, shape in pairs]

    def stepped(self, layers: Layers, gradients: Layers, rates: Tensor) -> Layers:
        """Return the layers that a gradient step on all latents and generators leads to.

        With rates a of G and b of z, and a gradient g of w, the step leads to G − a g zᵀ and to z − b Gᵀ g, so to
        w − a |z|² g − b G Gᵀ g + a b (g · w) g. This needs no second G, of which there would be one a task.

        Args:
            layers: as generated.
            gradients: of a loss by them.
            rates: (2, layers), a and b.
        """
        after = []
        for i, (weights, gradient) in enumerate(zip(layers, gradients, strict=True)):
            (a, b), z, generator, g = rates[:, i], self.latents[i], self.generators[i], gradient.flatten()
            along = a * b * (g @ weights.flatten()) - a * (z @ z)
            after.append(weights + (along * g - b * (generator @ (g @ generator))).view(weights.shape))
        return after


class MACAW(nn.Module):
    """Both networks, where their inner step starts, and its learned rates, one for each latent and each generator."""

    def __init__(self, config: MACAWConfig):
        """Weights are drawn from `config.seed`."""
        super().__init__()
        self.config, self.about = config, {}
        generator, last = torch.Generator().manual_seed(config.seed), config.hidden[-1]
        value = pairwise((config.observation_size + 1, *config.hidden, 1))
        policy = *pairwise((config.observation_size, *config.hidden)), (last, config.action_size)  # body and mean
        policy += (last + config.action_size, last), (last, 1)  # the head that guesses advantages
        self.value = GeneratedLayers(list(value), config.latent, generator)
        self.policy = GeneratedLayers(policy, config.latent, generator)
        for name in ("value", "policy"):
            rates = torch.full((2, len(getattr(self, name).latents)), math.log(config.inner_rate))
            self.register_parameter(f"{name}_rates", nn.Parameter(rates))
        self.register_buffer("mean", torch.zeros(config.observation_size))
        self.register_buffer("scale", torch.ones(config.observation_size))
        for name in ("return", "step"):
            self.register_buffer(f"{name}_mean", torch.zeros(()))
            self.register_buffer(f"{name}_scale", torch.ones(()))

    def set_statistics(self, tasks: Sequence[Transitions]) -> None:
        """Set the normalisation of observations and returns from the training tasks."""
        observations = torch.cat([task.observations for task in tasks])
        self.mean.copy_(observations.mean(0))
        self.scale.copy_(observations.std(0).clamp_min(1e-3))
        for name in ("return", "step"):
            values = torch.cat([getattr(task, f"{name}s") for task in tasks])
            getattr(self, f"{name}_mean").copy_(values.mean())
            getattr(self, f"{name}_scale").copy_(values.std().clamp_min(1e-3))

    def normalised(self, batch: Transitions) -> Transitions:
        """Observations, returns and steps in units of their spread, actions in units of the largest."""
        observations = self.normalised_observations(batch.observations)
        returns = (batch.returns - self.return_mean) / self.return_scale
        steps = (batch.steps - self.step_mean) / self.step_scale
        return Transitions(observations, batch.actions / self.config.action_scale, returns, steps)

    def normalised_observations(self, observations: Tensor) -> Tensor:
        """Observations (…, O) in units of their spread."""
        return ((observations - self.mean) / self.scale).clamp(-10, 10)

    def adapted(self, batch: Transitions) -> tuple[Layers, Layers]:
        """Make the inner step on one task's normalised batch: layers of value and policy after it."""
        value, policy = self.value(), self.policy()
        value = self.value.stepped(value, grad(self.value_loss)(value, batch), self.value_rates.exp())
        advantages = self.advantages(value, batch).detach()

        def loss(layers: Layers) -> Tensor:
            regression, guess = self.policy_losses(layers, advantages, batch)
            return regression + self.config.advantage * guess

        return value, self.policy.stepped(policy, grad(loss)(policy), self.policy_rates.exp())

    def value_loss(self, layers: Layers, batch: Transitions) -> Tensor:
        """Mean squared error of the returns."""
        return self.advantages(layers, batch).square().mean()

    def advantages(self, layers: Layers, batch: Transitions) -> Tensor:
        """R − V, (B,)."""
        seen = torch.cat((batch.observations, batch.steps.unsqueeze(-1)), -1)
        return batch.returns - mlp(layers, seen).squeeze(-1)

    def policy_losses(self, layers: Layers, advantages: Tensor, batch: Transitions) -> tuple[Tensor, Tensor]:
        """Advantage-weighted regression, and the squared error of the guessed advantages."""
        *body, mean, hidden, guess = layers
        features = mlp(body, batch.observations).relu()
        deviations = (batch.actions - mlp([mean], features).tanh()) / self.config.std
        standard = (advantages - advantages.mean()) / advantages.std().clamp_min(1e-6)
        weights = (standard / self.config.temperature).exp().clamp(max=self.config.max_weight)
        guessed = mlp([hidden, guess], torch.cat((features, batch.actions), -1)).squeeze(-1)
        return (weights * deviations.square().sum(-1) / 2).mean(), (guessed - advantages).square().mean()

    def outer_losses(self, inner: Transitions, outer: Transitions) -> tuple[Tensor, Tensor]:
        """Losses of value and policy on one task's other batch, after the inner step on the first."""
        value, policy = self.adapted(inner)
        advantages = self.advantages(value, outer)
        return advantages.square().mean(), self.policy_losses(policy, advantages.detach(), outer)[0]

    def save(self, path: str | os.PathLike, about: dict[str, Any], *, half: bool = False) -> Path:
        """Write one safetensors file; `half` keeps the weights in 16 bits."""
        names = [name for name, _ in self.named_parameters()] if half else []
        return save_module(path, self, {"config": asdict(self.config), "about": about}, half=names)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "MACAW":
        """Read what `save` wrote; what it was told is its attribute `about`.

        Raises:
            ValueError: the file is damaged or holds something else.
        """

        def make(described: dict[str, Any]) -> MACAW:
            macaw = cls(MACAWConfig(**described["config"]))
            macaw.about = described["about"]
            return macaw

        return load_module(Path(path), cls, make)


@one_thread()
def meta_train(
    macaw: MACAW, tasks: Sequence[Transitions], *, checkpoint: str | os.PathLike | None = None, progress: bool = True
) -> tuple[np.ndarray, float]:
    """Meta-train on the transitions of training tasks.

    An update draws tasks, and of each an inner and an outer batch that do not overlap. The value network learns from
    its own outer loss alone, the policy from its own.

    Args:
        macaw: is changed in place.
        tasks: transitions of each training task.
        checkpoint: a file to keep the state in; meta-training goes on from it if it is there, to the same result.
        progress: show a bar.

    Returns:
        The outer losses of value and policy, (updates, 2), and the seconds that it took.

    Raises:
        ValueError: a task with fewer transitions than two batches, or of other sizes than the model's, or not finite; a
            checkpoint that is damaged or of another training.
        FloatingPointError: a loss stopped being finite.
    """
    config = macaw.config
    for i, task in enumerate(tasks):
        check_transitions(task, config, f"task {i}")
    few = [i for i, task in enumerate(tasks) if len(task.returns) < 2 * config.batch]
    if few or not tasks:
        told = f"tasks {few} have fewer transitions" if few else "there is no task"
        raise ValueError(f"{told}; each needs 2 * batch = {2 * config.batch}: give more histories, or lower batch")
    macaw.set_statistics(tasks)
    ready = [macaw.normalised(task) for task in tasks]
    networks, rates = [*macaw.value.parameters(), *macaw.policy.parameters()], [macaw.value_rates, macaw.policy_rates]
    groups = [(networks, config.learning_rate), (rates, config.rate_learning_rate)]
    optimizer = torch.optim.Adam([{"params": params, "lr": rate} for params, rate in groups])
    identity = content_hash(asdict(config), _digest(tasks))
    losses, before = [], 0.0
    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_training(checkpoint, macaw, [optimizer], identity)
        losses, before = saved["losses"], saved["seconds"]
    first, began = len(losses), time.perf_counter()
    updates = tqdm(
        range(first, config.updates), initial=first, total=config.updates, unit="update", disable=not progress
    )
    for update in updates:
        rng = np.random.default_rng([config.seed, update])
        value, policy = (loss.mean() for loss in vmap(macaw.outer_losses)(*_batches(ready, config, rng)))
        losses.append((value.item(), policy.item()))
        if not np.isfinite(losses[-1]).all():
            raise FloatingPointError(f"losses are {losses[-1]} at update {update}; lower learning_rate")
        optimizer.zero_grad()
        (value + policy).backward()  # each reaches its own network and rates alone
        optimizer.step()
        if checkpoint is not None and (update + 1) % CHECKPOINT_EVERY == 0:
            seconds = before + time.perf_counter() - began
            save_training(checkpoint, macaw, [optimizer], identity, {"losses": losses, "seconds": seconds})
    return np.array(losses), before + time.perf_counter() - began


def _digest(tasks: Sequence[Transitions]) -> str:
    """What tells one set of transitions from another."""
    digest = hashlib.blake2b()
    for array in (x for task in tasks for x in task):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _batches(
    tasks: Sequence[Transitions], config: MACAWConfig, rng: np.random.Generator
) -> tuple[Transitions, Transitions]:
    """Inner and outer batch of some tasks, (tasks, B, …) each.

    On a new task the inner one is drawn from a recorded history, or it is what an agent has just played, one stage of
    learning; so it is now the one and now the other.
    """
    chosen = rng.choice(len(tasks), min(config.tasks, len(tasks)), replace=False)
    drawn = []
    for task in (tasks[i] for i in chosen):
        n, size = len(task.returns), config.batch
        if rng.random() < config.stretches:
            first = rng.integers(n - size + 1) + np.arange(size)
            rows = np.concatenate((first, rng.choice(np.delete(np.arange(n), first), size, replace=False)))
        else:
            rows = rng.choice(n, 2 * size, replace=False)
        drawn.append(Transitions(*(x[torch.from_numpy(rows)] for x in task)))
    both = Transitions(*(torch.stack(x) for x in zip(*drawn, strict=True)))  # (tasks, 2 B, …)
    halves = slice(config.batch), slice(config.batch, None)
    inner, outer = (Transitions(*(x[:, half] for x in both)) for half in halves)
    return inner, outer
