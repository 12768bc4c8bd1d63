"""The oracle: it sees the goal, it is what stable-baselines3 trained, and it learns."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from stable_baselines3.common.vec_env import VecNormalize

import adbook
from adbook import oracle as module
from adbook.oracle import Oracle, goal_features, train_oracle
from adbook.rollout import RandomPolicy, rollout
from adbook.sources import PPOConfig

TINY = PPOConfig(
    steps=400, n_envs=4, streams=1, n_steps=50, batch_size=100, n_epochs=1, hidden=(16, 16), normalize=True
)
FAMILY = adbook.family("reacher-goal")

pytestmark = pytest.mark.usefixtures("threads")


def test_directions_are_shown_without_a_seam():
    ant = adbook.family("ant-dir")
    features = goal_features(ant.train_tasks)
    np.testing.assert_allclose((features**2).sum(1), 1, rtol=1e-6)
    assert goal_features(FAMILY.train_tasks).tolist() == [list(map(np.float32, t.goal)) for t in FAMILY.train_tasks]


def test_environments_show_the_goal_of_the_episode_and_draw_the_next():
    vector = module._Shown(FAMILY, 3, seed=0)
    seen = vector.reset()
    goals = seen[:, 8:]
    for t in range(50):
        following, rewards, done, infos = vector.step(np.zeros((3, 2), np.float32))
        tips = np.stack([info["terminal_observation"] for info in infos]) if done.all() else following
        np.testing.assert_allclose(rewards, -np.linalg.norm(tips[:, 6:8] - goals, axis=1), rtol=1e-5)
        np.testing.assert_array_equal(tips[:, 8:], goals)
        assert done.all() == (t == 49)
    assert (np.abs(following[:, 8:] - goals).max(1) > 0).all()
    _, rewards, *_ = vector.step(np.zeros((3, 2), np.float32))
    goals = following[:, 8:]
    np.testing.assert_allclose(rewards, -np.linalg.norm(following[:, 6:8] - goals, axis=1), atol=0.02)  # one step on
    vector.close()


def test_an_oracle_acts_as_the_policy_that_was_trained(monkeypatch):
    models = []
    learn = module.learn
    monkeypatch.setattr(module, "learn", lambda *a, **k: models.append(learn(*a, **k)) or models[0])
    oracle = train_oracle(FAMILY, TINY, progress=False)
    normal = models[0].get_vec_normalize_env()
    assert isinstance(normal, VecNormalize)
    tasks, rng = FAMILY.test_tasks[:5], np.random.default_rng(0)
    observations = rng.normal(0, 2, (5, 8)).astype(np.float32)
    seen = np.concatenate((observations, goal_features(tasks)), 1)
    expected, _ = models[0].predict(normal.normalize_obs(seen), deterministic=True)
    state = oracle.show(tasks).init_state(5)
    action, _ = oracle.act(torch.from_numpy(observations), None, None, state, deterministic=True)
    np.testing.assert_allclose(action.detach().clamp(-1, 1), expected, atol=1e-5)


def test_an_oracle_learns_and_survives_the_disk(tmp_path):
    config = PPOConfig(steps=60_000, n_envs=32, n_steps=50, batch_size=400, learning_rate=2e-3, normalize=True)
    oracle = train_oracle(FAMILY, config, progress=False)
    loaded = Oracle.load(oracle.save(tmp_path / "o.safetensors"))
    assert loaded.about["config"]["steps"] == 60_000
    tasks = FAMILY.train_tasks[:8]
    options = {"episodes": 2, "deterministic": True}
    played = rollout(loaded.show(tasks), FAMILY, tasks, **options).returns
    np.testing.assert_array_equal(played, rollout(oracle.show(tasks), FAMILY, tasks, **options).returns)
    chance = rollout(RandomPolicy(2), FAMILY, tasks, episodes=2).returns
    assert played.mean() > 0.5 * chance.mean()
    swapped = rollout(loaded.show(tasks[::-1]), FAMILY, tasks, **options).returns
    assert swapped.mean() < played.mean() - 1  # it goes where it is shown


def test_mistakes_are_told(tmp_path):
    oracle = Oracle("reacher-goal", (4,))
    with pytest.raises(ValueError, match="oracle of reacher-goal, not of ant-dir"):
        oracle.show(adbook.family("ant-dir").test_tasks)
    with pytest.raises(ValueError, match="no task was given"):
        oracle.show([])
    with pytest.raises(ValueError, match=r"2 tasks are played but 0 goals shown; call show"):
        oracle.init_state(2)
    with pytest.raises(ValueError, match="seed=-1 must be a whole number from 0"):
        train_oracle(FAMILY, PPOConfig(normalize=True), -1)
    with pytest.raises(ValueError, match="normalize=False"):
        train_oracle(FAMILY, PPOConfig(), progress=False)
    with pytest.raises(FileNotFoundError, match=r"no oracle at .*nowhere.*python -m adbook oracle"):
        Oracle.load(tmp_path / "nowhere.safetensors")
    path = oracle.save(tmp_path / "o.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"o\.safetensors is damaged or not of adbook.Oracle"):
        Oracle.load(path)
    for described in ("{", "null", '{"family": "reacher-goal"}'):
        save_file({"w": np.zeros(2)}, path, metadata={"kind": "adbook.Oracle", "schema": "1", "json": described})
        with pytest.raises(ValueError, match=r"o\.safetensors is damaged or not of adbook.Oracle"):
            Oracle.load(path)
    save_file({"w": np.zeros(2)}, path, metadata={"kind": "adbook.Rollout", "schema": "1"})
    with pytest.raises(ValueError, match=r"o\.safetensors holds adbook.Rollout of schema 1, not adbook.Oracle"):
        Oracle.load(path)
