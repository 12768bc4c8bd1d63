"""Loops compiled by numba for training on a CPU: the selective scan, and the convolution before it, with adjoints.

Arrays are rows (B, L, D) (the letters are those of `adbook.scan`), so that the innermost loop runs over neighbouring
channels and becomes SIMD code; a loop over the state would need a horizontal sum for every output.  The forward scan
keeps the state of every `STEPS`-th step only, and the adjoint recomputes the states in between in a buffer that stays
in the processor's cache (Gu & Dao 2023, arXiv 2312.00752, section 3.3.2).  The C library's `exp` takes one number a
call and is most of a naive scan's time; the polynomial below is inlined and SIMD.

A *task* is one batch row b and a block of channels lo .. hi - 1.  Scratch arrays are allocated one by one, not as parts
of one array, and rows are sliced before a loop over channels: else the compiler must expect that they overlap, or
that an index is negative, and the loop is no longer SIMD (twice as slow).
"""

from __future__ import annotations

import numpy as np
from numba import njit

STEPS = 32  # steps between two stored states
BLOCK = 128  # most channels in a task: 32 steps of its states and decays fill half a megabyte of cache
_F = np.float32
LOG2E = _F(1.4426950408889634)
_LN2 = _F(0.6931471805599453)

# Sums may be reordered (SIMD needs that), but infinities and NaN keep their meaning.  The elementary functions are
# compiled strictly: their rounding must not be "simplified".
_options = {"error_model": "numpy", "nogil": True}
_kernel = njit(fastmath={"contract", "reassoc", "nsz"}, cache=True, **_options)
_part = njit(fastmath={"contract", "reassoc", "nsz"}, inline="always", **_options)
_strict = njit(fastmath={"contract"}, cache=True, **_options)


@_strict
def _exp2(x):
    """2**x within 1.4 half-units in the last place: 2**round(x) from the exponent's bits, the rest by a polynomial."""
    x = _F(-127) if x < _F(-127) else x  # 2**-127 comes out as 0 and 2**128 as infinity; NaN passes
    x = _F(128) if x > _F(128) else x
    whole = np.rint(x)
    r = x - whole  # in [-1/2, 1/2]; Chebyshev interpolation of 2**r, relative error 2e-8
    p = _F(1.5461444725e-4) * r + _F(1.3400428178e-3)
    p = p * r + _F(9.6180566784e-3)
    p = p * r + _F(5.5503272267e-2)
    p = p * r + _F(2.4022650922e-1)
    p = p * r + _F(6.9314720670e-1)
    p = p * r + _F(1)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@_strict
def _sigmoid(x):
    """1 / (1 + e**-x)."""
    return _F(1) / (_F(1) + _exp2(-LOG2E * x))


@_strict
def _softplus(x):
    """log(1 + e**x) = max(x, 0) + log1p(e**-|x|), with log1p(e) = 2 artanh(e / (2 + e))."""
    e = _exp2(-LOG2E * abs(x))
    s = e / (_F(2) + e)  # at most 1/3: seven terms of the series leave 2e-8
    q = s * s
    p = _F(1 / 13) * q + _F(1 / 11)
    p = p * q + _F(1 / 9)
    p = p * q + _F(1 / 7)
    p = p * q + _F(1 / 5)
    p = p * q + _F(1 / 3)
    p = p * q + _F(1)
    return max(x, _F(0)) + _F(2) * s * p


@_kernel
def transpose(x, out, at, lo, hi):
    """Copy the steps lo .. hi - 1 of x (D, L) to the rows of out (L, at + D or more), from column `at` on.

    In squares of 16 through a scratch array, for lines of `x` that are a power of two apart evict each other.
    """
    channels, square = x.shape[0], np.empty((16, 16), np.float32)
    for t in range(lo, hi, 16):
        steps = min(16, hi - t)
        for first in range(0, channels, 16):
            width = min(16, channels - first)
            if steps == width == 16:  # with constant bounds, these loops become SIMD shuffles
                for d in range(16):
                    row, line = x[first + d, t : t + 16], square[d]
                    for k in range(16):
                        line[k] = row[k]
                for k in range(16):
                    row = out[t + k, at + first : at + first + 16]
                    for d in range(16):
                        row[d] = square[d, k]
            else:
                for k in range(steps):
                    for d in range(width):
                        out[t + k, at + first + d] = x[first + d, t + k]


@_part
def _step_sizes(delta, bias, u, softplus, dt, dtu):
    """Δ and Δ u of one step."""
    for d in range(len(dt)):
        x = delta[d] + bias[d]
        if softplus:
            x = _softplus(x)
        dt[d] = x
        dtu[d] = x * u[d]


@_kernel
def scan(tasks, u, delta, bias, softplus, a2, initial, bc, skip, z, z_at, gated, out, ungated, stored, last):
    """Scan from the states `initial` (B, N, D); a task is (b, lo, hi, column of B in `bc`, column of C, part).

    `a2` (N, D) is A log2(e), and `z` holds the gate from column `z_at` on.  `ungated` (B, L, D) and `stored`
    (B, blocks of STEPS, N, D) are for the adjoint; without blocks in `stored`, nothing is stored.
    """
    n_state = a2.shape[0]
    for b, lo, hi, b_at, c_at, _ in tasks:
        width = hi - lo
        a, bias_i, skip_i = a2[:, lo:hi].copy(), bias[lo:hi], skip[lo:hi]
        h = initial[b, :, lo:hi].copy()
        dt, dtu = np.empty(width, np.float32), np.empty(width, np.float32)
        y = np.empty(width, np.float32)
        for t in range(u.shape[1]):
            if t % STEPS == 0 and t // STEPS < stored.shape[1]:
                stored[b, t // STEPS, :, lo:hi] = h
            u_t, b_t, c_t = u[b, t, lo:hi], bc[b, t, b_at : b_at + n_state], bc[b, t, c_at : c_at + n_state]
            _step_sizes(delta[b, t, lo:hi], bias_i, u_t, softplus, dt, dtu)
            for d in range(width):
                y[d] = skip_i[d] * u_t[d]
            for n in range(n_state):
                b_n, c_n = b_t[n], c_t[n]
                for d in range(width):
                    h_n = _exp2(dt[d] * a[n, d]) * h[n, d] + dtu[d] * b_n
                    h[n, d] = h_n
                    y[d] += c_n * h_n
            out_t = out[b, t, lo:hi]
            if gated:
                z_t, ungated_t = z[b, t, z_at + lo : z_at + hi], ungated[b, t, lo:hi]
                for d in range(width):
                    ungated_t[d] = y[d]
                    out_t[d] = y[d] * z_t[d] * _sigmoid(z_t[d])
            else:
                out_t[:] = y
        last[b, :, lo:hi] = h


@_part
def _ungate(d_out, ungated, z, d_z, d_y):
    """Gradients of the gate and of what it was multiplied with."""
    for d in range(len(d_y)):
        s = _sigmoid(z[d])
        d_z[d] = d_out[d] * ungated[d] * s * (_F(1) + z[d] * (_F(1) - s))
        d_y[d] = d_out[d] * z[d] * s


@_part
def _advance(dt, dtu, a, b_t, h, decay, h_next):
    """One step of the recurrence, keeping its decays."""
    for n in range(len(b_t)):
        b_n = b_t[n]
        for d in range(len(dt)):
            e = _exp2(dt[d] * a[n, d])
            decay[n, d] = e
            h_next[n, d] = e * h[n, d] + dtu[d] * b_n


@_part
def _retreat(dt, dtu, a, b_t, c_t, h, decay, h_next, d_y, d_h, d_dt, d_dtu, d_a, d_b, d_c):
    """One step of the adjoint: `d_h` holds the gradient that the later steps send to `h_next`, then that of `h`."""
    d_dt[:] = 0
    d_dtu[:] = 0
    for n in range(len(b_t)):
        b_n, c_n, d_bn, d_cn = b_t[n], c_t[n], _F(0), _F(0)
        for d in range(len(dt)):
            d_cn += d_y[d] * h_next[n, d]
            g = d_h[n, d] + d_y[d] * c_n
            d_bn += g * dtu[d]
            d_dtu[d] += g * b_n
            g *= decay[n, d]
            d_h[n, d] = g
            g *= h[n, d]  # the gradient of the exponent
            d_dt[d] += g * a[n, d]
            d_a[n, d] += g * dt[d]
        d_b[n], d_c[n] = d_bn, d_cn


@_kernel
def scan_adjoint(
    tasks, u, delta, bias, softplus, a2, initial, bc, skip, z, z_at, gated, ungated, stored, d_out, d_last,
    d_u, d_delta, d_bias, d_a, d_initial, d_bc, d_skip, d_z,
):  # fmt: skip
    """Gradients of `scan`; those of a, bias and skip for each b, those of B and C for each part.

    `initial` is not read: `stored` begins with it.
    """
    n_state = a2.shape[0]
    for b, lo, hi, b_at, c_at, part in tasks:
        width = hi - lo
        a, bias_i, skip_i = a2[:, lo:hi].copy(), bias[lo:hi], skip[lo:hi]
        states = np.empty((STEPS + 1, n_state, width), np.float32)
        decay = np.empty((STEPS, n_state, width), np.float32)
        dt = np.empty((STEPS, width), np.float32)
        dtu = np.empty((STEPS, width), np.float32)
        d_y = np.empty((STEPS, width), np.float32)
        d_h = d_last[b, :, lo:hi].copy()
        sum_a = np.zeros((n_state, width), np.float32)
        sum_bias, sum_skip = np.zeros(width, np.float32), np.zeros(width, np.float32)
        d_dtu, d_dt = np.empty(width, np.float32), np.empty(width, np.float32)
        for first in range((u.shape[1] - 1) // STEPS * STEPS, -1, -STEPS):
            steps = min(STEPS, u.shape[1] - first)
            states[0] = stored[b, first // STEPS, :, lo:hi]
            for k in range(steps):
                t = first + k
                _step_sizes(delta[b, t, lo:hi], bias_i, u[b, t, lo:hi], softplus, dt[k], dtu[k])
                _advance(dt[k], dtu[k], a, bc[b, t, b_at : b_at + n_state], states[k], decay[k], states[k + 1])
                if gated:
                    z_t, dz_t = z[b, t, z_at + lo : z_at + hi], d_z[b, t, z_at + lo : z_at + hi]
                    _ungate(d_out[b, t, lo:hi], ungated[b, t, lo:hi], z_t, dz_t, d_y[k])
                else:
                    d_y[k] = d_out[b, t, lo:hi]
            for k in range(steps - 1, -1, -1):
                t = first + k
                _retreat(
                    dt[k], dtu[k], a, bc[b, t, b_at : b_at + n_state], bc[b, t, c_at : c_at + n_state],
                    states[k], decay[k], states[k + 1], d_y[k], d_h, d_dt, d_dtu, sum_a,
                    d_bc[part, b, t, b_at : b_at + n_state], d_bc[part, b, t, c_at : c_at + n_state],
                )  # fmt: skip
                dt_k, dy_k, u_t, delta_t = dt[k], d_y[k], u[b, t, lo:hi], delta[b, t, lo:hi]
                du_t, ddelta_t = d_u[b, t, lo:hi], d_delta[b, t, lo:hi]
                for d in range(width):
                    du_t[d] = d_dtu[d] * dt_k[d] + dy_k[d] * skip_i[d]
                    sum_skip[d] += dy_k[d] * u_t[d]
                    g = d_dtu[d] * u_t[d] + d_dt[d] * _LN2
                    if softplus:
                        g *= _sigmoid(delta_t[d] + bias_i[d])
                    ddelta_t[d] = g
                    sum_bias[d] += g
        d_a[b, :, lo:hi] = sum_a
        d_initial[b, :, lo:hi] = d_h
        d_bias[b, lo:hi] = sum_bias
        d_skip[b, lo:hi] = sum_skip


@_part
def _convolve(x, b, t, lo, hi, weight, bias, y):
    """Y = bias + the K last rows of x up to t, each times its row of `weight`."""
    width = hi - lo
    for d in range(width):
        y[d] = bias[d]
    for k in range(max(0, len(weight) - 1 - t), len(weight)):
        x_k, w_k = x[b, t - len(weight) + 1 + k, lo:hi], weight[k]
        for d in range(width):
            y[d] += w_k[d] * x_k[d]


@_kernel
def conv_silu(tasks, x, weight, bias, out):
    """Silu of the causal depthwise convolution, to out (B, L, D) with weight (K, D) and bias (D,).

    x has at least D columns, and may have rows before those of `out`; what is before them counts as zeros.
    """
    before = x.shape[1] - out.shape[1]
    for b, lo, hi, _, _, _ in tasks:
        width = hi - lo
        w, bias_i = weight[:, lo:hi].copy(), bias[lo:hi]
        y = np.empty(width, np.float32)
        for t in range(out.shape[1]):
            _convolve(x, b, before + t, lo, hi, w, bias_i, y)
            out_t = out[b, t, lo:hi]
            for d in range(width):
                out_t[d] = y[d] * _sigmoid(y[d])


@_kernel
def conv_silu_adjoint(tasks, x, weight, bias, d_out, d_x, d_weight, d_bias):
    """Gradients of `conv_silu`; of weight (B, K, D) and bias (B, D) for each b, of x in its first columns."""
    length, taps = d_out.shape[1], len(weight)
    for b, lo, hi, _, _, _ in tasks:
        width = hi - lo
        w, bias_i = weight[:, lo:hi].copy(), bias[lo:hi]
        y = np.empty(width, np.float32)
        d_y = np.zeros((length + taps - 1, width), np.float32)
        sum_w, sum_bias = np.zeros((taps, width), np.float32), np.zeros(width, np.float32)
        for t in range(length):
            _convolve(x, b, t, lo, hi, w, bias_i, y)
            d_out_t, dy_t = d_out[b, t, lo:hi], d_y[t]
            for d in range(width):
                s = _sigmoid(y[d])
                dy_t[d] = d_out_t[d] * s * (_F(1) + y[d] * (_F(1) - s))
                sum_bias[d] += dy_t[d]
            for k in range(max(0, taps - 1 - t), taps):
                x_k, sum_k = x[b, t - taps + 1 + k, lo:hi], sum_w[k]
                for d in range(width):
                    sum_k[d] += dy_t[d] * x_k[d]
        for t in range(length):
            y[:] = 0
            for k in range(taps):
                w_k, dy_k = w[k], d_y[t + taps - 1 - k]
                for d in range(width):
                    y[d] += w_k[d] * dy_k[d]
            d_x[b, t, lo:hi] = y
        d_weight[b, :, lo:hi] = sum_w
        d_bias[b, lo:hi] = sum_bias


@_kernel
def rms_norm(tasks, x, weight, eps, out):
    """Scale rows of x (rows, E) to x / sqrt(mean of x² + eps) times weight; a task is (first row, end, its number)."""
    width = len(weight)
    for lo, hi, _ in tasks:
        for i in range(lo, hi):
            x_i, out_i = x[i], out[i]
            total = _F(0)
            for e in range(width):
                total += x_i[e] * x_i[e]
            scale = _F(1) / np.sqrt(total / _F(width) + eps)
            for e in range(width):
                out_i[e] = x_i[e] * scale * weight[e]


@_kernel
def rms_norm_adjoint(tasks, x, weight, eps, d_out, d_x, d_weight):
    """Gradients of `rms_norm`; that of weight (tasks, E) for each task."""
    width = len(weight)
    for lo, hi, part in tasks:
        sum_w = np.zeros(width, np.float32)
        for i in range(lo, hi):
            x_i, g_i, dx_i = x[i], d_out[i], d_x[i]
            total, along = _F(0), _F(0)
            for e in range(width):
                total += x_i[e] * x_i[e]
                along += x_i[e] * g_i[e] * weight[e]
            mean = total / _F(width) + eps
            scale, along = _F(1) / np.sqrt(mean), along / (_F(width) * mean)
            for e in range(width):
                dx_i[e] = scale * (g_i[e] * weight[e] - x_i[e] * along)
                sum_w[e] += g_i[e] * x_i[e] * scale
        d_weight[part] = sum_w
