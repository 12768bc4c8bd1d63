# ruff: noqa: D102 - a stand-in for an environment, whose methods are known
"""Source algorithms: what is recorded is what happened, in order, and the seed decides it."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

import adbook
from adbook.sources import PPOConfig, Recorder, _dice, run_ppo

TINY = PPOConfig(steps=200, n_envs=2, streams=2, n_steps=50, batch_size=50, n_epochs=1)


@pytest.fixture(autouse=True)
def threads():
    """The source leaves torch on one thread; the tests that follow get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Clock(gymnasium.Env):
    """Shows (episode, step), pays 10 × episode + step; odd episodes terminate after 2 steps, the others after 3."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    episode = -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        self.t += 1
        reward = float(10 * self.episode + self.t)
        terminated, truncated = bool(self.episode % 2 and self.t == 2), self.t == 3
        return np.array([self.episode, float(self.t)]), reward, terminated, truncated, {}


def test_the_recorder_keeps_the_last_observation_that_vectorisation_hides():
    recorder = Recorder(Clock(), capacity=9)
    vector = DummyVecEnv([lambda: recorder])
    vector.reset()
    for t in range(7):  # episodes of 3, 2 steps, and 2 of the third
        observation, _, done, _ = vector.step(np.full((1, 1), 0.1 * t, np.float32))
        if done[0]:
            assert observation[0, 1] == 0  # what stable-baselines3 gives is the reset one
    stream = recorder.stream
    assert stream["observations"].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert stream["next_observations"].tolist() == [[0, 1], [0, 2], [0, 3], [1, 1], [1, 2]]
    assert stream["rewards"].tolist() == [1, 2, 3, 11, 12]
    assert stream["truncated"].tolist() == [False, False, True, False, False]
    assert stream["terminated"].tolist() == [False, False, False, False, True]
    np.testing.assert_allclose(stream["actions"][:, 0], 0.1 * np.arange(5), rtol=1e-6)


def test_an_unfinished_episode_alone_is_no_stream():
    recorder = Recorder(Clock(), capacity=4)
    recorder.reset()
    recorder.step(np.zeros(1))
    assert all(len(values) == 0 for values in recorder.stream.values())


@pytest.fixture(scope="module")
def streams():
    family = adbook.family("reacher-goal")
    return family, run_ppo(family, family.train_tasks[0], TINY, seed=3)


def test_a_run_records_its_streams_in_whole_episodes(streams):
    _, recorded = streams
    assert len(recorded) == 2
    for stream in recorded:
        assert stream["observations"].shape == (100, 8)  # 200 steps over two environments
        assert np.flatnonzero(stream["truncated"]).tolist() == [49, 99]
        assert np.abs(stream["actions"]).max() <= 1  # as applied, not as drawn
        assert {v.dtype for v in stream.values()} == {np.dtype(np.float32), np.dtype(bool)}
    assert not np.array_equal(recorded[0]["observations"], recorded[1]["observations"])


def test_replaying_the_recorded_actions_gives_the_recorded_stream(streams):
    """Nothing was lost, reordered or changed between the simulator and the record."""
    family, recorded = streams
    env = family.make(family.train_tasks[0])
    stream = recorded[1]
    observation, _ = env.reset(
        seed=_dice(family.train_tasks[0], 3) + 1
    )  # stable-baselines3 adds the environment's number
    for t, action in enumerate(stream["actions"]):
        np.testing.assert_array_equal(stream["observations"][t], observation.astype(np.float32))
        observation, reward, _, truncated, _ = env.step(action)
        np.testing.assert_array_equal(stream["next_observations"][t], observation.astype(np.float32))
        assert stream["rewards"][t] == np.float32(reward)
        if truncated:
            observation, _ = env.reset()
    env.close()


def test_the_seed_fixes_a_run(streams):
    family, first = streams
    again, other = (run_ppo(family, family.train_tasks[0], TINY, seed=seed) for seed in (3, 4))
    for one, two in zip(first, again, strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(first[0]["actions"], other[0]["actions"])


def test_steps_are_rounded_up_to_whole_updates_and_streams_may_be_fewer():
    family = adbook.family("reacher-goal")
    config = PPOConfig(steps=101, n_envs=2, streams=1, n_steps=50, batch_size=100, n_epochs=1)
    (stream,) = run_ppo(family, family.train_tasks[0], config, seed=0)
    assert len(stream["rewards"]) == 100  # two updates of 100 steps, half of them in the recorded environment


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"n_epochs": -1}, "n_epochs=-1 must be at least 1"),
        ({"streams": 17}, "streams=17 exceeds n_envs=16"),
        ({"batch_size": 300}, r"batch_size=300 must divide n_envs \* n_steps = 800"),
    ],
)
def test_settings_that_cannot_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**changes)


def test_every_task_has_dice_of_its_own():
    """One seed for all tasks would give all the same exploration noise, which a model then learns by heart."""
    family = adbook.family("reacher-goal")
    config = PPOConfig(steps=200, n_envs=2, streams=1, n_steps=50, batch_size=100, n_epochs=1)
    first, second = (run_ppo(family, task, config, seed=0)[0]["actions"][:50] for task in family.train_tasks[:2])
    # independent clipped noise: the mean squared difference is twice the variance, about 2 × 0.2
    assert np.mean((first - second) ** 2) > 0.1
