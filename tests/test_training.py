"""Training: resumed equals uninterrupted, checkpoints are guarded, nothing but torch is needed, and it learns."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adbook.histories import LearningHistory
from adbook.mamba import MambaConfig
from adbook.policy import ADPolicy, PolicyConfig
from adbook.training import TrainingConfig, train
from adbook.transformer import TransformerConfig
from adbook.windows import WindowConfig, Windows

BACKBONES = {
    "mamba": MambaConfig(d_model=16, n_layers=1, d_state=4),
    "transformer": TransformerConfig(d_model=16, n_layers=1, n_heads=2, context=8),
}
SHORT = TrainingConfig(updates=8, batch_size=3, warmup=2, checkpoint_every=3)


def make_windows(kind=Windows, shift=0.0) -> Windows:
    """Windows of two episodes of three steps, cut from two histories of random numbers."""
    rng = np.random.default_rng(0)
    histories = []
    for number in range(2):
        observations = rng.standard_normal((18, 3), dtype=np.float32)
        truncated = np.arange(18) % 3 == 2
        following = np.roll(observations, -1, axis=0)
        actions = rng.uniform(-1, 1, (18, 2)).astype(np.float32)
        rewards = rng.standard_normal(18, dtype=np.float32) + np.float32(shift)
        arrays = observations, actions, rewards, following, np.zeros(18, bool), truncated
        histories.append(LearningHistory(*arrays, metadata={"task": "noise", "number": number}))
    return kind(histories, WindowConfig(episodes=2, every=3), horizon=3)


def make_policy(backbone="mamba") -> ADPolicy:
    torch.manual_seed(0)
    return ADPolicy(PolicyConfig(3, 2, backbone=BACKBONES[backbone], embedding=8))


def weights_of(policy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def assert_same(one, two) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


class Interrupted(Windows):
    """Windows that give out after five batches."""

    drawn = 0

    def sample(self, n, rng):
        """Stop at the sixth batch, as if by Ctrl-C."""
        self.drawn += 1
        if self.drawn == 6:
            raise KeyboardInterrupt
        return super().sample(n, rng)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(backbone, tmp_path):
    whole = make_policy(backbone)
    log = train(whole, make_windows(), SHORT, progress=False)
    stopped, checkpoint = make_policy(backbone), tmp_path / "deep" / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(stopped, make_windows(Interrupted), SHORT, checkpoint=checkpoint, progress=False)
    assert [file.name for file in checkpoint.parent.iterdir()] == ["state.safetensors"]
    torch.manual_seed(99)  # what the process has drawn meanwhile does not matter …
    resumed = ADPolicy(whole.config)  # … nor do the weights it starts from
    resumed_log = train(resumed, make_windows(), SHORT, checkpoint=checkpoint, progress=False)
    assert_same(weights_of(resumed), weights_of(whole))
    assert resumed_log.losses == log.losses
    assert len(log.losses) == 8
    assert resumed_log.tokens == log.tokens == 8 * 3 * 6  # updates, windows, steps


def test_a_finished_training_is_not_repeated(tmp_path):
    config, checkpoint = replace(SHORT, updates=6), tmp_path / "state.safetensors"
    first = make_policy()
    train(first, make_windows(), config, checkpoint=checkpoint, progress=False)
    windows = make_windows(Interrupted)
    again = make_policy()
    log = train(again, windows, config, checkpoint=checkpoint, progress=False)
    assert windows.drawn == 0
    assert len(log.losses) == 6
    assert_same(weights_of(again), weights_of(first))


def other_seed(policy, windows, config):
    return policy, windows, replace(config, seed=1)


def other_model(policy, windows, config):
    return ADPolicy(replace(policy.config, embedding=9)), windows, config


def other_histories(policy, windows, config):
    return policy, make_windows(shift=0.5), config


def mirrored_histories(policy, windows, config):
    mirrored = [replace(history, actions=-history.actions) for history in windows.histories]
    return policy, Windows(mirrored, windows.config, horizon=3), config


def histories_that_end_elsewhere(policy, windows, config):
    elsewhere = [replace(h, next_observations=h.next_observations + 1) for h in windows.histories]  # pays for strays
    return policy, Windows(elsewhere, windows.config, horizon=3), config


CHANGES = other_seed, other_model, other_histories, mirrored_histories, histories_that_end_elsewhere


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_something_else_is_refused_and_left_alone(change, tmp_path):
    checkpoint = tmp_path / "state.safetensors"
    train(make_policy(), make_windows(), SHORT, checkpoint=checkpoint, progress=False)
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"state\.safetensors is a checkpoint of another.*delete it"):
        train(*change(make_policy(), make_windows(), SHORT), checkpoint=checkpoint, progress=False)
    assert checkpoint.read_bytes() == before


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    checkpoint = tmp_path / "state.safetensors"
    train(make_policy(), make_windows(), SHORT, checkpoint=checkpoint, progress=False)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged.*delete it"):
        train(make_policy(), make_windows(), SHORT, checkpoint=checkpoint, progress=False)


def test_a_checkpoint_with_a_missing_part_is_refused_by_name(tmp_path):
    checkpoint = tmp_path / "state.safetensors"
    train(make_policy(), make_windows(), SHORT, checkpoint=checkpoint, progress=False)
    with safe_open(checkpoint, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(checkpoint)
    tensors.pop("policy/head.weight")
    save_file(tensors, checkpoint, metadata=header)
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged.*delete it"):
        train(make_policy(), make_windows(), SHORT, checkpoint=checkpoint, progress=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    class Poisoned(Interrupted):
        def sample(self, n, rng):
            batch = Windows.sample(self, n, rng)
            self.drawn += 1
            if self.drawn == 5:
                batch["actions"][:] = np.float32(1e30)  # its square is infinite
            return batch

    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(FloatingPointError, match=r"the loss is inf at update 4; .*learning_rate"):
        train(make_policy(), make_windows(Poisoned), SHORT, checkpoint=checkpoint, progress=False)
    assert all(value.isfinite().all() for value in load_file(checkpoint).values())


def test_the_seed_decides_windows_and_noise():
    def trained(seed):
        policy = make_policy()  # the same initial weights
        train(policy, make_windows(), replace(SHORT, seed=seed), progress=False)
        return weights_of(policy)

    first = trained(0)
    assert_same(trained(0), first)
    assert not torch.equal(trained(1)["head.weight"], first["head.weight"])


def test_the_schedule_in_closed_form():
    config = TrainingConfig(updates=1100, warmup=100, learning_rate=2e-3)
    assert config.rate(0) == pytest.approx(2e-5)  # a hundredth of the way up
    assert config.rate(49) == pytest.approx(1e-3)
    assert config.rate(99) == pytest.approx(2e-3)
    assert config.rate(100) == pytest.approx(2e-3)
    assert config.rate(600) == pytest.approx(2e-3 * (0.01 + 0.99 / 2))  # half of the cosine
    assert config.rate(1100) == pytest.approx(2e-5)  # where the cosine ends
    falling = [config.rate(update) for update in range(100, 1100)]
    assert falling == sorted(falling, reverse=True)


def test_the_schedule_is_what_the_optimiser_uses():
    """In AdamW's first step every weight moves by the rate, whatever its gradient: m / sqrt(v) is ±1."""
    config = TrainingConfig(updates=1000, batch_size=3, warmup=900, learning_rate=0.9, weight_decay=0.0)
    policy = make_policy()
    before = weights_of(policy)["head.weight"]
    with pytest.raises(KeyboardInterrupt):
        train(policy, make_windows(StopAfterOne), config, progress=False)
    moved = (policy.head.weight.detach() - before).abs()
    # 0.9 / 900, but for Adam's epsilon of 1e-8 beside gradients of 1e-4 and more
    np.testing.assert_allclose(moved.numpy(), 1e-3, rtol=1e-3)


class StopAfterOne(Interrupted):
    """Windows that give out after one batch."""

    drawn = 4


class Indifferent(ADPolicy):
    """A policy whose loss does not depend on it."""

    def loss(self, batch, noise=None):
        """Return zero, with gradients of zero."""
        return sum((parameter * 0).sum() for parameter in self.parameters())


def test_matrices_decay_and_nothing_else_does():
    """Weights without a gradient shrink by rate × decay an update; A, D, biases and norms stay as they are."""
    config = TrainingConfig(updates=2, batch_size=3, warmup=1, learning_rate=0.5, weight_decay=0.5)
    policy = Indifferent(make_policy().config)
    before = weights_of(policy)
    train(policy, make_windows(), config, progress=False)
    shrunk = (1 - 0.5 * 0.5) ** 2  # the cosine starts at the full rate
    for name, value in policy.named_parameters():
        decays = value.ndim >= 2 and not name.endswith("A_log")
        torch.testing.assert_close(value.detach(), before[name] * (shrunk if decays else 1.0), msg=name)


def test_the_statistics_are_those_of_the_histories():
    policy, windows = make_policy(), make_windows()
    train(policy, windows, replace(SHORT, updates=3), progress=False)
    observations = np.concatenate([history.observations for history in windows.histories]).astype(np.float64)
    rewards = np.concatenate([history.rewards for history in windows.histories]).astype(np.float64)
    np.testing.assert_allclose(policy.observation_mean, observations.mean(0), atol=1e-6)
    np.testing.assert_allclose(policy.observation_std, observations.std(0, ddof=1), atol=1e-6)
    np.testing.assert_allclose(policy.reward_mean, rewards.mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": 0}, "updates=0 must be a whole number of at least 1"),
        ({"batch_size": -2}, "batch_size=-2 must be a whole number of at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be a whole number of at least 1"),
        ({"warmup": 10, "updates": 10}, "warmup=10 must be less than updates=10"),
        ({"warmup": -1}, "warmup=-1"),
    ],
)
def test_settings_that_cannot_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation_size": 5}, r"observation_size=5 of the policy does not fit histories of \d; use \d"),
        ({"action_scale": 0.01}, "actions of .* in the histories; the policy's largest is action_scale=0.01; give it"),
    ],
)
def test_a_policy_that_does_not_fit_its_histories_is_refused_before_the_first_update(changes, message):
    policy = ADPolicy(replace(make_policy().config, **changes))
    with pytest.raises(ValueError, match=message):
        train(policy, make_windows(), SHORT, progress=False)


PROGRAM = """
import sys
for name in ("gymnasium", "mujoco", "stable_baselines3"):
    sys.modules[name] = None  # importing it raises
import torch
from adbook import histories, mamba, policy, training, transformer
from adbook.windows import WindowConfig, Windows
windows = Windows(histories.read_histories(sys.argv[1]), WindowConfig(2, 3), horizon=3)
for backbone in (mamba.MambaConfig(16, 1), transformer.TransformerConfig(16, 1, 2)):
    trained = policy.ADPolicy(policy.PolicyConfig(3, 2, backbone=backbone))
    log = training.train(trained, windows, training.TrainingConfig(updates=2, batch_size=2, warmup=1), progress=False)
    trained.save_pretrained(sys.argv[2])
    state = policy.ADPolicy.from_pretrained(sys.argv[2]).init_state(1)
    print(len(log.losses))
"""


def test_a_machine_without_simulator_can_train_from_files(tmp_path):
    from adbook.histories import save_histories

    path = save_histories(tmp_path / "histories.safetensors", make_windows().histories)
    command = [sys.executable, "-W", "error", "-c", PROGRAM, path, tmp_path / "policy"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", "2"]


def signs(actions: np.ndarray, secret: int) -> LearningHistory:
    """Two episodes of one step. The first tries ±1 and is paid action × secret; the second does what was right."""
    actions = np.array([*actions, secret], np.float32)[:, None]
    ends = np.ones(2, bool)
    rewards = (actions * secret)[:, 0]
    blank = np.zeros((2, 1), np.float32)
    return LearningHistory(blank, actions, rewards, blank, ~ends, ends, metadata={"task": f"secret {secret}"})


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_learns_to_read_the_reward(backbone):
    """What to do in the second episode is tried action × its reward, and follows from neither alone.

    Each action was tried equally often in tasks of either secret, so a policy that cannot read rewards gives the same
    answer m in both: its squared error is (m - 1)² / 2 + (m + 1)² / 2 = 1 + m², at least 1.
    """
    histories = [signs(np.array([tried]), secret) for tried in (-1, 1) for secret in (-1, 1)]
    windows = Windows(histories, WindowConfig(episodes=2, every=1), horizon=1)
    torch.manual_seed(0)
    policy = ADPolicy(PolicyConfig(1, 1, backbone=BACKBONES[backbone], head="mse", embedding=32))
    train(policy, windows, TrainingConfig(updates=100, batch_size=32, warmup=10, learning_rate=1e-2), progress=False)
    batch = {
        name: np.stack([getattr(history, name) for history in histories])
        for name in ("observations", "actions", "rewards")
    }
    with torch.inference_mode():
        arrays = (torch.from_numpy(array) for array in batch.values())
        mean, _ = policy(*arrays, torch.ones(4, 2, dtype=torch.bool))
    error = ((mean[:, 1, 0] - torch.tensor([-1.0, 1, -1, 1])) ** 2).mean()
    assert error < 0.1
    # the first action is a coin's toss, of which nothing can be known: error 1 is the best there
    assert math.isclose(float((mean[:, 0, 0] ** 2).mean()), 0, abs_tol=0.2)
