"""The policy: one-step form equals parallel form, only the past counts, and files are checked before they are used."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adbook
from adbook.mamba import MambaConfig
from adbook.policy import SCHEMA, ADPolicy, PolicyConfig, returns_to_go
from adbook.transformer import TransformerConfig

OBS, ACT, B, L = 5, 2, 3, 24
BACKBONES = {
    "mamba": MambaConfig(d_model=16, n_layers=2),
    "transformer": TransformerConfig(d_model=16, n_layers=2, n_heads=2, context=7),  # shorter than the sequence
}
each_backbone = pytest.mark.parametrize("backbone", BACKBONES)
each_head = pytest.mark.parametrize("head", ["gaussian", "mse"])


def make_policy(backbone="mamba", head="gaussian", **changes) -> ADPolicy:
    """A policy with weights far from their small start, so that every input has a visible influence."""
    torch.manual_seed(0)
    config = PolicyConfig(OBS, ACT, action_scale=2.0, backbone=BACKBONES[backbone], head=head, **changes)
    policy = ADPolicy(config).eval()
    torch.nn.init.normal_(policy.head.weight, std=0.3)
    returns = torch.linspace(-21, -2, 20).repeat(2, 1)
    returns[1] = torch.cat((torch.tensor([-9.0, -9, -9, -9, -3]), torch.full((15,), torch.nan)))
    policy.set_statistics(3 + 2 * torch.randn(500, OBS), -1 + 0.5 * torch.randn(500), returns)
    return policy


def make_batch(seed=1) -> dict[str, torch.Tensor]:
    """Random steps in episodes of 7, 7, 7 and 3 steps."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "observations": 3 + 2 * torch.randn(B, L, OBS, generator=generator),
        "actions": 4 * torch.rand(B, L, ACT, generator=generator) - 2,
        "rewards": -1 + 0.5 * torch.randn(B, L, generator=generator),
        "starts": (torch.arange(L) % 7 == 0).expand(B, L),
    }
    return batch | {name: torch.ones(B, L, dtype=torch.bool) for name in ("valid", "imitated")}


def predict(policy, batch):
    return policy(*(batch[name] for name in ("observations", "actions", "rewards", "starts")))


def play(policy, batch, **options):
    """Act through the steps of a batch, whose actions are not used; returns (B, L, ACT)."""
    state, actions = policy.init_state(B), []
    for t in range(L):
        before = batch["rewards"][:, t - 1] if t else torch.full((B,), 9.0)  # no step before the first: not looked at
        action, state = policy.act(batch["observations"][:, t], before, batch["starts"][:, t], state, **options)
        actions.append(action)
    return torch.stack(actions, 1)


def assert_close(actual, expected):
    """Float32 over a few dozen operations: 1e-5 of the largest value."""
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@each_backbone
@each_head
@torch.inference_mode()
def test_acting_step_by_step_equals_forward_over_what_was_done(backbone, head):
    policy, batch = make_policy(backbone, head), make_batch()
    actions = play(policy, batch, deterministic=True)
    mean, log_std = predict(policy, batch | {"actions": actions})
    assert_close(actions, 2 * mean.clamp(-1, 1))
    assert (mean.abs() > 1).any()  # the bound was met …
    assert (mean.abs() < 1).any()  # … and is not everywhere
    assert head == "gaussian" or (log_std == 0).all()


def test_the_return_to_go_is_the_sum_of_what_is_left_of_the_episode():
    rewards = torch.tensor([[1.0, 2, 3, 10, 20, 99], [1, 1, 1, 1, 1, 1]])
    starts = torch.tensor([[True, False, False, True, False, False], [True, True, True, False, False, True]])
    valid = torch.tensor([[True] * 5 + [False], [True] * 6])
    expected = torch.tensor([[6.0, 5, 3, 30, 20, 0], [1, 1, 3, 2, 1, 1]])
    assert torch.equal(returns_to_go(rewards, starts, valid), expected)


@each_backbone
@torch.inference_mode()
def test_a_decision_transformer_counts_down_what_it_wants_as_forward_is_told(backbone):
    policy, batch = make_policy(backbone, return_to_go=True), make_batch()
    assert policy.wanted == -2.75  # the mean of the last two of twenty, -2.5, and of the last one of five, -3
    actions = play(policy, batch, deterministic=True)
    starts, paid = batch["starts"], batch["rewards"]
    episodes = [slice(t, min(t + 7, L)) for t in range(0, L, 7)]
    to_go = torch.cat([policy.wanted - paid[:, e].cumsum(1) + paid[:, e] for e in episodes], 1)
    mean, _ = policy(batch["observations"], actions, paid, starts, to_go)
    assert_close(actions, 2 * mean.clamp(-1, 1))
    more, _ = policy(batch["observations"], actions, paid, starts, to_go + 1)
    assert (more - mean).abs().amax((0, 2)).min() > 1e-4  # it matters at every step


def test_the_loss_of_a_decision_transformer_shows_it_the_returns_of_the_batch():
    policy, batch = make_policy(return_to_go=True), make_batch()
    to_go = returns_to_go(batch["rewards"], batch["starts"], batch["valid"])
    mean, log_std = policy(*(batch[name] for name in ("observations", "actions", "rewards", "starts")), to_go)
    expected = -torch.distributions.Normal(mean, log_std.exp()).log_prob(batch["actions"] / 2).mean()
    torch.testing.assert_close(policy.loss(batch), expected)


@each_backbone
@torch.inference_mode()
def test_sampled_actions_are_mean_plus_sigma_times_noise(backbone):
    policy, batch = make_policy(backbone), make_batch()
    actions = play(policy, batch, generator=torch.Generator().manual_seed(4))
    mean, log_std = predict(policy, batch | {"actions": actions})
    generator = torch.Generator().manual_seed(4)
    noise = torch.stack([torch.randn(B, ACT, generator=generator) for _ in range(L)], 1)
    assert_close(actions, 2 * (mean + log_std.exp() * noise).clamp(-1, 1))
    other = play(policy, batch, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(actions, other)


@each_backbone
@torch.inference_mode()
def test_a_prediction_sees_the_past_and_its_own_observation_only(backbone):
    policy, batch, at = make_policy(backbone), make_batch(), 10
    base = predict(policy, batch)[0]
    first_touched = {"observations": at, "starts": at, "actions": at + 1, "rewards": at + 1}
    for name, first in first_touched.items():
        changed = batch[name].clone()
        changed[:, at] = ~changed[:, at] if name == "starts" else changed[:, at] + 1
        difference = (predict(policy, batch | {name: changed})[0] - base).abs().amax((0, 2))
        assert (difference[:first] == 0).all(), name
        assert difference[first] > 1e-4, name  # a step later at the latest, also across an episode's border
        assert difference[14:].max() > 1e-6, name  # episodes later still


@torch.inference_mode()
def test_withheld_rewards_stand_for_the_mean_of_the_training_data():
    """What cannot be told from a constant carries nothing of the task."""
    policy, batch = make_policy(), make_batch()
    state, mean_state = policy.init_state(B), policy.init_state(B)
    for t in range(9):
        step = batch["observations"][:, t], batch["starts"][:, t]
        withheld, state = policy.act(step[0], None, step[1], state, deterministic=True)
        mean = policy.reward_mean.expand(B)
        expected, mean_state = policy.act(step[0], mean, step[1], mean_state, deterministic=True)
        torch.testing.assert_close(withheld, expected, rtol=0, atol=0)
    given = play(policy, batch, deterministic=True)
    assert not torch.allclose(given[:, 8], withheld, atol=1e-3)  # while rewards that are given do matter


@torch.inference_mode()
def test_tasks_side_by_side_do_not_touch_each_other():
    policy, batch = make_policy(), make_batch()
    together = play(policy, batch, deterministic=True)
    changed = batch["observations"].clone()
    changed[1:] += 5
    apart = play(policy, batch | {"observations": changed}, deterministic=True)
    assert_close(apart[0], together[0])
    assert not torch.allclose(apart[1], together[1], atol=1e-3)


@torch.inference_mode()
def test_units_do_not_matter_once_the_statistics_are_set():
    """Shift and scale the data and its statistics alike, and the predictions stay."""
    policy, batch = make_policy(), make_batch()
    base = predict(policy, batch)[0]
    scaled = batch | {"observations": 7 - 4 * batch["observations"], "rewards": 3 * batch["rewards"] + 1}
    policy.observation_mean.copy_(7 - 4 * policy.observation_mean)
    policy.observation_std.mul_(-4)
    policy.reward_mean.copy_(3 * policy.reward_mean + 1)
    policy.reward_std.mul_(3)
    # the subtraction of the mean, now up to 5 times the spread, loses a few more bits: 1e-4
    torch.testing.assert_close(predict(policy, scaled)[0], base, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_the_data_and_survive_a_constant():
    policy = make_policy()
    data = torch.tensor([[1.0, 2, 3, 4, 7], [3.0, 2, 5, 4, 7]])
    policy.set_statistics(data.reshape(1, 2, OBS), torch.tensor([[1.0, 3.0]]))
    assert policy.observation_mean.tolist() == [2, 2, 4, 4, 7]
    root = 2**0.5
    torch.testing.assert_close(policy.observation_std, torch.tensor([root, 1, root, 1, 1]))  # of a constant: 1
    torch.testing.assert_close(policy.reward_std, torch.tensor([root]))


def test_an_observation_that_varies_by_rounding_alone_is_not_blown_up():
    policy = make_policy()
    height = torch.tensor([-0.275, -0.2749, -0.275, -0.2752, -0.275]).half().float()  # of a table
    small = torch.tensor([-1e-3, 1e-3, 2e-3, -2e-3, 0.0])  # small, and it varies
    data = torch.stack([height, small, height + 1, small, small], 1)
    policy.set_statistics(data, torch.zeros(5))
    assert policy.observation_std.tolist() == [1, small.std(), 1, small.std(), small.std()]


@torch.inference_mode()
def test_the_loss_is_the_likelihood_or_the_squared_error():
    batch = make_batch()
    gaussian = make_policy()
    mean, log_std = predict(gaussian, batch)
    expected = -torch.distributions.Normal(mean, log_std.exp()).log_prob(batch["actions"] / 2).mean()
    torch.testing.assert_close(gaussian.loss(batch), expected, rtol=1e-5, atol=0)
    squared = make_policy(head="mse")
    expected = ((batch["actions"] / 2 - predict(squared, batch)[0]) ** 2).mean()
    torch.testing.assert_close(squared.loss(batch), expected, rtol=1e-5, atol=0)


@torch.inference_mode()
def test_padding_counts_for_nothing():
    policy, batch = make_policy(), make_batch()
    cut = {name: value[:, :15] for name, value in batch.items()}
    padded = batch | {name: (torch.arange(L) < 15).expand(B, L) for name in ("valid", "imitated")}
    torch.testing.assert_close(policy.loss(padded), policy.loss(cut), rtol=1e-5, atol=0)


@torch.inference_mode()
def test_what_is_not_imitated_is_seen_and_does_not_count():
    policy, batch = make_policy(), make_batch()
    late = (torch.arange(L) >= 15).expand(B, L)
    mean, log_std = predict(policy, batch)
    taken = torch.distributions.Normal(mean, log_std.exp()).log_prob(batch["actions"] / policy.config.action_scale)
    expected = -taken[:, 15:].mean()
    torch.testing.assert_close(policy.loss(batch | {"imitated": late}), expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_noise_is_in_units_of_the_observations_spread():
    policy, batch = make_policy(), make_batch()
    noise = torch.randn(B, L, OBS, generator=torch.Generator().manual_seed(0))
    noisy = batch | {"observations": batch["observations"] + noise * policy.observation_std}
    torch.testing.assert_close(policy.loss(batch, noise), policy.loss(noisy), rtol=1e-5, atol=0)
    assert policy.loss(batch, noise) != policy.loss(batch)


@torch.inference_mode()
def test_log_sigma_stays_within_its_bounds():
    policy, batch = make_policy(log_std_min=-1.0, log_std_max=0.5), make_batch()
    policy.head.weight[ACT:] *= 100
    log_std = predict(policy, batch)[1]
    assert (log_std.min(), log_std.max()) == (-1.0, 0.5)


@each_backbone
@each_head
@torch.inference_mode()
def test_a_saved_policy_is_the_same_policy(tmp_path, backbone, head):
    policy, batch = make_policy(backbone, head), make_batch()
    folder = policy.save_pretrained(tmp_path / "policy", about={"date": "today"})
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    loaded = ADPolicy.from_pretrained(folder)
    assert loaded.config == policy.config
    assert not loaded.training
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(predict(loaded, batch)[0], predict(policy, batch)[0])
    assert json.loads((folder / "config.json").read_text())["about"] == {"date": "today"}


def test_others_may_read_what_is_saved_as_far_as_the_umask_lets_them(tmp_path):
    folder = make_policy().save_pretrained(tmp_path / "policy")
    (tmp_path / "ordinary").touch()
    modes = {file.stat().st_mode for file in (*folder.iterdir(), tmp_path / "ordinary")}
    assert len(modes) == 1


def test_an_interrupted_save_leaves_the_old_weights(tmp_path, monkeypatch):
    folder = make_policy().save_pretrained(tmp_path / "policy")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def half_written(file, weights):
        file.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(KeyboardInterrupt):
        make_policy(head="mse").save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.fixture
def saved(tmp_path):
    return make_policy().save_pretrained(tmp_path / "policy")


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damaged_weights_are_refused(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"weights in .*policy do not fit its config\.json, or are damaged"):
        ADPolicy.from_pretrained(saved)


def test_weights_of_another_shape_are_refused(saved):
    file = saved / "model.safetensors"
    weights = load_file(file)
    weights["head.bias"] = torch.zeros(7)
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        ADPolicy.from_pretrained(saved)


def test_another_schema_names_both_versions(saved):
    change_config(saved, schema=99)
    with pytest.raises(ValueError, match=f"schema version 99, this version reads {SCHEMA}"):
        ADPolicy.from_pretrained(saved)


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": "mamba", "hidden_size": 768}',  # of another library
        "[1, 2]",
        "{ not json",
        '{"schema": 1, "backbone": "lstm", "config": {"backbone": {}}}',
        '{"schema": 1, "backbone": "mamba", "config": {"backbone": {}, "colour": 3}}',
    ],
)
def test_a_foreign_configuration_is_refused_by_name(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not the configuration of a policy"):
        ADPolicy.from_pretrained(saved)


def test_a_missing_policy_is_told_what_is_missing(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no policy at .*nowhere"):
        ADPolicy.from_pretrained(tmp_path / "nowhere")
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"policy has no config\.json"):
        ADPolicy.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "categorical"}, "unknown head 'categorical'.*; choose one of gaussian, mse"),
        ({"observation_size": 0}, "observation_size=0 must be a whole number of at least 1"),
        ({"embedding": 1.5}, "embedding=1.5 must be a whole number of at least 1"),
        ({"action_scale": "1"}, "action_scale='1' must be a positive number"),
        ({"log_std_min": 2.0}, "log_std_min=2.0 must be less than log_std_max=1.0"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**({"observation_size": OBS, "action_size": ACT} | changes))


def test_a_policy_of_another_observation_size_is_refused_by_the_rollout():
    family = adbook.family("reacher-goal")
    with pytest.raises(ValueError, match="policy has observation_size 5, reacher-goal has 8"):
        adbook.rollout(make_policy(), family, family.test_tasks[:1], episodes=1)
