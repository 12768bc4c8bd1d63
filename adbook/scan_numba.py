"""The "numba" backend of the selective scan: shares the work among threads and joins the compiled loops to autograd.

The loops themselves are in `adbook.kernels`.  They run without the interpreter lock on plain Python threads, as many
as `torch.get_num_threads()` of the caller.  That is safe under concurrent callers and after a fork, where numba's own
parallel loops are not, and compiles sooner.  The split of the work depends on the shapes alone and partial sums are
added in a fixed order, so results do not depend on how many threads there are or which was first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adbook import kernels

_COPIED = 1024  # steps that are transposed at a time
_FEW = 4  # tasks to aim at for a small batch, so that some threads have something to do


@lru_cache
def split(batch: int, channels: int, groups: int = 1, n_state: int = 0, first: int = 0) -> np.ndarray:
    """The tasks of `adbook.kernels` in the order of the batch; B and C start at column `first` of their rows."""
    width = channels // groups
    parts = max(-(-width // kernels.BLOCK), min(_FEW // (batch * groups), width // 32))
    edges = [i * width // parts for i in range(parts + 1)]
    one_row = [
        (g * width + edges[p], g * width + edges[p + 1], first + g * n_state, first + (groups + g) * n_state, p)
        for g in range(groups)
        for p in range(parts)
    ]
    return np.array([(b, *task) for b in range(batch) for task in one_row])


_this_thread = threading.local()


def _become_helper() -> None:
    """Keep torch's own operations in this thread from starting further ones."""
    torch.get_num_threads()  # runs torch's set-up of a thread, which would undo the next line later
    torch.set_num_threads(1)
    _this_thread.is_helper = True


def _threads() -> int:
    """How many threads may work for this one."""
    return 1 if getattr(_this_thread, "is_helper", False) else torch.get_num_threads()


@lru_cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    """A pool of that many helpers, all started."""
    outside = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "adbook", initializer=_become_helper)
    started = threading.Barrier(threads)
    list(pool.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(outside)  # torch also keeps the last value set as the default for threads to come
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # a forked child has none of its parent's threads


def share(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Call `work` on every item, on `torch.get_num_threads()` helpers that each take the next item when free."""
    queue, inference = iter(items), torch.is_inference_mode_enabled()

    def pull() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # these modes are a thread's own
            for item in queue:  # taking the next one is atomic under the interpreter lock
                work(item)

    if _threads() == 1 or len(items) == 1:
        return pull()
    pool = _helpers(_threads())
    for helper in [pool.submit(pull) for _ in range(min(_threads(), len(items)))]:
        helper.result()
    return None


def run(loops: Callable[..., None], tasks: np.ndarray, *arrays: Any) -> None:
    """Share a compiled function's tasks; a helper, which works on a share already, runs them itself."""
    pieces = 1 if _threads() == 1 else min(len(tasks), 4 * _threads())
    share(lambda part: loops(part, *arrays), np.array_split(tasks, pieces))


class ScanInputs(NamedTuple):
    """What a scan over rows is given; all tensors float32 on the CPU and contiguous."""

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D)
    bias: Tensor  # (D,), added to delta
    softplus: bool
    A: Tensor  # (D, N)
    initial: Tensor | None  # (B, N, D), the state before the first step; None for zeros
    bc: Tensor  # (B, L, first + 2 G N): from column `first` on, B of every group, then C of every group
    first: int
    groups: int
    skip: Tensor  # (D,)
    z: Tensor | None  # (B, L, z_at + D): from column `z_at` on, the gate
    z_at: int

    def arrays(self) -> tuple:
        """The arguments as the compiled loops take them."""
        z = self.u if self.z is None else self.z
        a2 = (
            np.ascontiguousarray(self.A.detach().resolve_neg().numpy().T) * kernels.LOG2E
        )  # (N, D): exp(Δ A) = 2**(Δ a2)
        initial = zeros(len(self.u), *a2.shape) if self.initial is None else self.initial
        u, delta, bias, initial, bc, skip, z = arrays_of(self.u, self.delta, self.bias, initial, self.bc, self.skip, z)
        return u, delta, bias, self.softplus, a2, initial, bc, skip, z, self.z_at, self.z is not None

    def tasks(self) -> np.ndarray:
        """The split of the work."""
        return split(self.u.shape[0], self.u.shape[2], self.groups, self.A.shape[1], self.first)


class ScanOutputs(NamedTuple):
    """What a scan makes."""

    out: Tensor  # (B, L, D)
    ungated: Tensor  # (B, L, D), for the adjoint; empty if there is no gate
    stored: Tensor  # (B, blocks of STEPS, N, D), states for the adjoint
    last: Tensor  # (B, N, D)

    @classmethod
    def empty(cls, x: ScanInputs, keep: bool) -> ScanOutputs:
        """Room for the outputs of `x`, and if `keep` for the stored states."""
        (batch, length, channels), n_state = x.u.shape, x.A.shape[1]
        out = torch.empty_like(x.u)
        stored = x.u.new_empty(batch, -(-length // kernels.STEPS) if keep else 0, n_state, channels)
        ungated = x.u.new_empty(0, 0, 0) if x.z is None else torch.empty_like(out)
        return cls(out, ungated, stored, x.u.new_empty(batch, n_state, channels))


class ScanGradients(NamedTuple):
    """What the adjoint makes before sums over batch and parts."""

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D)
    bias: Tensor  # (B, D)
    A: Tensor  # (B, N, D)
    initial: Tensor  # (B, N, D)
    bc: Tensor  # (parts, B, L, first + 2 G N); columns before `first` are not filled
    skip: Tensor  # (B, D)
    z: Tensor  # as ScanInputs.z; columns before `z_at` are not filled

    @classmethod
    def empty(cls, x: ScanInputs) -> ScanGradients:
        """Room for the gradients of `x`."""
        (batch, _, channels), n_state = x.u.shape, x.A.shape[1]
        parts = int(x.tasks()[:, 5].max()) + 1
        bias, skip = x.u.new_empty(2, batch, channels)
        A, initial = x.u.new_empty(2, batch, n_state, channels)
        d_u, bc = torch.empty_like(x.u), x.u.new_empty(parts, *x.bc.shape)
        d_z = d_u if x.z is None else torch.empty_like(x.z)
        return cls(d_u, torch.empty_like(x.u), bias, A, initial, bc, skip, d_z)


def arrays_of(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """The tensors' memory as numpy arrays."""
    return tuple(x.detach().numpy() for x in tensors)


# Around the loops, torch's operations on large tensors are avoided: they wake threads of its own, which afterwards stay
# busy waiting for milliseconds and take the processor from those that work here.


def total(x: Tensor) -> Tensor:
    """The sum over the first axis."""
    return torch.from_numpy(x.numpy().sum(0))


def zeros(*shape: int) -> Tensor:
    """Zeros in float32."""
    return torch.from_numpy(np.zeros(shape, np.float32))


def _transpose(x: Tensor, out: Tensor, at: int = 0) -> None:
    """Copy x (B, D, L) to out (B, L, at + D or more), from column `at` on."""
    x = x.detach()
    if not x[0].is_contiguous():
        share(lambda pair: pair[0].copy_(pair[1].T), list(zip(out[..., at : at + x.shape[1]], x, strict=True)))
        return
    pieces = [
        (a, b, at, lo, min(lo + _COPIED, len(b)))
        for a, b in zip(x.numpy(), out.numpy(), strict=True)
        for lo in range(0, len(b), _COPIED)
    ]
    share(lambda piece: kernels.transpose(*piece), pieces)


def _rows(x: Tensor | None) -> Tensor | None:
    """X (B, D, L) as contiguous (B, L, D)."""
    if x is None or x.transpose(1, 2).is_contiguous():
        return None if x is None else x.detach().transpose(1, 2)
    rows = x.new_empty(len(x), x.shape[2], x.shape[1])
    _transpose(x, rows)
    return rows


def _transposed(x: Tensor) -> Tensor:
    """X.transpose(1, 2), not as a view: an autograd function's view must not be changed in place."""
    turned = x.transpose(1, 2)
    return x.new_empty(0).set_(x.untyped_storage(), 0, turned.shape, turned.stride())


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, softplus, initial):
        u, delta, z, initial = (_rows(x) for x in (u, delta, z, initial))
        (batch, length, channels), columns = u.shape, B.shape[1] * B.shape[2]
        bc = u.new_empty(batch, length, 2 * columns)
        for x, at in ((B, 0), (C, columns)):
            _transpose(x.flatten(1, 2), bc, at)
        bias, skip = (zeros(channels) if x is None else x.contiguous() for x in (delta_bias, D))
        x = ScanInputs(u, delta, bias, softplus, A, initial, bc, 0, B.shape[1], skip, z, 0)
        made = ScanOutputs.empty(x, any(ctx.needs_input_grad))
        run(kernels.scan, x.tasks(), *x.arrays(), *arrays_of(*made))
        ctx.save_for_backward(u, delta, bias, A, bc, skip, z, made.ungated, made.stored)
        ctx.softplus, ctx.groups = softplus, B.shape[1]
        ctx.set_materialize_grads(False)
        return _transposed(made.out), _transposed(made.last)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_last):
        u, delta, bias, A, bc, skip, z, ungated, stored = ctx.saved_tensors
        x = ScanInputs(u, delta, bias, ctx.softplus, A, None, bc, 0, ctx.groups, skip, z, 0)  # `stored` has the initial
        g = ScanGradients.empty(x)
        d_out, d_last = _rows(d_out), _rows(d_last)
        d_out = zeros(*u.shape) if d_out is None else d_out
        d_last = zeros(*g.initial.shape) if d_last is None else d_last
        run(kernels.scan_adjoint, x.tasks(), *x.arrays(), *arrays_of(ungated, stored, d_out, d_last), *arrays_of(*g))
        d_maps = total(g.bc).transpose(1, 2).unflatten(1, (2, ctx.groups, -1)).unbind(1)  # (B, G, N, L) each
        made = (
            g.u.transpose(1, 2), g.delta.transpose(1, 2), total(g.A).T, *d_maps, total(g.skip), g.z.transpose(1, 2),
            total(g.bias), None, g.initial.transpose(1, 2),
        )  # fmt: skip
        return tuple(y if needed else None for y, needed in zip(made, ctx.needs_input_grad, strict=True))


def scan(u, delta, A, B, C, D, z, delta_bias, softplus: bool, initial_state) -> tuple[Tensor, Tensor]:
    """The backend of `selective_scan`: u, delta, z (B, D, L), A (D, N), B and C (B, G, N, L); float32.

    D, z, delta_bias and initial_state (B, D, N) may be None.  Returns the output (B, D, L) and the last state
    (B, D, N).
    """
    return _Scan.apply(u, delta, A, B, C, D, z, delta_bias, softplus, initial_state)
