"""Training side by side: the losses and weights of training one by one, whatever runs beside it."""

from dataclasses import replace

import pytest
import torch
from test_training import BACKBONES, SHORT, make_windows

from adbook import training_cuda
from adbook.policy import ADPolicy, PolicyConfig
from adbook.training import train
from adbook.training_cuda import Training, train_side_by_side

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = PolicyConfig(3, 2, backbone=BACKBONES["mamba"], embedding=8)


@pytest.mark.parametrize("return_to_go", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_side_by_side_gives_what_one_by_one_gives(backbone, return_to_go, monkeypatch):
    monkeypatch.setattr(training_cuda, "_AHEAD", 2)
    shape = PolicyConfig(3, 2, backbone=BACKBONES[backbone], embedding=8, return_to_go=return_to_go)
    windows = make_windows()
    trainings, expected = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        one, other = ADPolicy(shape), ADPolicy(shape)
        other.load_state_dict(one.state_dict())
        # The noise is the device's own, so here is none; the ends differ, so that one starts where another one ended.
        config = replace(SHORT, observation_noise=0.0, weight_decay=0.1, seed=seed, updates=4 + seed)
        expected.append((one, train(one, windows, config, progress=False)))
        trainings.append(Training(other, windows, config))
    ended = dict(train_side_by_side(trainings, at_once=2, device=DEVICE))
    assert sorted(ended) == [0, 1, 2]
    for i, (policy, log) in enumerate(expected):
        torch.testing.assert_close(torch.tensor(ended[i].losses), torch.tensor(log.losses), rtol=1e-4, atol=1e-5)
        assert ended[i].tokens == log.tokens
        trained = trainings[i].policy.state_dict()
        # Adam divides a gradient by its size: where it is nothing but rounding, a GPU, which adds up in another order,
        # takes another step, of at most the learning rate, 3e-3. On a CPU little is rounded otherwise; a weight decay
        # that was forgotten would move weights of 0.3 by 2e-4.
        close = {"rtol": 1e-2, "atol": 1e-3} if DEVICE == "cuda" else {"rtol": 0, "atol": 5e-5}
        torch.testing.assert_close(trained, policy.cpu().state_dict(), **close)


def test_noise_is_drawn_anew_and_by_the_seed():
    def weights(seed):
        torch.manual_seed(0)
        policy = ADPolicy(SHAPE)
        config = replace(SHORT, observation_noise=0.5, seed=seed)
        list(train_side_by_side([Training(policy, make_windows(), config)], device=DEVICE))
        return policy.head.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_loss_that_is_not_finite_is_told_with_its_update_when_the_others_have_ended():
    ended = []
    bad, good = replace(SHORT, learning_rate=1e30, warmup=0), replace(SHORT, updates=10)
    both = [Training(ADPolicy(SHAPE), make_windows(), config) for config in (bad, good)]
    with pytest.raises(
        FloatingPointError, match=r"training 0: the loss is (nan|inf) at update \d; lower learning_rate"
    ):
        ended.extend(i for i, _ in train_side_by_side(both, device=DEVICE))
    assert ended == [1]  # what ran beside it is not lost
    with pytest.raises(ValueError, match="at_once=0 must be a whole number of at least 1"):
        next(train_side_by_side(both, at_once=0, device=DEVICE))
