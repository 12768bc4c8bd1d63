"""Figures of the book: plotly, returned and never shown; a method has the same colour on every page.

Every function returns a figure that already carries its alternative text, derived from the data it shows.
Importing this module sets up how figures look and how they reach the page (`adbook.look`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from adbook.checks import check_known
from adbook.look import GREY, METHODS, Style, describe, style
from adbook.metrics import iqm, stratified_bootstrap

__all__ = [
    "METHODS", "ablation_panel", "cost_against_length", "describe", "goal_map", "impulse_response",
    "in_context_curve", "learning_curves", "lines", "score_bars", "style", "training_curve", "window_diagram",
]  # fmt: skip


def learning_curves(
    curves: Mapping[str, ArrayLike], *, every: int = 1, steps: Mapping[str, ArrayLike] | None = None
) -> go.Figure:
    """Many learning histories by episode: the median, and a band with the middle 80 %.

    Args:
        curves: By source, ``(histories, episodes)`` returns; or scores, if `steps` are given.
        every: Environment episodes from one column to the next (the downsampling of the histories).
        steps: By source, ``(episodes,)`` environment steps that its run had made, for a logarithmic axis on which
            sources that differ in speed a hundredfold can be compared.
    """
    figure, told = go.Figure(), []
    for i, (name, values) in enumerate(curves.items()):
        low, middle, high = np.quantile(np.asarray(values, float), [0.1, 0.5, 0.9], axis=0).round(4)  # (K,) each
        x = np.asarray(steps[name]) if steps else 1 + every * np.arange(len(middle))
        _band(figure, x, middle, low, high, name, style(name, i), "lines")
        told.append(f"{name}: median from {middle[0]:z.1f} to {middle[-1]:z.1f}")
    if steps:
        _axes(figure, "environment steps of the run", "score (0 random, 1 oracle)")
        figure.update_xaxes(type="log", dtick=1)
    else:
        _axes(figure, "episode of the source's training", "return (sum of rewards)")
    quantity = "Score by environment steps" if steps else "Return by episode"
    return describe(figure, f"{quantity} of training, median and middle 80 % of histories. {'; '.join(told)}.")


def in_context_curve(
    curves: Mapping[str, ArrayLike], *, rng: np.random.Generator, quantity: str = "score"
) -> go.Figure:
    """Score or return by episode with frozen weights: IQM over seeds and tasks with its 95 % interval.

    Args:
        curves: By method, ``(tasks, episodes)`` of one seed, or ``(seeds, tasks, episodes)``.
        rng: For the bootstrap.
        quantity: "score" (0 random, 1 the source's end) or "return".

    Raises:
        ValueError: Another quantity, no curve, or one of another shape.
    """
    check_known("quantity", quantity, _QUANTITIES)
    if not curves:
        raise ValueError("curves is empty; give those of one method at least.")
    figure, told = go.Figure(), []
    for i, (name, values) in enumerate(curves.items()):
        values = _with_seeds(name, values, ndim=3)
        middle, (low, high) = iqm(values), stratified_bootstrap(values, rng=rng)
        _band(figure, 1 + np.arange(len(middle)), middle, low, high, name, style(name, i))
        told.append(
            f"{name} ({_over(values)}): {middle[0]:z.2f} in episode 1, {middle[-1]:z.2f} in episode {len(middle)}"
        )
    _axes(figure, "episode on the task (weights frozen)", _QUANTITIES[quantity])
    figure.update_xaxes(dtick=max(1, round(len(middle) / 10)), tick0=1)
    return describe(figure, f"{quantity.capitalize()} by episode, {_INTERVAL}. {'; '.join(told)}.")


_QUANTITIES = {"score": "score (0 random, 1 source's end)", "return": "return (sum of rewards)"}
_INTERVAL = "interquartile mean with 95 % bootstrap interval"


def score_bars(scores: Mapping[str, ArrayLike], *, rng: np.random.Generator) -> go.Figure:
    """One bar a method: IQM of the normalised score with its 95 % interval, the numbers written beside it.

    Args:
        scores: By method, ``(tasks,)`` of one seed, or ``(seeds, tasks)``.
        rng: For the bootstrap.
    """
    figure, told = go.Figure(), []
    for i, (name, values) in enumerate(scores.items()):
        middle, low, high = _interval(name, values, rng)
        label = f"{name}<br>{middle:z.2f} [{low:z.2f}, {high:z.2f}]"
        told.append(label.replace("<br>", f" ({_over(values)}) "))
        error = {"type": "data", "array": [high - middle], "arrayminus": [middle - low], "color": GREY}
        look = style(name, i)
        figure.add_bar(x=[middle], y=[label], orientation="h", error_x=error, marker_color=look.color)
    _axes(figure, _QUANTITIES["score"], None)
    figure.add_vline(x=1, line={"color": METHODS["source"].color, "dash": "longdash"})
    figure.update_layout(height=120 + 50 * len(scores), yaxis_autorange="reversed", showlegend=False)
    return describe(figure, f"Normalised score by method, {_INTERVAL}: {'; '.join(told)}.")


def ablation_panel(
    scores: Mapping[float | str, ArrayLike], *, factor: str, unit: str = "", rng: np.random.Generator
) -> go.Figure:
    """Score against one factor: IQM with its 95 % interval at each setting, the single tasks behind it.

    Args:
        scores: By setting, ``(tasks,)`` of one seed, or ``(seeds, tasks)``. Numbers make a numeric axis.
        factor: What is varied, for the axis.
        unit: Unit of the settings, for the axis.
        rng: For the bootstrap.
    """
    settings = list(scores)
    points = [_interval(str(setting), values, rng) for setting, values in scores.items()]
    middle, low, high = np.array(points).T  # (settings,) each
    look, figure = METHODS["mamba"], go.Figure()
    for setting, values in scores.items():
        tasks = np.asarray(values, float).reshape(-1, np.shape(values)[-1]).mean(axis=0)  # (n,)
        figure.add_scatter(
            x=[setting] * len(tasks), y=tasks, mode="markers", showlegend=False,
            marker={"color": GREY, "size": 5, "opacity": 0.5},
            hovertemplate="one task: %{y:.2f}<extra></extra>",
        )  # fmt: skip
    numeric = not any(isinstance(setting, str) for setting in settings)
    figure.add_scatter(
        x=settings, y=middle, mode="lines+markers" if numeric else "markers", showlegend=False,
        hovertemplate="IQM %{y:.3f}<extra></extra>", line={"color": look.color}, marker={"size": 10},
        error_y={"type": "data", "array": high - middle, "arrayminus": middle - low, "thickness": 2},
    )  # fmt: skip
    _axes(figure, f"{factor} ({unit})" if unit else factor, _QUANTITIES["score"])
    if numeric:
        figure.update_xaxes(tickvals=settings)
    told = (
        f"{s} ({_over(scores[s])}): {m:z.2f} [{a:z.2f}, {b:z.2f}]"
        for s, (m, a, b) in zip(settings, points, strict=True)
    )
    return describe(figure, f"Normalised score against {factor}, {_INTERVAL}. {'; '.join(told)}.")


def cost_against_length(
    lengths: ArrayLike,
    costs: Mapping[str, ArrayLike],
    *,
    quantity: str = "time",
    unit: str = "ms",
) -> go.Figure:
    """Measured cost against sequence length on logarithmic axes: the slope is the exponent.

    Args:
        lengths: ``(L,)`` tokens.
        costs: By method, ``(L,)``; NaN where it was not measured.
        quantity: What the costs of a forward and backward pass are, for the axis.
        unit: Unit of the costs.
    """
    lengths, figure, told = np.asarray(lengths, float), go.Figure(), []
    for i, (name, cost) in enumerate(costs.items()):
        cost = np.asarray(cost, float)
        _line(figure, lengths, cost, name, style(name, i))
        measured = np.flatnonzero(np.isfinite(cost))[-2:]
        if len(measured) == 2:
            slope = np.diff(np.log(cost[measured]))[0] / np.diff(np.log(lengths[measured]))[0]
            told.append(f"{name} grows at the end as length to the power {slope:.1f}")
    _axes(figure, "sequence length (tokens)", f"{quantity} ({unit})")
    figure.update_xaxes(type="log", tickvals=lengths, ticktext=[f"{x:,.0f}" for x in lengths])
    figure.update_yaxes(type="log", dtick=1)
    return describe(
        figure, f"{quantity.capitalize()} of both passes against sequence length, logarithmic. {'; '.join(told)}."
    )


def training_curve(
    runs: Mapping[str, tuple[ArrayLike, ArrayLike]], *, loss: str = "loss per step", log: bool = False
) -> go.Figure:
    """Training loss against the number of tokens seen.

    Args:
        runs: By method, ``(tokens (U,), loss (U,))`` at ``U`` updates.
        loss: What the loss is, with its unit, for the axis.
        log: Logarithmic loss axis (for a squared error).
    """
    figure, told = go.Figure(), []
    for i, (name, (tokens, values)) in enumerate(runs.items()):
        values = np.asarray(values, float)
        _line(figure, np.asarray(tokens, float), values, name, style(name, i), mode="lines")
        told.append(f"{name}: from {values[0]:.3g} to {values[-1]:.3g}")
    _axes(figure, "training tokens", loss)
    figure.update_yaxes(type="log" if log else "linear")
    return describe(figure, f"{loss.capitalize()} against training tokens. {'; '.join(told)}.")


def goal_map(
    goals: Mapping[str, ArrayLike],
    *,
    scores: Mapping[str, ArrayLike] | None = None,
    quantity: str = "score",
    reach: float | None = None,
) -> go.Figure:
    """Goals in the plane, by split; with scores, coloured by how well each was solved.

    Args:
        goals: By split ("train", "test", "ood"), ``(n, 2)`` positions in metres.
        scores: For some of the splits, ``(n,)`` normalised scores.
        quantity: What the scores are, if not normalised scores: "return", for example.
        reach: Radius in metres of a circle to draw, the arm's reach.
    """
    figure = go.Figure()
    for i, (split, points) in enumerate(goals.items()):
        look, values = style(split, i), (scores or {}).get(split)
        marker = {"color": look.color, "size": 10, "symbol": look.symbol}
        if values is not None:
            marker |= {
                "symbol": look.symbol.removesuffix("-open"),
                "color": values,
                "coloraxis": "coloraxis",
                "size": 14,
                "line": {"width": 1, "color": GREY},
            }
        x, y = np.asarray(points, float).T
        text = None if values is None else [f"{quantity} {v:.2f}" for v in values]
        figure.add_scatter(x=x, y=y, mode="markers", name=split, marker=marker, text=text, showlegend=values is None)
    if reach is not None:
        circle = {"x0": -reach, "x1": reach, "y0": -reach, "y1": reach}
        figure.add_shape(type="circle", line={"color": GREY, "dash": "dot"}, **circle)
    _axes(figure, "x (m)", "y (m)")
    figure.update_yaxes(scaleanchor="x", scaleratio=1)
    figure.update_xaxes(constrain="domain")
    bar = {"title": {"text": f"{quantity} on {', '.join(scores or ())}", "side": "right"}, "outlinewidth": 0}
    figure.update_layout(height=460, coloraxis={"colorscale": "Cividis", "colorbar": bar})
    told = ", ".join(f"{len(points)} {split}" for split, points in goals.items())
    solved = (f" Mean {quantity} {np.mean(v):z.2f} on {split}." for split, v in (scores or {}).items())
    return describe(figure, f"Goals in the plane: {told}.{''.join(solved)}")


def window_diagram(returns: ArrayLike, kept: Sequence[int]) -> go.Figure:
    """Which episodes of one learning history the model gets to see.

    Args:
        returns: ``(K,)``, return of every episode of the history.
        kept: Indices of the kept episodes, from 0.
    """
    returns, kept = np.asarray(returns, float), np.asarray(kept, int)
    figure, source, model = go.Figure(), METHODS["source"], METHODS["mamba"]
    figure.add_scatter(
        x=1 + np.arange(len(returns)), y=returns, mode="markers", name="dropped",
        marker={"color": source.color, "size": 5, "opacity": 0.6},
    )  # fmt: skip
    figure.add_scatter(
        x=1 + kept, y=returns[kept], mode="lines+markers", name="kept, in this order",
        line={"color": model.color, "width": 1}, marker={"size": 9},
    )  # fmt: skip
    _axes(figure, "episode of the source's training", "return (sum of rewards)")
    ends = f"from {returns[kept[0]]:.1f} to {returns[kept[-1]]:.1f}"
    return describe(
        figure,
        f"Return by episode of one history: {len(returns)} episodes, of which {len(kept)} are kept, {ends}.",
    )


def impulse_response(
    responses: ArrayLike,
    *,
    settings: Sequence[float],
    slider: str,
    unit: str = "",
    lines: Sequence[str] = ("response",),
    start: int = 0,
) -> go.Figure:
    """Impulse response of a linear recurrence with a slider, which works in a page without a kernel.

    Args:
        responses: ``(settings, lines, steps)``; every slider position is computed beforehand.
        settings: ``(settings,)`` values of the parameter on the slider.
        slider: Name of that parameter.
        unit: Its unit.
        lines: Names of the lines drawn at once (channels, states, methods).
        start: Slider position at first.

    Raises:
        ValueError: The shapes do not fit.
    """
    responses = np.asarray(responses, float)
    if responses.ndim != 3 or responses.shape[:2] != (len(settings), len(lines)):
        raise ValueError(
            f"responses has shape {responses.shape}; it must be (settings, lines, steps) = "
            f"({len(settings)}, {len(lines)}, any)."
        )
    figure = go.Figure()
    for i, name in enumerate(lines):
        _line(figure, np.arange(responses.shape[-1]), responses[start, i], name, style(name, i))
    figure.update_layout(showlegend=len(lines) > 1)
    labels = [f"{setting:.3g}" for setting in settings]
    steps = [
        {"method": "restyle", "label": label, "args": [{"y": list(response)}]}
        for label, response in zip(labels, responses.tolist(), strict=True)
    ]
    shown = {"prefix": f"{slider} = ", "suffix": f" {unit}"}
    figure.update_layout(
        height=460, sliders=[{"steps": steps, "active": start, "currentvalue": shown, "pad": {"t": 60}}]
    )
    _axes(figure, "step after the impulse", "response")
    margin = 0.05 * np.ptp(responses)
    figure.update_yaxes(range=[responses.min() - margin, responses.max() + margin])  # one scale for all settings
    reach = [int(np.abs(r[0]).cumsum().searchsorted(0.9 * np.abs(r[0]).sum())) for r in responses]
    return describe(
        figure,
        f"Impulse response with a slider for {slider}. Of {lines[0]}, 90 % has passed after {reach[0]} steps "
        f"at {slider} = {labels[0]} {unit} and after {reach[-1]} steps at {labels[-1]} {unit}.",
    )


def lines(
    x: ArrayLike, curves: Mapping[str, ArrayLike], *, axes: tuple[str, str], alt: str, log_x: bool = False
) -> go.Figure:
    """Plain curves over one axis, for what a single chapter shows; the caller tells what there is to see.

    Args:
        x: ``(n,)``.
        curves: By name, ``(n,)``.
        axes: Titles of the horizontal and the vertical axis, with units.
        alt: The alternative text.
        log_x: Logarithmic horizontal axis.
    """
    figure = go.Figure()
    for i, (name, y) in enumerate(curves.items()):
        _line(figure, np.asarray(x, float), np.asarray(y, float), name, style(name, i), mode="lines")
    _axes(figure, *axes)
    figure.update_xaxes(type="log" if log_x else "linear")
    return describe(figure, alt)


def _with_seeds(name: str, values: ArrayLike, ndim: int) -> np.ndarray:
    """Add the seed axis that the scores of a single seed lack."""
    values = np.asarray(values, float)
    if values.ndim not in (ndim - 1, ndim):
        axes = "(seeds, tasks, episodes)" if ndim == 3 else "(seeds, tasks)"
        raise ValueError(f"{name!r} has shape {values.shape}; it must be {axes}, without seeds for a single one.")
    return values if values.ndim == ndim else values[None]


def _over(values: ArrayLike) -> str:
    """What the bootstrap of these scores resamples; see `stratified_bootstrap`."""
    seeds = len(values) if np.ndim(values) > 1 else 1
    return f"interval over {seeds} seeds" if seeds > 1 else "one seed, interval over tasks"


def _interval(name: str, values: ArrayLike, rng: np.random.Generator) -> tuple[float, float, float]:
    """IQM, lower and upper bound."""
    values = _with_seeds(name, values, ndim=2)
    return iqm(values), *map(float, stratified_bootstrap(values, rng=rng))


def _line(figure: go.Figure, x: np.ndarray, y: np.ndarray, name: str, look: Style, mode="lines+markers") -> None:
    line, marker = {"color": look.color, "dash": look.dash}, {"symbol": look.symbol, "size": 7}
    figure.add_scatter(x=x, y=y, mode=mode, name=name, legendgroup=name, line=line, marker=marker)


def _band(
    figure: go.Figure,
    x: np.ndarray,
    middle: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    name: str,
    look: Style,
    mode: str = "lines+markers",
) -> None:
    """A line with a shaded band, which go on and off together in the legend."""
    figure.add_scatter(
        x=np.concatenate([x, x[::-1]]), y=np.concatenate([high, low[::-1]]),
        fill="toself", fillcolor=look.fill, line={"width": 0}, mode="lines",
        legendgroup=name, showlegend=False, hoverinfo="skip",
    )  # fmt: skip
    _line(figure, x, middle, name, look, mode)


def _axes(figure: go.Figure, x: str, y: str | None) -> None:
    figure.update_layout(xaxis_title_text=x, yaxis_title_text=y)
