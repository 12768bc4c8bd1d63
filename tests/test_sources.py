"""Source algorithms: what is recorded is what happened, in order, and the seed decides it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from stable_baselines3.common.type_aliases import ReplayBufferSamples

import adbook
from adbook import vectors
from adbook.droq import DroQ
from adbook.sources import DroQConfig, PPOConfig, SACConfig, _dice, learn, run_source, source_name
from adbook.vectors import TaskVector

pytestmark = pytest.mark.usefixtures("threads")
PPO = PPOConfig(steps=200, n_envs=2, streams=2, n_steps=50, batch_size=50, n_epochs=1)
SAC = SACConfig(steps=200, n_envs=2, streams=2, learning_starts=50, batch_size=16)
DROQ = DroQConfig(steps=200, n_envs=2, streams=2, learning_starts=150, batch_size=16, updates=2)
ALL = pytest.mark.parametrize("config", [PPO, SAC, DROQ], ids=source_name)


@pytest.fixture
def reacher():
    return adbook.family("reacher-goal")


@ALL
def test_a_run_records_its_streams_in_whole_episodes(reacher, config):
    recorded = run_source(reacher, reacher.train_tasks[0], config, seed=3)
    assert len(recorded) == 2
    for stream in recorded:
        assert stream["observations"].shape == (100, 8)  # 200 steps over two environments
        assert np.flatnonzero(stream["truncated"]).tolist() == [49, 99]
        assert np.abs(stream["actions"]).max() <= 1  # as applied, not as drawn
        assert {v.dtype for v in stream.values()} == {np.dtype(np.float32), np.dtype(bool)}
    assert not np.array_equal(recorded[0]["observations"], recorded[1]["observations"])


@ALL
def test_the_seed_decides_a_run(reacher, config):
    first, again, other = (run_source(reacher, reacher.train_tasks[0], config, seed=s)[1] for s in (3, 3, 4))
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    assert not np.array_equal(first["actions"], other["actions"])
    assert not np.array_equal(first["observations"][0], other["observations"][0])


@ALL
def test_weights_are_updated(reacher, config, monkeypatch):
    """Else a history would be a record of a policy that never learns."""
    before, after = {}, {}
    build = type(config).build

    def watched(config, vector, seed):
        model = build(config, vector, seed)
        before.update({name: v.clone() for name, v in model.policy.state_dict().items()})
        after["model"] = model
        return model

    monkeypatch.setattr(type(config), "build", watched)
    run_source(reacher, reacher.train_tasks[0], config, seed=0)
    now = after["model"].policy.state_dict()
    still = {name for name in before if torch.equal(before[name], now[name])}
    assert not still, still


def test_a_bonus_for_entropy_keeps_exploration_up(reacher):
    def log_std(entropy):
        config = replace(PPO, entropy=entropy)
        vector = TaskVector(reacher, reacher.train_tasks[:1] * config.n_envs, seed=0)
        return learn(vector, config, seed=0).policy.log_std.mean().item()

    assert log_std(0.0) < log_std(10.0)
    assert log_std(10.0) > PPO.log_std_init  # nothing else counts then


@pytest.mark.parametrize("config", [SAC, DROQ], ids=source_name)
def test_critics_are_updated_so_often_for_each_step(reacher, config):
    """A step of any of the environments, after those of random actions."""
    model = learn(TaskVector(reacher, reacher.train_tasks[:1] * config.n_envs, seed=0), config, seed=0)
    assert model._n_updates == config.updates * (config.steps - config.learning_starts)


def test_the_learning_rate_of_ppo_falls_linearly_to_0(reacher):
    model = replace(PPO, learning_rate=0.004).build(TaskVector(reacher, reacher.train_tasks[:2], seed=0), 0)
    assert [model.lr_schedule(remaining) for remaining in (1.0, 0.25, 0.0)] == [0.004, 0.001, 0.0]


def test_tasks_have_dice_of_their_own(reacher):
    """One seed for all tasks would give all the same exploration noise, which a model then learns by heart."""
    first, second = (run_source(reacher, task, PPO, seed=0)[0]["actions"][:50] for task in reacher.train_tasks[:2])
    # independent clipped noise: the mean squared difference is twice the variance, about 2 × 0.2
    assert np.mean((first - second) ** 2) > 0.1
    assert _dice(reacher.train_tasks[0], 0) != _dice(reacher.train_tasks[0], 1)


def test_a_run_leaves_its_caller_as_many_threads_as_it_had(reacher, monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    run_source(reacher, reacher.train_tasks[0], PPO, seed=0)
    assert (set_to[0], set_to[-1]) == (1, 7)


def test_a_source_tells_how_far_it_is(reacher):
    told = []
    run_source(reacher, reacher.train_tasks[0], PPO, seed=0, on_steps=told.append)
    assert told == [0, 100]  # before each of the two rollouts of 2 × 50 steps


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (PPOConfig, {"steps": 0}, "steps=0 must be a whole number of at least 1"),
        (PPOConfig, {"steps": 1e4}, "steps=10000.0 must be a whole number"),
        (PPOConfig, {"hidden": 64}, r"hidden=64 must be a tuple of layer widths of at least 1, such as .64, 64."),
        (SACConfig, {"hidden": (0,)}, r"hidden=.0,. must be a tuple"),
        (PPOConfig, {"batch_size": 1}, "batch_size=1 must be at least 2"),
        (PPOConfig, {"streams": 17}, "streams=17 exceeds n_envs=16"),
        (PPOConfig, {"batch_size": 300}, "batch_size=300 must divide n_envs . n_steps = 800"),
        (PPOConfig, {"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        (PPOConfig, {"learning_rate": float("nan")}, "learning_rate=nan must be a positive number"),
        (PPOConfig, {"gamma": 1.5}, "gamma=1.5 must be from 0 to 1"),
        (PPOConfig, {"log_std_init": float("inf")}, "log_std_init=inf must be a finite number"),
        (PPOConfig, {"entropy": -0.1}, "entropy=-0.1 must be a number of at least 0"),
        (SACConfig, {"updates": 0}, "updates=0 must be a whole number of at least 1"),
        (SACConfig, {"tau": -0.1}, "tau=-0.1 must be from 0 to 1"),
        (SACConfig, {"temperature": 0.0}, "temperature=0.0 must be a positive number"),
        (SACConfig, {"streams": 5}, "streams=5 exceeds n_envs=4"),
        (SACConfig, {"steps": 400}, "learning_starts=500 must be from 0 to below steps=400"),
        (PPOConfig, {"n_envs": True}, "n_envs=True must be a whole number of at least 1"),
        (PPOConfig, {"gamma": "0.9"}, "gamma='0.9' must be from 0 to 1"),
        (PPOConfig, {"normalize": "no"}, "normalize='no' must be True or False"),
        (SACConfig, {"temperature": "auto"}, "temperature='auto' must be a positive number"),
        (DroQConfig, {"dropout": 1.0}, "dropout=1.0 must be from 0 to below 1"),
    ],
)
def test_settings_that_cannot_run_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def droq(reacher, **changes: float) -> DroQ:
    return replace(DROQ, **changes).build(TaskVector(reacher, reacher.train_tasks[:2], seed=0), 0)


def test_droq_critics_are_regularised_and_no_other_network(reacher):
    model = droq(reacher, dropout=0.3)
    layer = ["Linear", "Dropout", "LayerNorm", "ReLU"]
    for critic in (model.critic, model.critic_target):
        for network in critic.q_networks:
            assert [type(m).__name__ for m in network] == [*layer, *layer, "Linear"]
            assert {m.p for m in network if isinstance(m, torch.nn.Dropout)} == {0.3}
        assert set(critic.parameters()) == {p for network in critic.q_networks for p in network.parameters()}
    assert not any(isinstance(m, torch.nn.Dropout | torch.nn.LayerNorm) for m in model.actor.modules())
    assert len(model.critic.optimizer.param_groups[0]["params"]) == len(list(model.critic.parameters()))
    for one, two in zip(model.critic.parameters(), model.critic_target.parameters(), strict=True):
        assert torch.equal(one, two)


def test_droq_updates_the_policy_once_and_the_critics_every_time(reacher):
    model = droq(reacher)
    model.learn(160)
    counted = {"actor": 0, "critic": 0}
    for name in counted:
        optimizer = getattr(model, name).optimizer
        step = optimizer.step

        def count(*args, name=name, step=step, **kwargs):
            counted[name] += 1
            return step(*args, **kwargs)

        optimizer.step = count
    model.train(gradient_steps=20, batch_size=16)
    assert counted == {"actor": 1, "critic": 20}


def test_droq_keeps_dropout_in_the_target(reacher):
    """The same input twice gives two values; stable-baselines3 keeps its targets in evaluation mode."""
    model = droq(reacher, dropout=0.5)
    model.learn(160)
    model.train(gradient_steps=1, batch_size=16)
    observations, actions = torch.ones(4, 8), torch.zeros(4, 2)
    with torch.no_grad():
        one, two = (torch.cat(model.critic_target(observations, actions)) for _ in range(2))
    assert not torch.equal(one, two)


def test_droq_hands_out_targets_of_fresh_actions_and_last_of_all_the_policy_its_batch(reacher, monkeypatch):
    """γ (1 - d) for every transition, α log π of an action drawn where it ended, batches in order."""
    model = droq(reacher, gamma=0.9, temperature=0.3)
    model.learn(2)  # no update yet
    sizes = {"observations": 8, "actions": 2, "next_observations": 8, "rewards": 1}
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(6, size, generator=generator) for name, size in sizes.items()}
    dones = torch.tensor([0.0, 1, 0, 0, 1, 0])[:, None]
    asked, critics, policy = [], [], []

    def sample(*what, **_):
        asked.append(what)
        return ReplayBufferSamples(**drawn, dones=dones)

    monkeypatch.setattr(model.replay_buffer, "sample", sample)
    monkeypatch.setattr(model, "_update_critics", lambda *batch: critics.append(batch))
    monkeypatch.setattr(model, "_update_policy", lambda *batch: policy.append(batch))
    torch.manual_seed(5)
    model.train(gradient_steps=3, batch_size=2)
    torch.manual_seed(5)
    with torch.no_grad():
        actions, log_probability = model.actor.action_log_prob(drawn["next_observations"])
    assert asked == [(6,)]
    names = "observations", "actions", "next_observations"
    expected = [*(drawn[name] for name in names), actions, drawn["rewards"], 0.9 * (1 - dones)]
    expected.append(0.3 * log_probability[:, None])
    for column, whole in zip(zip(*critics, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(column), whole)
    assert [len(batch[0]) for batch in critics] == [2, 2, 2]
    ((observations, temperature),) = policy
    assert torch.equal(observations, drawn["observations"][4:])
    assert temperature.item() == pytest.approx(0.3)


def test_droq_critic_update_by_hand(reacher):
    """Without dropout, the target is r + γ (1 - d) (min Q' - α log π), the loss half the squared errors."""
    model = droq(reacher, dropout=0.0)
    sizes = {"observations": 8, "actions": 2, "next_observations": 8, "next_actions": 2, "rewards": 1, "discounts": 1}
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(5, size, generator=generator) for name, size in sizes.items()}
    cost = torch.full((5, 1), 0.7)
    with torch.no_grad():
        smaller = torch.minimum(*model.critic_target(batch["next_observations"], batch["next_actions"]))
        target = batch["rewards"] + batch["discounts"] * (smaller - 0.7)
    values = model.critic(batch["observations"], batch["actions"])
    loss = sum(0.5 * (value - target).pow(2).mean() for value in values)
    expected = torch.autograd.grad(loss, list(model.critic.parameters()))
    model._update_critics(*batch.values(), cost)
    for p, gradient in zip(model.critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-6)  # sums of 5 × 64 float32 products


def test_droq_policy_update_by_hand(reacher):
    """The policy falls along α log π - the mean of the critics; the temperature falls where entropy is plentiful."""
    model = droq(reacher, dropout=0.0)
    observations, temperature = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3])
    for surplus in (1.0, -1.0):
        torch.manual_seed(1)
        actions, log_probability = model.actor.action_log_prob(observations)
        first, second = model.critic(observations, actions)
        loss = (0.3 * log_probability[:, None] - (first + second) / 2).mean()
        expected = torch.autograd.grad(loss, list(model.actor.parameters()))
        model.target_entropy = -log_probability.mean().item() - surplus
        before = model.log_ent_coef.item()
        torch.manual_seed(1)
        model._update_policy(observations, temperature)
        for p, gradient in zip(model.actor.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-6)
        assert (model.log_ent_coef.item() - before) * surplus < 0


def test_droq_target_follows_every_critic_update(reacher):
    model = droq(reacher, dropout=0.0, tau=0.25)
    model.learn(160)
    old = [p.clone() for p in model.critic_target.parameters()]
    model.train(gradient_steps=1, batch_size=16)
    for p, before, new in zip(model.critic_target.parameters(), old, model.critic.parameters(), strict=True):
        torch.testing.assert_close(p, 0.75 * before + 0.25 * new)


def test_a_saved_droq_is_loaded(reacher, tmp_path):
    model = droq(reacher, dropout=0.3)
    model.save(tmp_path / "droq")
    again = DroQ.load(tmp_path / "droq")
    assert again.critic.q_networks[0][1].p == 0.3


@pytest.mark.parametrize("name", vectors._ENVPOOL)
def test_envpool_steps_as_gymnasium_does(name):
    """From the same state, each step of an episode leads to the same observation and reward."""
    pytest.importorskip("envpool")
    assert vectors.disagreement(name) <= vectors.TOLERANCE
    assert vectors.simulator(name) == "envpool"


def test_a_family_that_envpool_steps_otherwise_is_left_to_gymnasium(monkeypatch):
    pytest.importorskip("envpool")
    assert vectors.simulator("ant-dir") == vectors.simulator("pusher-goal") == "gymnasium"
    for apart in (2e-5, float("nan")):
        monkeypatch.setattr(vectors, "disagreement", lambda name, apart=apart: apart)
        assert vectors.simulator.__wrapped__("reacher-goal") == "gymnasium"
    monkeypatch.setattr(vectors.importlib.util, "find_spec", lambda name: None)
    assert vectors.simulator.__wrapped__("half-cheetah-vel") == "gymnasium"


@pytest.mark.parametrize("kind", [vectors._Gymnasium, vectors._EnvPool])
@pytest.mark.parametrize("name", vectors._ENVPOOL)
def test_rewards_and_ends_in_a_vector(name, kind, monkeypatch):
    """Rewards follow each environment's own goal; an episode lasts the horizon, and its last observation is kept."""
    if kind is vectors._EnvPool:
        pytest.importorskip("envpool")
    family = adbook.family(name)
    monkeypatch.setitem(vectors.SIMULATORS, vectors.simulator(name), kind)
    tasks = family.train_tasks[:2]
    vector = TaskVector(family, tasks, seed=1, capacity=family.horizon + 1, streams=2)
    first = vector.reset()
    for t in range(family.horizon + 1):
        following, rewards, done, infos = vector.step(np.zeros((2, family.action_size), np.float32))
        assert done.tolist() == [t == family.horizon - 1] * 2
        if done.all():
            last, after = np.stack([info["terminal_observation"] for info in infos]), following
            assert all(info["TimeLimit.truncated"] for info in infos)
    assert rewards[0] != rewards[1]
    one, two = vector.streams
    np.testing.assert_array_equal(one["observations"][0], first[0])
    np.testing.assert_array_equal(two["next_observations"][-1], last[1])
    assert not np.allclose(last, after)  # what an algorithm sees next is another episode
    assert len(one["rewards"]) == family.horizon  # cut after the last finished episode
    vector.close()


def test_a_vector_that_never_ended_an_episode_has_no_stream(reacher):
    vector = TaskVector(reacher, reacher.train_tasks[:1], seed=0, capacity=3, streams=1)
    vector.reset()
    vector.step(np.zeros((1, 2)))
    assert all(len(values) == 0 for values in vector.streams[0].values())


@pytest.mark.parametrize("normalize", [False, True])
def test_replaying_the_recorded_actions_gives_the_recorded_stream(reacher, monkeypatch, normalize):
    """Nothing was lost, reordered, changed or normalised between the simulator and the record."""
    monkeypatch.setitem(vectors.SIMULATORS, vectors.simulator("reacher-goal"), vectors._Gymnasium)
    stream = run_source(reacher, reacher.train_tasks[0], replace(PPO, normalize=normalize), seed=3)[1]
    env = reacher.make(reacher.train_tasks[0])
    seeds = np.random.SeedSequence(_dice(reacher.train_tasks[0], 3)).generate_state(2)
    observation, _ = env.reset(seed=int(seeds[1]))
    for t, action in enumerate(stream["actions"]):
        np.testing.assert_array_equal(stream["observations"][t], observation.astype(np.float32))
        observation, reward, _, truncated, _ = env.step(action)
        np.testing.assert_array_equal(stream["next_observations"][t], observation.astype(np.float32))
        assert stream["rewards"][t] == np.float32(reward)
        if truncated:
            observation, _ = env.reset()
    env.close()


def test_an_early_end_is_told_apart_from_the_horizon():
    """Ant falls over: terminated, not truncated, and the value of what follows is not added to its reward."""
    family = adbook.family("ant-dir")
    vector = TaskVector(family, family.train_tasks[:2], seed=0, capacity=200, streams=2)
    vector.reset()
    rng = np.random.default_rng(0)
    ended = []
    for _ in range(200):
        _, _, done, infos = vector.step(rng.uniform(-1, 1, (2, 8)).astype(np.float32))
        ended += [info["TimeLimit.truncated"] for info, d in zip(infos, done, strict=True) if d]
    streams = vector.streams
    assert sum(s["terminated"].sum() for s in streams) == ended.count(False)
    assert sum(s["truncated"].sum() for s in streams) == ended.count(True)
    assert ended.count(False) >= 1
    vector.close()


def test_settings_too_short_for_an_episode_are_refused_before_the_run():
    cheetah = adbook.family("half-cheetah-vel")
    with pytest.raises(ValueError, match=r"steps=1600 over 16 environments are 100 steps each.*half-cheetah-vel .200"):
        run_source(cheetah, cheetah.train_tasks[0], PPOConfig(steps=1600), seed=0)


def test_tasks_of_another_family_and_none_are_refused(reacher):
    with pytest.raises(ValueError, match="tasks of ant-dir given with family 'reacher-goal'"):
        TaskVector(reacher, adbook.family("ant-dir").train_tasks[:1], seed=0)
    with pytest.raises(ValueError, match="tasks is empty"):
        TaskVector(reacher, [], seed=0)
