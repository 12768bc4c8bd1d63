"""Many trainings side by side on one GPU: seeds, agents and settings of small models, which leave it idle by turns.

One training of a model of this book's size keeps a large GPU waiting for Python, which starts some hundred small
kernels an update. Here an update is one CUDA graph, histories lie on the GPU, where windows are cut, and each training
has a stream of its own, so that their kernels overlap. Windows are those of `adbook.training.train` with the same seed;
the noise is drawn on the GPU, and so is another one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from adbook.checks import check_whole
from adbook.policy import ADPolicy
from adbook.training import TrainingConfig, TrainingLog, parameter_groups, set_statistics
from adbook.windows import Windows

_AHEAD = 25  # updates whose windows are drawn and sent at once


@dataclass(frozen=True)
class Training:
    """One training: what `adbook.training.train` is given."""

    policy: ADPolicy
    windows: Windows
    config: TrainingConfig
    half: bool = False  # True: matrix products and attention in bfloat16; weights and sums stay in float32


def train_side_by_side(
    trainings: Sequence[Training], at_once: int = 12, device: str = "cuda"
) -> Iterator[tuple[int, TrainingLog]]:
    """Train policies in place; the first `at_once` of them start together, and where one ends the next one starts.

    Args:
        trainings: in the order in which they are to start.
        at_once: how many run side by side.
        device: "cuda"; on "cpu" they take turns, without graphs and streams.

    Yields:
        The number of a training that has ended and its log, whose seconds are those that it shared with others. Its
        policy is on the CPU again.

    Raises:
        ValueError: `at_once` is below 1.
        FloatingPointError: a loss was not finite; raised when all other trainings have ended.
    """
    check_whole("at_once", at_once)
    failed: list[str] = []
    tables: dict[tuple[int, ...], dict[str, Tensor]] = {}
    waiting, running = iter(enumerate(trainings)), {}
    while True:
        for i, training in islice(waiting, at_once - len(running)):
            key = tuple(id(history) for history in training.windows.histories)
            if key not in tables:
                tables[key] = _table(training.windows, device)
            running[i] = _Run(training, tables[key], torch.device(device))
        if not running:
            break
        for i, run in list(running.items()):
            if run.update == run.config.updates:
                del running[i]
                try:
                    log = run.finish()
                except FloatingPointError as error:
                    failed.append(f"training {i}: {error}")
                else:
                    yield i, log
            else:
                run.advance()
    if failed:
        raise FloatingPointError("; ".join(failed))


def _table(windows: Windows, device: str) -> dict[str, Tensor]:
    """All steps of all histories, one after the other: (steps, size)."""
    names = "observations", "actions"
    table = {name: np.concatenate([getattr(history, name) for history in windows.histories]) for name in names}
    return {name: torch.from_numpy(array).float().to(device) for name, array in table.items()}


class _Run:
    """A training under way."""

    def __init__(self, training: Training, table: dict[str, Tensor], device: torch.device):
        self.training, self.config, self.windows = training, training.config, training.windows
        self.table, self.device, self.on_gpu = table, device, device.type == "cuda"
        set_statistics(training.policy, self.windows)
        self.policy = training.policy.to(device).train()
        self.rate = torch.zeros((), device=device)
        fused = {"fused": True, "capturable": True} if self.on_gpu else {}
        groups = parameter_groups(self.policy, self.config)
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=self.config.betas, **fused)
        self.losses = torch.zeros(self.config.updates, device=device)
        shape = self.config.batch_size, self.windows.length
        self.places = torch.zeros(shape, dtype=torch.int64, device=device)
        self.rewards = torch.zeros(shape, device=device)
        self.noise = torch.zeros(*shape, table["observations"].shape[1], device=device)
        self.generator = torch.Generator(device).manual_seed(self.config.seed)
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.update, self.began, self.graph = 0, perf_counter(), None
        with torch.cuda.stream(self.stream):
            self._draw()
            if self.on_gpu:
                torch.cuda.synchronize()  # tables and weights come by another stream
                self._capture()

    def advance(self) -> None:
        """Start the next update; on a GPU, without waiting for its end."""
        with torch.cuda.stream(self.stream):
            if self.update and self.update % _AHEAD == 0:
                self._draw()
            self._take(self.update % _AHEAD)
            if self.config.observation_noise:
                self.noise.normal_(generator=self.generator)
            self.rate.fill_(self.config.rate(self.update))
            if self.graph is None:
                self.loss = self._update()
            else:
                self.graph.replay()
            self.losses[self.update].copy_(self.loss)
        self.update += 1

    def finish(self) -> TrainingLog:
        """Wait for the end, and return the log."""
        if self.on_gpu:
            self.stream.synchronize()
        losses = self.losses.tolist()
        if not np.isfinite(losses).all():
            first = int(np.argmin(np.isfinite(losses)))
            raise FloatingPointError(f"the loss is {losses[first]} at update {first}; lower learning_rate")
        self.policy.eval().cpu()
        tokens = self.config.updates * self.places.numel()
        return TrainingLog(losses, perf_counter() - self.began, tokens)

    def _draw(self) -> None:
        """Send the next updates' windows: rewards, and number of the step × 8 + imitated × 4 + start × 2 + valid."""
        places, rewards = [], []
        for update in range(self.update, min(self.update + _AHEAD, self.config.updates)):
            rng = np.random.default_rng([self.config.seed, update, 0])  # as `train`
            drawn = self.windows.draw(self.config.batch_size, rng)
            places.append(8 * drawn["places"] + 4 * drawn["imitated"] + 2 * drawn["starts"] + drawn["valid"])
            rewards.append(drawn["rewards"])
        self.ahead = [torch.from_numpy(np.stack(each)).to(self.device) for each in (places, rewards)]

    def _take(self, i: int) -> None:
        """Make the i-th of the windows sent those of the next update."""
        for now, ahead in zip((self.places, self.rewards), self.ahead, strict=True):
            now.copy_(ahead[i])

    def _update(self) -> Tensor:
        """One update with the windows at `places`; returns the loss."""
        index = self.places >> 3
        batch = {name: values[index] for name, values in self.table.items()} | {"rewards": self.rewards}
        batch |= {name: (self.places & bit) > 0 for name, bit in (("valid", 1), ("starts", 2), ("imitated", 4))}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.half):
            loss = self.policy.loss(batch, self.config.observation_noise * self.noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _capture(self) -> None:
        """Record an update as a graph; the updates that this takes are undone."""
        kept = [p.detach().clone() for p in self.policy.parameters()]
        self._take(0)
        for _ in range(3):  # compiles kernels and makes the optimizer's state
            self._update()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.loss = self._update()
        torch.cuda.synchronize()
        with torch.no_grad():
            for p, value in zip(self.policy.parameters(), kept, strict=True):
                p.copy_(value)
                for state in self.optimizer.state[p].values():
                    state.zero_()
        torch.cuda.synchronize()
