"""Scores against closed forms and against scipy's trimmed mean, which is rliable's definition of the IQM."""

from functools import partial

import numpy as np
import pytest
from scipy.stats import trim_mean

from adbook import metrics
from adbook.metrics import episodes_to_fraction, iqm, jitter_and_drop, normalized_score, stratified_bootstrap

RANDOM, SOURCE = np.array([-12.0, -8.0]), np.array([-2.0, -4.0])


def test_the_probability_of_improvement_compares_all_pairs_of_seeds_on_a_task():
    ours, theirs = [[1.0, 5.0], [3.0, 5.0]], [[2.0, 5.0], [0.0, 4.0], [2.0, 6.0]]
    # Task 1: 1 beats 0 alone, 3 beats all: 4 of 6. Task 2: 5 ties with 5, beats 4, loses to 6: 1.5 of 3.
    assert metrics.probability_of_improvement(ours, theirs) == pytest.approx((4 / 6 + 0.5) / 2)
    assert metrics.probability_of_improvement(theirs, ours) == pytest.approx(1 - (4 / 6 + 0.5) / 2)
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(1, 3\) must be .* same tasks"):
        metrics.probability_of_improvement(ours, [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="a score is not a number"):
        metrics.probability_of_improvement(ours, [[1.0, np.nan]])


def test_episodes_to_a_score_are_counted_from_one():
    assert metrics.episodes_to_score([0.2, 0.89, 0.9, 0.5]) == 3
    assert metrics.episodes_to_score([0.2, 0.5], 0.2) == 1
    assert metrics.episodes_to_score([0.2, 0.5]) == float("inf")


def test_random_scores_zero_and_source_scores_one_on_every_task():
    np.testing.assert_array_equal(normalized_score(RANDOM, RANDOM, SOURCE), [0, 0])
    np.testing.assert_array_equal(normalized_score(SOURCE, RANDOM, SOURCE), [1, 1])


def test_score_is_normalised_along_the_task_axis_when_seeds_tasks_and_episodes_are_equally_many():
    returns = np.broadcast_to([[-7.0], [-6.0]], (2, 2, 2))  # half-way on each task
    np.testing.assert_array_equal(normalized_score(returns, RANDOM, SOURCE), np.full((2, 2, 2), 0.5))


def test_score_keeps_what_lies_outside_the_line():
    np.testing.assert_array_equal(normalized_score([-22.0, 0.0], RANDOM, SOURCE), [-1, 2])


def test_other_number_of_tasks_is_refused():
    with pytest.raises(ValueError, match=r"source has shape \(3,\).*2 tasks"):
        normalized_score(np.zeros((2, 5)), RANDOM, np.zeros(3))


@pytest.mark.parametrize("source", [[-2.0, -8.0], [-2.0, np.nan], [-2.0, np.inf]])
def test_source_no_better_than_random_is_refused_and_named(source):
    with pytest.raises(ValueError, match=r"tasks \[1\]"):
        normalized_score(np.zeros(2), RANDOM, source)


def test_iqm_of_eight_values_is_the_mean_of_the_middle_four():
    assert iqm([[100, 1, 2, -50], [3, 4, -60, 200]]) == 2.5


@pytest.mark.parametrize("shape", [(1, 16), (3, 16), (5, 7), (2, 1), (1, 1)])
def test_iqm_is_scipys_trimmed_mean_of_everything(shape):
    scores = np.random.default_rng(0).normal(size=shape)
    assert iqm(scores) == trim_mean(scores, proportiontocut=0.25, axis=None)


def test_iqm_keeps_the_episode_axis():
    scores = np.random.default_rng(0).normal(size=(3, 16, 4))
    # The same 24 middle values of size below 3, summed in another order.
    atol = 24 * 3 * np.finfo(float).eps
    np.testing.assert_allclose(iqm(scores), [iqm(scores[..., k]) for k in range(4)], rtol=0, atol=atol)


def test_interval_of_a_mean_of_two_seeds_has_its_exact_bounds():
    # One task, seeds 0 and 1: the resampled mean is 0, 1/2, 1 with probability 1/4, 1/2, 1/4. The 95 % bounds
    # are 0 and 1, the 40 % bounds (quantiles 0.3 and 0.7) both 1/2, unless a count of 2,000 is 5 standard
    # deviations off.
    scores, bootstrap = np.array([[0.0], [1.0]]), partial(stratified_bootstrap, statistic=np.mean)
    assert bootstrap(scores, rng=np.random.default_rng(1)) == (0, 1)
    assert bootstrap(scores, rng=np.random.default_rng(1), confidence=0.4) == (0.5, 0.5)


def test_tasks_are_strata_a_difference_between_tasks_alone_gives_no_width():
    scores = np.tile(np.arange(16.0), (3, 1))
    assert stratified_bootstrap(scores, rng=np.random.default_rng(0)) == (iqm(scores), iqm(scores))


def test_one_seed_resamples_tasks_with_the_normal_approximations_width():
    scores = np.random.default_rng(0).normal(size=(1, 400))
    low, high = stratified_bootstrap(scores, np.mean, rng=np.random.default_rng(1))
    expected = 2 * 1.96 * scores.std() / 20
    # The 2.5 % quantile of 2,000 draws has a relative standard error of about 3 % of the half width.
    assert high - low == pytest.approx(expected, rel=0.1)


def test_interval_of_a_curve_keeps_runs_together():
    flat = np.random.default_rng(0).normal(size=(4, 6, 1)) + np.zeros(5)  # every run is constant over 5 episodes
    low, high = stratified_bootstrap(flat, rng=np.random.default_rng(0), n=200)
    np.testing.assert_array_equal(low, np.full(5, low[0]))
    assert (low < high).all()


def test_interval_depends_on_the_generator_only():
    scores = np.random.default_rng(0).normal(size=(3, 8))
    first, again, other = (stratified_bootstrap(scores, rng=np.random.default_rng(s), n=100) for s in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("shape", [(16,), (1, 1)])
def test_too_little_to_resample_is_refused(shape):
    with pytest.raises(ValueError, match="at least two seeds or two tasks"):
        stratified_bootstrap(np.zeros(shape), rng=np.random.default_rng(0))


def test_confidence_in_percent_is_refused():
    with pytest.raises(ValueError, match="confidence is 95"):
        stratified_bootstrap(np.zeros((2, 2)), rng=np.random.default_rng(0), confidence=95)


def test_episodes_to_fraction_counts_the_rise_from_one():
    assert episodes_to_fraction([-11, -6, -2, -1, -1.5]) == 3  # 90 % of the rise of 10 is reached at -2
    assert episodes_to_fraction([-11, -6, -2, -1, -1.5], fraction=0.5) == 2
    assert episodes_to_fraction([-11, -6, -2, -1, -1.5], fraction=1) == 4


def test_curve_that_never_rises_takes_for_ever():
    assert episodes_to_fraction([1.0, 0.5, 1.0]) == np.inf


@pytest.mark.parametrize("curve", [np.zeros((2, 3)), [], [0, np.nan]])
def test_anything_but_one_finite_curve_is_refused(curve):
    with pytest.raises(ValueError, match="average over tasks first"):
        episodes_to_fraction(curve)


@pytest.mark.parametrize("fraction", [0, 90])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=f"fraction is {fraction}"):
        episodes_to_fraction([0, 1], fraction)


def test_jitter_and_drop_of_curves_that_are_known():
    assert jitter_and_drop(np.linspace(0, 1, 20)) == pytest.approx((0, 0))
    spike = np.zeros(20)
    spike[7] = 3.0  # a single episode is jitter, and no drop
    assert jitter_and_drop(spike) == pytest.approx((3 / np.sqrt(20), 0))
    collapse = np.repeat([1.0, 0.2, 1.1], 10)  # ten episodes are a drop, and no jitter
    assert jitter_and_drop(collapse) == pytest.approx((0, 0.8))
    with pytest.raises(ValueError, match=r"shape .3,.; it must be one history of at least 5 episodes"):
        jitter_and_drop(np.zeros(3))
    with pytest.raises(ValueError, match="one history"):
        jitter_and_drop(np.zeros((2, 9)))
