"""Parity with mamba-ssm itself, on the CPU: the scan against its plain form, and weights both ways with its block.

Not collected by `make test`, since it installs mamba-ssm; `make parity` does that and runs it.
"""

import sys
import types

import pytest
import torch
from scan_cases import case

import adbook.scan
from adbook.mamba import Mamba, MambaBlock, MambaConfig
from adbook.policy import ADPolicy, PolicyConfig

sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))  # the kernel; imports want it

from mamba_ssm.models.mixer_seq_simple import MixerModel  # noqa: E402
from mamba_ssm.modules import mamba_simple  # noqa: E402
from mamba_ssm.ops import selective_scan_interface  # noqa: E402
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref  # noqa: E402

BACKENDS = ["reference", "torch", "numba"]


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    """Let mamba-ssm's block run on the CPU."""
    monkeypatch.setattr(mamba_simple, "selective_scan_fn", selective_scan_ref)
    monkeypatch.setattr(mamba_simple, "selective_state_update", None)


def official_tolerances(dtype, gated):
    """Relative and absolute, of each result: those of the function's own test.

    tests/ops/test_selective_scan.py in mamba's repository at v2.3.2.
    """
    rtol, atol = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}[dtype]
    rtolw, atolw = (max(1e-3, rtol), max(1e-3, atol)) if gated else (1e-3, 1e-3)
    return {
        "out": (rtol, atol),
        "last": (rtol, atol),
        "u": (2 * rtol, 2 * atol),
        "delta": (5 * rtol, 10 * atol),
        "A": (rtolw, 5 * atolw),
        "varying": (rtol, atol),  # B and C
        "constant": (rtolw, atolw),
        "D": (rtolw, atolw),
        "z": (rtolw, atolw),
        "delta_bias": (rtolw, atolw),
    }


def official_case(dtype, length, groups=1, varying=(True, True), has=("D", "z", "delta_bias")):
    """The arguments of the function's own test: 2 sequences, 4 channels, 8 states."""
    torch.manual_seed(0)
    batch, dim, n_state = 2, 4, 8

    def matrix(varies):
        shape = (batch, n_state, length) if groups == 1 else (batch, groups, n_state, length)
        return torch.randn(shape, dtype=dtype) if varies else torch.randn(dim, n_state)

    arguments = {"A": -0.5 * torch.rand(dim, n_state), "B": matrix(varying[0]), "C": matrix(varying[1])}
    optional = {
        "D": torch.randn(dim),
        "z": torch.randn(batch, dim, length, dtype=dtype),
        "delta_bias": 0.5 * torch.rand(dim),
    }
    arguments |= {name: optional[name] for name in has}
    arguments["u"] = torch.randn(batch, dim, length, dtype=dtype)
    return arguments | {"delta": 0.5 * torch.rand(batch, dim, length, dtype=dtype)}


def run(scan, arguments, dtype, softplus, **options):
    """Output, last state, and the gradients that a random gradient of the output leads to, rounded to `dtype`."""
    arguments = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    out, last = scan(**arguments, delta_softplus=softplus, return_last_state=True, **options)
    torch.manual_seed(1)
    gradients = torch.autograd.grad(out, list(arguments.values()), torch.randn(out.shape).to(dtype).to(out))
    return {"out": out.detach(), "last": last.detach(), **dict(zip(arguments, gradients, strict=True))}


def check_against_mamba_ssm(arguments, softplus):
    """Values and gradients within the tolerances of the function's own test, which is in float32.

    For narrow inputs the plain form is given the same numbers in float32: it would compute silu(z) in the narrow
    format, where the kernel, as all of ours, does so in float32.
    """
    dtype = arguments["u"].dtype
    expected = run(selective_scan_ref, {name: x.float() for name, x in arguments.items()}, dtype, softplus)
    dtypes = {name: x.dtype for name, x in arguments.items()} | {"out": dtype, "last": torch.float32}
    allowed = official_tolerances(dtype, "z" in arguments)
    for backend in BACKENDS:
        got = run(adbook.scan.selective_scan, arguments, dtype, softplus, backend=backend)
        for name, x in expected.items():
            kind = name if name in allowed else "constant" if arguments[name].dim() == 2 else "varying"
            assert got[name].dtype == dtypes[name], (backend, name)
            rtol, atol = allowed[kind]
            assert torch.allclose(got[name], x.to(dtypes[name]), rtol=rtol, atol=atol), (backend, name)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_scan_passes_the_functions_own_test(dtype, length, groups):
    check_against_mamba_ssm(official_case(dtype, length, groups), softplus=True)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("has", [(), ("D",), ("z",), ("delta_bias",)])
@pytest.mark.parametrize("varying", [(True, True), (True, False), (False, True), (False, False)])
def test_the_scan_without_what_is_optional(varying, has, softplus):
    check_against_mamba_ssm(official_case(torch.float32, 372, varying=varying, has=has), softplus)


@pytest.mark.parametrize(("b", "c"), [("step", "step"), ("group", "constant"), ("constant", "constant")])
def test_the_kernel_of_mamba_ssm_is_called_as_it_wants(b, c, monkeypatch):
    """Here with its plain form in the kernel's place."""
    dtypes = []

    def kernel(u, delta, A, B, C, D, z, delta_bias, softplus, return_last_state):
        dtypes.append([x.dtype for x in (u, delta, A, B, C, D, z, delta_bias)])
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, softplus, return_last_state)

    monkeypatch.setattr(selective_scan_interface, "selective_scan_fn", kernel)
    monkeypatch.setattr(adbook.scan, "_reason_against", lambda *_: None)
    x = {name: value.bfloat16() for name, value in case(40, b=b, c=c).items()} | {"A": case(40)["A"].float()}
    out, last = adbook.scan.selective_scan(**x, delta_softplus=True, return_last_state=True, backend="mamba_ssm")
    expected, state = adbook.scan.selective_scan(**x, delta_softplus=True, return_last_state=True, backend="torch")
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())  # two roundings
    torch.testing.assert_close(last, state, rtol=1e-5, atol=1e-5)
    narrow, wide = torch.bfloat16, torch.float32
    maps = [wide if form == "constant" else narrow for form in (b, c)]
    assert dtypes == [[narrow, narrow, wide, *maps, wide, narrow, wide]]


def perturbed(model):
    """Away from the ones and zeros of the initialisation, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.abs().mean()
    return model


def assert_same_function(ours, theirs):
    tokens, weighting = torch.randn(2, 2, 50, ours.config.d_model)
    results = []
    for block in (ours, theirs):
        x = tokens.clone().requires_grad_()
        out = block(x)
        gradients = torch.autograd.grad((out * weighting).sum(), [x, *(block.get_parameter(n) for n in names(ours))])
        results.append([out, *gradients])
    for got, expected in zip(*results, strict=True):
        # float32 on both sides: some forty operations, and sums over 100 tokens, whose errors have random signs
        assert (got - expected).abs().max() <= 2 * 40 * 10 * 2**-24 * expected.abs().max()


def names(block):
    return [name for name, _ in block.named_parameters()]


def test_weights_of_a_policy_go_to_mamba_ssm_and_back():
    torch.manual_seed(0)
    policy = perturbed(ADPolicy(PolicyConfig(8, 2, backbone=MambaConfig(d_model=32, n_layers=2, d_state=8, d_conv=3))))
    for layer in policy.backbone.layers:
        theirs = mamba_simple.Mamba(d_model=32, d_state=8, d_conv=3, use_fast_path=False)
        theirs.load_state_dict(layer.mixer.state_dict(), strict=True)
        assert_same_function(layer.mixer, theirs)
        perturbed(theirs)
        layer.mixer.load_state_dict(theirs.state_dict(), strict=True)
        assert_same_function(layer.mixer, theirs)


def test_names_of_the_whole_stack_are_those_of_mamba_ssm():
    config = MambaConfig(d_model=32, n_layers=3)
    theirs = MixerModel(32, n_layer=3, d_intermediate=0, vocab_size=2, rms_norm=True, fused_add_norm=False)
    expected = {name: x.shape for name, x in theirs.state_dict().items() if name != "embedding.weight"}
    assert {name: x.shape for name, x in Mamba(config).state_dict().items()} == expected


def test_steps_are_those_of_mamba_ssm():
    torch.manual_seed(0)
    ours, theirs = MambaBlock(MambaConfig(d_model=32)), mamba_simple.Mamba(d_model=32, use_fast_path=False)
    theirs.load_state_dict(perturbed(ours).state_dict(), strict=True)
    conv, ssm = theirs.allocate_inference_cache(3, 1)
    state = ours.init_state(3)
    with torch.no_grad():
        for token in torch.randn(60, 3, 32):
            got, state = ours.step(token, state)
            expected, conv, ssm = theirs.step(token[:, None], conv, ssm)
            assert (got - expected[:, 0]).abs().max() <= 2 * 40 * 10 * 2**-24 * expected.abs().max()
    torch.testing.assert_close(state.ssm, ssm, rtol=1e-4, atol=1e-5)
    assert torch.equal(state.conv, conv) or (state.conv - conv).abs().max() < 1e-5
