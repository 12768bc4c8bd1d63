"""The "triton" backend of the selective scan: one GPU kernel forward and one backward, compiled on first use.

A program takes one sequence and a block of channels, and goes through the sequence in chunks of `CHUNK` steps, the
steps of a chunk side by side on the threads.  Within a chunk the recurrence is an associative scan (Blelloch 1990) of
pairs (decay, kick), one state n after the other, so that the states and decays of a chunk are never all there at once:
memory sees u, Δ, z, B and C once and the output once (Gu & Dao 2023, arXiv 2312.00752, section 3.3.2).  Numbers may be
narrow in memory; on the chip all are float32.

The forward kernel keeps the state before each chunk, and the backward kernel, going from the last chunk to the first,
recomputes the rest.  Gradients that several programs share (those of B and C) are written apart and added by PyTorch
afterwards, always in the same order: the same input gives the same bits.

A limit: where the decays of a chunk multiply to more than float32 holds (A or Δ of the wrong sign, and large), the
result is NaN even if the states stay finite, as in mamba-ssm's kernel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from adbook.scan_torch import grouped

CHUNK = 64  # steps of a chunk: a state is kept for each, and a thread holds some neighbouring steps
_CHANNELS = 32  # most channels of a program
_PROGRAMS = 256  # with fewer programs, each takes fewer channels; a GPU runs some hundred at a time
_PER_THREAD = 8  # numbers of a chunk that a thread holds of each kind; with 16 they do not fit into its registers
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -_LOG2E))


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e**-|x|), with log1p(e) = 2 artanh(e / (2 + e)), accurate for tiny results too."""
    e = tl.exp2(tl.abs(x) * -_LOG2E)
    s = e / (2 + e)  # at most 1/3: seven terms of the series leave 2e-8
    q = s * s
    p = 1 / 11 + q * (1 / 13)
    p = 1 / 9 + q * p
    p = 1 / 7 + q * p
    p = 1 / 5 + q * p
    p = 1 / 3 + q * p
    return tl.maximum(x, 0.0) + 2 * s * (1 + q * p)


@triton.jit
def _then(decay1, kick1, decay2, kick2):
    """The map h -> decay h + kick of some steps, followed by that of the steps after them."""
    return decay2 * decay1, decay2 * kick1 + kick2


@triton.jit
def _then_decayed(product1, decayed1, kick1, product2, decayed2, kick2):
    """The same, told apart at the last step: the state after it is `decayed`, plus product · h, plus `kick`.

    The adjoint wants the decayed state by itself; as a difference, state - kick, it would be lost in rounding.
    """
    return product1 * product2, decayed2 + product2 * (decayed1 + kick1), kick2


@triton.jit
def _before(decay2, product2, g2, decay1, product1, g1):
    """The adjoint of some steps (index 2), preceded by that of the steps before them (index 1).

    Of steps s to e: the decay of s, the product of the decays after s, and g_s, the gradient of state s, if nothing
    came after e.  With a gradient λ from after e it is g_s + product · λ.
    """
    passed = product1 * decay2
    return decay1, passed * product2, g1 + passed * g2


@triton.jit
def _column(x, index, at):
    """Column `at` of x, whose columns are numbered by `index`."""
    return tl.sum(tl.where(index[None, :] == at, x, 0.0), 1)


@triton.jit
def _exponents(A_ptr, d, d_inside, n, n_state):
    """A log2(e) of state n, (channels, 1); finite, since a step outside multiplies it by 0."""
    a = tl.load(A_ptr + d * n_state + n, mask=d_inside, other=0.0)[:, None] * _LOG2E
    return tl.where(a < -3e38, -3e38, a)


@triton.jit
def _load_chunk(pointer, d, t, inside, stride_d):
    return tl.load(pointer + d[:, None].to(tl.int64) * stride_d + t[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_map(pointer, d, t, d_inside, t_inside, n, n_state, stride_n, VARIES: tl.constexpr):
    """B or C of state n: (1, steps), or (channels, 1) if constant."""
    if VARIES:
        return tl.load(pointer + n * stride_n + t, mask=t_inside, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.load(pointer + d * n_state + n, mask=d_inside, other=0.0)[:, None]


@triton.jit
def _load_channels(pointer, d, d_inside):
    """D or the bias as (channels, 1), 0 if there is none."""
    if pointer is None:
        return tl.zeros_like(d).to(tl.float32)[:, None]
    else:
        return tl.load(pointer + d, mask=d_inside, other=0.0)[:, None]


@triton.jit
def _step_sizes(delta, inside, SOFTPLUS: tl.constexpr):
    """Δ, and 0 outside: a step that changes nothing."""
    if SOFTPLUS:
        return tl.where(inside, _softplus(delta), 0.0)
    else:
        return tl.where(inside, delta, 0.0)


@triton.jit
def _place(b, group, n_index, channels, width, n_state, CHANNELS: tl.constexpr):
    """This program's channels, and where their states lie in (B, D, N); with what is inside of each."""
    in_group = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    d, d_inside = group * width + in_group, in_group < width
    row = b * channels + d
    of_state = row[:, None] * n_state + n_index[None, :]
    return d, d_inside, row, of_state, d_inside[:, None] & (n_index < n_state)[None, :]


@triton.jit
def _forward(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr,
    out_ptr, states_ptr, last_ptr,
    channels, width, length, n_state, b_groups, c_groups,
    u_b, u_d, delta_b, delta_d, z_b, z_d, B_b, B_g, B_n, C_b, C_g, C_n,
    SOFTPLUS: tl.constexpr, B_VARIES: tl.constexpr, C_VARIES: tl.constexpr,
    N: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    b, group = tl.program_id(0).to(tl.int64), tl.program_id(2)
    n_index, k = tl.arange(0, N), tl.arange(0, STEPS)
    d, d_inside, row, of_state, state_inside = _place(b, group, n_index, channels, width, n_state, CHANNELS)
    chunks = tl.cdiv(length, STEPS)
    B_ptr += b * B_b + group // b_groups * B_g
    C_ptr += b * C_b + group // c_groups * C_g
    bias, skip = _load_channels(bias_ptr, d, d_inside), _load_channels(D_ptr, d, d_inside)
    if initial_ptr is None:
        state = tl.zeros([CHANNELS, N], tl.float32)
    else:
        state = tl.load(initial_ptr + of_state, mask=state_inside, other=0.0)
    for chunk in range(chunks):
        t = chunk * STEPS + k
        t_inside = t < length
        inside = d_inside[:, None] & t_inside[None, :]
        if states_ptr is not None:
            at = (b * chunks + chunk) * channels + d
            tl.store(states_ptr + at[:, None] * n_state + n_index[None, :], state, mask=state_inside)
        u = _load_chunk(u_ptr + b * u_b, d, t, inside, u_d)
        dt = _step_sizes(_load_chunk(delta_ptr + b * delta_b, d, t, inside, delta_d) + bias, inside, SOFTPLUS)
        dtu = dt * u
        y = skip * u
        for n in range(n_state):
            a = _exponents(A_ptr, d, d_inside, n, n_state)
            b_n = _load_map(B_ptr, d, t, d_inside, t_inside, n, n_state, B_n, B_VARIES)
            c_n = _load_map(C_ptr, d, t, d_inside, t_inside, n, n_state, C_n, C_VARIES)
            product, h = tl.associative_scan((tl.exp2(dt * a), dtu * b_n), 1, _then)
            h += product * _column(state, n_index, n)[:, None]
            y += c_n * h
            state = tl.where(n_index[None, :] == n, _column(h, k, STEPS - 1)[:, None], state)
        if z_ptr is not None:
            z = _load_chunk(z_ptr + b * z_b, d, t, inside, z_d)
            y *= z * _sigmoid(z)
        tl.store(out_ptr + row[:, None] * length + t[None, :], y, mask=inside)
    tl.store(last_ptr + of_state, state, mask=state_inside)


@triton.jit
def _backward(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, states_ptr, d_out_ptr, d_last_ptr,
    d_u_ptr, d_delta_ptr, d_A_ptr, d_B_ptr, d_C_ptr, d_D_ptr, d_z_ptr, d_bias_ptr, d_initial_ptr,
    channels, width, length, n_state, b_groups, c_groups,
    u_b, u_d, delta_b, delta_d, z_b, z_d, B_b, B_g, B_n, C_b, C_g, C_n,
    SOFTPLUS: tl.constexpr, B_VARIES: tl.constexpr, C_VARIES: tl.constexpr,
    N: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    b, group = tl.program_id(0).to(tl.int64), tl.program_id(2)
    n_index, k = tl.arange(0, N), tl.arange(0, STEPS)
    d, d_inside, row, of_state, state_inside = _place(b, group, n_index, channels, width, n_state, CHANNELS)
    chunks = tl.cdiv(length, STEPS)
    # Sums over this program's channels: (batch, programs of a sequence, N, L)
    part = (b * tl.num_programs(2) + group) * tl.num_programs(1) + tl.program_id(1)
    d_B_ptr += part * n_state * length if B_VARIES else 0
    d_C_ptr += part * n_state * length if C_VARIES else 0
    B_ptr += b * B_b + group // b_groups * B_g
    C_ptr += b * C_b + group // c_groups * C_g
    bias, skip = _load_channels(bias_ptr, d, d_inside), _load_channels(D_ptr, d, d_inside)
    sent = tl.load(d_last_ptr + of_state, mask=state_inside, other=0.0)  # what later steps send to the state
    d_A = tl.zeros([CHANNELS, N], tl.float32)
    d_B, d_C = d_A, d_A  # if constant
    d_D, d_bias = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    zero, one = tl.zeros([CHANNELS, STEPS], tl.float32), tl.full([CHANNELS, STEPS], 1.0, tl.float32)
    for i in range(chunks):
        chunk = chunks - 1 - i
        t = chunk * STEPS + k
        t_inside = t < length
        inside = d_inside[:, None] & t_inside[None, :]
        before_ptr = states_ptr + ((b * chunks + chunk) * channels + d) * n_state
        u = _load_chunk(u_ptr + b * u_b, d, t, inside, u_d)
        delta = _load_chunk(delta_ptr + b * delta_b, d, t, inside, delta_d) + bias
        dt = _step_sizes(delta, inside, SOFTPLUS)
        dtu = dt * u
        d_y = _load_chunk(d_out_ptr + b * channels * length, d, t, inside, length)
        if z_ptr is not None:
            z = _load_chunk(z_ptr + b * z_b, d, t, inside, z_d)
            d_y *= z * _sigmoid(z)
        y = skip * u  # only the gradient of z needs it
        d_dt, d_dtu = tl.zeros_like(u), tl.zeros_like(u)
        for n in range(n_state):
            a = _exponents(A_ptr, d, d_inside, n, n_state)
            b_n = _load_map(B_ptr, d, t, d_inside, t_inside, n, n_state, B_n, B_VARIES)
            c_n = _load_map(C_ptr, d, t, d_inside, t_inside, n, n_state, C_n, C_VARIES)
            decay = tl.exp2(dt * a)
            kick = dtu * b_n
            product, decayed, _ = tl.associative_scan((decay, zero, kick), 1, _then_decayed)
            decayed += product * tl.load(before_ptr + n, mask=d_inside, other=0.0)[:, None]
            h = decayed + kick
            y += c_n * h
            _, product, g = tl.associative_scan((decay, one, d_y * c_n), 1, _before, reverse=True)
            g += product * _column(sent, n_index, n)[:, None]
            here = n_index[None, :] == n
            sent = tl.where(here, _column(decay * g, k, 0)[:, None], sent)
            d_exponent = g * decayed
            d_dt += d_exponent * a
            d_dtu += g * b_n
            d_A += tl.where(here, tl.sum(d_exponent * dt, 1)[:, None], 0.0)
            if B_VARIES:
                tl.store(d_B_ptr + n * length + t, tl.sum(g * dtu, 0), mask=t_inside)
            else:
                d_B += tl.where(here, tl.sum(g * dtu, 1)[:, None], 0.0)
            if C_VARIES:
                tl.store(d_C_ptr + n * length + t, tl.sum(d_y * h, 0), mask=t_inside)
            else:
                d_C += tl.where(here, tl.sum(d_y * h, 1)[:, None], 0.0)
        d_delta = d_dt * _LN2 + d_dtu * u
        if SOFTPLUS:
            d_delta *= _sigmoid(delta)
        at = row[:, None] * length + t[None, :]
        tl.store(d_u_ptr + at, d_dtu * dt + d_y * skip, mask=inside)
        tl.store(d_delta_ptr + at, d_delta, mask=inside)
        d_D += tl.sum(d_y * u, 1)
        d_bias += tl.sum(tl.where(inside, d_delta, 0.0), 1)
        if z_ptr is not None:
            s = _sigmoid(z)
            d_out = _load_chunk(d_out_ptr + b * channels * length, d, t, inside, length)
            tl.store(d_z_ptr + at, d_out * y * s * (1 + z * (1 - s)), mask=inside)
    tl.store(d_A_ptr + of_state, d_A, mask=state_inside)
    tl.store(d_initial_ptr + of_state, sent, mask=state_inside)
    tl.store(d_D_ptr + row, d_D, mask=d_inside)
    tl.store(d_bias_ptr + row, d_bias, mask=d_inside)
    if not B_VARIES:
        tl.store(d_B_ptr + of_state, d_B, mask=state_inside)
    if not C_VARIES:
        tl.store(d_C_ptr + of_state, d_C, mask=state_inside)


class _Arguments(NamedTuple):
    """What both kernels are given first."""

    u: Tensor  # (B, D, L); the last axis of all (B, D, L) and (B, G, N, L) is contiguous
    delta: Tensor  # (B, D, L)
    A: Tensor  # (D, N), float32 as all that have no length
    B: Tensor  # (B, G, N, L) or (D, N)
    C: Tensor  # (B, G, N, L) or (D, N)
    D: Tensor | None  # (D,)
    z: Tensor | None  # (B, D, L)
    bias: Tensor | None  # (D,)

    def launch(self, kernel: triton.JITFunction, softplus: bool, *others: Tensor | None) -> None:
        """Run a kernel on these, the other tensors, and the sizes and strides."""
        (batch, channels, length), n_state = self.u.shape, self.A.shape[1]
        groups, block, blocks = self.split()
        maps = [(x, x.dim() == 4) for x in (self.B, self.C)]
        sizes = [channels, channels // groups, length, n_state]
        sizes += [groups // x.shape[1] if varies else groups for x, varies in maps]
        strides = [s for x in (self.u, self.delta, self.z) for s in ((0, 0) if x is None else x.stride()[:2])]
        strides += [s for x, varies in maps for s in (x.stride()[:3] if varies else (0, 0, 0))]
        with torch.cuda.device_of(self.u):  # Triton launches on the current device
            kernel[batch, blocks, groups](
                *self, *others, *sizes, *strides, SOFTPLUS=softplus, B_VARIES=maps[0][1], C_VARIES=maps[1][1],
                N=triton.next_power_of_2(n_state), CHANNELS=block, STEPS=CHUNK,
                num_warps=max(1, block * CHUNK // (32 * _PER_THREAD)),
            )  # fmt: skip

    def split(self) -> tuple[int, int, int]:
        """The number of groups that share both B and C, channels in a block, and blocks in a group."""
        groups = math.lcm(*(x.shape[1] if x.dim() == 4 else 1 for x in (self.B, self.C)))
        width = self.u.shape[1] // groups
        block = min(_CHANNELS, triton.next_power_of_2(width))
        while block > 4 and len(self.u) * groups * triton.cdiv(width, block) < _PROGRAMS:
            block //= 2
        return groups, block, triton.cdiv(width, block)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, softplus, initial, *arguments):
        x = _Arguments(*arguments)
        (batch, channels, length), n_state = x.u.shape, x.A.shape[1]
        out = torch.empty(x.u.shape, dtype=x.u.dtype, device=x.u.device)
        last, states = x.A.new_empty(batch, channels, n_state), None
        if any(ctx.needs_input_grad):
            states = x.A.new_empty(batch, triton.cdiv(length, CHUNK), channels, n_state)
        x.launch(_forward, softplus, initial, out, states, last)
        ctx.softplus = softplus
        ctx.save_for_backward(*x, states)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_last):
        *arguments, states = ctx.saved_tensors
        x = _Arguments(*arguments)
        (batch, channels, length), n_state = x.u.shape, x.A.shape[1]
        groups, _, blocks = x.split()
        d_u, d_delta, d_z = (
            None if y is None else torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x.u, x.delta, x.z)
        )
        d_A, d_initial = x.A.new_empty(2, batch, channels, n_state)
        d_D, d_bias = x.A.new_empty(2, batch, channels)
        d_B, d_C = (  # each program's own
            x.A.new_empty(batch, *((groups * blocks, n_state, length) if y.dim() == 4 else y.shape)) for y in (x.B, x.C)
        )
        made = d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias, d_initial
        x.launch(_backward, ctx.softplus, states, d_out.contiguous(), d_last.contiguous(), *made)
        return (
            None, d_initial if ctx.needs_input_grad[1] else None, d_u, d_delta, d_A.sum(0),
            _total(d_B, x.B), _total(d_C, x.C), None if x.D is None else d_D.sum(0), d_z,
            None if x.bias is None else d_bias.sum(0),
        )  # fmt: skip


def _total(parts: Tensor, x: Tensor) -> Tensor:
    """The gradient of B or C from those of each program, or if constant from those of each sequence."""
    return (parts.unflatten(1, (x.shape[1], -1)).sum(2) if x.dim() == 4 else parts.sum(0)).to(x.dtype)


def scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False, initial_state=None
) -> tuple[Tensor, Tensor]:
    """The backend of `selective_scan`: its arguments, on one GPU (or a CPU, interpreted), float32 or narrower.

    Returns the output (B, D, L) in u's dtype and the last state (B, D, N) in float32.
    """
    u, delta, z = (None if x is None else _last_contiguous(x) for x in (u, delta, z))
    A, D, delta_bias, initial_state = (
        None if x is None else x.float().contiguous() for x in (A, D, delta_bias, initial_state)
    )
    B, C = (x.float().contiguous() if x.dim() == 2 else _last_contiguous(grouped(x)) for x in (B, C))
    return _Scan.apply(softplus, initial_state, u, delta, A, B, C, D, z, delta_bias)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
