"""How the book's figures look and how they reach the page: palette, template, alternative text, renderer.

Importing this module registers the template ``adbook`` (transparent, readable on white and on black) and the
renderer of the same name, which makes a figure live in a static page without network. JupyterLab keeps using
plotly's own mimetype.
"""

from __future__ import annotations

import html
import warnings
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer


@dataclass(frozen=True)
class Style:
    """How a method looks; the dash and the marker tell methods apart where colour does not."""

    color: str
    dash: str = "solid"
    symbol: str = "circle"

    @property
    def fill(self) -> str:
        """The colour at one fifth opacity, for bands."""
        red, green, blue = (int(self.color[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.2)"


# The palette of Okabe and Ito (jfly.uni-koeln.de/color), which the common colour-vision deficiencies keep
# apart. Its orange, sky blue and purple are darkened until they contrast by 3:1 with white as well as with
# #121212.
GREY = "#7F7F7F"
_BLUE, _VERMILLION, _GREEN = "#0072B2", "#D55E00", "#009E73"
_PURPLE, _ORANGE, _SKY = "#C46D9C", "#B97E00", "#3492CC"
METHODS = {
    "mamba": Style(_BLUE),
    "transformer": Style(_VERMILLION, "dash", "square"),
    "source": Style(_GREEN, "longdash", "diamond"),
    "random": Style(GREY, "dot", "x"),
    "reward withheld": Style(_PURPLE, "dashdot", "triangle-up"),
    "untrained": Style(_ORANGE, "longdashdot", "cross"),
    "mse": Style(_SKY, "dash", "triangle-down"),
    "deterministic": Style(_SKY, "dot", "star"),
    "decision-transformer": Style(_PURPLE, "dot", "star"),
    "context shuffled": Style(GREY, "dashdot", "square-open"),
    "transformer, reread": Style(_VERMILLION, "dot", "square-open"),
    "decision-transformer, reread": Style(_PURPLE, "longdash", "star-open"),
    "macaw": Style(_ORANGE, "dash", "triangle-down"),
    "macaw-online": Style(_ORANGE, "dot", "triangle-up"),
    "mql": Style(_SKY, "dashdot", "diamond"),
}
METHODS |= {
    "gaussian": METHODS["mamba"],  # the book's default head: the same network
    "attention": METHODS["transformer"],
    "attention alone": Style(_VERMILLION, "dot", "square-open"),
    "scan": METHODS["mamba"],
    "projections": Style(GREY, "dot", "circle-open"),
    "mambapy": Style(_PURPLE, "dashdot", "triangle-up"),
    "reference loop": Style(_ORANGE, "longdashdot", "cross"),
    "memory wiped": Style(_ORANGE, "dash", "triangle-left"),
    "context reset": Style(_ORANGE, "dash", "triangle-left"),
    "source's start": Style(_GREEN, "dot", "diamond-open"),
    "PPO": METHODS["source"],
    "SAC": Style(_PURPLE, "dashdot", "triangle-up"),
    "DroQ": Style(_ORANGE, "dot", "square"),
    "oracle": Style(_SKY, "dash", "star"),
    "sbx-rl": Style(_SKY, "dash", "triangle-down"),
    "train": Style(GREY, "dot", "circle-open"),
    "test": Style(_BLUE),
    "ood": Style(_VERMILLION, "dash", "square"),
}
_SPARE = tuple(METHODS[m] for m in ("mamba", "transformer", "source", "reward withheld", "untrained", "mse"))

_TEXT, _FAINT = "#797979", "rgba(127,127,127,0.25)"  # text: 4.3:1 on white and on #121212
_AXIS = {
    "gridcolor": _FAINT, "linecolor": GREY, "tickcolor": GREY, "showline": True, "ticks": "outside",
    "zeroline": False, "automargin": True, "title": {"standoff": 12},
}  # fmt: skip
pio.templates["adbook"] = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": _TEXT, "family": "system-ui, sans-serif", "size": 14},
        "colorway": [style.color for style in _SPARE],
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "height": 380,
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        "colorscale": {"sequential": "Cividis"},
        "hovermode": "closest",
        "sliderdefaults": {"bgcolor": _FAINT, "activebgcolor": GREY, "bordercolor": GREY, "tickcolor": GREY},
    }
)
pio.templates.default = "adbook"

# In the page, text takes the theme's own colour: no fixed grey contrasts by 4.5:1 with both backgrounds.
_CSS = (
    ".adbook-figure{margin:1em 0}"
    ".adbook-figure svg.main-svg text:not(.hovertext text)"
    "{fill:var(--pst-color-text-base,currentColor)!important}"
)
# The 1.5 MB script is taken once a page, however many figures the page has.
_LOADER = "<script>window.Plotly||document.write('<script src=\"{}\"><\\/script>')</script>"


class _PageRenderer(MimetypeRenderer):
    """Figures as HTML that finds plotly beside the page and that a screen reader can announce."""

    script = "../_static/plotly-cartesian.min.js"  # as seen from a chapter's page

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        """Wrap plotly's own HTML in a figure with alternative text."""
        meta = fig_dict["layout"].get("meta") or {}
        plot = pio.to_html(
            fig_dict,
            full_html=False,
            include_plotlyjs=False,
            auto_play=False,
            validate=False,
            config={"responsive": True, "displaylogo": False},
        )
        return {
            "text/html": f'<figure class="adbook-figure"><style>{_CSS}</style>{_LOADER.format(self.script)}'
            f'<div role="img" aria-label="{html.escape(_alt(fig_dict["layout"], meta))}">{plot}</div></figure>'
        }


def _alt(layout: dict[str, Any], meta: dict[str, Any]) -> str:
    if meta.get("alt"):
        return meta["alt"]
    warnings.warn(
        "This figure has no alternative text; give it one with adbook.plots.describe(figure, alt=...).",
        stacklevel=2,
    )
    x, y = (layout.get(axis, {}).get("title", {}).get("text", "?") for axis in ("xaxis", "yaxis"))
    return f"{y} against {x}"


pio.renderers["adbook"] = _PageRenderer()
pio.renderers.default = "plotly_mimetype+adbook"


def describe(figure: go.Figure, alt: str) -> go.Figure:
    """Attach the text that stands for the figure where it cannot be seen; returns the same figure.

    Args:
        figure: Any plotly figure.
        alt: What a reader who does not see it should know: what is plotted and what it shows.

    Raises:
        ValueError: The alternative text is empty.
    """
    if not alt.strip():
        raise ValueError("alt is empty; say what is plotted and what it shows.")
    return figure.update_layout(meta={"alt": alt})


def style(method: str, position: int = 0) -> Style:
    """The look of a method; an unknown name takes a spare look by its position in a figure."""
    return METHODS.get(method, _SPARE[position % len(_SPARE)])
