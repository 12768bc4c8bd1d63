"""MQL piece by piece: contexts, targets, the proximal term, propensity, effective sample size, adaptation at play."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import adbook
from adbook import experiments
from adbook.baselines import mql, mql_adaptation, mql_replay
from adbook.baselines.mql import MQL, Learner
from adbook.baselines.mql_adaptation import AdaptationConfig, AdaptingMQL, effective_sample_size, fit_propensity
from adbook.baselines.mql_replay import MQLConfig, Replay
from adbook.baselines.runs import mql_config

TINY = MQLConfig(2, 1, horizon=5, hidden=(6,), context=3, memory=4, batch=8)
QUICK = AdaptationConfig(steps=8, new_updates=2, old_updates=4, old_batch=8, samples=20)


@pytest.fixture
def model():
    return MQL(TINY)


def filled(steps=12, n=2, length=5, seed=0, config=TINY):
    """A replay of episodes of `length` steps; rewards count the steps of all tasks."""
    replay, rng = Replay(n, steps, config), np.random.default_rng(seed)
    for t in range(steps):
        sizes = (n, config.observation_size), (n, config.action_size), (n, config.observation_size)
        observations, actions, following = (rng.standard_normal(size).astype(np.float32) for size in sizes)
        row = {"observations": observations, "actions": actions, "next_observations": following}
        ended = np.full(n, t % length == length - 1)
        replay.add(**row, rewards=n * t + np.arange(n), terminated=ended, since_start=np.full(n, t % length))
    return replay


def test_a_context_holds_the_transitions_before_and_none_of_another_episode_or_task():
    replay = filled()
    batch = replay.at(np.array([7, 5, 0, 9]), np.array([1, 0, 0, 1]))
    rewards = batch.past[..., -1]
    np.testing.assert_array_equal(rewards, [[0, 11, 13], [0, 0, 0], [0, 0, 0], [13, 15, 17]])
    np.testing.assert_array_equal(batch.next_past[..., -1], [[11, 13, 15], [0, 0, 10], [0, 0, 0], [15, 17, 19]])
    np.testing.assert_array_equal(batch.rewards, [15, 10, 0, 19])
    np.testing.assert_array_equal(batch.terminated, [0, 0, 0, 1])
    features = torch.cat((batch.observations, batch.actions, batch.rewards.unsqueeze(1)), 1)
    np.testing.assert_array_equal(batch.next_past[:, -1], features)


def test_a_thinned_replay_keeps_whole_stretches_from_starts_of_episodes():
    replay = filled(24, n=2)
    replay.since_start[:, 1] = torch.arange(1, 25).remainder(3)  # the second task's episodes start at 2, 5, 8, …
    thin = replay.thinned(2, skip=4)
    np.testing.assert_array_equal(thin.rewards[:, 0] / 2, [5, 6, 7, 8, 9, 15, 16, 17, 18, 19])
    np.testing.assert_array_equal((thin.rewards[:, 1] - 1) / 2, [5, 6, 7, 8, 9, 17, 18, 19, 20, 21])
    np.testing.assert_array_equal(thin.at(np.array([5]), np.array([0])).past[..., -1], [[0, 0, 0]])
    with pytest.raises(ValueError, match="begins and ends after the first 22 of 24 steps of a task; raise steps or"):
        replay.thinned(2, skip=22)


@pytest.mark.parametrize("name", adbook.FAMILIES)
def test_a_smoke_run_leaves_whole_episodes_to_keep(name):
    settings = experiments.profile("smoke", name)
    config, _ = mql_config(settings)
    assert config.steps - config.random_steps >= 2 * settings.n_tasks * config.horizon


def test_contexts_at_play_are_those_of_the_replay():
    replay, past = filled(n=1), mql_replay.no_past(1, TINY)
    for t in range(replay.steps):
        batch = replay.at(np.array([t]), np.array([0]))
        torch.testing.assert_close(past, batch.past)
        past = mql_replay.remembered(past, batch.observations, batch.actions, batch.rewards)
        torch.testing.assert_close(past, batch.next_past)
        if t % 5 == 4:
            past[:] = 0


def test_targets_take_the_smaller_critic_and_stop_at_a_terminal_state(model):
    learner = Learner(model)
    for bias, net in zip((3.0, 2.0), learner.target.critics.nets, strict=True):
        torch.nn.init.zeros_(net[-1].weight)
        torch.nn.init.constant_(net[-1].bias, bias)
    batch = filled().at(np.array([0, 4]), np.array([0, 0]))
    torch.testing.assert_close(learner.wanted(batch), torch.tensor([0 + 0.99 * 2.0, 8.0]))


def test_targets_are_computed_with_noisy_actions_within_bounds(model):
    """A critic that returns the action: it is the target actor's, moved by at most the clipped noise, or at a bound."""
    learner = Learner(model)
    for net in learner.target.critics.nets:
        net[0] = torch.nn.Identity()
        net[2] = torch.nn.Identity()
        net[1] = torch.nn.Linear(TINY.observation_size + TINY.memory + 1, 1)
        torch.nn.init.zeros_(net[1].bias)
        net[1].weight.data = torch.tensor([[0.0] * (TINY.observation_size + TINY.memory) + [1.0]])
    batch = filled().at(np.zeros(500, int), np.zeros(500, int))
    with torch.no_grad():
        calm = learner.target.actor(batch.next_past, batch.next_observations)[:, 0]
    moved = learner.wanted(batch) / TINY.discount - calm
    assert moved.abs().max() <= TINY.noise_clip + 1e-6
    assert moved.std().item() == pytest.approx(0.28, abs=0.04)  # 0.3, clipped at 0.5


def test_actor_and_targets_move_at_every_second_update(model):
    learner, replay, rng = Learner(model), filled(), np.random.default_rng(0)
    slow = copy.deepcopy(learner.target)
    learner.update(replay.sample(8, rng))
    for after, old, fast in zip(*(x.parameters() for x in (learner.target, slow, model)), strict=True):
        torch.testing.assert_close(after, 0.995 * old + 0.005 * fast.detach())
    before, slow = copy.deepcopy(model), copy.deepcopy(learner.target)
    learner.update(replay.sample(8, rng))
    assert same(model.actor, before.actor)
    assert not same(model.critics, before.critics)
    assert same(learner.target, slow)


def test_it_learns_the_action_that_pays_from_transitions_that_count():
    """A bandit: half of the transitions pay for large actions, the other half, of weight 0, for small ones."""
    model, replay = MQL(replace(TINY, hidden=(32,))), filled(400)
    replay.actions.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    replay.terminated.fill_(1.0)
    replay.rewards.copy_(replay.actions[..., 0] * torch.tensor([1.0, -1.0]))  # by task
    learner, rng = Learner(model), np.random.default_rng(0)
    for _ in range(200):
        steps, tasks = rng.integers(400, size=64), rng.integers(2, size=64)
        learner.update(replay.at(steps, tasks), torch.from_numpy(1.0 - tasks).float())
    batch = replay.sample(64, rng)
    assert model.actor(batch.past, batch.observations).mean() > 0.5
    best, worst = (model.critics(batch.past, batch.observations, torch.full((64, 1), a)).mean() for a in (1.0, -1.0))
    assert best > worst + 1


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_transitions_of_weight_zero_teach_nothing(model):
    learner, before = Learner(model), copy.deepcopy(model)
    for _ in range(2):
        learner.update(filled().sample(8, np.random.default_rng(0)), torch.zeros(8))
    assert same(model, before)


def test_the_proximal_term_by_hand():
    net, anchor = (torch.nn.Linear(2, 1) for _ in range(2))
    net.weight.data, net.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    anchor.weight.data, anchor.bias.data = torch.tensor([[0.0, 2.0]]), torch.tensor([5.0])
    term = mql.proximal(net, anchor, 0.4)
    assert term.item() == pytest.approx(0.2 * (1 + 4))
    term.backward()
    torch.testing.assert_close(net.weight.grad, torch.tensor([[0.4, 0.0]]))
    torch.testing.assert_close(net.bias.grad, torch.tensor([-0.8]))


def test_the_propensity_of_a_context_with_two_values_is_the_ratio_of_their_shares():
    """With two values the logistic model is saturated: 3 of 4 against 1 of 5, and 1 of 4 against 4 of 5."""
    new, old = np.array([[0.0], [0.0], [0.0], [1.0]]), np.array([[0.0], [1.0], [1.0], [1.0], [1.0]])
    fitted = fit_propensity(new, old, l2=0.0)
    np.testing.assert_allclose(fitted.beta(np.array([[0.0], [1.0]])), [0.75 / 0.2, 0.25 / 0.8], rtol=1e-3)


def test_contexts_that_are_alike_have_a_propensity_of_one():
    contexts = np.random.default_rng(0).standard_normal((200, 3))
    np.testing.assert_allclose(fit_propensity(contexts, contexts).beta(contexts), 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected"), [([2, 2, 2, 2], 1.0), ([1, 0, 0, 0], 0.25), ([2, 1], 0.9), ([0, 0], 0.0)]
)
def test_effective_sample_size_by_hand(beta, expected):
    assert effective_sample_size(np.array(beta, float)) == pytest.approx(expected)


def test_a_weight_in_the_loss_is_cut_above_and_dropped_below():
    propensity = mql_adaptation.Propensity(np.array([1.0, 0.0]), np.array([[0.0], [1.0]]))  # β = e^context
    contexts = np.log([[0.09], [0.5], [2.0], [9.0]])
    np.testing.assert_allclose(propensity.counted(contexts, AdaptationConfig()), [0, 0.5, 2, 2.7])


def test_adaptation_leaves_the_meta_trained_weights_and_moves_its_own(model):
    before = copy.deepcopy(model)
    actor = mql_adaptation.adapt(model, filled(n=1, seed=1), filled(), QUICK)
    assert same(model, before)
    assert not same(actor, model.actor)


def test_weights_are_held_the_more_the_fewer_old_transitions_are_like_the_new(model, monkeypatch):
    """λ = 1 − ESS: nearly 0 where the new task is like all old ones; nearly 3/4 where it is like one of four."""
    pulls = []
    monkeypatch.setattr(Learner, "update", lambda self, *a, pull, **k: pulls.append(pull))
    old, new = filled(200, n=4), filled(200, n=1)
    for replay in (old, new):
        replay.rewards.normal_(generator=torch.Generator().manual_seed(0))
    mql_adaptation.adapt(model, new, old, replace(QUICK, samples=500))
    for strange in range(4):
        old.rewards[:, strange] = 1e3 * (-1) ** strange * (strange > 1)
    new.rewards[:] = -1e3
    mql_adaptation.adapt(model, new, old, replace(QUICK, samples=500))
    assert len(pulls) == 2 * (QUICK.new_updates + QUICK.old_updates)
    assert pulls[0] < 0.2
    assert pulls[-1] == pytest.approx(0.75, abs=0.1)


def test_adaptation_weighs_old_transitions_and_is_drawn_to_the_meta_trained_weights(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Learner, "update", lambda self, batch, weights=None, *, anchor, pull: seen.append((batch, weights, anchor))
    )
    mql_adaptation.adapt(model, filled(n=1, seed=1), filled(), QUICK)
    assert all(anchor is model for *_, anchor in seen)
    assert [weights is None for _, weights, _ in seen] == [True] * 2 + [False] * 4
    assert all(weights.shape == (QUICK.old_batch,) for _, weights, _ in seen[2:])
    with pytest.raises(ValueError, match="the number of steps in new=0 must be"):
        mql_adaptation.adapt(model, Replay(1, 4, TINY), filled(), QUICK)


def test_an_agent_remembers_no_step_of_the_episode_before(model):
    agent = AdaptingMQL(model, filled(), replace(QUICK, steps=100))
    state = agent.init_state(2)
    for t in range(3):
        start = torch.tensor([t == 0, t in (0, 2)])
        _, state = agent.act(torch.ones(2, 2), torch.ones(2), start, state)
    assert state.past[0, 1:].all()
    assert not state.past[1].any()


def test_a_task_adapts_at_the_first_start_of_an_episode_after_enough_steps_and_alone(model):
    """Episodes of 4 and of 6 steps, at least 7 steps before adaptation: due at steps 8 and 12."""
    agent = AdaptingMQL(model, filled(), replace(QUICK, steps=7))
    state, changed, generator = agent.init_state(2), [[], []], torch.Generator().manual_seed(0)
    for t in range(14):
        start = torch.tensor([t % 4 == 0, t % 6 == 0])
        observation = torch.randn(2, 2, generator=generator)
        with torch.inference_mode():
            _, state = agent.act(observation, torch.full((2,), float(t)), start, state, generator=generator)
        for i in range(2):
            changed[i].append(state.actors[i] is not model.actor)
    assert [row.index(True) for row in changed] == [8, 12]


def test_what_an_agent_has_seen_becomes_a_replay():
    """Episodes of 3 steps, which ended in a terminal state, and of 5, the horizon, whose end nobody saw."""
    seen = mql_adaptation.Seen.nothing(2, 2, 1)
    for t in range(8):
        start = torch.tensor([t in (0, 3), t == 0])
        numbers = (torch.full(size, float(t)) for size in ((2, 2), (2, 1)))
        seen = seen.acted(*numbers, start).rewarded(torch.full((2,), float(t)))
    replay = mql_adaptation.as_replay(seen, 0, TINY)
    batch = replay.at(np.arange(replay.steps), np.zeros(replay.steps, int))
    np.testing.assert_array_equal(batch.rewards, [0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(batch.terminated, [0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.next_observations[[0, 1, 3, 6], 0], [1, 2, 4, 7])
    np.testing.assert_array_equal(batch.past[4, :, -1], [0, 0, 3])
    seen = seen.acted(torch.zeros(2, 2), torch.zeros(2, 1), torch.tensor([True, True])).rewarded(torch.full((2,), 8.0))
    ended = mql_adaptation.as_replay(seen, 0, TINY)  # the last episode, of one step, has ended in a terminal state
    assert ended.at(np.array([7]), np.array([0])).terminated.item() == 1


def test_meta_training_repeats_itself_and_learns_from_all_tasks_in_order():
    known = adbook.family("reacher-goal")
    config = MQLConfig(
        8, 2, horizon=50, hidden=(8,), memory=4, batch=8, steps=240, random_steps=120, updates_per_step=0.1
    )
    models = [MQL(config), MQL(config), MQL(replace(config, seed=1))]
    replays = [mql.meta_train(model, known, known.train_tasks[:2], progress=False)[0] for model in models]
    assert same(models[0], models[1])
    assert not same(models[0], models[2])
    assert not same(models[0], MQL(config))
    assert replays[0].steps == 120  # of each task
    batch = replays[0].at(np.array([49, 50]), np.array([1, 1]))
    assert batch.past[0].any(1).all()
    assert not batch.past[1].any()
    assert (batch.terminated == 0).all()  # Reacher's episodes end by time


def test_meta_training_that_was_killed_keeps_what_it_had(tmp_path, monkeypatch):
    monkeypatch.setattr(mql, "CHECKPOINT_EVERY", 120)
    known, checkpoint = adbook.family("reacher-goal"), tmp_path / "mql.training"
    config = MQLConfig(
        8, 2, horizon=50, hidden=(8,), memory=4, batch=8, steps=240, random_steps=60, updates_per_step=0.1
    )
    whole, killed, resumed, again = (MQL(config) for _ in range(4))

    def trained(model):
        return mql.meta_train(model, known, known.train_tasks[:2], checkpoint=checkpoint, progress=False)[0]

    expected, _ = mql.meta_train(whole, known, known.train_tasks[:2], progress=False)
    explore, left = mql._explore, iter(range(80))

    def interrupted(*args, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return explore(*args, **options)

    monkeypatch.setattr(mql, "_explore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(killed)
    monkeypatch.setattr(mql, "_explore", explore)
    replay = trained(resumed)
    assert replay.steps == 120
    np.testing.assert_array_equal(replay.actions[:60], expected.actions[:60])
    assert replay.since_start[60, 0] == 0  # a fresh episode
    assert not same(resumed, killed)
    replay = trained(again)  # from the checkpoint at the end
    assert replay.steps == 120
    assert same(again, resumed)
    with pytest.raises(ValueError, match=r"mql\.training is a checkpoint of another"):
        mql.meta_train(MQL(config), known, known.train_tasks[:3], checkpoint=checkpoint, progress=False)


def test_meta_training_on_episodes_that_end_in_a_terminal_state(monkeypatch):
    """Ant-Dir's: what was acted on is what the replay gives back, and the last observation is the episode's own."""
    known = adbook.family("ant-dir")
    config = MQLConfig(27, 8, hidden=(8,), memory=4, batch=8, steps=600, random_steps=560, updates_per_step=0.1)
    pasts, explore, drawn = [], mql._explore, []

    def watched(model, past, *args, random):
        pasts.append(past.clone())
        drawn.append(random)
        return explore(model, past, *args, random=random)

    monkeypatch.setattr(mql, "_explore", watched)
    replay, _ = mql.meta_train(MQL(config), known, known.train_tasks[:2], progress=False)
    steps = np.arange(300)
    assert drawn == [True] * 280 + [False] * 20
    for task in range(2):
        batch = replay.at(steps, np.full(300, task))
        torch.testing.assert_close(batch.past, torch.stack(pasts)[:, task])
        ends = np.flatnonzero(replay.since_start[1:, task] == 0)
        lengths = np.diff(np.concatenate(([-1], ends)))
        np.testing.assert_array_equal(batch.terminated[ends], lengths < known.horizon)
        assert batch.terminated[ends].any()
        assert batch.terminated.sum() == batch.terminated[ends].sum() + batch.terminated[-1]
        goes_on = np.setdiff1d(steps[:-1], ends)
        torch.testing.assert_close(batch.next_observations[goes_on], batch.observations[goes_on + 1])
        assert (batch.next_observations[ends] != batch.observations[ends + 1]).any(1).all()


def test_a_family_of_another_size_is_refused(model):
    known, config = adbook.family("reacher-goal"), MQLConfig(8, 2, hidden=(8,), memory=4)
    with pytest.raises(ValueError, match="policy has horizon 200, reacher-goal has 50"):
        mql.meta_train(MQL(config), known, known.train_tasks[:2], progress=False)
    with pytest.raises(ValueError, match="policy has observation_size 2, reacher-goal has 8"):
        mql.meta_train(model, known, known.train_tasks[:2], progress=False)


def test_no_test_task_enters_meta_training():
    known, model = adbook.family("reacher-goal"), MQL(MQLConfig(8, 2, horizon=50))
    for tasks in (
        known.test_tasks[:1],
        [*known.train_tasks[:3], known.ood_tasks[0]],
        known.sample_tasks(1, np.random.default_rng(0)),
    ):
        with pytest.raises(ValueError, match="meta-training is for training tasks"):
            mql.meta_train(model, known, tasks, progress=False)


def test_it_plays_with_frozen_weights():
    known = adbook.family("reacher-goal")
    config = MQLConfig(8, 2, horizon=50, hidden=(8,), memory=4, batch=8)
    agent = AdaptingMQL(MQL(config), filled(config=config), replace(QUICK, steps=40))
    played = adbook.rollout(agent, known, known.train_tasks[:2], episodes=3)
    assert np.isfinite(played.returns).all()


def test_it_survives_the_disk_with_its_replay(tmp_path, model):
    agent = AdaptingMQL(model, filled(), QUICK, seed=3)
    loaded = AdaptingMQL.load(agent.save(tmp_path / "m.safetensors", {"steps": 1}))
    assert (loaded.config, loaded.adaptation, loaded.about, loaded.seed) == (TINY, QUICK, {"steps": 1}, 3)
    new = filled(n=1, seed=1)
    assert same(*(mql_adaptation.adapt(each.model, new, each.old, QUICK) for each in (agent, loaded)))
    room = Replay(2, 20, TINY)
    for name, values in agent.old.named_buffers():
        getattr(room, name)[: len(values)] = values
    room.steps = agent.old.steps
    loaded = AdaptingMQL.load(AdaptingMQL(model, room, QUICK).save(tmp_path / "r.safetensors", {}))
    assert (loaded.old.steps, len(loaded.old.rewards)) == (12, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 0}, "context=0 must be a whole"),
        ({"tau": 0.0}, r"tau=0\.0 must be a positive number"),
        ({"hidden": ()}, r"hidden=\(\) must be a tuple of layer widths"),
        ({"tau": 5.0}, r"tau=5\.0 must be from 0 to 1"),
        ({"discount": math.nan}, "discount=nan must be from 0 to 1"),
        ({"exploration": -1.0}, r"exploration=-1\.0 must be a positive number or 0"),
        ({"random_steps": 10**6}, "random_steps=1000000 must be less than steps="),
    ],
)
def test_settings_that_cannot_run_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
