"""The live player: the run in Python, without a page."""

import threading

import numpy as np
import pytest
import torch
from player_cases import policy

import adbook
from adbook.insight import Watched
from adbook.live import LivePlayer
from adbook.mamba import MambaConfig
from adbook.rollout import RandomPolicy
from adbook.tasks import Task
from adbook.transformer import TransformerConfig

GOAL, OTHER = (0.1, 0.05), (-0.1, 0.1)


@pytest.fixture
def mamba():
    return policy(MambaConfig(d_model=8, n_layers=1))


@pytest.fixture
def live(mamba):
    player = LivePlayer({"mamba": mamba, "random": RandomPolicy(2)}, adbook.family("reacher-goal"), goal=GOAL, pace=0)
    yield player
    player.close()
    if player._thread:
        player._thread.join()


def test_a_live_run_is_the_rollout_of_the_same_seed(live, mamba):
    live.run(2, wait=True)
    live.run(1, wait=True)  # goes on, with the memory kept
    family = adbook.family("reacher-goal")
    tasks = [Task("reacher-goal", GOAL, "sampled", 0)]
    for name, agent in (("mamba", mamba), ("random", RandomPolicy(2))):
        expected = adbook.rollout(agent, family, tasks, episodes=3, seed=0)
        for part in ("rewards", "actions", "qpos"):
            np.testing.assert_array_equal(getattr(live.rollouts[name], part), getattr(expected, part))
    assert live.shape == [2, 1, 3, 50]
    assert (live.episode, live.step, live.planned) == (2, 50, 3)


def test_a_moved_goal_holds_from_the_next_episode_on(live):
    live.observe(lambda change: setattr(live, "goal", OTHER), "current_steps")  # in the midst of the first episode
    live.run(3, wait=True)
    assert live.goals == [list(GOAL), list(OTHER), list(OTHER)]
    played = live.rollouts["random"]
    qpos, actions = played.qpos[0], played.actions[0]
    tip = np.stack([0.1 * f(qpos[..., 0]) + 0.11 * f(qpos[..., 0] + qpos[..., 1]) for f in (np.cos, np.sin)], -1)
    for k, (goal, wrong) in enumerate(((GOAL, OTHER), (OTHER, GOAL), (OTHER, GOAL))):
        distance = -played.rewards[0, k] - 0.1 * (actions[k] ** 2).sum(-1)
        off, off_wrong = (np.abs(distance - np.linalg.norm(tip[k, 1:] - g, axis=-1)).max() for g in (goal, wrong))
        assert off < 0.01 < 0.05 < off_wrong  # m; the recorded pose is that of a moment later


def test_before_the_first_step_a_goal_is_where_the_first_episode_begins(live):
    live.goal = OTHER
    live.run(1, wait=True)
    assert live.goals == [list(OTHER)]
    assert live.rollouts["mamba"].tasks[0].goal == OTHER


def test_a_run_can_be_stopped_at_a_step_and_resumed(live, mamba):
    begun = threading.Event()
    live.observe(lambda change: begun.set(), "current_steps")
    live.pace = 1
    live.run(1)
    assert begun.wait(30)
    live.stop()
    (t, _), total = live.current_steps, live.shape[2]
    assert (0 < t < 50, total, live.running) == (True, 0, False)
    assert len(live.current) == 4 * (2 * (t + 1) * 2 + 2 * t + t * len(live.insight["names"]))
    live.pace = 0
    live.run(1, wait=True)
    tasks = [Task("reacher-goal", GOAL, "sampled", 0)]
    expected = adbook.rollout(mamba, adbook.family("reacher-goal"), tasks, episodes=1, seed=0)
    np.testing.assert_array_equal(live.rollouts["mamba"].rewards, expected.rewards)


def test_what_is_streamed_is_what_is_recorded(live):
    streamed = []
    live.observe(lambda change: streamed.append((list(live.current_steps), change.new)), "current")
    live.pace = 2
    live.run(1, wait=True)
    steps, last = max((s for s in streamed if s[0]), key=lambda s: s[0])
    numbers, t = np.frombuffer(last, "<f4"), steps[0]
    qpos, rewards = numbers[: 2 * (t + 1)].reshape(-1, 2), numbers[2 * (t + 1) :][:t]
    rollout = live.rollouts["mamba"]
    np.testing.assert_array_equal(qpos, rollout.qpos[0, 0, : t + 1, :2])
    np.testing.assert_array_equal(rewards, rollout.rewards[0, 0, :t])
    names = live.insight["names"]
    seen = numbers[2 * (t + 1) + t :][: t * len(names)].reshape(t, -1)
    np.testing.assert_array_equal(seen[:, names.index("action 1")], rollout.actions[0, 0, :t, 0])


def test_forgetting_starts_afresh_with_other_dice(live):
    live.run(1, wait=True)
    first = live.rollouts["mamba"].rewards
    live.forget()
    assert (live.shape[2], live.current_steps, live.episode, live.step) == (0, [0, 0], 0, 0)
    live.run(1, wait=True)
    assert live.rollouts["mamba"].rewards.shape == first.shape
    assert not np.array_equal(live.rollouts["mamba"].rewards, first)


def test_who_scrubs_is_left_in_peace(live):
    live.run(2, wait=True)
    live.follow, live.episode, live.step = False, 0, 7
    live.run(1, wait=True)
    assert (live.episode, live.step, live.shape[2]) == (0, 7, 3)


def test_an_agent_that_has_fallen_waits_for_the_others():
    family = adbook.family("ant-dir")
    live = LivePlayer({"wild": RandomPolicy(8, 1.0), "calm": RandomPolicy(8, 1e-3)}, family, pace=0)
    ends = {}
    for name, agent in live._agents.items():
        live.run(2, wait=True)
        expected = adbook.rollout(agent, family, live.rollouts[name].tasks, episodes=2, seed=live._seed)
        np.testing.assert_array_equal(live.rollouts[name].rewards, expected.rewards)
        ends[name] = expected.lengths
        live._seed -= 1
        live.forget()
    assert ends["wild"].min() < ends["calm"].max()  # or this test tested nothing


def test_what_breaks_a_run_off_is_told_and_raised(live, mamba):
    with torch.no_grad():
        mamba.head.bias.fill_(float("nan"))
    live.run(1)
    with pytest.raises(ValueError, match="it must be finite"):
        live.wait()
    assert "it must be finite" in live.trouble
    assert live.running is False
    with torch.no_grad():
        mamba.head.bias.zero_()
    live.forget()
    live.run(1, wait=True)
    assert (live.trouble, live.shape[2]) == ("", 1)


def test_a_run_beyond_the_most_is_refused(live, monkeypatch):
    monkeypatch.setattr("adbook.live.MOST_EPISODES", 3)
    live.episodes = 3
    live.run(2, wait=True)
    live.run(2)
    with pytest.raises(ValueError, match="4 episodes would be more than 3, the most; forget first"):
        live.wait()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("goal", (1, 1), r"goal=.* is not a point \(x, y\) at most 0.25 m from the base"),
        ("goal", (0.1,), "pass 2 finite numbers"),
        ("episodes", 0, "episodes is 0; it must lie between 1 and 200"),
        ("pace", -1, "pace is -1"),
        ("episode", 1, "episode is 1; it must lie between 0 and 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(live, name, value, message):
    before = getattr(live, name)
    with pytest.raises(ValueError, match=message):
        setattr(live, name, value)
    assert getattr(live, name) == before


def test_agents_that_do_not_fit_are_refused(mamba):
    family = adbook.family("reacher-goal")
    with pytest.raises(ValueError, match="0 agents"):
        LivePlayer({}, family)
    with pytest.raises(ValueError, match="5 agents were given; the player shows one to four"):
        LivePlayer(dict.fromkeys("abcde", RandomPolicy(2)), family)
    with pytest.raises(ValueError, match="The policy has observation_size 8, ant-dir has 27"):
        LivePlayer(mamba, adbook.family("ant-dir"))
    with pytest.raises(ValueError, match=r"goal=\(3, 0\) is not a point"):
        LivePlayer(mamba, family, goal=(3, 0))


def test_the_pages_messages_reach_it(live):
    sent = []
    live.send = lambda content, buffers=None: sent.append(content)
    live._handle_custom_msg({"do": "hello"}, [])
    assert sent == [{"kernel": True}]
    live.run(1, wait=True)
    live._handle_custom_msg({"do": "forget"}, [])
    assert live.shape[2] == 0
    live.set_state({"goal": list(OTHER), "episodes": 2, "running": True})
    live.wait()
    assert live.goals == [list(OTHER)] * 2


# ----------------------------------------------------------------------------------------------------------
# what goes wrong when several things happen at once


@pytest.mark.parametrize("act", ["stop", "forget", "wait"])
def test_who_observes_a_message_of_the_page_may_wait_for_the_run(live, act):
    live.observe(lambda change: getattr(live, act)(), "goal")
    shown = threading.Event()
    live.observe(lambda change: shown.set(), "current_steps")
    live.pace = 1
    live.run(1)
    assert shown.wait(30)
    message = threading.Thread(target=live.set_state, args=({"goal": list(OTHER)},), daemon=True)
    message.start()
    message.join(30)
    assert not message.is_alive()
    assert live.running is False


def test_what_the_page_may_not_set_is_set_back_and_the_page_is_told(live):
    live.send_state = (told := []).append
    for wrong in ({"goal": [5.0, 5.0], "episodes": 7}, {"goal": [float("nan"), 0]}, {"pace": -3.0}, {"episode": 9}):
        with pytest.raises(ValueError, match=r"is not a point|it must lie between"):
            live.set_state(wrong)
    assert (live.goal, live.episodes, live.pace, live.episode) == (list(GOAL), 20, 0, 0)
    assert told == [["goal", "episodes"], ["goal"], ["pace"], ["episode"]]


@pytest.mark.parametrize("goal", [np.array(OTHER), np.float32(OTHER).tolist(), OTHER])
def test_a_goal_can_be_set_in_every_form_of_numbers(live, goal):
    live.goal = goal
    assert live.goal == pytest.approx(OTHER)
    assert all(type(number) is float for number in live.goal)


def test_two_players_of_one_policy_do_not_see_each_others_thoughts(mamba):
    family = adbook.family("reacher-goal")
    players = [LivePlayer(mamba, family, goal=GOAL, pace=0, seed=seed) for seed in (0, 1)]
    for player in players:
        player.run(4)
    for player in players:
        player.wait()
        alone = LivePlayer(mamba, family, goal=GOAL, pace=0, seed=player._seed)
        alone.run(4, wait=True)
        assert player.seen == alone.seen
        alone.close()
        player.close()


def test_a_player_leaves_torch_and_the_policies_as_they_were(mamba):
    threads = torch.get_num_threads()
    mamba.train()
    live = LivePlayer({"a": mamba, "b": mamba}, adbook.family("reacher-goal"), pace=0)
    assert torch.get_num_threads() == threads
    live.run(1, wait=True)
    live.forget()
    live.close()
    assert torch.get_num_threads() == threads
    assert mamba.training
    live.run(1)
    with pytest.raises(RuntimeError, match="The player is closed; make another"):
        live.wait()


def test_after_a_run_broke_off_the_next_says_to_forget(live, mamba):
    with torch.no_grad():
        mamba.head.bias.fill_(float("nan"))
    for message in ("it must be finite", "An agent broke off .*; forget first"):
        live.run(1)
        with pytest.raises((ValueError, RuntimeError), match=message):
            live.wait()


def test_weights_that_change_in_a_run_are_found_out(live, mamba):
    def learn(change):
        with torch.no_grad():
            mamba.head.bias.add_(1e-3)

    live.observe(learn, "returns")
    live.run(1)
    with pytest.raises(RuntimeError, match="parameters changed during the run"):
        live.wait()


def test_who_observes_the_run_cannot_forget_it(live):
    live.observe(lambda change: live.forget(), "current_steps")
    live.run(1)
    with pytest.raises(RuntimeError, match=r"forget\(\) was called in the thread of the run"):
        live.wait()


def test_what_is_saved_of_a_run_is_at_rest(live, tmp_path):
    live.observe(lambda change: live.save_html(tmp_path / "page.html"), "current_steps")
    live.run(1, wait=True)
    assert '"running": false' in (tmp_path / "page.html").read_text()


def test_several_watched_agents_and_a_transformer_are_told_apart(mamba):
    transformer = policy(TransformerConfig(d_model=16, n_layers=1, n_heads=2, context=60))
    watched = Watched(mamba)
    agents = {"mamba": watched, "again": watched, "transformer": transformer, "random": RandomPolicy(2)}
    live = LivePlayer(agents, adbook.family("reacher-goal"), pace=0)
    assert "change" not in live.insight["agents"][2]  # before the first step, too
    live.run(2, wait=True)
    known = live.insight["agents"]
    assert [bool(names) and "change" in names for names in known] == [True, True, False, False]
    assert live.insight["contexts"] == [None, None, 60, None]
    live.close()
