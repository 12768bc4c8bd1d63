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
from scan_cases import ROUNDING, assert_close, case, differentiate, longest_sum

import adbook.scan
from adbook.scan import backends, selective_scan

BACKENDS = ["reference", "torch", "numba"]  # those of a CPU; the others: test_scan_triton.py, tests/parity


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
    x = case(
        length=34, channels=3, n_state=2, batch=1, b=b, c=c, initial=True
    )  # one step past the 32 of a block, twice

    def scan(*tensors):
        arguments = dict(zip(x, tensors, strict=True))
        return selective_scan(**arguments, delta_softplus=True, return_last_state=True, backend=backend)

    assert torch.autograd.gradcheck(scan, [v.clone().requires_grad_() for v in x.values()], fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [True, False], ids=["full", "bare"])
@pytest.mark.parametrize(("b", "c"), [("step", "step"), ("group", "step"), ("constant", "step"), ("group", "constant")])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_backends_agree_with_the_float64_reference(backend, full, b, c, length):
    x = case(length, b=b, c=c, full=full, initial=full)
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
def test_a_scan_in_pieces_is_the_whole_scan(backend):
    x = case(70, initial=True)
    whole = differentiate(x, "reference", torch.float64)
    cuts = [(0, 1), (1, 33), (33, 70)]

    def in_pieces(**arguments):
        state, outs = arguments.pop("initial_state"), []
        for lo, hi in cuts:
            piece = {name: v[..., lo:hi] if v.shape[-1] == 70 else v for name, v in arguments.items()}
            out, state = selective_scan(
                **piece, delta_softplus=True, return_last_state=True, backend=backend, initial_state=state
            )
            outs.append(out)
        return torch.cat(outs, -1), state

    assert_close(differentiate(x, in_pieces, torch.float32), whole, longest_sum(x) * ROUNDING)


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


def laid_out(x, order, gap):
    """The same numbers, with the axes in memory in another order, and every number followed by `gap` others."""
    order = sorted(range(x.dim()), key=lambda axis: order[axis])
    room = torch.zeros(*[x.shape[axis] for axis in order], 1 + gap, dtype=x.dtype)
    room[..., 0] = x.permute(order)
    return room[..., 0].permute([order.index(axis) for axis in range(x.dim())])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3)),
    forms=st.tuples(*[st.sampled_from(["step", "group", "constant"])] * 2),
    order=st.permutations(range(4)),
    gap=st.integers(0, 1),
    full=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    backend=st.sampled_from(["torch", "numba"]),
)
def test_gradients_for_any_shape_stride_and_dtype(shape, forms, order, gap, full, dtype, backend):
    length, thirds, n_state, batch = shape
    x = {k: v.to(dtype) for k, v in case(length, 3 * thirds, n_state, batch, *forms, full=full, initial=full).items()}
    expected = differentiate(x, "reference", torch.float64, full)
    got = differentiate({k: laid_out(v, order, gap) for k, v in x.items()}, backend, softplus=full)
    assert {v.dtype for k, v in got.items() if k != "last"} == {dtype}
    # Some forty roundings lie on the way to each number, and then those of the sums; the incoming gradients are
    # rounded to `dtype` as the results are.
    assert_close(
        got, expected, (40 + longest_sum(x)) * ROUNDING if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    )


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


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("channels", [1, 6])
def test_numba_takes_any_mixture_of_memory_orders(length, channels):
    x = {name: value.float() for name, value in case(length, channels, batch=2).items()}
    expected = differentiate(x, "numba")
    for rows in itertools.product([False, True], repeat=3):
        mixed = dict(x)
        for name, in_rows in zip(("u", "delta", "z"), rows, strict=True):
            mixed[name] = laid_out(x[name], (0, 2, 1) if in_rows else (0, 1, 2), gap=0)
        both = torch.stack([mixed["u"], mixed["z"]], 1).flatten(1, 2)
        mixed["u"], mixed["z"] = both.chunk(2, 1)  # views of one tensor, as in a Mamba block
        assert_close(differentiate(mixed, "numba"), expected, longest_sum(x) * ROUNDING)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [True, False])
def test_results_can_be_changed_in_place(backend, full):
    x = {name: value.float().requires_grad_() for name, value in case(40, full=full).items()}

    def results(change):
        out, last = selective_scan(**x, delta_softplus=full, return_last_state=True, backend=backend)
        out = out.mul_(2) if change else out * 2
        if backend != "reference":  # there it is what autograd keeps of the last step
            last = last.add_(1) if change else last + 1
        return [out, last, *torch.autograd.grad(out.sum() + last.square().sum(), list(x.values()))]

    assert all(map(torch.equal, results(True), results(False)))


def test_defaults_of_torch_do_not_matter():
    x = {name: value.float() for name, value in case(40).items()}
    expected = differentiate(x, "numba")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            out, last = selective_scan(**x, delta_softplus=True, return_last_state=True, backend="numba")
    finally:
        torch.set_default_dtype(before)
    assert out.dtype == last.dtype == torch.float32
    assert torch.equal(out, expected["out"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_narrow_the_backward_pass(backend):
    x = case(40)
    expected = differentiate(x, "reference", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = differentiate(x, backend, torch.float32)
    assert_close(got, expected, longest_sum(x) * ROUNDING)


class _Scans(torch.utils.data.Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return selective_scan(**self.x, backend="numba") + i


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_numba_in_the_workers_of_a_data_loader():
    x = {name: value.float() for name, value in case(40, batch=4, full=False).items()}
    expected = selective_scan(**x, backend="numba")  # starts this process' own threads
    loader = torch.utils.data.DataLoader(_Scans(x), batch_size=None, num_workers=2, timeout=60)
    for i, got in enumerate(loader):
        assert torch.equal(got, expected + i)


def test_automatic_choice():
    def bits(backend, **changes):
        return selective_scan(**{k: v.float() for k, v in case(40, full=False).items()} | changes, backend=backend)

    assert torch.equal(bits("auto"), bits("numba"))
    constant = {"B": torch.ones(9, 5)}
    assert torch.equal(bits("auto", **constant), bits("torch", **constant))
    double = case(40, full=False)
    assert torch.equal(selective_scan(**double), selective_scan(**double, backend="torch"))


def test_backends_say_why_they_cannot_be_used(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(adbook.scan, "_is_installed", lambda module: module == "mamba_ssm")
    reasons = backends()
    assert list(reasons) == ["reference", "torch", "numba", "triton", "mamba_ssm"]
    assert reasons["reference"] is reasons["torch"] is None
    assert reasons["numba"] == "numba is not installed"
    assert "triton is not installed" in reasons["triton"]
    assert "without its Mamba-1 kernel" in reasons["mamba_ssm"]
    assert selective_scan(**{k: v.float() for k, v in case(3).items()}).shape == (2, 9, 3)  # auto takes "torch"
    monkeypatch.setattr(adbook.scan, "_is_installed", lambda module: True)
    assert [("no GPU" in str(backends()[name])) for name in ("numba", "triton", "mamba_ssm")] == [False, True, True]


def test_numba_is_loaded_only_when_used():
    code = "import sys, adbook.scan, adbook.mamba, adbook.transformer; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backend": "cuda"},
            r"unknown backend 'cuda'; choose one of auto, reference, torch, numba, triton, mamba_ssm",
        ),
        ({"A": torch.zeros(9, 5, dtype=torch.complex64)}, "A is complex; only real numbers are supported"),
        ({"B": torch.zeros(2, 5, 12, dtype=torch.complex64)}, "B is complex"),
        ({"u": torch.zeros(2, 9, 12, dtype=torch.int64)}, r"u has dtype torch.int64; .*use u.float\(\)"),
        ({"z": torch.zeros(2, 9, 12, device="meta")}, "z is on meta and u on cpu; move all tensors to one device"),
        ({"initial_state": torch.zeros(2, 5, 9)}, r"initial_state has shape \(2, 5, 9\); u and A need \(2, 9, 5\)"),
        ({"C": None}, "C is of type NoneType; an ordinary .* torch.Tensor is needed"),
        ({"D": 1.0}, "D is of type float"),
        ({"u": torch.zeros(2, 9, 12).to_sparse()}, "u is a torch.sparse_coo tensor"),
        ({"backend": "mamba_ssm"}, "it runs on the GPU and the tensors are on cpu; use 'auto' or 'torch'"),
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
