"""The selective scan of S6, `selective_scan`, with the interface of `mamba_ssm`'s `selective_scan_fn`.

For every channel d the scan is a linear recurrence whose coefficients depend on the input at that step (Gu & Dao
2023, "Mamba", arXiv 2312.00752, section 3.2 and algorithm 2):

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t          state, (N,)
    y_t = C_t · h_t + D u_t                         output, a number

A is discretised by zero-order hold and B by Euler's rule, Δ B, as in the authors' implementation; the exact form of B
(the paper's equation 4) differs from it by a relative O(Δ A).

| code        | paper | shape             | meaning                                                   |
|-------------|-------|-------------------|-----------------------------------------------------------|
| `u`         | x     | (B, D, L)         | input; B sequences, D channels, L steps                   |
| `delta`     | Δ     | (B, D, L)         | step size, after `delta_bias` and softplus                |
| `A`         | A     | (D, N)            | diagonal state matrix, N states a channel                 |
| `B`, `C`    | B, C  | (B, N, L)         | input and output maps of each step, shared by all channels |
|             |       | (B, G, N, L)      | shared by groups of D / G neighbouring channels           |
|             |       | (D, N)            | constant in time (S4D), one for each channel              |
| `D`         | D     | (D,)              | skip connection                                           |
| `z`         |       | (B, D, L)         | gate: the output is multiplied by silu(z) (section 3.4)   |
"""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_STEPS = 32  # steps between two states that the "torch" backend stores


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a batch of sequences; differentiable in every tensor, with float32 (or float64) accumulation.

    Follows `mamba_ssm.ops.selective_scan_interface.selective_scan_fn` (mamba-ssm 2.3.2) in arguments, layouts and
    meaning; the last state can be differentiated too.

    Args:
        u: Input, (B, D, L).
        delta: Step sizes before bias and softplus, (B, D, L).
        A: State matrix, (D, N), real; decaying states need negative entries.
        B: Input map, (B, N, L), (B, G, N, L) or (D, N).
        C: Output map, in one of the same shapes.
        D: Skip connection, (D,).
        z: Gate, (B, D, L).
        delta_bias: Added to `delta`, (D,).
        delta_softplus: Whether step sizes are softplus(delta + delta_bias).
        return_last_state: Also return the state after the last step.
        backend: "auto", "reference", "torch" or "numba".  "auto" takes "numba" for float32 and narrower numbers on
            the CPU, and "torch" otherwise.

    Returns:
        The output (B, D, L) in `u`'s dtype, or with `return_last_state` the pair of it and the state (B, D, N).

    Raises:
        ValueError: if a shape does not fit, A is complex, or the backend is unknown or cannot be used here.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    scan = _BACKENDS[_choose(backend, u, A, B, C)]
    dtype = torch.promote_types(u.dtype, torch.float32)
    wide = [None if x is None else x.to(dtype) for x in (u, delta, A, B, C, D, z, delta_bias)]
    out, last = scan(*wide, delta_softplus)
    out = out.to(u.dtype)
    return (out, last) if return_last_state else out


def backends() -> dict[str, str | None]:
    """Every backend's name with None if it can be used on this machine, or the reason why not."""
    has_numba = importlib.util.find_spec("numba") is not None
    return {"reference": None, "torch": None, "numba": None if has_numba else "numba is not installed"}


def _choose(backend: str, u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str:
    """The backend to use; for a name given, check that it can be used for these tensors."""
    if backend not in ("auto", *_BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(('auto', *_BACKENDS))}")
    reason = None
    if u.device.type != "cpu":
        reason = f"it runs on the CPU and the tensors are on {u.device}"
    elif torch.float64 in (u.dtype, A.dtype):
        reason = "it computes in float32 and the input is float64"
    else:
        reason = backends()["numba"]
    if backend == "numba" and reason:
        raise ValueError(f"backend 'numba' cannot be used: {reason}; use 'auto' or 'torch'")
    if backend != "auto":
        return backend
    constant = B.dim() == 2 or C.dim() == 2  # numba's inner loop runs over channels that share B and C
    return "torch" if reason or constant else "numba"


def _check(u, delta, A, B, C, D, z, delta_bias) -> None:
    """Raise a ValueError for the first tensor that does not fit `u` (B, D, L) and `A` (D, N)."""
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u has shape {tuple(u.shape)}; needed are three non-empty axes (batch, channels, length)")
    if A.is_complex():
        raise ValueError("A is complex; only real A is supported: pass its real part, as Mamba's A = -exp(A_log)")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A has shape {tuple(A.shape)}; u's {channels} channels need ({channels}, states)")
    n_state = A.shape[1]
    for name, x, shape in (
        ("delta", delta, (batch, channels, length)),
        ("z", z, (batch, channels, length)),
        ("D", D, (channels,)),
        ("delta_bias", delta_bias, (channels,)),
    ):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; u and A need {shape}")
    for name, x in (("B", B), ("C", C)):
        groups = x.shape[1] if x.dim() == 4 else 1
        fits = tuple(x.shape) in (
            (channels, n_state),
            (batch, n_state, length),
            (batch, groups, n_state, length),
        )
        if not fits or groups == 0 or channels % groups:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; u and A need ({batch}, {n_state}, {length}), "
                f"({batch}, G, {n_state}, {length}) with G dividing {channels}, or ({channels}, {n_state})"
            )


# --- "reference": the recurrence as written, gradients by autograd


def _reference(u, delta, A, B, C, D, z, delta_bias, softplus) -> tuple[Tensor, Tensor]:
    delta = _step_sizes(delta, delta_bias, softplus)
    B, C = (_per_channel(x, u) for x in (B, C))  # (B, D, N, L) or (B, D, N, 1)
    h = u.new_zeros(*u.shape[:2], A.shape[1])  # (B, D, N)
    outputs = []
    # unbind, because the gradient of an index x[..., t] is a zero tensor of x's size: quadratic in the length
    B, C = (x.expand(-1, -1, -1, u.shape[2]).unbind(-1) for x in (B, C))
    for u_t, delta_t, B_t, C_t in zip(u.unbind(-1), delta.unbind(-1), B, C, strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t
        outputs.append((h * C_t).sum(-1))
    return _finish(torch.stack(outputs, -1), u, D, z), h


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, softplus: bool) -> Tensor:
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    return F.softplus(delta) if softplus else delta


def _per_channel(x: Tensor, u: Tensor) -> Tensor:
    """B or C for each channel and step: (B, D, N, L), or (B, D, N, 1) if constant."""
    if x.dim() == 2:
        return x[None, :, :, None].expand(u.shape[0], -1, -1, -1)
    x = x[:, None] if x.dim() == 3 else x
    return x.repeat_interleave(u.shape[1] // x.shape[1], 1)


def _finish(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z)


# --- "torch": the same in blocks of _STEPS steps, with an adjoint that recomputes the states


def _torch(u, delta, A, B, C, D, z, delta_bias, softplus) -> tuple[Tensor, Tensor]:
    y, last = _TorchScan.apply(u, _step_sizes(delta, delta_bias, softplus), A, _grouped(B), _grouped(C))
    return _finish(y, u, D, z), last


def _grouped(x: Tensor) -> Tensor:
    """(B, N, L) as one group; a constant (D, N) as D groups of one channel: (1, D, N, 1)."""
    if x.dim() == 2:
        return x[None, :, :, None]
    return x[:, None] if x.dim() == 3 else x


class _TorchScan(torch.autograd.Function):
    """Scan and adjoint; only the states at the borders of blocks are stored.

    With g_t the gradient of h_t, the adjoint is the same recurrence run backwards, g_t = C_t dy_t + a_{t+1} g_{t+1}
    with a_t = exp(Δ_t A), and every gradient follows from g_t, h_{t-1} and a_t.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C):
        h = u.new_zeros(*u.shape[:2], A.shape[1])  # (B, D, N)
        borders, outputs = [], []
        for block in _blocks(u.shape[2]):
            borders.append(h)
            states = _states(h, *_block_terms(block, u, delta, A, B))
            h = states[-1].clone()  # not a view, which would keep the block alive
            outputs.append(_by_group(states, C).mul(_steps_first(C, block)).sum(-1).flatten(2))  # (K, B, D)
        ctx.save_for_backward(u, delta, A, B, C, *borders)
        return torch.cat(outputs).permute(1, 2, 0), h

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_last):
        u, delta, A, B, C, *borders = ctx.saved_tensors
        d_u, d_delta = torch.empty_like(u), torch.empty_like(delta)
        d_A, d_B, d_C = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
        carried = d_last  # gradient of the state at the block's end
        for block, border in zip(reversed(_blocks(u.shape[2])), reversed(borders), strict=True):
            decay, kicks = _block_terms(block, u, delta, A, B)
            states = _states(border, decay, kicks)
            u_k, delta_k, d_y_k = (x[..., block].permute(2, 0, 1) for x in (u, delta, d_y))  # (K, B, D)
            _add_reduced(d_C, block, _by_group(states, C) * _by_group(d_y_k, C)[..., None])
            g = (_by_group(d_y_k, C)[..., None] * _steps_first(C, block)).reshape(states.shape)
            g[-1] += carried
            for k in range(len(g) - 2, -1, -1):
                g[k].addcmul_(decay[k + 1], g[k + 1])
            carried = decay[0] * g[0]
            _add_reduced(d_B, block, _by_group(g, B) * _by_group(delta_k * u_k, B)[..., None])
            d_kick = (_by_group(g, B) * _steps_first(B, block)).sum(-1).flatten(2)  # gradient of Δ u, (K, B, D)
            g.mul_(decay).mul_(torch.cat([border[None], states[:-1]]))  # gradient of the exponent Δ A
            d_A += torch.einsum("kbdn,kbd->dn", g, delta_k)
            d_u[..., block] = (d_kick * delta_k).permute(1, 2, 0)
            d_delta[..., block] = (d_kick * u_k + (g * A).sum(-1)).permute(1, 2, 0)
        return d_u, d_delta, d_A, d_B, d_C


def _blocks(length: int) -> list[slice]:
    return [slice(t, min(t + _STEPS, length)) for t in range(0, length, _STEPS)]


def _steps_first(x: Tensor, block: slice) -> Tensor:
    """A block of B or C (B, G, N, L) as (K, B, G, 1, N); a constant (1, D, N, 1) as (1, 1, D, 1, N)."""
    x = x[..., block] if x.shape[-1] > 1 else x
    return x.permute(3, 0, 1, 2).unsqueeze(3)


def _by_group(x: Tensor, like: Tensor) -> Tensor:
    """(K, B, D, ...) as (K, B, G, D / G, ...) with the groups of `like` (B, G, N, L)."""
    return x.unflatten(2, (like.shape[1], -1))


def _block_terms(block: slice, u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """exp(Δ A) and Δ B u of a block's steps, (K, B, D, N) each."""
    delta = delta[..., block].permute(2, 0, 1)  # (K, B, D)
    kicks = _by_group(delta * u[..., block].permute(2, 0, 1), B)[..., None] * _steps_first(B, block)
    return torch.exp(delta[..., None] * A), kicks.flatten(2, 3)


def _states(h: Tensor, decay: Tensor, kicks: Tensor) -> Tensor:
    """The states of a block, written over `kicks` (K, B, D, N)."""
    for decay_t, state in zip(decay, kicks, strict=True):
        h = state.addcmul_(decay_t, h)
    return kicks


def _add_reduced(total: Tensor, block: slice, terms: Tensor) -> None:
    """Add (K, B, G, D / G, N) to a block of the gradient of B or C (B, G, N, L), or to a constant's (1, D, N, 1)."""
    if total.shape[-1] > 1:
        total[..., block] += terms.sum(3).permute(1, 2, 3, 0)
    else:  # constant (summed over steps and batch), or one step only
        total += terms.sum((0, 3)).sum_to_size(total.shape[:3])[..., None]


def _numba(u, delta, A, B, C, D, z, delta_bias, softplus) -> tuple[Tensor, Tensor]:
    from adbook import scan_numba  # imported on use: numba takes a second to load and is not needed elsewhere

    rows = [None if x is None else x.transpose(1, 2) for x in (u, delta, z)]
    if B.dim() == 2 or C.dim() == 2:
        B, C = (_per_channel(x, u).expand(-1, -1, -1, u.shape[2]) for x in (B, C))
    else:
        B, C = _grouped(B), _grouped(C)
        groups = math.lcm(B.shape[1], C.shape[1])  # the compiled loop wants the same groups for both
        B, C = (x.repeat_interleave(groups // x.shape[1], 1) for x in (B, C))
    out, last = scan_numba.scan(rows[0], rows[1], A, B, C, D, rows[2], delta_bias, softplus)
    return out.transpose(1, 2), last


_BACKENDS = {"reference": _reference, "torch": _torch, "numba": _numba}
