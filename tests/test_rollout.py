# ruff: noqa: D101, D102, D105, D107 - stand-ins for environments and policies, whose methods are known
"""Rollouts: what the policy is fed, what is written down, and that nothing is learnt but in context."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import adbook
from adbook.play import play
from adbook.rollout import RandomPolicy, Rollout, rollout
from adbook.tasks import Task

HORIZON = 4


class ToyEnv:
    """Pays (task + 1) times the action; episodes of task i end after i + 2 steps or at the horizon."""

    def __init__(self, task):
        self.task, self.closed, self.resets = task, False, 0
        self.action_space = SimpleNamespace(low=np.float32([-1.0]), high=np.float32([1.0]))
        self.data = SimpleNamespace(qpos=np.zeros(3))
        self.unwrapped = self

    def reset(self, seed=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.resets, self.t = self.resets + 1, 0
        self.data.qpos[:] = self.rng.random(3)
        return self._observation(), {}

    def step(self, action):
        assert self.t is not None, "stepped after its end"
        self.t += 1
        self.data.qpos += 1
        terminated, truncated = self.t == self.task.index + 2, self.t == HORIZON
        reward = float((self.task.index + 1) * action[0])
        observation = self._observation()
        if terminated or truncated:
            self.t = None
        return observation, reward, terminated, truncated, {}

    def _observation(self):
        return np.array([self.t, self.data.qpos[0]])

    def close(self):
        self.closed = True


@dataclass
class ToyFamily:
    name: str = "toy"
    split: str = "default"
    horizon: int = HORIZON
    observation_size: int = 2
    action_size: int = 1

    def __post_init__(self):
        self.envs = []

    def check(self, tasks):
        """As `TaskFamily.check`, without a range of goals."""
        if not tasks:
            raise ValueError("tasks is empty")
        if any(task.family != self.name for task in tasks):
            raise ValueError(f"tasks of {tasks[0].family} given with family {self.name!r}")

    def make(self, task):
        self.envs.append(ToyEnv(task))
        return self.envs[-1]


class Counter(nn.Module):
    """Acts with 0.01 times the number of steps it has seen (its state) and notes what it is fed."""

    def __init__(self, gain=0.01):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.fed, self.modes = [], []

    def init_state(self, n):
        return torch.zeros(n, 1)

    def act(self, observation, reward, start, state, *, deterministic=False, generator=None):
        self.fed.append((observation, reward, start))
        self.modes.append((self.training, torch.is_inference_mode_enabled(), deterministic))
        return self.gain * (state + 1), state + 1


def tasks(n, split="test"):
    return tuple(Task("toy", (0.0,), split, i) for i in range(n))


@pytest.fixture
def played():
    family, policy = ToyFamily(), Counter()
    return rollout(policy, family, tasks(3), episodes=2, seed=3), policy, family


def test_state_is_carried_over_episodes_and_steps_stop_at_the_end_of_each(played):
    result, _, _ = played
    nan = np.nan
    np.testing.assert_allclose(  # tasks end after 2, 3 and 4 steps; the action counts on in the next episode
        100 * result.actions[..., 0],
        [
            [[1, 2, nan, nan], [3, 4, nan, nan]],
            [[1, 2, 3, nan], [4, 5, 6, nan]],
            [[1, 2, 3, 4], [5, 6, 7, 8]],
        ],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(result.lengths, [[2, 2], [3, 3], [4, 4]])
    np.testing.assert_allclose(result.returns, [[0.03, 0.07], [0.12, 0.3], [0.3, 0.78]], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(result.rewards), np.isnan(result.actions[..., 0]))


def test_what_was_noted_at_every_step_is_sorted_by_episode(played):
    result, policy, _ = played
    calls = np.tile(0.01 * np.arange(1, len(policy.fed) + 1), (3, 1))[..., None]  # what `Counter` played, call by call
    np.testing.assert_allclose(result.by_episode(calls), result.actions, rtol=1e-6)


def test_policy_is_fed_observation_last_reward_and_start_until_its_task_is_over_and_then_zeros(played):
    result, policy, _ = played
    observations, rewards, starts = (torch.stack(x).numpy() for x in zip(*policy.fed, strict=True))
    np.testing.assert_array_equal(starts[:, 1], [1, 0, 0, 1, 0, 0, 0, 0])  # task 1: two episodes of 3 steps
    np.testing.assert_array_equal(starts[:, 2], [1, 0, 0, 0, 1, 0, 0, 0])
    paid = result.rewards[1, :, :3].ravel()
    np.testing.assert_array_equal(rewards[:, 1], [0, *paid, 0])  # across the border of the episodes, too
    np.testing.assert_array_equal(observations[:, 1, 0], [0, 1, 2, 0, 1, 2, 0, 0])
    np.testing.assert_array_equal(observations[6:, 1], np.zeros((2, 2)))


def test_positions_are_those_before_each_step_and_after_the_last(played):
    result, _, _ = played
    steps = np.diff(result.qpos[0, 1], axis=0)
    np.testing.assert_allclose(steps[:2], 1, rtol=1e-6)
    assert np.isnan(steps[2:]).all()
    assert not np.array_equal(result.qpos[0, 0, 0], result.qpos[0, 1, 0])  # each episode starts anew


def test_every_environment_is_reset_once_an_episode_and_closed(played):
    _, _, family = played
    assert [(env.resets, env.closed) for env in family.envs] == [(2, True)] * 3


def test_withheld_reward_is_not_fed_and_recorded_as_it_was():
    open_policy, blind_policy = Counter(), Counter()
    seen = rollout(open_policy, ToyFamily(), tasks(2), episodes=2)
    blind = rollout(blind_policy, ToyFamily(), tasks(2), episodes=2, withhold_reward=True)
    assert all(reward is None for _, reward, _ in blind_policy.fed)
    assert any(reward.any() for _, reward, _ in open_policy.fed)
    np.testing.assert_array_equal(blind.rewards, seen.rewards)
    assert blind.metadata["withhold_reward"] is True


def test_policy_runs_in_evaluation_and_inference_mode_and_gets_its_mode_back():
    policy = Counter().train()
    rollout(policy, ToyFamily(), tasks(1), episodes=1, deterministic=True)
    assert set(policy.modes) == {(False, True, True)}
    assert policy.training


def test_actions_are_clipped_to_the_action_space():
    result = rollout(Counter(gain=0.4), ToyFamily(), tasks(3)[2:], episodes=1)
    np.testing.assert_allclose(result.actions[0, 0, :, 0], [0.4, 0.8, 1, 1])
    np.testing.assert_allclose(result.rewards[0, 0], [1.2, 2.4, 3, 3], rtol=1e-6)


def test_a_policy_that_learns_in_its_weights_is_found_out():
    class Cheat(Counter):
        def act(self, *inputs, **options):
            self.gain.data += 1e-7
            return super().act(*inputs, **options)

    family = ToyFamily()
    with pytest.raises(RuntimeError, match="parameters changed"):
        rollout(Cheat(), family, tasks(1), episodes=1)
    assert family.envs[0].closed


def test_an_action_that_is_not_finite_stops_with_its_place_and_closes_the_environments():
    class Broken(Counter):
        def act(self, *inputs, **options):
            action, state = super().act(*inputs, **options)
            return action / (state != 6), state

    family = ToyFamily()
    with pytest.raises(ValueError, match=r"task 1 is \[inf\] in episode 1, step 2"):
        rollout(Broken(), family, tasks(3), episodes=2)
    assert all(env.closed for env in family.envs)


@pytest.fixture(scope="module")
def reacher():
    return adbook.family("reacher-goal")


@pytest.fixture(scope="module")
def random_play(reacher):
    return rollout(RandomPolicy(2), reacher, reacher.test_tasks[:3], episodes=2, seed=5)


def test_record_is_what_the_environments_took_and_gave(reacher, random_play):
    class Spy(gymnasium.Wrapper):
        def step(self, action):
            before = self.unwrapped.data.qpos.copy()
            result = super().step(action)
            log.append((action, result[1], before, self.unwrapped.data.qpos.copy()))
            return result

    log, spied = [], SimpleNamespace(**vars(reacher), check=reacher.check, make=lambda task: Spy(reacher.make(task)))
    rollout(RandomPolicy(2), spied, random_play.tasks, episodes=2, seed=5)
    # 3 tasks are stepped in turn: (2 episodes · 50 steps, 3 tasks) -> (tasks, episodes, steps)
    actions, rewards, before, after = (
        np.moveaxis(np.float32(x).reshape(2, 50, 3, -1), 2, 0) for x in zip(*log, strict=True)
    )
    np.testing.assert_array_equal(random_play.actions, actions)
    np.testing.assert_array_equal(random_play.rewards, rewards[..., 0])
    np.testing.assert_array_equal(random_play.qpos[:, :, :-1], before)
    np.testing.assert_array_equal(random_play.qpos[:, :, 1:], after)


def test_step_by_step_it_is_the_same_and_pauses_before_each_reset(reacher):
    tasks, policy = reacher.test_tasks[:2], RandomPolicy(2)
    whole = rollout(policy, reacher, tasks, episodes=2, seed=5)
    paused = []
    for record in play(policy, reacher, tasks, episodes=2, seed=5):
        if record.over.any():
            paused.append((record.episode.tolist(), record.t.tolist(), not torch.is_inference_mode_enabled()))
    assert paused == [([1, 1], [50, 50], True), ([2, 2], [50, 50], True)]
    np.testing.assert_array_equal(Rollout.of(record, {}).rewards, whole.rewards)


def test_a_goal_moved_in_a_pause_pays_from_then_on(reacher):
    steps = play(RandomPolicy(2), reacher, reacher.test_tasks[:1], episodes=2)
    for record in steps:
        if record.over[0] and record.active[0]:
            record.envs[0].unwrapped.goal = reacher.test_tasks[1].goal
    stayed = rollout(RandomPolicy(2), reacher, reacher.test_tasks[:1], episodes=2)
    moved = Rollout.of(record, {})
    np.testing.assert_array_equal(moved.qpos[..., :2], stayed.qpos[..., :2])  # nobody was told
    np.testing.assert_array_equal(moved.rewards[:, 0], stayed.rewards[:, 0])
    assert (moved.rewards[:, 1] != stayed.rewards[:, 1]).all()


def test_same_seed_same_rollout_other_seed_other_rollout(reacher, random_play):
    again, other = (rollout(RandomPolicy(2), reacher, reacher.test_tasks[:3], episodes=2, seed=s) for s in (5, 6))
    np.testing.assert_array_equal(random_play.rewards, again.rewards)
    assert not np.isclose(random_play.rewards, other.rewards).any(axis=(1, 2)).all()
    assert not np.array_equal(random_play.qpos[:, 0, 0], other.qpos[:, 0, 0])


def test_a_task_starts_the_same_whatever_tasks_follow_and_whatever_the_policy_does(reacher, random_play):
    alone = rollout(RandomPolicy(2, 0), reacher, reacher.test_tasks[:1], episodes=2, seed=5)
    np.testing.assert_array_equal(alone.qpos[0, :, 0], random_play.qpos[0, :, 0])


def test_random_actions_fill_their_range():
    action, _ = RandomPolicy(7, 2).act(
        torch.zeros(4000, 20), None, None, None, generator=torch.Generator().manual_seed(0)
    )
    assert action.shape == (4000, 7)
    assert -2 <= action.min() < -1.99
    assert 1.99 < action.max() < 2
    # 28,000 draws of standard deviation 4/√12: five standard errors of the mean.
    assert abs(action.mean()) < 5 * 4 / 12**0.5 / 28000**0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "tasks is empty"),
        ({"episodes": 0}, "episodes=0 must be a whole number of at least 1"),
        ({"episodes": 2.5}, "episodes=2.5 must be a whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"tasks": (Task("ant-dir", (0.0,), "test", 0),)}, "tasks of ant-dir given with family 'toy'"),
    ],
)
def test_impossible_requests_are_refused_before_an_environment_is_made(change, message):
    family = ToyFamily()
    with pytest.raises(ValueError, match=message):
        rollout(**{"policy": Counter(), "family": family, "tasks": tasks(1), **change})
    assert family.envs == []


def test_the_name_of_a_family_is_no_family():
    with pytest.raises(TypeError, match=r"give adbook.family\('toy'\)"):
        rollout(Counter(), "toy", tasks(1))


def test_policy_of_another_family_is_refused():
    policy = Counter()
    policy.config = SimpleNamespace(observation_size=8, action_size=1)
    with pytest.raises(ValueError, match="policy has observation_size 8, toy has 2"):
        rollout(policy, ToyFamily(), tasks(1))


def test_saved_rollout_comes_back_as_it_was(played, tmp_path):
    result, _, _ = played
    loaded = Rollout.load(result.save(tmp_path / "new folder" / "r.safetensors"))
    for name in ("returns", "rewards", "actions", "qpos"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(result, name))
    described = [(r.family, r.split, r.tasks, r.metadata) for r in (loaded, result)]
    assert described[0] == described[1]
    assert [p.name for p in (tmp_path / "new folder").iterdir()] == ["r.safetensors"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(played, tmp_path, monkeypatch):
    path = played[0].save(tmp_path / "r.safetensors")
    before = path.read_bytes()

    def interrupted(file, data):
        file.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        played[0].save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_cannot_be_read_are_named_with_a_remedy(played, tmp_path):
    path = played[0].save(tmp_path / "r.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"x": np.zeros(2)}, tmp_path / "other.safetensors")
    arrays = load_file(path)
    save_file(arrays, tmp_path / "new.safetensors", {"kind": "adbook.Rollout", "schema": "2", "json": "{}"})
    for name, message in {
        "cut": r"cut\.safetensors is not a complete safetensors file .*make it again",
        "text": r"text\.safetensors is not a complete safetensors file",
        "other": r"other\.safetensors holds 'something else', not 'adbook\.Rollout'",
        "new": r"new\.safetensors has rollout schema 2, this adbook reads schema 1; run the rollout again",
    }.items():
        with pytest.raises(ValueError, match=message):
            Rollout.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no rollout at .*absent.*; make one"):
        Rollout.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"returns": np.zeros((3, 3))}, r"returns has shape \(3, 3\).*must be \(3, 2\)"),
        ({"qpos": np.zeros((3, 2, 4, 3))}, r"qpos has shape .*must be \(3, 2, 5, any\)"),
        ({"actions": np.zeros((3, 2, 4))}, r"actions has shape"),
        ({"rewards": np.zeros((3, 2))}, r"rewards has shape \(3, 2\)"),
        ({"tasks": tasks(2)}, "2 tasks were given for arrays of 3"),
        ({"returns": np.full((3, 2), np.nan)}, "returns holds a value that is not finite"),
        ({"rewards": np.where(np.arange(4) == 1, np.nan, np.zeros((3, 2, 4)))}, "rewards holds a gap"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(played, change, message):
    with pytest.raises(ValueError, match=message):
        replace(played[0], **change)


def test_repr_shows_shapes_and_not_numbers(played):
    assert repr(played[0]) == (
        "Rollout(family='toy', split='test', tasks=3, returns=(3, 2), rewards=(3, 2, 4), "
        "actions=(3, 2, 4, 1), qpos=(3, 2, 5, 3))"
    )


def test_tasks_of_several_splits_are_named_together():
    mixed = (Task("toy", (0.0,), "test", 0), Task("toy", (0.0,), "ood", 1))
    assert rollout(Counter(), ToyFamily(), mixed, episodes=1).split == "ood+test"
