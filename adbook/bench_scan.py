"""The benchmark of the selective scan: time and memory against its peers, on the CPU and, where there is one, a GPU.

On the CPU all work on the same number of tokens, in float32, forward and backward.  The yardstick is the pair of
projections, in and out, that any Mamba layer has besides its scan: two matrix products, as fast as the machine is.  The
peers are the plain loop, mambapy's parallel scan, and causal attention (PyTorch's fused kernel).
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from adbook.mamba import Mamba, MambaConfig
from adbook.scan import backends, selective_scan
from adbook.transformer import Transformer, TransformerConfig

CHANNELS, STATES, WIDTH = 256, 16, 128  # D, N, and E of the layer around the scan
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SHAPES = {"b16_l512": (16, 512), "b4_l4000": (4, 4000)}
_GPU_SHAPE = (16, 1024, 4096, 16)  # B, D, L, N

Work = Callable[[], Any]  # one forward and backward pass


def bench_scan(
    lengths: Sequence[int] = LENGTHS, shapes: dict[str, tuple[int, int]] = SHAPES, rounds: int = 3
) -> dict[str, Any]:
    """Measure the scan with softplus, skip connection and gate, forward and backward, against its peers.

    In each round what is compared takes its turn, and the best of the rounds counts, so that other load on the machine
    hits nothing alone.

    Args:
        lengths: Of the sequences in the sweep; the batch is such that all have as many tokens as the longest.
        shapes: Batch and length of the close comparisons, by name.
        rounds: Timed passes of each.

    Returns:
        Ratios by name; `sweep`, with microseconds a token by number of threads and method, and peak memory in bytes a
        token by method, for each of `lengths`.

    Raises:
        ModuleNotFoundError: if mambapy is not installed; the message says how to.
    """
    mambapy_scan()  # refuse before the long work
    threads = torch.get_num_threads()
    try:
        ratios = {}
        for name, (batch, length) in shapes.items():
            ratios |= {f"{key}_{name}": value for key, value in _ratios(batch, length, threads, rounds).items()}
        sweep = _sweep(lengths, threads, rounds)
    finally:
        torch.set_num_threads(threads)
    return ratios | {
        "sweep": sweep, "channels": CHANNELS, "states": STATES, "width": WIDTH,
        "threads": threads, "torch": torch.__version__,
    }  # fmt: skip


def _ratios(batch: int, length: int, threads: int, rounds: int) -> dict[str, float]:
    works = {
        "projections": projections(batch, length),
        "scan": scan(batch, length),
        "scan_rows": scan(batch, length, rows=True),
    }
    # u, Δ, z and the output's gradient, B and C in float32; what is made has the same sizes
    given = 4 * batch * length * (4 * CHANNELS + 2 * STATES)
    one, all_of_them = (_best(works, count, 10 * rounds) for count in (1, threads))
    # Apart, for it takes and frees so much memory that what runs next has to ask the system for its own anew.
    mambapy = _best({"mambapy": scan(batch, length, mambapy_scan())}, 1, rounds)["mambapy"]
    return {
        "scan_ms": 1e3 * one["scan"],
        "scan_to_projections": one["scan"] / one["projections"],
        "scan_in_rows_to_projections": one["scan_rows"] / one["projections"],
        "mambapy_to_scan": mambapy / one["scan"],
        f"speed_up_by_{threads}_threads": one["scan"] / all_of_them["scan"],
        "peak_to_own_memory": (given + _peak("scan", batch, length)) / (2 * given),
    }


def _sweep(lengths: Sequence[int], threads: int, rounds: int) -> dict[str, Any]:
    tokens = max(lengths)
    counts = sorted({1, threads})
    microseconds = {str(count): {method: [] for method in METHODS} for count in counts}
    memory = {method: [] for method in METHODS}
    for length in tqdm(lengths, desc="lengths", mininterval=5):
        works = {method: make(tokens // length, length) for method, make in METHODS.items()}
        for count in counts:
            for method, best in _best(works, count, rounds).items():
                microseconds[str(count)][method].append(1e6 * best / tokens)
        for method in METHODS:
            memory[method].append(_peak(method, tokens // length, length) / tokens)
    return {"lengths": list(lengths), "tokens": tokens, "microseconds": microseconds, "bytes": memory}


def _best(works: dict[str, Work], threads: int, rounds: int) -> dict[str, float]:
    """Seconds of the best of some passes of each, in turns."""
    torch.set_num_threads(threads)
    best = dict.fromkeys(works, float("inf"))
    for turn in range(rounds + 1):
        for name, work in works.items():
            if turn > 1 and best[name] > 2:  # seconds: what takes so long has little noise
                continue
            time.sleep(0.05)  # until threads that the one before woke have ceased to wait busily
            start = time.perf_counter()
            work()
            if turn:  # the first only compiles and allocates
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def projections(batch: int, length: int) -> Work:
    """The matrix products of a Mamba layer: from its width to twice its channels, and from its channels back."""
    tokens, inner = torch.randn(batch, length, WIDTH), torch.randn(batch, length, CHANNELS)
    pair = nn.Linear(WIDTH, 2 * CHANNELS, bias=False), nn.Linear(CHANNELS, WIDTH, bias=False)
    inputs = [tokens.requires_grad_(), inner.requires_grad_(), *(layer.weight for layer in pair)]
    gradients = [torch.randn(batch, length, layer.out_features) for layer in pair]
    return lambda: torch.autograd.grad([pair[0](tokens), pair[1](inner)], inputs, gradients)


def scan(batch: int, length: int, function: Callable[..., Tensor] = selective_scan, rows: bool = False) -> Work:
    """A scan of (B, D, L) tensors, or of transposed (B, L, D) ones, as a Mamba layer has them."""

    def tensor(count: int) -> Tensor:
        x = torch.randn(batch, length, count).transpose(1, 2) if rows else torch.randn(batch, count, length)
        return x.requires_grad_()

    A = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    delta_bias = torch.full((CHANNELS,), -4.0)
    u, delta, z = (tensor(CHANNELS) for _ in range(3))
    inputs = [u, delta, A, tensor(STATES), tensor(STATES), torch.ones(CHANNELS), z, delta_bias]
    inputs = [x.requires_grad_() for x in inputs]
    gradient = torch.randn_like(u)

    return lambda: torch.autograd.grad(function(*inputs, delta_softplus=True), inputs, gradient)


def _layer(make: Callable[[int], nn.Module], batch: int, length: int) -> Work:
    layer = make(length)
    tokens, gradient = torch.randn(2, batch, length, WIDTH).unbind()
    inputs = [tokens.requires_grad_(), *layer.parameters()]
    return lambda: torch.autograd.grad(layer(tokens), inputs, gradient)


def _attention(batch: int, length: int) -> Work:
    """Causal attention of 4 heads between its own two projections."""
    mix, out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
    tokens, gradient = torch.randn(2, batch, length, WIDTH).unbind()
    inputs = [tokens.requires_grad_(), mix.weight, out.weight]

    def work() -> tuple[Tensor, ...]:
        heads = mix(tokens).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, E / heads)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return torch.autograd.grad(out(y.transpose(1, 2).flatten(2)), inputs, gradient)

    return work


def _mamba(_: int) -> Mamba:
    return Mamba(MambaConfig(d_model=WIDTH, n_layers=1, d_state=STATES))


def _transformer(length: int) -> Transformer:
    return Transformer(TransformerConfig(d_model=WIDTH, n_layers=1, n_heads=4, context=length))


METHODS = {
    "projections": projections,
    "scan": scan,
    "reference loop": lambda batch, length: scan(batch, length, partial(selective_scan, backend="reference")),
    "mambapy": lambda batch, length: scan(batch, length, mambapy_scan()),
    "attention alone": _attention,
    "mamba": partial(_layer, _mamba),
    "transformer": partial(_layer, _transformer),
}


def mambapy_scan() -> Callable[..., Tensor]:
    """The parallel scan of mambapy with the interface of `selective_scan`, used as its own `MambaBlock` does."""
    try:
        from mambapy.pscan import pscan
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this benchmark compares with mambapy, which is not installed; "
            "install it with: pip install mambapy==1.2.0 --no-deps"
        ) from error

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        x, delta, B, C = (y.transpose(1, 2) for y in (u, delta, B, C))  # rows, as mambapy has them
        delta = F.softplus(delta + delta_bias)
        decay = torch.exp(delta.unsqueeze(-1) * A)  # (B, L, D, N)
        kicks = (delta * x).unsqueeze(-1) * B.unsqueeze(2)
        y = (pscan(decay, kicks) @ C.unsqueeze(-1)).squeeze(-1) + D * x  # (B, L, D)
        return y.transpose(1, 2) * F.silu(z)

    return scan


def _peak(method: str, batch: int, length: int) -> int:
    """Bytes that a pass takes at its peak, in a fresh process, whose high-water mark nothing else has raised."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure_peak, method, batch, length).result()


def _measure_peak(method: str, batch: int, length: int) -> int:
    torch.set_num_threads(1)
    METHODS[method](1, min(length, 64))()  # load and compile
    work = METHODS[method](batch, length)
    _ballast = bytearray(b"x") * max(high_water() - psutil.Process().memory_info().rss, 0)  # now we are at the mark
    before = high_water()
    work()
    return high_water() - before


def high_water() -> int:
    """The most memory, in bytes, that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bench_gpu(rounds: int = 3) -> dict[str, Any]:
    """Time the scan on a GPU against the least time in which its memory traffic can be done.

    Returns:
        The device, that least time `floor_ms`, and for each kernel that is there its `ms`, their ratio, its peak
        memory, and its largest error against float64 by the type of its input, in millionths of the largest number.

    Raises:
        ValueError: PyTorch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("the benchmark gpu needs a GPU, and PyTorch sees none; leave it out here")
    usable = [name for name in ("triton", "mamba_ssm") if backends()[name] is None]
    arguments = _gpu_arguments(*_GPU_SHAPE, torch.bfloat16)
    works = {name: partial(_gpu_pass, arguments, name) for name in usable}
    floor = _traffic(arguments) / _bandwidth()
    result = {"device": torch.cuda.get_device_name(), "floor_ms": 1e3 * floor}
    for name, work in works.items():
        best = min(_gpu_seconds(work) for _ in range(rounds + 1))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        peak = torch.cuda.max_memory_allocated() - before
        result[name] = {"ms": 1e3 * best, "floor_to_time": floor / best, "peak_mib": peak / 2**20}
        for dtype in (torch.bfloat16, torch.float32):
            result[name][f"error_ppm_{str(dtype).removeprefix('torch.')}"] = 1e6 * _gpu_error(name, dtype)
    return result


def _gpu_arguments(batch: int, channels: int, length: int, states: int, dtype: torch.dtype) -> dict[str, Tensor]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    arguments = {name: tensor(batch, channels, length) for name in ("u", "delta", "z")}
    arguments |= {name: tensor(batch, states, length) for name in ("B", "C")}
    arguments |= {"A": -torch.arange(1.0, states + 1, device="cuda").repeat(channels, 1)}
    arguments |= {"D": torch.ones(channels, device="cuda"), "delta_bias": torch.full((channels,), -4.0, device="cuda")}
    return {name: x.requires_grad_() for name, x in arguments.items()}


def _gpu_pass(arguments: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    out = selective_scan(**arguments, delta_softplus=True, backend=backend)
    gradients = torch.autograd.grad(out, list(arguments.values()), torch.ones_like(out))
    return {"out": out.detach(), **dict(zip(arguments, gradients, strict=True))}


def _gpu_seconds(work: Work) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _traffic(arguments: dict[str, Tensor]) -> int:
    """Bytes of a forward and a backward pass that reads and writes everything once."""
    given, output = sum(x.nbytes for x in arguments.values()), arguments["u"].nbytes
    return (given + output) + (given + output + given)


def _bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    return 2 * x.nbytes / min(_gpu_seconds(x.clone) for _ in range(10))


def _gpu_error(backend: str, dtype: torch.dtype) -> float:
    """The largest error of output and gradients, each relative to its largest entry, against the float64 loop."""
    arguments = _gpu_arguments(2, 64, 1024, 16, dtype)
    exact = {name: x.detach().double().requires_grad_() for name, x in arguments.items()}
    got, expected = _gpu_pass(arguments, backend), _gpu_pass(exact, "reference")
    return max(((got[name] - x).abs().max() / x.abs().max()).item() for name, x in expected.items())
