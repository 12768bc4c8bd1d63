"""The "reference" and the "torch" backend of the selective scan: PyTorch operations, on any device.

Both take the arguments of `adbook.selective_scan`, all of one dtype, float32 or float64, and return the output
(B, D, L) and the last state (B, D, N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

STEPS = 32  # steps between two states that the "torch" backend stores


def reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False, initial_state=None
) -> tuple[Tensor, Tensor]:
    """The recurrence as written, gradients by autograd."""
    delta = _step_sizes(delta, delta_bias, softplus)
    B, C = (per_channel(x, u) for x in (B, C))  # (B, D, N, L) or (B, D, N, 1)
    h = u.new_zeros(*u.shape[:2], A.shape[1]) if initial_state is None else initial_state  # (B, D, N)
    outputs = []
    # unbind, because the gradient of an index x[..., t] is a zero tensor of x's size: quadratic in the length
    B, C = (x.expand(-1, -1, -1, u.shape[2]).unbind(-1) for x in (B, C))
    for u_t, delta_t, B_t, C_t in zip(u.unbind(-1), delta.unbind(-1), B, C, strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t
        outputs.append((h * C_t).sum(-1))
    return _finish(torch.stack(outputs, -1), u, D, z), h


def torch_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False, initial_state=None
) -> tuple[Tensor, Tensor]:
    """The same in blocks of `STEPS` steps, with an adjoint that recomputes the states."""
    initial = u.new_zeros(*u.shape[:2], A.shape[1]) if initial_state is None else initial_state
    y, last = _Scan.apply(u, _step_sizes(delta, delta_bias, softplus), A, grouped(B), grouped(C), initial)
    return _finish(y, u, D, z), last


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, softplus: bool) -> Tensor:
    """Δ (B, D, L) from the `delta` that is given."""
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    return F.softplus(delta) if softplus else delta


def _finish(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The output (B, D, L) from C · h: with skip connection and gate."""
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z)


def grouped(x: Tensor) -> Tensor:
    """B or C (B, N, L) as one group; a constant (D, N) as D groups of one channel: (1, D, N, 1)."""
    if x.dim() == 2:
        return x[None, :, :, None]
    return x[:, None] if x.dim() == 3 else x


def per_channel(x: Tensor, u: Tensor) -> Tensor:
    """B or C for each channel and step: (B, D, N, L), or (B, D, N, 1) if constant."""
    x = grouped(x)
    return x.repeat_interleave(u.shape[1] // x.shape[1], 1).expand(u.shape[0], -1, -1, -1)


class _Scan(torch.autograd.Function):
    """Scan and adjoint; only the states at the borders of blocks are stored.

    With g_t the gradient of h_t, the adjoint is the same recurrence run backwards, g_t = C_t dy_t + a_{t+1} g_{t+1}
    with a_t = exp(Δ_t A), and every gradient follows from g_t, h_{t-1} and a_t.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C, h):
        borders, outputs = [], []
        for block in _blocks(u.shape[2]):
            borders.append(h)
            states = _states(h, *_block_terms(block, u, delta, A, B))
            h = states[-1].clone()  # not a view, which would keep the block alive
            outputs.append(_by_group(states, C).mul(_steps_first(C, block)).sum(-1).flatten(2))  # (K, B, D)
        ctx.save_for_backward(u, delta, A, B, C, *borders)
        return torch.cat(outputs).permute(1, 2, 0).contiguous(), h  # not a view, which could not be changed in place

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
            d_u[..., block] = (d_kick * delta_k).permute(1, 2, 0)
            d_delta[..., block] = (d_kick * u_k + (g * A).sum(-1)).permute(1, 2, 0)
            d_A += g.mul_(delta_k[..., None]).sum((0, 1))  # no matrix product, which autocast would narrow
        return d_u, d_delta, d_A, d_B, d_C, carried


def _blocks(length: int) -> list[slice]:
    return [slice(t, min(t + STEPS, length)) for t in range(0, length, STEPS)]


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
