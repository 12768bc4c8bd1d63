"""Mamba: official names and initialisation, and the compiled path against the plain one in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from adbook.bench import _with_scan
from adbook.mamba import Mamba, MambaBlock, MambaConfig
from adbook.scan import selective_scan

ROUNDING = 2.0**-24  # of float32: the relative error of one operation


def block(seed=0, **changes):
    torch.manual_seed(seed)
    return MambaBlock(MambaConfig(**changes))


def test_names_and_shapes_are_the_official_ones():
    shapes = {name: tuple(x.shape) for name, x in block(d_model=40, d_state=7, d_conv=3).state_dict().items()}
    inner, rank = 80, 3  # 2 × 40, and 40 / 16 rounded up
    assert shapes == {
        "A_log": (inner, 7),
        "D": (inner,),
        "in_proj.weight": (2 * inner, 40),
        "conv1d.weight": (inner, 1, 3),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * 7, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (40, inner),
    }


def test_initial_state_matrix_and_skip():
    fresh = block(d_state=16)
    expected = -torch.arange(1.0, 17).expand(128, 16)
    torch.testing.assert_close(-fresh.A_log.exp(), expected, rtol=8 * ROUNDING, atol=0)  # log, exp, |log 16| < 3
    assert torch.equal(fresh.D, torch.ones(128))


def test_initial_step_sizes_are_log_uniform():
    fresh = block(d_model=2048, dt_min=1e-3, dt_max=0.1)
    delta = F.softplus(fresh.dt_proj.bias.double())
    # The bias is about log Δ, at most 7 in size; its rounding moves Δ by as much relative to Δ.
    assert delta.min() >= 1e-3 * (1 - 16 * ROUNDING)
    assert delta.max() <= 0.1 * (1 + 16 * ROUNDING)
    place = (delta.log() - math.log(1e-3)) / math.log(100)  # uniform in [0, 1]
    quartiles = torch.quantile(place, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    deviation = 0.5 / math.sqrt(4096)  # of a median of 4096 numbers, the largest of the three
    torch.testing.assert_close(quartiles, torch.tensor([0.25, 0.5, 0.75]).double(), atol=5 * deviation, rtol=0)
    limit = 128**-0.5  # R = 2048 / 16
    assert 0.99 * limit < fresh.dt_proj.weight.abs().max() <= limit


def test_initial_step_sizes_have_a_floor():
    fresh = block(dt_min=1e-6, dt_max=1e-6)
    torch.testing.assert_close(F.softplus(fresh.dt_proj.bias), torch.full((128,), 1e-4), rtol=32 * ROUNDING, atol=0)


@pytest.mark.parametrize("n_layers", [1, 9])
def test_residual_branches_start_smaller_in_deeper_stacks(n_layers):
    model = Mamba(MambaConfig(n_layers=n_layers))
    limit = 128**-0.5 / math.sqrt(n_layers)  # torch's uniform limit for 128 inputs, then 1 / √n_layers
    for layer in model.layers:
        assert 0.99 * limit < layer.mixer.out_proj.weight.abs().max() <= limit * (1 + 2 * ROUNDING)


def differentiate(model, tokens, weighting):
    tokens = tokens.clone().requires_grad_()
    out = model(tokens)
    names = ["tokens", *(name for name, _ in model.named_parameters())]
    gradients = torch.autograd.grad((out * weighting).sum(), [tokens, *model.parameters()])
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize(
    ("batch", "length", "changes"),
    [
        (3, 70, {}),
        (20, 100, {"d_model": 32}),  # two pieces of the batch
        (1, 33, {"d_model": 24, "d_state": 5}),
        (2, 40, {"d_model": 80, "expand": 3, "dt_rank": 1}),  # 240 channels: two blocks
        (2, 2, {"d_model": 16, "d_conv": 4}),  # shorter than the convolution
        (2, 35, {"d_model": 16, "d_conv": 1, "d_state": 1}),
    ],
)
def test_the_compiled_path_agrees_with_the_plain_one_in_float64(batch, length, changes):
    torch.manual_seed(0)
    model = Mamba(MambaConfig(n_layers=2, **changes))
    with torch.no_grad():
        for parameter in model.parameters():  # away from the ones and zeros of the initialisation
            parameter += 0.1 * torch.randn_like(parameter) * parameter.abs().mean()
    tokens, weighting = torch.randn(2, batch, length, model.config.d_model)
    got = differentiate(model, tokens, weighting)
    expected = differentiate(model.double(), tokens.double(), weighting.double())
    # Rounding errors add up over the longest sums, those over all tokens in the gradients of weights; errors are of
    # random sign, so the square root of their number counts, and some forty operations lie on the way.
    tolerance = 40 * ROUNDING * math.sqrt(batch * length)
    for name, x in expected.items():
        assert (got[name] - x).abs().max() <= tolerance * x.abs().max(), name


def test_the_benchmark_really_replaces_the_scan():
    lengths = []

    def counting(u, *arguments, **options):
        lengths.append(u.shape[2])
        return selective_scan(u, *arguments, **options)

    torch.manual_seed(0)
    model = Mamba(MambaConfig(d_model=16, n_layers=3))
    tokens = torch.randn(2, 20, 16)
    expected = model(tokens)
    torch.testing.assert_close(_with_scan(model, counting)(tokens), expected, rtol=1e-5, atol=1e-5)
    assert lengths == [20, 20, 20]


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    model = Mamba(MambaConfig(d_model=16, n_layers=2))
    tokens, weighting = torch.randn(2, 12, 300, 16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(differentiate(model, tokens, weighting))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_step_is_differentiable_and_the_same_with_and_without_gradients():
    model = Mamba(MambaConfig(d_model=16, n_layers=1))
    tokens = torch.randn(5, 3, 16)
    outputs = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            state = model.init_state(3)
            for token in tokens:
                out, state = model.step(token, state)
            outputs.append(out)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    outputs[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_step_leaves_the_old_state_alone():
    model = Mamba(MambaConfig(d_model=16, n_layers=1))
    with torch.inference_mode():
        _, state = model.step(torch.randn(2, 16), model.init_state(2))
        kept = [x.clone() for x in state[0]]
        first, _ = model.step(torch.ones(2, 16), state)
        second, _ = model.step(torch.ones(2, 16), state)
    assert all(map(torch.equal, kept, state[0]))
    assert torch.equal(first, second)


def test_narrow_and_wide_weights_take_the_plain_path():
    model = Mamba(MambaConfig(d_model=16, n_layers=1))
    tokens = torch.randn(2, 20, 16)
    expected = model(tokens)
    assert model.double()(tokens.double()).dtype == torch.float64
    got = model.bfloat16()(tokens.bfloat16())
    assert got.dtype == torch.bfloat16
    # about 20 roundings to 8 bits lie on the way from tokens to outputs of size 1
    assert (got.float() - expected).abs().max() < 20 * 2.0**-8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model=0 must be a whole number of at least 1"),
        ({"n_layers": 2.0}, "n_layers=2.0 must be a whole number"),
        ({"d_conv": True}, "d_conv=True must be a whole number"),
        ({"dt_rank": -1}, "dt_rank=-1 must be"),
        ({"dt_min": 0.2}, "dt_min=0.2 must not be more than dt_max=0.1"),
        ({"dt_init_floor": "x"}, "dt_init_floor='x' must be a positive number"),
    ],
)
def test_a_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        MambaConfig(**changes)


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 0, 16), (0, 5, 16), (5, 16)])
def test_tokens_of_another_shape_are_refused_before_memory_is_touched(shape):
    model = Mamba(MambaConfig(d_model=16, n_layers=1))
    for takes in (model, model.layers[0].mixer):
        with pytest.raises(ValueError, match=r"tokens have shape .*needed is \(batch, length, 16\)"):
            takes(torch.randn(shape))


def test_a_foreign_state_is_refused():
    model, other = (Mamba(MambaConfig(d_model=16, n_layers=1, d_state=n)) for n in (16, 64))
    for state in (other.init_state(2), model.init_state(3)):
        with torch.no_grad(), pytest.raises(ValueError, match=r"state has shapes .*use init_state\(2\)"):
            model.step(torch.randn(2, 16), state)
