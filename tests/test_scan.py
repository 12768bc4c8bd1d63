"""The selective scan: an explicit loop, numerical gradients, and every backend against the float64 reference."""

import itertools
import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adbook.scan import backends, selective_scan

BACKENDS = list(backends())
ROUNDING = 2.0**-24  # of float32: the relative error of one operation


def case(length, channels=9, n_state=5, batch=2, b="step", c="step", full=True, seed=0):
    """Arguments of a scan in float64, rounded to float32 so that every dtype starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    forms = {"step": (batch, n_state, length), "group": (batch, 3, n_state, length), "constant": (channels, n_state)}
    arguments = {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length) - 1 if full else normal(batch, channels, length).abs() / 8,
        "A": -4 * torch.rand(channels, n_state, generator=generator).double(),
        "B": normal(*forms[b]),
        "C": normal(*forms[c]),
    }
    if full:
        arguments |= {"D": normal(channels), "z": normal(batch, channels, length), "delta_bias": normal(channels)}
    return arguments


def differentiate(arguments, backend, dtype, softplus):
    """Output, last state and the gradient of every argument, for a fixed random weighting of both results."""
    arguments = {name: x.to(dtype).requires_grad_() for name, x in arguments.items()}
    out, last = selective_scan(**arguments, delta_softplus=softplus, return_last_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in (out, last))
    gradients = torch.autograd.grad(loss, list(arguments.values()))
    return {"out": out.detach(), "last": last.detach(), **dict(zip(arguments, gradients, strict=True))}


def assert_close(got, expected, tolerance):
    """Compare relative to each result's largest entry: rounding errors of a sum scale with its largest terms."""
    for name, x in expected.items():
        error = (got[name].double() - x).abs().max() / x.abs().max().clamp(min=1e-30)
        assert error < tolerance, f"{name}: {error:.1e} > {tolerance:.1e}"


def longest_sum(arguments):
    """Terms of the longest sum in values or gradients: over batch and steps (A, D), or over channels (B, C)."""
    batch, channels, length = arguments["u"].shape
    return batch * length + channels + arguments["A"].shape[1]


def test_reference_is_the_recurrence_written_out():
    x = case(length=7, channels=6, b="group", c="constant")
    out, last = selective_scan(**x, delta_softplus=True, return_last_state=True, backend="reference")
    n = {name: value.numpy() for name, value in x.items()}
    for b, d in itertools.product(range(2), range(6)):
        h = np.zeros(5)
        for t in range(7):
            delta = np.log1p(np.exp(n["delta"][b, d, t] + n["delta_bias"][d]))
            h = np.exp(delta * n["A"][d]) * h + delta * n["B"][b, d // 2, :, t] * n["u"][b, d, t]
            gate = n["z"][b, d, t] / (1 + np.exp(-n["z"][b, d, t]))
            y = (h @ n["C"][d] + n["D"][d] * n["u"][b, d, t]) * gate
            assert out[b, d, t].item() == pytest.approx(y, rel=1e-12)
        np.testing.assert_allclose(last[b, d].numpy(), h, rtol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("b", "c"), [("step", "step"), ("group", "constant"), ("constant", "group")])
def test_gradients_are_those_of_finite_differences(backend, b, c):
    x = case(length=34, channels=3, n_state=2, batch=1, b=b, c=c)  # one step past the 32 of a block, twice

    def scan(*tensors):
        arguments = dict(zip(x, tensors, strict=True))
        return selective_scan(**arguments, delta_softplus=True, return_last_state=True, backend=backend)

    assert torch.autograd.gradcheck(scan, [v.clone().requires_grad_() for v in x.values()], fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [True, False], ids=["full", "bare"])
@pytest.mark.parametrize(("b", "c"), [("step", "step"), ("group", "step"), ("constant", "step"), ("group", "constant")])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_backends_agree_with_the_float64_reference(backend, full, b, c, length):
    x = case(length, b=b, c=c, full=full)
    expected = differentiate(x, "reference", torch.float64, full)
    assert_close(differentiate(x, backend, torch.float32, full), expected, longest_sum(x) * ROUNDING)
    if backend == "torch":
        assert_close(differentiate(x, backend, torch.float64, full), expected, longest_sum(x) * 2.0**-53)


@pytest.mark.parametrize(("batch", "channels", "n_state"), [(1, 37, 16), (1, 300, 16), (5, 129, 1), (3, 257, 3)])
def test_numba_joins_blocks_of_channels(batch, channels, n_state):
    x = case(40, channels, n_state, batch)
    expected = differentiate(x, "reference", torch.float64, True)
    assert_close(differentiate(x, "numba", torch.float32, True), expected, longest_sum(x) * ROUNDING)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_accumulated_in_float32(backend, dtype):
    x = {name: value.to(dtype).double() for name, value in case(100).items()}
    got = differentiate(x, backend, dtype, True)
    assert {v.dtype for name, v in got.items() if name != "last"} == {dtype}
    assert got["last"].dtype == torch.float32
    # Against the same rounded inputs, all that is left is the rounding of each result to the narrow format.
    weighting = torch.finfo(dtype).eps  # the loss' weights, and so the gradients that come in, are rounded too
    assert_close(got, differentiate(x, "reference", torch.float64, True), 2 * weighting)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_order_does_not_matter(backend):
    x = {name: value.float() for name, value in case(33).items()}
    turned = {name: v.transpose(0, -1).contiguous().transpose(0, -1) for name, v in x.items()}
    assert not turned["u"].is_contiguous()
    expected = selective_scan(**x, delta_softplus=True, backend=backend)
    got = selective_scan(**turned, delta_softplus=True, backend=backend)
    assert_close({"out": got}, {"out": expected}, longest_sum(x) * ROUNDING)  # sums may run in another order


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3)),
    forms=st.tuples(*[st.sampled_from(["step", "group", "constant"])] * 2),
    seed=st.integers(0, 2**20),
    full=st.booleans(),
    backend=st.sampled_from(["torch", "numba"]),
)
def test_any_shape(shape, forms, seed, full, backend):
    length, thirds, n_state, batch = shape
    x = case(length, 3 * thirds, n_state, batch, *forms, full=full, seed=seed)
    expected = selective_scan(**x, delta_softplus=full, backend="reference")
    got = selective_scan(**{k: v.float() for k, v in x.items()}, delta_softplus=full, backend=backend)
    # Each output is a sum of decayed terms: it is off by a few roundings of the sum of their magnitudes for each step
    # and state.  (The exponent's own rounding, x of its size, comes with a factor e**-x.)
    positive = {k: v if k in ("delta", "A", "delta_bias") else v.abs() for k, v in x.items() if k != "z"}
    size = selective_scan(**positive, delta_softplus=full, backend="reference")
    size = size * (x["z"].abs() if full else 1)
    assert ((got - expected).abs() <= 8 * (length + n_state) * ROUNDING * size).all()


def test_numba_softplus_is_accurate_from_tiny_to_large():
    delta = torch.linspace(-80, 80, 4001)[None, :, None]  # one step: y = Δ
    one = torch.ones(1, 1, 1)
    A, u = -torch.ones(4001, 1), torch.ones_like(delta)
    got = selective_scan(u, delta, A, one, one, delta_softplus=True, backend="numba")
    expected = torch.nn.functional.softplus(delta.double(), threshold=1000)
    # e**-|x| inherits |x| roundings from its argument, where it matters (x < 0); ten more for the series.
    allowed = ROUNDING * (10 + delta.double().clamp(max=0).abs())
    assert ((got.double() / expected - 1).abs() <= allowed).all()


def test_numba_exponential_is_accurate_where_it_is_not_denormal():
    exponent = torch.linspace(-86, 86, 4001)  # two steps, the second without input: y_2 = exp(A)
    u = torch.tensor([1.0, 0.0]).expand(1, 4001, 2)
    one = torch.ones(1, 1, 2)
    got = selective_scan(u, torch.ones_like(u), exponent[:, None], one, one, backend="numba")[0, :, 1]
    relative = (got.double() / exponent.double().exp() - 1).abs()
    assert (relative <= ROUNDING * (4 + 2 * exponent.double().abs())).all()  # A log2(e) is rounded, then used


@pytest.mark.parametrize("backend", BACKENDS)
def test_decay_beyond_float32_forgets_and_nan_stays_visible(backend):
    u = torch.ones(2, 3, 40)
    u[1, 2, 20] = torch.nan
    one = torch.ones(2, 1, 40)
    y = selective_scan(u, torch.ones_like(u), torch.full((3, 1), -1e4), one, one, backend=backend)
    assert torch.equal(y[0], torch.ones(3, 40))  # exp(-10,000) is 0, not NaN
    assert torch.equal(y[1].isnan().any(0), torch.arange(40) >= 20)
    assert not y[1, :2].isnan().any()


def test_numba_does_not_depend_on_the_number_of_threads():
    x = case(70, channels=200, batch=5)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(differentiate(x, "numba", torch.float32, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


def test_numba_from_several_threads_at_once():
    cases = [case(50, seed=seed) for seed in range(6)]
    expected = [differentiate(x, "numba", torch.float32, True)["A"] for x in cases]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda x: differentiate(x, "numba", torch.float32, True)["A"], cases))
    assert all(map(torch.equal, got, expected))


def _scan_in_child(x, expected):
    torch.set_num_threads(2)
    sys.exit(0 if torch.equal(selective_scan(**x, backend="numba"), expected) else 3)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_numba_after_a_fork():
    x = {name: value.float() for name, value in case(40, batch=4, full=False).items()}
    expected = selective_scan(**x, backend="numba")
    child = multiprocessing.get_context("fork").Process(target=_scan_in_child, args=(x, expected))
    child.start()
    child.join(60)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the child hangs"
    assert child.exitcode == 0


def test_automatic_choice():
    def bits(backend, **changes):
        return selective_scan(**{k: v.float() for k, v in case(40, full=False).items()} | changes, backend=backend)

    assert torch.equal(bits("auto"), bits("numba"))
    constant = {"B": torch.ones(9, 5)}
    assert torch.equal(bits("auto", **constant), bits("torch", **constant))
    double = case(40, full=False)
    assert torch.equal(selective_scan(**double), selective_scan(**double, backend="torch"))


def test_numba_is_loaded_only_when_used():
    code = "import sys, adbook.scan, adbook.mamba, adbook.transformer; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, r"'cuda' is unknown; choose one of auto, reference, torch, numba"),
        ({"A": torch.zeros(9, 5, dtype=torch.complex64)}, "A is complex"),
        ({"A": torch.zeros(8, 5)}, r"A has shape \(8, 5\); u's 9 channels need \(9, states\)"),
        ({"u": torch.zeros(2, 9, 0)}, "three non-empty axes"),
        ({"delta": torch.zeros(2, 9, 11)}, r"delta has shape \(2, 9, 11\).*need \(2, 9, 12\)"),
        ({"B": torch.zeros(2, 12, 5)}, r"B has shape \(2, 12, 5\).*\(2, 5, 12\)"),
        ({"C": torch.zeros(2, 2, 5, 12)}, r"C has shape.*G dividing 9"),
        ({"D": torch.zeros(5)}, r"D has shape \(5,\).*need \(9,\)"),
        ({"u": torch.zeros(2, 9, 12, dtype=torch.float64), "backend": "numba"}, "float64; use 'auto' or 'torch'"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, message):
    arguments = {name: x.float() for name, x in case(12).items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments | change)
