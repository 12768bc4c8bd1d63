"""The live player: the run in Python, without a page."""

import threading

import numpy as np
import pytest
import torch
from player_cases import policy

import adbook
from adbook.live import LivePlayer
from adbook.mamba import MambaConfig
from adbook.rollout import RandomPolicy
from adbook.tasks import Task

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
    with pytest.raises(ValueError, match="5 rollouts were given; the player shows one to four"):
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
