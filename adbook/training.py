"""One training loop for every backbone: windows of learning histories in, a policy that imitates the learning out.

Needs no simulator: torch, numpy and a file of histories are enough. Lightning Fabric carries devices, precision and
several processes; with none given, one device of the fastest kind at hand is used.
"""

import hashlib
import math
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from adbook.checks import check_positive, check_whole, is_number
from adbook.files import content_hash
from adbook.policy import ADPolicy
from adbook.stored import load_training, save_training
from adbook.windows import Windows

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class TrainingConfig:
    """AdamW with warm-up and a cosine schedule."""

    updates: int = 2000
    batch_size: int = 20  # windows an update and process
    learning_rate: float = 3e-3  # at the end of the warm-up; falls to a hundredth along a cosine
    warmup: int = 100  # updates
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # largest norm of the gradient
    observation_noise: float = 0.02  # Gaussian, in standard deviations of each observation
    seed: int = 0  # of windows and noise; initial weights are drawn when the policy is made
    checkpoint_every: int = 500  # updates

    def __post_init__(self):
        """Refuse settings that cannot run."""
        for name in ("updates", "batch_size", "checkpoint_every"):
            check_whole(name, getattr(self, name))
        for name in ("warmup", "seed"):
            check_whole(name, getattr(self, name), 0)
        if not self.warmup < self.updates:
            raise ValueError(f"warmup={self.warmup} must be less than updates={self.updates}")
        check_positive(self, ("learning_rate", "clip"))
        for name in ("weight_decay", "observation_noise"):
            if not is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number of at least 0")
        if (
            not isinstance(self.betas, tuple)
            or len(self.betas) != 2
            or not all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        ):
            raise ValueError(f"betas={self.betas!r} must be two numbers of at least 0 and less than 1")

    def rate(self, update: int) -> float:
        """Learning rate of an update."""
        if update < self.warmup:
            return self.learning_rate * (update + 1) / self.warmup
        progress = (update - self.warmup) / (self.updates - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class TrainingLog:
    """What a training run leaves beside the weights."""

    losses: list[float]  # one an update
    seconds: float = 0.0  # spent in updates
    tokens: int = 0  # trained on

    @property
    def tokens_per_second(self) -> float:
        """Mean speed, data loading included."""
        return self.tokens / max(self.seconds, 1e-9)


def train(
    policy: ADPolicy,
    windows: Windows,
    config: TrainingConfig,
    *,
    checkpoint: str | os.PathLike | None = None,
    fabric: "Fabric | None" = None,
    progress: bool = True,
) -> TrainingLog:
    """Train `policy` in place.

    What an update draws depends on the seed and the update's number alone, so a run that was interrupted and goes on
    from its checkpoint gives the same weights, bit for bit on a CPU, as one that was not.

    Args:
        policy: an untrained policy; its normalisation is set from the windows' histories.
        windows: where batches come from.
        config: the schedule.
        checkpoint: a file to keep the state of training in; training goes on from it if it is there.
        fabric: devices and precision, `lightning_fabric.Fabric(...)`; launch it before.
        progress: show a bar with the loss and tokens a second.

    Returns:
        The losses and the speed.

    Raises:
        ValueError: the checkpoint is damaged, or of another model, configuration or set of histories.
        FloatingPointError: the loss stopped being finite.
    """
    if fabric is None:
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="auto", devices=1)
    set_statistics(policy, windows)
    optimizer = torch.optim.AdamW(parameter_groups(policy, config), lr=config.learning_rate, betas=config.betas)
    identity = content_hash(asdict(policy.config), asdict(config), asdict(windows.config), _digest(windows))
    log = TrainingLog([])
    model, optimizer = fabric.setup(policy, optimizer)  # first: an optimiser's state is loaded to where its weights are
    if checkpoint is not None and Path(checkpoint).exists():
        log = TrainingLog(**load_training(checkpoint, policy, [optimizer], identity))
    model.mark_forward_method("loss")
    model.train()
    first = len(log.losses)
    bar = tqdm(total=config.updates, initial=first, unit="update", disable=not progress or fabric.global_rank > 0)
    with bar:
        for update in range(first, config.updates):
            began = time.perf_counter()
            batch, noise = _batch(windows, config, update, fabric)
            for group in optimizer.param_groups:
                group["lr"] = config.rate(update)
            loss = model.loss(batch, noise)
            value = _finite(loss, update)  # before clipping, whose complaint would be about gradients
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=config.clip)
            optimizer.step()
            optimizer.zero_grad()
            log.losses.append(value)
            log.tokens += noise.shape[0] * noise.shape[1] * fabric.world_size
            log.seconds += time.perf_counter() - began
            bar.update()
            bar.set_postfix_str(f"loss {np.mean(log.losses[-50:]):.3f}, {log.tokens_per_second:,.0f} tokens/s")
            done = update + 1
            if checkpoint is not None and done % config.checkpoint_every == 0 and fabric.global_rank == 0:
                save_training(checkpoint, policy, [optimizer], identity, asdict(log))
    policy.eval()
    return log


def set_statistics(policy: ADPolicy, windows: Windows) -> None:
    """Set the policy's normalisation from the histories behind `windows`.

    Raises:
        ValueError: the policy is of other sizes than the histories, or their actions are larger than its largest.
    """
    config, first = policy.config, windows.histories[0]
    for name, width in (("observation_size", first.observations.shape[1]), ("action_size", first.actions.shape[1])):
        if getattr(config, name) != width:
            raise ValueError(
                f"{name}={getattr(config, name)} of the policy does not fit histories of {width}; use {width}"
            )
    largest = max(float(np.abs(history.actions).max()) for history in windows.histories)
    if largest > 1.001 * config.action_scale:  # what is kept in 16 bits can be rounded up
        told = (
            f"actions of {largest:.3g} are in the histories; the policy's largest is action_scale={config.action_scale}"
        )
        raise ValueError(f"{told}; give it that of the family")
    observations = np.concatenate([history.observations for history in windows.histories])
    rewards = np.concatenate([history.rewards for history in windows.histories])
    returns = [torch.from_numpy(np.asarray(history.episode_returns)) for history in windows.histories]
    returns = nn.utils.rnn.pad_sequence(returns, batch_first=True, padding_value=math.nan)
    policy.set_statistics(torch.from_numpy(observations), torch.from_numpy(rewards), returns)


def parameter_groups(policy: nn.Module, config: TrainingConfig) -> list[dict]:
    """Weight decay for matrices only; not for biases, norms, and the scan's A and D (as Mamba's authors train it)."""
    decayed = [p for n, p in policy.named_parameters() if p.ndim >= 2 and not n.endswith("A_log")]
    kept = {id(p) for p in decayed}
    rest = [p for p in policy.parameters() if id(p) not in kept]
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _digest(windows: Windows) -> list:
    """What tells one set of histories from another: the length of a window, and every number that is trained on."""
    digest = hashlib.blake2b()
    for history in windows.histories:
        for field in fields(history):
            if field.name != "metadata":
                digest.update(np.ascontiguousarray(getattr(history, field.name)))
    return [windows.length, [h.metadata for h in windows.histories], digest.hexdigest()]


def _batch(windows: Windows, config: TrainingConfig, update: int, fabric: "Fabric") -> tuple[dict[str, Tensor], Tensor]:
    rng = np.random.default_rng([config.seed, update, fabric.global_rank])
    batch = windows.sample(config.batch_size, rng)
    noise = config.observation_noise * rng.standard_normal(batch["observations"].shape, dtype=np.float32)
    tensors = {name: torch.from_numpy(array).to(fabric.device) for name, array in batch.items()}
    return tensors, torch.from_numpy(noise).to(fabric.device)


def _finite(loss: Tensor, update: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at update {update}; train again with a lower learning_rate")
    return value
