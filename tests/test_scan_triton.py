"""The Triton kernels: against the float64 reference, interpreted on a CPU or on a GPU, and compiled for GPUs unseen."""

import subprocess
import sys

import pytest
import torch
from scan_cases import ROUNDING, assert_close, case, differentiate, longest_sum

from adbook.scan import selective_scan

triton = pytest.importorskip("triton", reason="triton is made for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 8 steps: the interpreter takes a second for every hundred steps of a state."""
    from adbook import scan_triton

    monkeypatch.setattr(scan_triton, "CHUNK", 8)


@pytest.mark.parametrize(
    ("b", "c", "full"),
    [("step", "step", True), ("group", "step", False), ("constant", "group", True), ("step", "constant", False)],
)
@pytest.mark.parametrize("length", [1, 8, 19])
def test_kernels_agree_with_the_float64_reference(b, c, full, length):
    x = case(length, n_state=3, b=b, c=c, full=full, initial=full)
    expected = differentiate(x, "reference", torch.float64, full)
    assert_close(differentiate(x, "triton", torch.float32, full, DEVICE), expected, longest_sum(x) * ROUNDING)


@pytest.mark.parametrize(("programs", "batch", "channels"), [(1, 1, 70), (256, 2, 37), (5, 3, 6)])
def test_blocks_of_channels_are_joined(programs, batch, channels, monkeypatch):
    from adbook import scan_triton

    monkeypatch.setattr(scan_triton, "_PROGRAMS", programs)  # with fewer programs, blocks have up to 32 channels
    x = case(9, channels, 1, batch)
    expected = differentiate(x, "reference", torch.float64)
    assert_close(differentiate(x, "triton", torch.float32, device=DEVICE), expected, longest_sum(x) * ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_accumulated_in_float32(dtype):
    x = {name: value.to(dtype).double() for name, value in case(19, n_state=2).items()}
    got = differentiate(x, "triton", dtype, device=DEVICE)
    assert {v.dtype for name, v in got.items() if name != "last"} == {dtype}
    assert got["last"].dtype == torch.float32
    weighting = torch.finfo(dtype).eps  # the gradients that come in are rounded too
    assert_close(got, differentiate(x, "reference", torch.float64), 2 * weighting)


def test_gradients_of_states_that_forget_at_once_are_as_accurate_as_the_others():
    """Each state's own error counts: that of A = -24 is e**-24 of the slowest one's, and a rounding of it is less."""
    x = case(20, channels=4, n_state=6, full=False) | {"delta": torch.ones(2, 4, 20).double()}
    x["A"] = -torch.tensor([1.0, 2, 4, 8, 16, 24]).double().repeat(4, 1)
    expected, got = (
        differentiate(x, *how)
        for how in (("reference", torch.float64, False), ("triton", torch.float32, False, DEVICE))
    )
    error = (got["A"].double() - expected["A"]).abs().amax(0) / expected["A"].abs().amax(0)
    assert (error < (20 * 2 + 2 * 24) * ROUNDING).all()  # sums over 2 × 20 steps; an exponent inherits its size


def test_a_state_that_is_never_kept_gives_no_nan_beside_the_end():
    x = {"u": torch.ones(1, 1, 3), "delta": torch.ones(1, 1, 3), "B": torch.ones(1, 1, 3), "C": torch.ones(1, 1, 3)}
    x |= {"A": torch.tensor([[-torch.inf]])}
    x = {name: value.to(DEVICE) for name, value in x.items()}
    out, last = selective_scan(**x, return_last_state=True, backend="triton")
    assert torch.equal(out.cpu(), torch.ones(1, 1, 3))
    assert last.item() == 1


def test_memory_order_does_not_matter():
    x = {name: value.float() for name, value in case(9, n_state=2).items()}
    turned = {name: v.transpose(0, -1).contiguous().transpose(0, -1) for name, v in x.items()}
    assert not turned["u"].is_contiguous()
    expected, got = (differentiate(y, "triton", device=DEVICE) for y in (x, turned))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_softplus_is_accurate_from_tiny_to_large_and_nan_stays_visible():
    delta = torch.linspace(-80, 80, 41, device=DEVICE)[None, :, None]  # one step: y = Δ
    one, A = torch.ones(1, 1, 1, device=DEVICE), -torch.ones(41, 1, device=DEVICE)
    got = selective_scan(torch.ones_like(delta), delta, A, one, one, delta_softplus=True, backend="triton")
    expected = torch.nn.functional.softplus(delta.double(), threshold=1000)
    allowed = ROUNDING * (10 + delta.double().clamp(max=0).abs())  # e**-|x| inherits |x| roundings
    assert ((got.double() / expected - 1).abs() <= allowed).all()
    u = torch.ones(1, 2, 20, device=DEVICE)
    u[0, 1, 11] = torch.nan
    ones = torch.ones(1, 1, 20, device=DEVICE)
    y = selective_scan(u, torch.ones_like(u), -torch.ones(2, 1, device=DEVICE), ones, ones, backend="triton")
    assert torch.equal(y[0].isnan().cpu(), torch.tensor([[False] * 20, [False] * 11 + [True] * 9]))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
def test_kernels_compile_for_a_gpu_that_is_not_here(kernel, capability, tmp_path):
    """The interpreter accepts more than the compiler; this needs no GPU, but a process without the interpreter."""
    script = f"""
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from adbook import scan_triton
kernel = scan_triton.{kernel}
fixed = dict(SOFTPLUS=True, B_VARIES=True, C_VARIES=False, N=4, CHANNELS=16, STEPS=64, initial_ptr=None)
types = {{name: "*bf16" if name[:2] in ("u_", "de", "z_", "B_") else "*fp32" for name in kernel.arg_names}}
types |= {{name: "i32" for name in kernel.arg_names if not name.endswith("_ptr")}}
types |= {{name: "constexpr" for name in fixed if name in types}}
values = {{(kernel.arg_names.index(name),): value for name, value in fixed.items() if name in types}}
made = compile(ASTSource(kernel, types, values), target=GPUTarget("cuda", {capability}, 32), options={{"num_warps": 4}})
assert len(made.asm["cubin"]) > 1000
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={"TRITON_CACHE_DIR": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
