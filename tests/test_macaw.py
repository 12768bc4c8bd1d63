"""MACAW piece by piece: returns, weights, generated layers, inner step, outer gradient, and adaptation at play."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad

import adbook
from adbook.baselines import macaw
from adbook.baselines.macaw import MACAW, GeneratedLayers, MACAWConfig, Transitions
from adbook.baselines.macaw_adaptation import AdaptingMACAW
from adbook.stored import save_module

TINY = MACAWConfig(3, 2, hidden=(5, 4), latent=3, batch=6, tasks=2, updates=2)


@pytest.fixture
def model():
    return MACAW(TINY).double()


@pytest.fixture
def batch():
    return some(8, torch.Generator().manual_seed(1))


def some(n, generator):
    sizes = (n, TINY.observation_size), (n, TINY.action_size), (n,), (n,)
    drawn = (torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes)
    return Transitions(*(x.tanh() for x in drawn))


def test_returns_are_discounted_from_each_step_to_the_end():
    np.testing.assert_allclose(macaw.returns_to_come(np.array([1.0, 2.0, 4.0]), 0.5), [3.0, 4.0, 4.0])


def test_transitions_start_anew_with_every_episode():
    history = adbook.load_histories("reacher-goal", split="test")[0]
    seen = macaw.transitions([history, history], 1.0)
    starts = [e.start for e in history.episodes]
    np.testing.assert_allclose(seen.returns[starts], history.episode_returns, rtol=1e-4)
    np.testing.assert_array_equal(seen.steps[:51], [*range(50), 0])
    assert len(seen.returns) == 2 * len(history.rewards)


def test_losses_of_the_policy_by_hand(batch):
    """Two transitions, standardised to ±√½: weights e^-√½, and e^√½ = 2.03, clipped at 1.5."""
    model = MACAW(replace(TINY, max_weight=1.5)).double()
    two = Transitions(*(x[:2] for x in batch))
    advantages = torch.tensor([0.5, 9.0], dtype=torch.float64)
    first, second, mean, hidden, last = layers = model.policy()
    features = macaw.mlp([first, second], two.observations).relu()
    errors = two.actions - macaw.mlp([mean], features).tanh()
    guessed = macaw.mlp([hidden, last], torch.cat((features, two.actions), 1))
    regression, guess = model.policy_losses(layers, advantages, two)
    squares = (errors**2).sum(1) / (2 * 0.2**2)
    torch.testing.assert_close(regression, (math.exp(-math.sqrt(0.5)) * squares[0] + 1.5 * squares[1]) / 2)
    torch.testing.assert_close(guess, ((guessed[0, 0] - 0.5) ** 2 + (guessed[1, 0] - 9) ** 2) / 2)


def test_generated_layers_are_linear_in_latent_and_generator_and_start_as_linear_layers_do():
    net = GeneratedLayers([(300, 200)], latent=32, generator=torch.Generator().manual_seed(0))
    (layer,) = net()
    weight, bias = layer[:, :-1], layer[:, -1]
    assert weight.shape == (200, 300)
    assert weight.var().item() == pytest.approx(1 / (3 * 300), rel=0.5)  # of 32 latent numbers, whose spread is 25 %
    given = torch.randn(4, 300)
    torch.testing.assert_close(macaw.mlp(net(), given), given @ weight.T + bias)
    small = GeneratedLayers([(3, 2)], latent=4, generator=torch.Generator().manual_seed(0)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    names = [name for name, _ in small.named_parameters()]

    def outputs(*values):
        return macaw.mlp(functional_call(small, dict(zip(names, values, strict=True)), ()), inputs)

    assert torch.autograd.gradcheck(outputs, tuple(small.parameters()))


def test_a_step_is_that_of_every_latent_and_generator_at_its_own_rate():
    """Against gradients by the parameters; weights change in more than the one direction of a plain layer."""
    net = GeneratedLayers([(6, 6), (6, 2)], latent=6, generator=torch.Generator().manual_seed(0)).double()
    rates = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)  # of generators and latents
    x = torch.randn(1, 6, dtype=torch.float64)

    def loss(layers):
        return (macaw.mlp(layers, x) - 1).square().sum()

    before = [layer.detach() for layer in net()]
    after = net.stepped(before, grad(loss)(before), rates)
    loss(net()).backward()
    with torch.no_grad():
        for kind, parameters in enumerate((net.generators, net.latents)):
            for rate, parameter in zip(rates[kind], parameters, strict=True):
                parameter -= rate * parameter.grad
    for one, other in zip(after, net(), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.linalg.matrix_rank((after[0] - before[0])[:, :-1], rtol=1e-6) > 1


def test_the_inner_step_goes_down_the_numerical_gradient(model, batch):
    """By the weights of each layer, of which the step is made."""
    value, policy = model.adapted(batch)
    advantages = model.advantages(value, batch).detach()

    def inner_loss(layers):
        regression, guess = model.policy_losses(layers, advantages, batch)
        return regression + TINY.advantage * guess

    losses = (model.value, value, lambda layers: model.value_loss(layers, batch)), (model.policy, policy, inner_loss)
    rates = torch.full((2, 5), TINY.inner_rate, dtype=torch.float64)
    for net, adapted, loss in losses:
        layers = [layer.detach() for layer in net()]
        slopes = [torch.zeros_like(layer) for layer in layers]
        for i, layer in enumerate(layers):
            for at in np.ndindex(*layer.shape):
                slopes[i][at] = numerical(
                    lambda x, i=i, f=loss, w=layers: f([*w[:i], x, *w[i + 1 :]]).item(), layer, at
                )
        for one, other in zip(adapted, net.stepped(layers, slopes, rates), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def numerical(function, point, at, h=1e-5):
    """Central difference along one coordinate; its error is of order h²."""
    step = torch.zeros_like(point)
    step[at] = h
    return (function(point + step) - function(point - step)) / (2 * h)


def test_outer_gradients_pass_through_the_inner_step(model, batch):
    """Second order: against finite differences of the outer losses, also by the learned rates; none crosses over."""
    other = some(8, torch.Generator().manual_seed(2))
    wanted = [(0, model.value.latents[0]), (0, model.value_rates), (1, model.policy.latents[0])]
    wanted += [(1, model.policy.latents[-1]), (1, model.policy_rates), (1, model.policy.generators[0])]
    for which, parameter in wanted:
        losses = model.outer_losses(batch, other)
        assert torch.autograd.grad(losses[1 - which], parameter, allow_unused=True, retain_graph=True)[0] is None
        gradient = torch.autograd.grad(losses[which], parameter)[0]

        def outer(x, which=which, parameter=parameter):
            before = parameter.data
            parameter.data = x
            loss = model.outer_losses(batch, other)[which].item()
            parameter.data = before
            return loss

        at = (0,) * parameter.ndim
        assert gradient[at].item() == pytest.approx(numerical(outer, parameter.detach(), at), rel=1e-4, abs=1e-9)
        assert gradient[at] != 0


def test_inner_batches_are_stretches_or_from_everywhere_and_outer_ones_from_the_rest_of_the_task():
    numbers = [torch.arange(100.0 * i, 100 * i + 14) for i in range(3)]
    tasks = [Transitions(x.unsqueeze(1), x.unsqueeze(1), x, x) for x in numbers]
    rng, share = np.random.default_rng(0), {}
    for stretches in (0, 0.5, 1):
        stretched = []
        for _ in range(100):
            inner, outer = macaw._batches(tasks, replace(TINY, stretches=stretches), rng)
            for one, other in zip(inner.returns, outer.returns, strict=True):
                stretched.append(torch.equal(one, one[0] + torch.arange(6)))
                assert len({*one.tolist(), *other.tolist()}) == 12
                assert len({x // 100 for x in (*one.tolist(), *other.tolist())}) == 1
        share[stretches] = np.mean(stretched)
    assert (share[0], share[1]) == (0, 1)
    assert 0.35 < share[0.5] < 0.65  # of 200, four standard deviations


@pytest.fixture(scope="module")
def opposite():
    """Two tasks that want opposite actions: no policy suits both, an adapted one suits its own."""
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for sign in (-1, 1):
        actions = torch.rand(400, 1, generator=generator) * 2 - 1
        returns = -4 * (actions[:, 0] - 0.8 * sign).abs()
        tasks.append(Transitions(torch.randn(400, 2, generator=generator), actions, returns, torch.zeros(400)))
    trained = MACAW(MACAWConfig(2, 1, hidden=(32, 32), latent=8, batch=64, updates=200, learning_rate=3e-3))
    return trained, tasks, macaw.meta_train(trained, tasks, progress=False)[0]


def test_meta_training_makes_one_step_enough(opposite):
    trained, tasks, losses = opposite
    assert losses[-20:, 1].mean() < 0.8 * losses[:20, 1].mean()
    agent = AdaptingMACAW(trained, [Transitions(*(x[:64] for x in task)) for task in tasks])
    actions, _ = agent.act(torch.zeros(2, 2), None, torch.ones(2, dtype=bool), agent.init_state(2), deterministic=True)
    assert actions[0] < -0.4
    assert actions[1] > 0.4


def test_it_adapts_to_what_it_has_tried_itself(opposite):
    """Steps of one transition each; the means alone would hold no other action to learn from, so it is noisy first."""
    agent, generator = AdaptingMACAW(opposite[0]), torch.Generator().manual_seed(0)
    state, reward, start = agent.init_state(2), None, torch.ones(2, dtype=bool)
    taken = []
    for _ in range(70):
        action, state = agent.act(
            torch.randn(2, 2, generator=generator), reward, start, state, deterministic=True, generator=generator
        )
        taken.append(action)
        reward = -4 * (action[:, 0] - torch.tensor([-0.8, 0.8])).abs()
    before, after = torch.stack(taken[:64]), torch.stack(taken[64:])
    assert before.std(0).min() > 0.1
    assert after[:, 1].mean() > before[:, 1].mean() + 0.1  # before the step both play what suits the first


@pytest.fixture
def three_tasks():
    return [Transitions(*(x.float() for x in some(20, torch.Generator().manual_seed(i)))) for i in range(3)]


def test_meta_training_repeats_itself_and_follows_the_seed(three_tasks):
    first, again, other = (
        macaw.meta_train(MACAW(replace(TINY, seed=seed)), three_tasks, progress=False)[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_meta_training_that_was_killed_goes_on_to_the_same_result(three_tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(macaw, "CHECKPOINT_EVERY", 3)
    config, checkpoint = replace(TINY, updates=8), tmp_path / "macaw.training"
    whole, killed, resumed = (MACAW(config) for _ in range(3))
    losses, _ = macaw.meta_train(whole, three_tasks, progress=False)
    batches, left = macaw._batches, iter(range(7))

    def interrupted(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return batches(*args)

    monkeypatch.setattr(macaw, "_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        macaw.meta_train(killed, three_tasks, checkpoint=checkpoint, progress=False)
    monkeypatch.setattr(macaw, "_batches", batches)
    np.testing.assert_array_equal(
        macaw.meta_train(resumed, three_tasks, checkpoint=checkpoint, progress=False)[0], losses
    )
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"macaw\.training is a checkpoint of another"):
        macaw.meta_train(MACAW(config), three_tasks[:2], checkpoint=checkpoint, progress=False)


def test_too_few_transitions_are_refused(batch):
    with pytest.raises(ValueError, match=r"tasks \[0\] have fewer transitions; each needs 2 \* batch = 12"):
        macaw.meta_train(MACAW(TINY), [batch], progress=False)


def with_nan(x):
    return x.index_fill(0, torch.tensor(3), math.nan)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("returns", lambda x: x[:, None], r"returns of \w+ 0 are of shape \(20, 1\); they must be"),
        ("observations", lambda x: x[:, 1:], r"observations of \w+ 0 are of shape \(20, 2\); they must be \(20, 3\)"),
        ("actions", lambda x: x[1:], r"actions of \w+ 0 are of shape \(19, 2\); they must be \(20, 2\)"),
        ("steps", with_nan, r"steps of \w+ 0 are not all finite"),
        ("steps", list, r"\w+ 0 is Transitions, not Transitions of tensors"),
    ],
)
def test_transitions_that_are_none_are_refused(three_tasks, part, change, message):
    strange = three_tasks[0]._replace(**{part: change(getattr(three_tasks[0], part))})
    with pytest.raises(ValueError, match=message):
        macaw.meta_train(MACAW(TINY), [strange], progress=False)
    with pytest.raises(ValueError, match=message):
        AdaptingMACAW(MACAW(TINY), [strange])


def test_histories_of_two_tasks_are_not_one():
    histories = adbook.load_histories("reacher-goal", split="test")
    with pytest.raises(ValueError, match="histories of 16 tasks given"):
        macaw.transitions(histories, 0.9)


def test_a_task_adapts_when_its_next_episode_starts_and_as_from_the_same_transitions():
    """Episodes of 4 steps and of 7: with a batch of 6 the first task is due after 8 steps, the second after 7."""
    agent = AdaptingMACAW(MACAW(replace(TINY, inner_rate=1.0)))
    generator = torch.Generator().manual_seed(0)
    state, reward, changes = agent.init_state(2), None, [[], []]
    meta = state.each[0][0]
    observations, rewards, actions = (
        torch.randn(12, 2, 3, generator=generator),
        torch.randn(12, 2, generator=generator),
        [],
    )
    for t in range(12):
        start = torch.tensor([t % 4 == 0, t % 7 == 0])
        with torch.inference_mode():
            action, state = agent.act(observations[t], reward, start, state, deterministic=True, generator=generator)
        actions.append(action)
        reward = rewards[t]
        for i in range(2):
            changes[i].append(not torch.equal(state.each[i][0], meta))
    assert [row.index(True) for row in changes] == [8, 7]
    returns = [macaw.returns_to_come(rewards[a : a + 4, 0].numpy(), TINY.discount) for a in (0, 4)]
    numbers = torch.from_numpy(np.concatenate(returns)).float(), torch.arange(8).remainder(4).float()
    seen = Transitions(observations[:8, 0], torch.stack(actions)[:8, 0], *numbers)
    every = (Transitions(*(x[rows] for x in seen)) for rows in torch.combinations(torch.arange(8), 6))
    found = flat(state.each[0])
    errors = sorted((flat(agent._adapted(one)) - found).abs().max().item() for one in every)
    assert errors[0] < 1e-6 * found.abs().max()
    assert errors[1] > 10 * errors[0]  # from six of the eight, and no other six


def flat(layers):
    return torch.cat([weights.flatten() for weights in layers])


def test_what_was_meta_trained_stays_as_it_is_when_it_is_played():
    known = adbook.family("reacher-goal")
    agent = AdaptingMACAW(MACAW(MACAWConfig(8, 2, hidden=(8,), latent=2, batch=60)))
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    played = adbook.rollout(agent, known, known.train_tasks[:2], episodes=4)
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())
    assert np.isfinite(played.returns).all()
    with pytest.raises(ValueError, match="2 tasks are played but 0 batches given"):
        adbook.rollout(AdaptingMACAW(agent.macaw, []), known, known.train_tasks[:2], episodes=1)


def test_a_task_without_a_batch_is_played_as_it_was_meta_trained_to_the_end(batch):
    one = Transitions(*(x.float() for x in batch))
    agent = AdaptingMACAW(MACAW(replace(TINY, inner_rate=1.0)), [None, one])
    state = agent.init_state(2)
    meta = flat(AdaptingMACAW(agent.macaw).init_state(1).each[0])
    assert torch.equal(flat(state.each[0]), meta)
    assert not torch.equal(flat(state.each[1]), meta)
    assert not state.waiting.any()


def test_it_survives_the_disk_in_half_precision(tmp_path):
    meta = MACAW(TINY)
    meta.return_mean.fill_(-123.456)
    loaded = MACAW.load(meta.save(tmp_path / "m.safetensors", {"seed": 0}, half=True))
    assert (loaded.config, loaded.about) == (TINY, {"seed": 0})
    assert loaded.return_mean == meta.return_mean
    for name, value in meta.named_parameters():
        torch.testing.assert_close(dict(loaded.named_parameters())[name], value, rtol=1e-3, atol=1e-6)
    (tmp_path / "m.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"m\.safetensors is damaged or not of adbook\.MACAW .*delete it to train it"):
        MACAW.load(tmp_path / "m.safetensors")


def test_settings_in_a_file_that_cannot_run_are_told_with_its_name(tmp_path):
    meta = MACAW(TINY)
    path = save_module(tmp_path / "m.safetensors", meta, {"config": asdict(TINY) | {"latent": 0}, "about": {}})
    with pytest.raises(ValueError, match=r"m\.safetensors is damaged .*latent=0 must be"):
        MACAW.load(path)


def test_a_number_that_16_bits_cannot_hold_is_refused(tmp_path):
    meta = MACAW(TINY)
    meta.value_rates.data[0, 0] = 1e5
    with pytest.raises(ValueError, match="value_rates holds numbers above 65,504"):
        meta.save(tmp_path / "m.safetensors", {}, half=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": 0}, "latent=0 must be a whole"),
        ({"std": float("nan")}, "std=nan must be a positive number"),
        ({"stretches": float("nan")}, "stretches=nan must be from 0 to 1"),
        ({"discount": 2.0}, r"discount=2\.0 must be from 0 to 1"),
        ({"advantage": -5.0}, r"advantage=-5\.0 must be a positive number or 0"),
        ({"batch": 1}, "batch=1 must be a whole number of at least 2"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be a whole number from 0 to below"),
        ({"hidden": 5}, "hidden=5 must be a tuple of layer widths"),
    ],
)
def test_settings_that_cannot_run_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
