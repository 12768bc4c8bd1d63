"""Scores: how good, how sure, how soon.

Returns of different tasks are not comparable: a goal at the rim costs more on the way than one at the base. A
return is therefore put on a line on which 0 is what uniformly random actions get on the *same* task and 1
what the source algorithm ends with. Aggregates follow Agarwal et al., "Deep Reinforcement Learning at the
Edge of the Statistical Precipice" (NeurIPS 2021, arXiv:2108.13264) and its package rliable: interquartile
mean and stratified bootstrap.

Axes, in this order throughout: ``S`` training seeds, ``n`` tasks, ``K`` episodes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import median_filter


def normalized_score(returns: ArrayLike, random: ArrayLike, source: ArrayLike) -> np.ndarray:
    """Put returns on the line from random actions (0) to the source's end (1), task by task.

    Args:
        returns: ``(..., n, K)``, tasks on the last axis but one, as in `Rollout.returns` with or without
            seeds stacked in front; or ``(n,)``.
        random: ``(n,)``, mean return of uniformly random actions on each task.
        source: ``(n,)``, mean return at the end of the source algorithm's training on each task.

    Returns:
        Scores of the shape of `returns`, float64; below 0 and above 1 where that is what happened.

    Raises:
        ValueError: The numbers of tasks differ, or a reference is not finite or a source no better than
            random.
    """
    returns, random, source = (np.asarray(x, dtype=np.float64) for x in (returns, random, source))
    n = returns.shape[0] if returns.ndim == 1 else returns.shape[-2]
    for name, reference in (("random", random), ("source", source)):
        if reference.shape != (n,):
            raise ValueError(
                f"{name} has shape {reference.shape}; returns {returns.shape} hold {n} tasks: give ({n},)."
            )
    worthless = np.flatnonzero(~(np.isfinite(source - random) & (source > random)))
    if worthless.size:
        raise ValueError(
            f"On tasks {worthless.tolist()} the source's return {source[worthless].tolist()} is not above "
            f"random actions' {random[worthless].tolist()}, so scores mean nothing; train the source longer."
        )
    if returns.ndim > 1:
        random, source = random[:, None], source[:, None]  # (n, 1)
    return (returns - random) / (source - random)


def iqm(scores: ArrayLike) -> float | np.ndarray:
    """Interquartile mean: the mean of the middle half of all seeds and tasks together.

    Of ``m`` values the ``⌊m/4⌋`` lowest and highest are dropped: rliable's definition, which is
    ``scipy.stats.trim_mean(scores, 0.25)``. Scipy's checks would take most of a bootstrap's time.

    Args:
        scores: ``(n,)``, ``(S, n)``, or ``(S, n, ...)`` with further axes (episodes), which are kept.

    Returns:
        A float, or an array of the kept axes.

    Raises:
        ValueError: There is no score, or one is NaN: sorting would drop it as if it were the best.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not scores.size or np.isnan(scores).any():
        raise ValueError(f"scores of shape {scores.shape} are empty or hold NaN; every run needs a score.")
    pooled = scores.reshape(-1, *scores.shape[2:])  # (S n, ...)
    cut = len(pooled) // 4
    middle = np.partition(pooled, (cut, len(pooled) - cut - 1), axis=0)[cut : len(pooled) - cut]
    mean = middle.mean(axis=0)
    return mean if mean.ndim else float(mean)


def stratified_bootstrap(
    scores: ArrayLike,
    statistic: Callable[[np.ndarray], float | np.ndarray] = iqm,
    *,
    rng: np.random.Generator,
    n: int = 2000,
    confidence: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of a statistic of all seeds and tasks.

    With two seeds or more the seeds are resampled with replacement, for each task on its own (the tasks are
    the strata and stay as they are), as rliable does. The interval then answers: *how far would the number
    move had the training been run with other seeds, on these same tasks?* Resampling each task on its own
    treats a seed's results on two tasks as independent. They share one network, so the interval is somewhat
    too narrow.

    With one seed there is nothing to resample within a task, and the tasks are resampled instead. The
    interval then answers another question: *how far would the number move had other tasks been drawn, for
    this one network?* It says nothing about another training run. A figure has to say which of the two it
    shows.

    Args:
        scores: ``(S, n)`` or ``(S, n, ...)``; whole cells are resampled, so an episode axis behind stays
            together.
        statistic: Maps an array like `scores` to a number, or to an array (one interval for each entry).
        rng: Source of the resampling.
        n: Number of resamples.
        confidence: Probability mass between the bounds.

    Returns:
        Lower and upper bound, each of the shape of ``statistic(scores)``.

    Raises:
        ValueError: Fewer than two axes, one single cell, or a confidence outside (0, 1).
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim < 2 or scores.shape[0] * scores.shape[1] < 2:
        raise ValueError(
            f"scores has shape {scores.shape}; it must be (seeds, tasks) with at least two seeds or two "
            "tasks (give one seed as scores[None])."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, for example 0.95.")
    values = [statistic(_resample(scores, rng)) for _ in range(n)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return low, high


def _resample(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    seeds, tasks = scores.shape[:2]
    if seeds == 1:
        return scores[:, rng.integers(tasks, size=tasks)]
    return scores[rng.integers(seeds, size=(seeds, tasks)), np.arange(tasks)]  # (S, n, ...)


def probability_of_improvement(scores: ArrayLike, others: ArrayLike) -> float:
    """Chance that a run of one method beats a run of another on the same task, averaged over tasks.

    Agarwal et al. (2021, section 4.3): all pairs of seeds are compared on each task, and a tie counts as one half.

    Args:
        scores: ``(S, n)`` of the one.
        others: ``(S', n)`` of the other.

    Raises:
        ValueError: The tasks differ in number, there is no score, or one is not a number.
    """
    scores, others = (np.asarray(x, dtype=np.float64) for x in (scores, others))
    if scores.ndim != 2 or others.ndim != 2 or scores.shape[1] != others.shape[1] or not scores.size or not others.size:
        raise ValueError(f"scores {scores.shape} and {others.shape} must be (seeds, tasks) of the same tasks.")
    if np.isnan(scores).any() or np.isnan(others).any():
        raise ValueError("a score is not a number; leave out or repeat the run that has none.")
    pairs = scores[:, None] - others  # (S, S', n)
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def episodes_to_score(curve: ArrayLike, score: float = 0.9) -> float:
    """Count the episodes until a curve reaches a score: 0.9 is nine tenths of the way to the source's end.

    Args:
        curve: ``(K,)``, an average over tasks: single tasks are too noisy for a first crossing.
        score: To be reached.

    Returns:
        The number of the first such episode, counted from 1; infinity if there is none.
    """
    reached = np.flatnonzero(np.asarray(curve) >= score)
    return float(reached[0] + 1) if reached.size else float("inf")


def episodes_to_fraction(curve: ArrayLike, fraction: float = 0.9) -> float:
    """Episodes needed to come near the top: sample efficiency of in-context learning.

    The first episode, counted from 1, at which the curve has made `fraction` of the way from its first value
    to its highest. The fraction is of the *rise*, so it means the same for scores and for (negative) returns.

    Args:
        curve: ``(K,)``, an average over tasks: single tasks are too noisy for a first crossing.
        fraction: Part of the rise, in (0, 1].

    Returns:
        The number of episodes; infinity if the curve never rises above its first value.

    Raises:
        ValueError: The curve is not one-dimensional and finite, or the fraction is out of range.
    """
    curve = np.asarray(curve, dtype=np.float64)
    if curve.ndim != 1 or curve.size == 0 or not np.isfinite(curve).all():
        raise ValueError(f"curve has shape {curve.shape}; it must be (episodes,) and finite: average over tasks first.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must lie in (0, 1].")
    rise = curve.max() - curve[0]
    if rise == 0:
        return float("inf")
    # At fraction 1 rounding may lift the threshold above the maximum itself, hence the minimum.
    threshold = min(curve[0] + fraction * rise, curve.max())
    return float(np.argmax(curve >= threshold) + 1)


def jitter_and_drop(curve: ArrayLike, window: int = 5) -> tuple[float, float]:
    """How rough a learning curve is: what an episode tells about its neighbours, and what is lost after it was won.

    Args:
        curve: ``(K,)``, scores of one history, episode by episode.
        window: Episodes of the running median that stands for what the source could do at a time; odd.

    Returns:
        The root mean square distance of an episode from the running median, and the deepest fall of the running median
        below the highest value that it had had before.

    Raises:
        ValueError: The curve is not one-dimensional, or shorter than the window.
    """
    curve = np.asarray(curve, dtype=np.float64)
    if curve.ndim != 1 or len(curve) < window:
        raise ValueError(f"curve has shape {curve.shape}; it must be one history of at least {window} episodes.")
    smooth = median_filter(curve, window, mode="nearest")
    jitter = np.sqrt(np.mean((curve - smooth) ** 2))
    return float(jitter), float((np.maximum.accumulate(smooth) - smooth).max())
