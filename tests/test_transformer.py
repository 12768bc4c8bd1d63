"""The contract that both backbones share, and the transformer's window and positions."""

import pytest
import torch

from adbook.mamba import Mamba, MambaConfig
from adbook.transformer import Transformer, TransformerConfig

MODELS = {
    "mamba": lambda: Mamba(MambaConfig(d_model=32, n_layers=2, d_state=8)),
    "transformer": lambda: Transformer(TransformerConfig(d_model=32, n_layers=2, n_heads=2, context=40)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def repeat_step(model, tokens):
    """Outputs (B, L, E) and the last state of stepping through tokens (B, L, E)."""
    state, outputs = model.init_state(tokens.shape[0]), []
    for token in tokens.unbind(1):
        output, state = model.step(token, state)
        outputs.append(output)
    return torch.stack(outputs, 1), state


def numbers_in(state):
    """How many numbers a state holds, however it nests."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    parts = state if isinstance(state, tuple) else vars(state).values() if hasattr(state, "__dict__") else ()
    return sum(numbers_in(part) for part in parts)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])  # across the scan's blocks of 32 and the window of 40
def test_forward_equals_repeated_step(model, length):
    tokens = torch.randn(3, length, 32)
    with torch.inference_mode():
        expected = model(tokens)
        got, _ = repeat_step(model, tokens)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_forward_equals_repeated_step_in_float64(model):
    model, tokens = model.double(), torch.randn(2, 90, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(tokens)
        assert (repeat_step(model, tokens)[0] - expected).abs().max() < 1e-13 * expected.abs().max()


@pytest.mark.parametrize("length", [1, 3, 33, 40, 41, 100])  # below and above the convolution's 4, and the window of 40
def test_prefill_is_forward_and_leads_where_steps_lead(model, length):
    model, tokens = model.double(), torch.randn(2, length + 50, 32, dtype=torch.float64)
    with torch.inference_mode():
        expected, _ = repeat_step(model, tokens)
        first, state = model.prefill(tokens[:, :length])
        assert (first - expected[:, :length]).abs().max() < 1e-12 * expected.abs().max()
        for t in range(length, length + 50):
            output, state = model.step(tokens[:, t], state)
            assert (output - expected[:, t]).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("changed", [0, 37, 89])
def test_no_output_depends_on_later_tokens(model, changed):
    tokens = torch.randn(2, 90, 32)
    other = tokens.clone()
    other[:, changed:] = torch.randn(32)
    with torch.inference_mode():
        before, after = model(tokens), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


def test_sequences_of_a_batch_do_not_mix(model):
    tokens = torch.randn(4, 50, 32)
    with torch.inference_mode():
        expected = model(tokens)
        assert (model(tokens[2:3]) - expected[2:3]).abs().max() < 1e-5 * expected.abs().max()
        stepped = repeat_step(model, tokens[2:3])[0]
    assert (stepped - expected[2:3]).abs().max() < 1e-5 * expected.abs().max()


def test_every_weight_gets_a_gradient(model):
    model(torch.randn(2, 50, 32)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_the_state_does_not_grow(model):
    with torch.inference_mode():
        sizes = [numbers_in(repeat_step(model, torch.randn(2, length, 32))[1]) for length in (2, 60)]
    assert sizes[0] == sizes[1] > 0


def test_same_seed_same_weights_another_seed_others():
    def weights(make, seed):
        torch.manual_seed(seed)
        return torch.cat([parameter.flatten() for parameter in make().parameters()])

    for make in MODELS.values():
        assert torch.equal(weights(make, 1), weights(make, 1))
        assert not torch.equal(weights(make, 1), weights(make, 2))


def one_layer(context):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(d_model=16, n_layers=1, n_heads=2, context=context))


@pytest.mark.parametrize("context", [1, 7, 50])
def test_the_window_holds_exactly_context_tokens(context):
    model, tokens = one_layer(context), torch.randn(1, 60, 16)
    with torch.no_grad():
        before = model(tokens)
        tokens[:, 3] = torch.randn(16)  # not a shift, which the norm would remove
        changed = (model(tokens) - before)[0].abs().amax(-1) > 0
    assert changed.tolist() == [3 <= t < 3 + context for t in range(60)]


def test_positions_are_relative():
    model, tokens = one_layer(10), torch.randn(2, 60, 16)
    with torch.no_grad():
        late, early = model(tokens)[:, 29:], model(tokens[:, 20:])[:, 9:]  # from where both windows are full
    assert (late - early).abs().max() < 1e-5 * late.abs().max()


def test_positions_stay_exact_in_long_rollouts():
    model, tokens = one_layer(10), torch.randn(2, 25, 16)
    outputs = []
    with torch.inference_mode():
        for start in (0, 10_000_000):
            state = model.init_state(2)
            state.position = start
            for token in tokens.unbind(1):
                output, state = model.step(token, state)
            outputs.append(output)  # of a window that has been filled since the start
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5 * outputs[0].abs().max()


def test_residual_branches_start_smaller_in_deeper_stacks():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(n_layers=8))
    for layer in model.layers:
        for linear, inputs in ((layer.attention.proj, 64), (layer.mlp[-1], 256)):
            limit = inputs**-0.5 / 4  # torch's uniform limit, then 1 / √(2 × 8)
            assert 0.99 * limit < linear.weight.abs().max() <= limit * (1 + 2**-22)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 0}, "context=0 must be a whole number of at least 1"),
        ({"mlp": 1.51}, r"mlp=1.51 times d_model \(64\)"),
        ({"mlp": 0}, "mlp=0 times"),
        ({"mlp": float("nan")}, "mlp=nan times"),
        ({"mlp": "4"}, "mlp='4' times"),
        (
            {"d_model": 60, "n_heads": 8},
            r"d_model=60 must be a multiple of 2 × n_heads \(16\)",
        ),
    ],
)
def test_a_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**changes)
