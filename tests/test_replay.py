"""The source's histories as rollouts: the positions recovered from observations are the ones that MuJoCo had."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest

import adbook
from adbook.histories import LearningHistory
from adbook.replay import source_rollout
from adbook.rollout import Rollout

HALF_ULP = 2.0**-24  # of float32, relative


@dataclass
class Run:
    """A history of random actions, and what only MuJoCo knew: positions and velocities, by episode."""

    history: LearningHistory
    qpos: list[np.ndarray]
    qvel: list[np.ndarray]


def play(name, task, episodes=2, seed=0, scale=1.0, act=None, kick=None) -> Run:
    """Play episodes with `act(step, rng)`, by default random actions, and write down all that happens."""
    family, rng = adbook.family(name), np.random.default_rng(seed)
    env, rows, qpos, qvel = family.make(task), [], [], []
    high = scale * family.action_scale
    act = act or (lambda step, rng: rng.uniform(-high, high, family.action_size))
    data = env.unwrapped.data
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed if episode == 0 else None)
        if kick:
            kick(data)
        qpos.append([data.qpos.copy()])
        qvel.append([data.qvel.copy()])
        ended, step = False, 0
        while not ended:
            action = act(step, rng).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, reward, following, terminated, truncated))
            qpos[-1].append(data.qpos.copy())
            qvel[-1].append(data.qvel.copy())
            observation, ended, step = following, terminated or truncated, step + 1
    env.close()
    kinds = [np.float32] * 4 + [bool] * 2
    columns = [np.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    metadata = {"task": asdict(task), "source": "PPO"}
    return Run(LearningHistory(*columns, metadata), [np.array(q) for q in qpos], [np.array(v) for v in qvel])


def pairs(run):
    """Recovered and true positions of each episode, and the true velocities."""
    shown = source_rollout([run.history], episodes=len(run.qpos))
    for k, (true, velocity) in enumerate(zip(run.qpos, run.qvel, strict=True)):
        recovered = shown.qpos[0, k]
        assert np.isnan(recovered[len(true) :]).all()
        yield recovered[: len(true)].astype(float), true, velocity


def spin(step, rng):
    """Full torque: the faster joint makes many turns."""
    return np.array([1.0, -0.2])


@pytest.mark.parametrize("act", [None, spin])
def test_reachers_angles_are_exact_over_whole_turns(act):
    task = adbook.family("reacher-goal").test_tasks[3]
    for recovered, true, _ in pairs(play("reacher-goal", task, act=act)):
        # cos and sin are rounded (each by at most half an ulp of 1), and then the angle is
        np.testing.assert_allclose(recovered, true, rtol=HALF_ULP, atol=2 * HALF_ULP)
        if act:
            assert np.ptp(true[:, 0]) > 4 * np.pi
            assert np.abs(np.diff(true[:, 0])).max() < np.pi  # or turns could not be counted
        np.testing.assert_array_equal(recovered[:, 2:], np.float32([task.goal] * len(true)))


def test_pushers_joints_and_goal_are_exact_and_its_object_is_10_ms_old():
    def kick(data):
        data.qvel[7:9] = 4, -3  # the object's velocity is not observed

    task = adbook.family("pusher-goal").test_tasks[3]
    for recovered, true, velocity in pairs(play("pusher-goal", task, kick=kick)):
        others = [*range(7), 9, 10]
        np.testing.assert_array_equal(recovered[:, others], true[:, others].astype(np.float32))
        # MuJoCo's last step of 10 ms moved the object by its new velocity; the place (below 1 m) is rounded twice
        assert np.abs(np.ptp(true[:, 7:9], axis=0)).min() > 0.1
        assert (np.abs(recovered - true)[1:, 7:9] <= 0.01 * np.abs(velocity[1:, 7:9]) + 2 * HALF_ULP).all()
        np.testing.assert_allclose(recovered[0], true[0], rtol=0, atol=2 * HALF_ULP)


def drift(recovered, true, columns):
    """Largest error, over an episode, of the way from its start; m."""
    way = [x[:, columns] - x[0, columns] for x in (recovered, true)]
    return np.abs(way[0] - way[1]).max()


def walk(velocity, columns, dt=0.05):
    """How far the trapezoidal rule may go astray over an episode, m.

    In each step it is off by at most half the change of the velocity, were that monotonic, and to either side: taken as
    evenly spread in between, the sum is a random walk, and three of its standard deviations are allowed.
    """
    changes = np.diff(velocity[:, columns], axis=0)
    return 3 * np.sqrt(np.square(dt / 2 * changes).sum(axis=0) / 3).max()


@pytest.mark.parametrize("near", [False, True])
def test_cheetahs_pose_is_exact_and_its_way_too_if_the_reward_tells_the_side(near):
    family = adbook.family("half-cheetah-vel")
    task = (min if near else max)(family.test_tasks + family.ood_tasks, key=lambda task: abs(task.goal[0]))
    for recovered, true, velocity in pairs(play("half-cheetah-vel", task, episodes=4)):
        np.testing.assert_array_equal(recovered[:, 1:], true[:, 1:].astype(np.float32))
        assert np.ptp(true[:, 0]) > 0.3
        # Rewards of at most 8 in size are rounded by 2^-22 at most, and over 10 s all of it may add up; the control
        # cost, an action's dot product in float32, and x itself add less than that again.
        assert drift(recovered, true, [0]) < (2 * walk(velocity, [0]) if near else 10 * 2.0**-21)


def test_ants_pose_is_exact_and_its_way_is_integrated():
    task = adbook.family("ant-dir").test_tasks[0]
    lengths = set()
    for recovered, true, velocity in pairs(play("ant-dir", task, episodes=6)):
        np.testing.assert_array_equal(recovered[:, 2:], true[:, 2:].astype(np.float32))
        assert drift(recovered, true, [0, 1]) < walk(velocity, [0, 1])
        lengths.add(len(true) - 1)
    assert min(lengths) < 200  # some ended early


def toy(n=12, **metadata) -> LearningHistory:
    """Reacher's history of `n` episodes at rest; the reward is the episode's number in every step."""
    seen = np.tile(np.float32([1, 1, 0, 0, 0, 0, 0.21, 0]), (50 * n, 1))
    rewards = np.repeat(np.arange(n), 50).astype(np.float32)
    actions = np.stack((rewards / 100, -rewards / 100), 1)
    last = np.arange(50 * n) % 50 == 49
    about = {"task": asdict(adbook.family("reacher-goal").test_tasks[0]), "source": "PPO", **metadata}
    return LearningHistory(seen, actions, rewards, seen, np.zeros_like(last), last, about)


def another(history, index=1, name="reacher-goal") -> LearningHistory:
    return replace(history, metadata=history.metadata | {"task": asdict(adbook.family(name).test_tasks[index])})


def test_episodes_are_spread_from_the_first_to_the_last():
    shown = source_rollout([toy(12), another(toy(5))], episodes=5)
    expected = [[0, 2, 5, 8, 11], [0, 1, 2, 3, 4]]
    assert shown.metadata == {"source": "PPO", "episodes": expected, "of": [12, 5]}
    np.testing.assert_array_equal(shown.returns, 50 * np.float32(expected))
    np.testing.assert_array_equal(shown.rewards, np.repeat(np.float32(expected)[..., None], 50, axis=-1))
    np.testing.assert_array_equal(shown.actions[..., 1], -shown.rewards / np.float32(100))
    assert shown.tasks == adbook.family("reacher-goal").test_tasks[:2]
    assert (shown.family, shown.split) == ("reacher-goal", "test")


def test_episodes_of_the_environments_beside_are_counted():
    shown = source_rollout([toy(6, config={"n_envs": 4}, stream=3)], episodes=3)
    assert shown.metadata["episodes"] == [[3, 11, 23]]  # of the stream the episodes 0, 2 and 5
    assert shown.metadata["of"] == [24]


def test_numbers_count_episodes_of_the_source_run_also_where_it_was_thinned():
    shown = source_rollout([toy(12).every(2, 1).every(3)], episodes=2)
    assert shown.metadata["episodes"] == [[1, 7]]
    assert shown.metadata["of"] == [8]
    assert shown.returns.tolist() == [[50, 350]]


def test_a_rollout_of_the_source_is_saved_and_loaded(tmp_path):
    shown = source_rollout([toy(3)], episodes=3)
    loaded = Rollout.load(shown.save(tmp_path / "source.safetensors"))
    np.testing.assert_array_equal(loaded.qpos, shown.qpos)
    assert (loaded.metadata, loaded.tasks) == (shown.metadata, shown.tasks)


def test_histories_that_do_not_fit_are_refused():
    nameless = replace(toy(), metadata={})
    with pytest.raises(ValueError, match="no history was given"):
        source_rollout([])
    with pytest.raises(ValueError, match="history 1 names no task"):
        source_rollout([toy(), nameless])
    with pytest.raises(ValueError, match=r"histories of pusher-goal, reacher-goal were given; give those of one"):
        source_rollout([toy(), another(toy(), name="pusher-goal")])
    with pytest.raises(ValueError, match="two histories of reacher-goal/test-000 were given; give one a task"):
        source_rollout([toy(), another(toy()), toy()])
    with pytest.raises(ValueError, match=r"20 episodes are asked for and .* has 12; lower episodes"):
        source_rollout([toy()])
    with pytest.raises(ValueError, match="episodes=1 must be at least 2"):
        source_rollout([toy()], episodes=1)
