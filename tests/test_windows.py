"""Context windows: which episodes they hold, in which order, and what is refused."""

import math

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


def test_where_windows_are_drawn_is_what_they_hold():
    given = [make_history(number=float(i)) for i in range(3)]
    windows = Windows(given, WindowConfig(3, 4), horizon=3)
    history, steps, starts, valid = windows.draw(20, np.random.default_rng(5))
    sampled = windows.sample(20, np.random.default_rng(5))
    for name in ("observations", "actions", "rewards"):
        held = np.stack([getattr(given[i], name)[index] for i, index in zip(history, steps, strict=True)])
        np.testing.assert_array_equal(held, sampled[name])
    np.testing.assert_array_equal(starts, sampled["starts"])
    np.testing.assert_array_equal(valid, sampled["valid"])


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
