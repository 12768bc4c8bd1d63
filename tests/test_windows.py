"""Context windows: which episodes they hold, in which order, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_histories import make_history

from adbook.windows import WindowConfig, Windows, window_returns


def cut(histories, n=400, seed=0, horizon=3, **config):
    return Windows(histories, WindowConfig(**config), horizon).sample(n, np.random.default_rng(seed))


def test_windows_are_consecutive_kept_episodes_from_the_start():
    windows = cut([make_history()], episodes=3, every=4)
    episodes, steps = windows["observations"][..., 0], windows["observations"][..., 1]
    phase = episodes[:, :1]
    expected = np.repeat([0, 4, 8], 3)[None] + phase
    np.testing.assert_array_equal(episodes, expected)
    np.testing.assert_array_equal(steps, np.tile([0, 1, 2], (400, 3)))
    np.testing.assert_array_equal(windows["actions"], windows["observations"][..., :2] / np.float32(100))
    np.testing.assert_array_equal(windows["rewards"], 10 * episodes + steps)
    np.testing.assert_array_equal(windows["starts"], np.tile([True, False, False], (400, 3)))
    assert windows["valid"].all()
    assert set(phase[:, 0]) == {0, 1, 2, 3}  # a phase is missed with probability 4 × (3/4)^400


def test_windows_from_anywhere_reach_both_ends():
    windows = cut([make_history()], episodes=2, every=2, span=False)
    first = windows["observations"][:, 0, 0].astype(int)
    np.testing.assert_array_equal(windows["observations"][:, 3, 0], first + 2)
    assert set(first) == set(range(10))  # phases 0 and 1, first kept episodes 0 to 4 of 6


def test_a_window_of_the_last_phase_fits_exactly():
    windows = cut([make_history()], episodes=3, every=4)
    assert windows["observations"][..., 0].max() == 11  # the history's last episode


def test_a_window_that_holds_the_end_learns_first_and_then_stays_there():
    windows = cut([make_history()], episodes=4, every=6, hold=2)  # twelve episodes: two to learn in, one in six
    episodes = windows["observations"][:, ::3, 0]  # (windows, kept episodes)
    np.testing.assert_array_equal(episodes[:, 1], episodes[:, 0] + 6)
    assert set(episodes[:, 0]) == set(range(6))
    held = episodes[:, 2:]
    assert set(held.flatten()) == set(range(6, 12))
    assert (held[:, 0] < held[:, 1]).all()  # in the order in which they were made, none twice
    assert cut([make_history()], n=3, episodes=9, every=2, hold=8)[
        "valid"
    ].all()  # more than there are: some come twice


def test_a_window_over_a_whole_history_takes_one_episode_of_each_stretch():
    windows = cut([make_history()], episodes=5, every=None)  # twelve episodes in stretches of 2, 2, 3, 2 and 3
    episodes = windows["observations"][:, ::3, 0].astype(int)  # (windows, kept episodes)
    assert [set(column) for column in episodes.T] == [{0, 1}, {2, 3}, {4, 5, 6}, {7, 8}, {9, 10, 11}]
    assert len({tuple(row) for row in episodes}) > 50  # of 72: each stretch is drawn from by itself
    for settings in ({"span": False}, {"hold": 1}):
        with pytest.raises(ValueError, match=r"every=None covers a history whole; it goes with span=True and hold=0"):
            WindowConfig(5, None, **settings)


@pytest.mark.parametrize("strays", [0.0, 0.5])
def test_where_windows_are_drawn_is_what_they_hold(strays):
    given = reachers()
    windows = Windows(given, WindowConfig(3, 4, strays=strays), horizon=3)
    drawn = windows.draw(20, np.random.default_rng(5))
    sampled = windows.sample(20, np.random.default_rng(5))
    for name in ("observations", "actions"):
        held = np.concatenate([getattr(history, name) for history in given])[drawn["places"]]
        np.testing.assert_array_equal(held, sampled[name])
    for name in ("rewards", "starts", "valid", "imitated"):
        np.testing.assert_array_equal(drawn[name], sampled[name])


def reachers():
    """Histories of Reacher-Goal on three goals, of twelve short episodes and of as many that are shorter."""
    rng, made = np.random.default_rng(0), []
    for i, lengths in enumerate([(3,) * 12, (2,) * 12, (3,) * 12]):
        plain = make_history(lengths)
        o, following = (rng.normal(0, 0.1, (len(plain.rewards), 8)).astype(np.float32) for _ in range(2))
        goal = [0.05 * i, 0.1]
        rewards = -np.linalg.norm(following[:, 6:] - goal, axis=1).astype(np.float32)
        about = {"task": {"family": "reacher-goal", "goal": goal, "split": "train", "index": i}}
        made.append(replace(plain, observations=o, next_observations=following, rewards=rewards, metadata=about))
    return made


def test_strays_are_of_any_history_paid_by_the_windows_own_and_not_imitated():
    given = reachers()
    windows = Windows(given, WindowConfig(4, 3, strays=0.4), horizon=3)
    drawn, sampled = (f(600, np.random.default_rng(1)) for f in (windows.draw, windows.sample))
    of = np.concatenate([np.full(len(history.rewards), i) for i, history in enumerate(given)])[drawn["places"]]
    ends = np.concatenate([history.next_observations for history in given])[drawn["places"]][..., 6:]
    own = np.take_along_axis(of, drawn["valid"].sum(1, keepdims=True) - 1, axis=1)  # (n, 1), of the last episode
    goals = np.array([history.metadata["task"]["goal"] for history in given])[own[:, 0]]
    np.testing.assert_allclose(sampled["rewards"], -np.linalg.norm(ends - goals[:, None], axis=-1), rtol=1e-6)
    assert (of == own)[drawn["imitated"]].all()
    assert not drawn["imitated"][~drawn["valid"]].any()
    begins = drawn["starts"] & drawn["valid"]
    assert begins.sum() == 600 * 4
    strays = (begins & ~drawn["imitated"]).sum()
    # Of 1800 episodes that may give way 40 % do, within four standard deviations of a binomial.
    assert abs(strays - 720) < 4 * math.sqrt(1800 * 0.4 * 0.6)
    assert set(of[begins & ~drawn["imitated"]]) == {0, 1, 2}


def test_strays_need_tasks_of_one_family():
    for metadata in ({}, {"task": {"family": "reacher-goal"}}):
        with pytest.raises(ValueError, match="strays need histories whose metadata name the task"):
            Windows([replace(make_history(), metadata=metadata)], WindowConfig(3, 4, strays=0.1), 3)
    two = [replace(make_history(), metadata={"task": {"family": name, "goal": [0.1]}}) for name in ("one", "other")]
    with pytest.raises(ValueError, match="strays need histories of tasks of one family; these are of"):
        Windows(two, WindowConfig(3, 4, strays=0.1), 3)
    for wrong in (-0.1, 1.0, math.nan, "high"):
        with pytest.raises(ValueError, match=r"strays=.* must be a number from 0 to below 1"):
            WindowConfig(strays=wrong)


def test_short_episodes_are_packed_and_the_rest_is_padding():
    windows = cut([make_history((3, 1, 2, 3))], n=5, episodes=4, every=1)
    assert windows["observations"].shape == (5, 12, 3)
    for i in range(5):
        assert windows["valid"][i].tolist() == [True] * 9 + [False] * 3
        assert np.flatnonzero(windows["starts"][i]).tolist() == [0, 3, 4, 6]
        assert windows["observations"][i, :9, 0].tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3]
        np.testing.assert_array_equal(windows["observations"][i, 9:], windows["observations"][i, [8] * 3])


def test_returns_in_a_window_are_those_of_its_episodes():
    history = make_history((3, 1, 2, 3))
    windows = cut([history], n=5, episodes=4, every=1)
    np.testing.assert_array_equal(window_returns(windows), np.tile(history.episode_returns, (5, 1)))


def test_windows_follow_the_generator_and_reach_every_history():
    given = [make_history(number=float(i)) for i in range(3)]
    one, same, other = (cut(given, n=60, seed=seed, episodes=2, every=3) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["observations"], other["observations"])
    assert set(one["observations"][:, 0, 2]) == {0, 1, 2}
    assert (one["observations"][..., 2] == one["observations"][:, :1, 2]).all()  # no window mixes two histories


def test_a_context_longer_than_a_history_is_refused():
    histories = [make_history(), make_history((3,) * 11)]
    message = "3 episodes, one in 4, needs 12 episodes, but .*11 episodes.*lower episodes or every"
    with pytest.raises(ValueError, match=message):
        Windows(histories, WindowConfig(episodes=3, every=4), 3)
    Windows(histories[:1], WindowConfig(episodes=3, every=4), 3)  # twelve are enough


def test_windows_need_histories_and_positive_settings():
    with pytest.raises(ValueError, match="no history was given"):
        Windows([], WindowConfig(), 3)
    wrongs = {"episodes": 0}, {"every": 2.0}, {"every": math.nan}, {"episodes": True}, {"span": "no"}, {"hold": 8}
    for wrong in wrongs:
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.* must be"):
            WindowConfig(**wrong)


def test_a_horizon_shorter_than_an_episode_is_refused():
    with pytest.raises(ValueError, match="horizon=2 is shorter than an episode of 3 steps"):
        cut([make_history()], horizon=2, episodes=3, every=4)
