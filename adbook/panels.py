"""Figures of several families side by side, made of those in `adbook.plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from adbook.plots import describe, in_context_curve


def in_context_panels(families: Mapping[str, Mapping[str, ArrayLike]], *, rng: np.random.Generator) -> go.Figure:
    """`adbook.plots.in_context_curve` of several families, one panel each, in two columns.

    Args:
        families: By family, its curves by method, ``(tasks, episodes)`` or ``(seeds, tasks, episodes)``.
        rng: For the bootstrap.

    Raises:
        ValueError: There is no family, or as `in_context_curve`.
    """
    if not families:
        raise ValueError("families is empty; give the curves of one at least.")
    columns = min(2, len(families))
    rows = math.ceil(len(families) / columns)
    panels = make_subplots(rows, columns, subplot_titles=list(families), vertical_spacing=0.2)
    told, shown = [], set()
    for i, (family, curves) in enumerate(families.items()):
        single, place = in_context_curve(curves, rng=rng), {"row": 1 + i // columns, "col": 1 + i % columns}
        for trace in single.data:
            if trace.name:  # a band has none
                trace.showlegend = trace.name not in shown
                shown.add(trace.name)
            panels.add_trace(trace, **place)
        panels.update_xaxes(title_text="episode", dtick=single.layout.xaxis.dtick, tick0=1, **place)
        panels.update_yaxes(title_text="score" if place["col"] == 1 else None, **place)
        told.append(f"{family}: {single.layout.meta['alt'].split('. ', 1)[1]}")
    panels.update_layout(height=110 + 300 * rows, margin_t=80, legend_y=1 + 0.12 / rows)
    return describe(panels, f"Score by episode, one panel a family. {' '.join(told)}")
