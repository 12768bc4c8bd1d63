"""The selective scan of S6, `selective_scan`, with the interface of `mamba_ssm`'s `selective_scan_fn`.

For every channel d the scan is a linear recurrence whose coefficients depend on the input at that step (Gu & Dao
2023, "Mamba", arXiv 2312.00752, section 3.2 and algorithm 2):

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t          state, (N,)
    y_t = C_t · h_t + D u_t                         output, a number

A is discretised by zero-order hold and B by Euler's rule, Δ B, as in the authors' implementation; the exact form of B
(the paper's equation 4) differs from it by a relative O(Δ A).

| code            | paper | shape             | meaning                                                   |
|-----------------|-------|-------------------|-----------------------------------------------------------|
| `u`             | x     | (B, D, L)         | input; B sequences, D channels, L steps                   |
| `delta`         | Δ     | (B, D, L)         | step size, after `delta_bias` and softplus                |
| `A`             | A     | (D, N)            | diagonal state matrix, N states a channel                 |
| `B`, `C`        | B, C  | (B, N, L)         | input and output maps of each step, shared by all channels |
|                 |       | (B, G, N, L)      | shared by groups of D / G neighbouring channels           |
|                 |       | (D, N)            | constant in time (S4D), one for each channel              |
| `D`             | D     | (D,)              | skip connection                                           |
| `z`             |       | (B, D, L)         | gate: the output is multiplied by silu(z) (section 3.4)   |
| `initial_state` | h_0   | (B, D, N)         | state before the first step                               |

There are five implementations of it, called backends:

| backend       | runs on          | what it is                                                                        |
|---------------|------------------|-----------------------------------------------------------------------------------|
| `"reference"` | any device       | the recurrence as a loop, gradients by autograd: the meaning of the others        |
| `"torch"`     | any device       | PyTorch operations with an adjoint of its own, `adbook.scan_torch`                |
| `"numba"`     | CPU              | one compiled loop each way, `adbook.scan_numba`                                   |
| `"triton"`    | GPU              | one kernel each way, compiled on first use, `adbook.scan_triton`                  |
| `"mamba_ssm"` | NVIDIA GPU       | the CUDA kernel of mamba-ssm, where it is installed                               |
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys

import torch
from torch import Tensor

from adbook.checks import check_known
from adbook.scan_torch import grouped, per_channel, reference, torch_scan


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
    initial_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a batch of sequences; differentiable in every tensor, with float32 (or float64) accumulation.

    Follows `mamba_ssm.ops.selective_scan_interface.selective_scan_fn` (mamba-ssm 2.3.2) in arguments, layouts and
    meaning.  Two things go beyond it: the last state can be differentiated, and a scan can start from a state, so
    that a long sequence can be scanned in pieces, each from the last state of the one before.

    Args:
        u: Input, (B, D, L), in any memory order, as all the others.
        delta: Step sizes before bias and softplus, (B, D, L).
        A: State matrix, (D, N), real; decaying states need negative entries.
        B: Input map, (B, N, L), (B, G, N, L) or (D, N).
        C: Output map, in one of the same shapes.
        D: Skip connection, (D,).
        z: Gate, (B, D, L).
        delta_bias: Added to `delta`, (D,).
        delta_softplus: Whether step sizes are softplus(delta + delta_bias).
        return_last_state: Also return the state after the last step.
        backend: "auto", "reference", "torch", "numba", "triton" or "mamba_ssm".  "auto" takes "numba" for float32 and
            narrower numbers on the CPU, "mamba_ssm" or else "triton" for them on a GPU, and "torch" otherwise.
        initial_state: State before the first step, (B, D, N); None for zeros.

    Returns:
        The output (B, D, L) in `u`'s dtype, or with `return_last_state` the pair of it and the state (B, D, N), which
        is float32, or float64 if any tensor is.

    Raises:
        ValueError: if a shape, dtype or device does not fit, or the backend is unknown or cannot be used here.
    """
    tensors = {
        "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
        "initial_state": initial_state,
    }  # fmt: skip
    tensors = {name: x for name, x in tensors.items() if x is not None or name in ("u", "delta", "A", "B", "C")}
    _check(tensors)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32
    backend = _choose(backend, tensors, wide, return_last_state)
    if backend not in _GPU_BACKENDS:  # those read narrow numbers as they are and widen them on the chip
        tensors = {name: x.to(wide) for name, x in tensors.items()}
    out, last = _BACKENDS[backend](softplus=delta_softplus, **tensors)
    out = out.to(u.dtype)
    return (out, last) if return_last_state else out


def backends() -> dict[str, str | None]:
    """Every backend's name with None if it can be used on this machine, or the reason why not."""
    return {"reference": None, "torch": None} | {name: missing() for name, missing in _MISSING.items()}


def numba_missing() -> str | None:
    """Return why the compiled CPU path cannot be taken, or None."""
    return None if _is_installed("numba") else "numba is not installed"


def _triton_missing() -> str | None:
    if not _is_installed("triton"):
        return "triton is not installed (PyTorch's builds for GPUs bring it)"
    if _interpreted() or torch.cuda.is_available():
        return None
    return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels, very slowly, on a CPU)"


def _mamba_ssm_missing() -> str | None:
    if not _is_installed("mamba_ssm"):
        return "mamba-ssm is not installed"
    if not _is_installed("selective_scan_cuda"):
        return "mamba-ssm is installed without its Mamba-1 kernel, selective_scan_cuda"
    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


_MISSING = {"numba": numba_missing, "triton": _triton_missing, "mamba_ssm": _mamba_ssm_missing}
_GPU_BACKENDS = ("mamba_ssm", "triton")  # in the order in which "auto" takes them


def _is_installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _choose(backend: str, tensors: dict[str, Tensor], wide: torch.dtype, return_last_state: bool) -> str:
    """The backend to use; for a name given, check that it can be used for these tensors."""
    check_known("backend", backend, ("auto", *_BACKENDS))
    if backend in ("reference", "torch"):
        return backend
    if backend != "auto":
        reason = _reason_against(backend, tensors, wide)
        if reason:
            raise ValueError(f"backend {backend!r} cannot be used: {reason}; use 'auto' or 'torch'")
        return backend
    constant = tensors["B"].dim() == 2 or tensors["C"].dim() == 2
    if tensors["u"].device.type == "cpu":  # numba's inner loop runs over channels that share B and C
        candidates = () if constant else ("numba",)
    else:  # mamba-ssm's backward pass takes no account of the last state
        candidates = ("triton",) if constant or return_last_state else _GPU_BACKENDS
    usable = (name for name in candidates if _reason_against(name, tensors, wide) is None)
    return next(usable, "torch")


def _reason_against(backend: str, tensors: dict[str, Tensor], wide: torch.dtype) -> str | None:
    """Why a compiled backend cannot scan these tensors, or None."""
    device = tensors["u"].device
    interpreted = backend == "triton" and _interpreted() and device.type == "cpu"
    if device.type != ("cpu" if backend == "numba" else "cuda") and not interpreted:
        return f"it runs on the {'CPU' if backend == 'numba' else 'GPU'} and the tensors are on {device}"
    if wide == torch.float64:
        return "it computes in float32 and the input is float64"
    if backend == "mamba_ssm" and "initial_state" in tensors:
        return "mamba-ssm's kernel takes no initial state"
    return _MISSING[backend]()


def _check(tensors: dict[str, Tensor]) -> None:
    """Raise a ValueError for the first tensor that does not fit `u` (B, D, L) and `A` (D, N)."""
    u, A = tensors["u"], tensors["A"]
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            kind = f"a {x.layout} tensor" if isinstance(x, Tensor) else f"of type {type(x).__name__}"
            raise ValueError(f"{name} is {kind}; an ordinary (dense) torch.Tensor is needed")
    for name, x in tensors.items():
        if x.is_complex():
            raise ValueError(f"{name} is complex; only real numbers are supported, as Mamba's A = -exp(A_log)")
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}; floating-point numbers are needed: use {name}.float()")
        if x.device != u.device:
            raise ValueError(f"{name} is on {x.device} and u on {u.device}; move all tensors to one device")
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u has shape {tuple(u.shape)}; needed are three non-empty axes (batch, channels, length)")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A has shape {tuple(A.shape)}; u's {channels} channels need ({channels}, states)")
    n_state = A.shape[1]
    for name, shape in (
        ("delta", (batch, channels, length)),
        ("z", (batch, channels, length)),
        ("D", (channels,)),
        ("delta_bias", (channels,)),
        ("initial_state", (batch, channels, n_state)),
    ):
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; u and A need {shape}")
    for name in ("B", "C"):
        shape = tuple(tensors[name].shape)
        groups = shape[1] if len(shape) == 4 else 1
        fits = shape in ((channels, n_state), (batch, n_state, length), (batch, groups, n_state, length))
        if not fits or groups == 0 or channels % groups:
            raise ValueError(
                f"{name} has shape {shape}; u and A need ({batch}, {n_state}, {length}), "
                f"({batch}, G, {n_state}, {length}) with G dividing {channels}, or ({channels}, {n_state})"
            )


# The compiled backends are imported on use: numba takes a second to load, and the others may not be there.


def _numba(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False, initial_state=None
) -> tuple[Tensor, Tensor]:
    from adbook import scan_numba

    if B.dim() == 2 or C.dim() == 2:
        B, C = (per_channel(x, u).expand(-1, -1, -1, u.shape[2]) for x in (B, C))
    else:
        B, C = grouped(B), grouped(C)
        groups = math.lcm(B.shape[1], C.shape[1])  # the compiled loop wants the same groups for both
        B, C = (x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], 1) for x in (B, C))
    return scan_numba.scan(u, delta, A, B, C, D, z, delta_bias, softplus, initial_state)


def _triton(**arguments) -> tuple[Tensor, Tensor]:
    from adbook import scan_triton

    return scan_triton.scan(**arguments)


def _mamba_ssm(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False) -> tuple[Tensor, Tensor]:
    """The CUDA kernel: u, delta, z and maps that vary in one dtype, everything else in float32."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    delta, z = (None if x is None else x.to(u.dtype) for x in (delta, z))
    B, C = (x.float() if x.dim() == 2 else x.to(u.dtype) for x in (B, C))
    A, D, delta_bias = (None if x is None else x.float() for x in (A, D, delta_bias))
    out, last = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, softplus, return_last_state=True)
    return out, last.detach()  # its backward pass takes no account of the last state


_BACKENDS = {"reference": reference, "torch": torch_scan, "numba": _numba, "triton": _triton, "mamba_ssm": _mamba_ssm}
