"""Mamba's layers on the CPU, fused: one autograd function for norm, projections, convolution, scan and residual.

`mamba_inner_fn` of mamba-ssm 2.3.2 does the same on a GPU for what lies between the projections.  Two things make it
fast here: all stays in rows (B, L, D), so nothing is transposed, and the batch is worked through in pieces of about a
thousand tokens, each by one thread from the first operation to the last, so that a piece stays in the cache and threads
seldom wait for each other.  Large operations of torch outside the pieces are avoided on purpose: they wake torch's own
threads, which then stay busy waiting for milliseconds and take the processor from those that work here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adbook import kernels
from adbook.scan_numba import ScanGradients, ScanInputs, ScanOutputs, arrays_of, run, share, split, total

_TOKENS = 1024  # tokens in one piece of the batch, at least a sequence
_NORM_ROWS = 512  # rows in one task of the final norm


class _Weights(NamedTuple):
    norm: Tensor | None  # (E,), of the RMSNorm before the block; None for a block without norm and residual
    in_proj: Tensor  # (2 D, E)
    conv: Tensor  # (D, 1, K)
    conv_bias: Tensor  # (D,)
    x_proj: Tensor  # (R + 2 N, D)
    dt_proj: Tensor  # (D, R)
    dt_bias: Tensor  # (D,)
    A: Tensor  # (D, N)
    D: Tensor  # (D,)
    out_proj: Tensor  # (E, D)

    def taps(self) -> Tensor:
        """The convolution's weight as rows (K, D)."""
        return self.conv.detach().squeeze(1).T.contiguous()


def layer(tokens: Tensor, block: nn.Module, norm: nn.RMSNorm | None = None) -> Tensor:
    """Tokens + block(norm(tokens)) for a `MambaBlock`, or without a norm block(tokens); float32 on the CPU."""
    weights = _Weights(
        None if norm is None else norm.weight, block.in_proj.weight, block.conv1d.weight, block.conv1d.bias,
        block.x_proj.weight, block.dt_proj.weight, block.dt_proj.bias, -torch.exp(block.A_log), block.D,
        block.out_proj.weight,
    )  # fmt: skip
    return _Layer.apply(tokens.contiguous(), np.float32(0 if norm is None else norm.eps), *weights)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, eps, *weights):
        w = _Weights(*weights)
        batch, length, _ = tokens.shape
        inner, rank = w.dt_proj.shape
        normed = tokens if w.norm is None else torch.empty_like(tokens)
        xz, projected = (tokens.new_empty(batch, length, len(x)) for x in (w.in_proj, w.x_proj))
        x, delta = tokens.new_empty(2, batch, length, inner)
        out = torch.empty_like(tokens)
        inputs = ScanInputs(x, delta, w.dt_bias, True, w.A, None, projected, rank, 1, w.D, xz, inner)
        made = ScanOutputs.empty(inputs, any(ctx.needs_input_grad))
        conv = arrays_of(xz, w.taps(), w.conv_bias, x)
        scan = *inputs.arrays(), *arrays_of(*made)

        def work(piece: _Piece) -> None:
            if w.norm is not None:
                norm = *arrays_of(_matrix(tokens), w.norm), eps, *arrays_of(_matrix(normed))
                run(kernels.rms_norm, piece.norm_task, *norm)
            torch.mm(piece.of(normed), w.in_proj.T, out=piece.of(xz))
            run(kernels.conv_silu, piece.tasks, *conv)
            torch.mm(piece.of(x), w.x_proj.T, out=piece.of(projected))
            torch.mm(piece.of(projected)[:, :rank], w.dt_proj.T, out=piece.of(delta))
            run(kernels.scan, piece.tasks, *scan)
            torch.mm(piece.of(made.out), w.out_proj.T, out=piece.of(out))
            if w.norm is not None:
                piece.of(out).add_(piece.of(tokens))

        share(work, _pieces(inputs))
        ctx.eps = eps
        ctx.save_for_backward(*w, tokens, normed, xz, x, projected, delta, made.out, made.ungated, made.stored)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        count = len(_Weights._fields)
        w = _Weights(*ctx.saved_tensors[:count])
        tokens, normed, xz, x, projected, delta, y, ungated, stored = ctx.saved_tensors[count:]
        inner, rank = w.dt_proj.shape
        inputs = ScanInputs(x, delta, w.dt_bias, True, w.A, None, projected, rank, 1, w.D, xz, inner)
        g, pieces, taps = ScanGradients.empty(inputs), _pieces(inputs), w.taps()
        d_out, d_tokens, d_y = d_out.contiguous(), torch.empty_like(tokens), torch.empty_like(y)
        d_normed = d_tokens if w.norm is None else torch.empty_like(tokens)
        d_taps, d_conv_bias = y.new_empty(len(y), *taps.shape), y.new_empty(len(y), inner)
        d_norm, d_in_proj, d_x_proj, d_dt_proj, d_out_proj = (
            y.new_empty(len(pieces), *shape)
            for shape in (tokens.shape[2:], w.in_proj.shape, w.x_proj.shape, w.dt_proj.T.shape, w.out_proj.shape)
        )
        d_last = np.zeros((len(y), w.A.shape[1], inner), np.float32)
        scan = (*inputs.arrays(), *arrays_of(ungated, stored, d_y), d_last, *arrays_of(*g))
        conv = arrays_of(xz, taps, w.conv_bias, g.u, g.z, d_taps, d_conv_bias)
        narrow = w.dt_proj.T.contiguous().T  # with so few columns this order of memory is several times as fast

        def work(piece: _Piece) -> None:
            i, d_piece = piece.number, piece.of(d_out)
            torch.mm(d_piece, w.out_proj, out=piece.of(d_y))
            torch.mm(d_piece.T, piece.of(y), out=d_out_proj[i])
            run(kernels.scan_adjoint, piece.tasks, *scan)
            d_delta, d_projected = piece.of(g.delta), g.bc[:, piece.rows].sum(0).flatten(0, 1)
            torch.mm(piece.of(projected)[:, :rank].T, d_delta, out=d_dt_proj[i])
            d_projected[:, :rank] = d_delta @ narrow
            torch.mm(d_projected.T, piece.of(x), out=d_x_proj[i])
            piece.of(g.u).addmm_(d_projected, w.x_proj)
            run(kernels.conv_silu_adjoint, piece.tasks, *conv)
            torch.mm(piece.of(g.z).T, piece.of(normed), out=d_in_proj[i])
            torch.mm(piece.of(g.z), w.in_proj, out=piece.of(d_normed))
            if w.norm is not None:
                matrices = arrays_of(_matrix(d_normed), _matrix(d_tokens), d_norm)
                norm = *arrays_of(_matrix(tokens), w.norm), ctx.eps, *matrices
                run(kernels.rms_norm_adjoint, piece.norm_task, *norm)
                piece.of(d_tokens).add_(d_piece)

        share(work, pieces)
        return (
            d_tokens, None, None if w.norm is None else total(d_norm), total(d_in_proj), total(d_taps).T[:, None],
            total(d_conv_bias), total(d_x_proj), total(d_dt_proj).T, total(g.bias), total(g.A).T, total(g.skip),
            total(d_out_proj),
        )  # fmt: skip


class _Piece(NamedTuple):
    """Some rows of the batch: what one thread works on at a time."""

    number: int
    rows: slice
    tasks: np.ndarray  # of the scan and the convolution
    norm_task: np.ndarray  # (first token, end, number) of the norm

    def of(self, x: Tensor) -> Tensor:
        """This piece of x (B, L, ...) as a matrix (tokens, ...), without a copy."""
        return x[self.rows].flatten(0, 1)


def _pieces(x: ScanInputs) -> list[_Piece]:
    batch, length, _ = x.u.shape
    tasks, size = x.tasks(), max(1, _TOKENS // length)
    each = len(tasks) // batch
    starts = [(b, min(b + size, batch)) for b in range(0, batch, size)]
    return [
        _Piece(i, slice(lo, hi), tasks[lo * each : hi * each], np.array([[lo * length, hi * length, i]]))
        for i, (lo, hi) in enumerate(starts)
    ]


def _matrix(x: Tensor) -> Tensor:
    """(B, L, E) as (tokens, E)."""
    return x.flatten(0, 1)


def step(xz: Tensor, conv: Tensor, ssm: Tensor, A: Tensor, block: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """From in_proj's output xz (B, 2 D) to out_proj's input (B, D) in `MambaBlock.step`, without gradients.

    The inputs of the convolution (B, D, K) and the state (B, D, N) come in and go out as transposed rows.  A step is
    little work for many sequences, so it stays on this thread.
    """
    width = len(block.D)
    conv = torch.cat([conv.transpose(1, 2)[:, 1:], xz[:, None, :width]], 1)  # (B, K, D)
    x, y = xz.new_empty(2, len(xz), 1, width)
    taps = block.conv1d.weight.detach().squeeze(1).T.contiguous()  # (K, D)
    tasks = split(len(xz), width, 1, A.shape[1], block.config.rank)
    kernels.conv_silu(tasks, *arrays_of(conv, taps, block.conv1d.bias, x))
    projected = block.x_proj(x)  # (B, 1, R + 2 N)
    delta = F.linear(projected[..., : block.config.rank], block.dt_proj.weight)
    before = ssm.transpose(1, 2)  # (B, N, D)
    inputs = ScanInputs(
        x, delta, block.dt_proj.bias, True, A, before, projected, block.config.rank, 1, block.D, xz.unsqueeze(1), width
    )
    after = torch.empty_like(before)
    nothing = xz.new_empty(len(xz), 0, A.shape[1], width)
    made = arrays_of(y, torch.empty_like(y), nothing, after)
    kernels.scan(tasks, *inputs.arrays(), *made)
    return y.squeeze(1), conv.transpose(1, 2), after.transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm` over the last axis of x, float32 on the CPU."""
    return _RMSNorm.apply(x.contiguous(), weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = np.float32(eps)
        out = torch.empty_like(x)
        rows, out_rows = (y.detach().flatten(0, -2).numpy() for y in (x, out))
        run(kernels.rms_norm, _row_tasks(x), rows, weight.detach().numpy(), ctx.eps, out_rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        tasks = _row_tasks(x)
        d_x, d_weight = torch.empty_like(x), x.new_empty(len(tasks), len(weight))
        rows, d_out_rows, d_x_rows = (y.detach().flatten(0, -2).numpy() for y in (x, d_out.contiguous(), d_x))
        arrays = rows, weight.detach().numpy(), ctx.eps, d_out_rows, d_x_rows, d_weight.numpy()
        run(kernels.rms_norm_adjoint, tasks, *arrays)
        return d_x, d_weight.sum(0), None


def _row_tasks(x: Tensor) -> np.ndarray:
    starts = np.arange(0, x.shape[:-1].numel(), _NORM_ROWS)
    return np.stack([starts, np.minimum(starts + _NORM_ROWS, x.shape[:-1].numel()), np.arange(len(starts))], 1)
