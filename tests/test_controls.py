"""Controls: what is taken from a policy's context, and that nothing else is."""

import numpy as np
import pytest
import torch

from adbook import MambaConfig, TransformerConfig, family, rollout
from adbook.controls import Rereading, ShuffledContext, reset_every_episode
from adbook.policy import ADPolicy, PolicyConfig

BACKBONES = [MambaConfig(d_model=16, n_layers=2), TransformerConfig(d_model=16, n_layers=2, n_heads=2, context=400)]
REACHER = family("reacher-goal")
TASKS = REACHER.test_tasks[:3]


@pytest.fixture(params=BACKBONES, ids=["mamba", "transformer"])
def policy(request) -> ADPolicy:
    """A policy whose weights are far from their small start, so that its context is seen in its actions."""
    torch.manual_seed(0)
    made = ADPolicy(PolicyConfig(REACHER.observation_size, REACHER.action_size, backbone=request.param)).eval()
    torch.nn.init.normal_(made.head.weight, std=0.3)
    return made


def plays_as(wrapped, policy):
    """Assert that both act alike, but for rounding, on two tasks that begin their episodes at different steps."""
    generator = torch.Generator().manual_seed(2)
    both = wrapped, policy
    states = [one.init_state(2) for one in both]
    for t in range(30):
        observation, reward = torch.randn(2, 8, generator=generator), torch.randn(2, generator=generator)
        start, played = torch.tensor([t % 10 == 0, t % 7 == 0]), []
        for i, one in enumerate(both):
            action, states[i] = one.act(observation, reward, start, states[i], deterministic=True)
            played.append(action)
        assert (played[0] - played[1]).abs().max() < 1e-5


def test_a_first_episode_has_no_past_to_shuffle_and_later_ones_differ(policy):
    plain = rollout(policy, REACHER, TASKS, episodes=3, seed=1)
    shuffled = rollout(ShuffledContext(policy), REACHER, TASKS, episodes=3, seed=1)
    np.testing.assert_array_equal(shuffled.actions[:, 0], plain.actions[:, 0])
    assert (shuffled.actions[:, 1] != plain.actions[:, 1]).any(axis=(1, 2)).all()
    again = rollout(ShuffledContext(policy), REACHER, TASKS, episodes=3, seed=1)
    np.testing.assert_array_equal(shuffled.actions, again.actions)
    other = rollout(ShuffledContext(policy, seed=1), REACHER, TASKS, episodes=3, seed=1)
    np.testing.assert_array_equal(other.actions[:, 0], plain.actions[:, 0])
    assert (other.actions[:, 1] != shuffled.actions[:, 1]).any()


@torch.inference_mode()
def test_a_past_in_its_own_order_is_the_policy_itself(policy, monkeypatch):
    """With the identity for a permutation, reading the past anew must change nothing but the rounding."""
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    plays_as(ShuffledContext(policy), policy)


@torch.inference_mode()
def test_only_the_task_that_begins_an_episode_has_its_past_shuffled(policy):
    """Whatever order a row's past is read in, it is the row's own past and complete."""
    wrapped = ShuffledContext(policy)
    generator, state = torch.Generator().manual_seed(2), wrapped.init_state(2)
    for t in range(12):
        observation, reward = torch.randn(2, 8, generator=generator), torch.randn(2, generator=generator)
        before = state.tokens
        _, state = wrapped.act(observation, reward, torch.tensor([t == 8, False]), state)
        torch.testing.assert_close(state.tokens[1, :t], before[1], rtol=0, atol=0)
        same = torch.equal(state.tokens[0, :t], before[0])
        assert same == (t != 8)
        ordered = (x[x[:, 0].argsort()] for x in (state.tokens[0, :t], before[0]))
        torch.testing.assert_close(*ordered, rtol=0, atol=0)


@torch.inference_mode()
def test_with_room_for_its_whole_past_rereading_is_the_policy_itself(policy):
    plays_as(Rereading(policy, episodes=5), policy)


@torch.inference_mode()
def test_only_the_last_episodes_are_reread_and_in_their_order(policy):
    """Episodes of 10 steps: the fourth begins with the tokens of the second and the third, and nothing older."""
    wrapped = Rereading(policy, episodes=2)
    generator, state, tokens = torch.Generator().manual_seed(2), wrapped.init_state(1), []
    for t in range(31):
        observation, reward = torch.randn(1, 8, generator=generator), torch.randn(1, generator=generator)
        action, state = wrapped.act(observation, reward, torch.tensor([t % 10 == 0]), state, deterministic=True)
        tokens.append(state[0].now[-1])
    read = torch.cat(tokens[10:]).unsqueeze(0)
    expected = policy.config.action_scale * policy._head(policy.backbone(policy.embed(read))[:, -1])[0].clamp(-1, 1)
    torch.testing.assert_close(action, expected, rtol=0, atol=1e-6)
    everything = torch.cat(tokens).unsqueeze(0)
    ends = [policy.backbone(policy.embed(x))[:, -1] for x in (read, everything)]
    assert (ends[0] - ends[1]).abs().max() > 1e-4


def test_with_a_context_that_is_reset_every_episode_is_a_first_one(policy):
    wiped = reset_every_episode(policy, REACHER, TASKS, episodes=3, seed=4)
    assert wiped.shape == (3, 3)
    for k, seed in enumerate(np.random.SeedSequence(4).generate_state(3)):
        first = rollout(policy, REACHER, TASKS, episodes=2, seed=seed)
        np.testing.assert_array_equal(wiped[:, k], first.returns[:, 0])


def test_two_seeds_share_no_dice_in_episodes_that_are_reset(policy):
    one, other = (reset_every_episode(policy, REACHER, TASKS, episodes=3, seed=seed) for seed in (4, 5))
    assert len(np.unique([*one.ravel(), *other.ravel()])) == 2 * one.size
