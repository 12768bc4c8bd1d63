"""Figures: what they plot, what they say to a reader who does not see them, and how they reach the page."""

import re
from itertools import combinations

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from adbook import panels, plots
from adbook.look import GREY, METHODS
from adbook.metrics import iqm, stratified_bootstrap

TASKS, EPISODES = 6, 4


def rng():
    return np.random.default_rng(0)


def curves():
    return rng().normal(size=(3, TASKS, EPISODES))


FIGURES = {
    "learning": lambda: plots.learning_curves({"source": rng().normal(size=(5, 7))}, every=16),
    "sources": lambda: plots.learning_curves(
        {"PPO": rng().normal(size=(5, 7)), "SAC": rng().normal(size=(3, 4))},
        steps={"PPO": 1e4 * np.arange(1, 8), "SAC": 1e3 * np.arange(1, 5)},
    ),
    "in context": lambda: plots.in_context_curve({"mamba": curves(), "random": curves()[0]}, rng=rng()),
    "panels": lambda: panels.in_context_panels(
        {"reacher-goal": {"mamba": curves()}, "ant-dir": {"mamba": curves(), "transformer": curves()}}, rng=rng()
    ),
    "returns": lambda: plots.in_context_curve({"mamba": curves()}, rng=rng(), quantity="return"),
    "bars": lambda: plots.score_bars({"mamba": curves()[..., 0], "random": curves()[0, :, 0]}, rng=rng()),
    "numbers": lambda: plots.ablation_panel(
        {1: curves()[..., 0], 8: curves()[..., 1]}, factor="context", unit="episodes", rng=rng()
    ),
    "names": lambda: plots.ablation_panel(
        {"mse": curves()[..., 0], "gaussian": curves()[..., 1]}, factor="head", rng=rng()
    ),
    "cost": lambda: plots.cost_against_length([128, 256, 512], {"mamba": [1, 2, 4], "transformer": [1, 4, np.nan]}),
    "loss": lambda: plots.training_curve({"mamba": ([0, 8e3], [1.0, 0.5])}),
    "goals": lambda: plots.goal_map(
        {"train": np.zeros((9, 2)), "test": np.ones((2, 2))}, scores={"test": [0.8, 0.9]}, reach=0.21
    ),
    "window": lambda: plots.window_diagram(np.arange(10.0) - 10, [0, 4, 8]),
    "impulse": lambda: plots.impulse_response(
        np.exp(-np.array([0.1, 1])[:, None, None] * np.arange(50)), settings=[0.1, 1], slider="Δ", unit="s"
    ),
}


@pytest.fixture(params=FIGURES)
def figure(request):
    return FIGURES[request.param]()


def test_every_figure_has_alternative_text_and_titled_axes(figure):
    assert len(figure.layout.meta["alt"]) > 40
    assert "nan" not in figure.layout.meta["alt"]
    titles = [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text]
    bars = figure.data[0].type == "bar"  # their vertical axis names the methods
    assert all(titles[: 1 if bars else 2])


def test_every_figure_is_transparent_and_of_one_template(figure):
    assert figure.layout.template == pio.templates["adbook"]
    assert figure.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"


def test_every_figure_reaches_the_page_with_its_text_and_without_network(figure, recwarn):
    bundle = pio.renderers["adbook"].to_mimebundle(figure.to_dict())
    page = bundle["text/html"]
    assert set(bundle) == {"text/html"}
    label = re.search(r'role="img" aria-label="([^"]*)"', page)[1]
    assert label.replace("&#x27;", "'") == figure.layout.meta["alt"]
    assert re.findall(r'src=\\?"([^"\\]*)', page) == ["../_static/plotly-cartesian.min.js"]
    assert not recwarn.list


def test_default_renderers_serve_jupyterlab_and_the_page():
    assert pio.renderers.default == "plotly_mimetype+adbook"
    assert set(FIGURES["loss"]()._repr_mimebundle_()) == {"application/vnd.plotly.v1+json", "text/html"}


def test_figure_without_alternative_text_warns_and_says_at_least_its_axes():
    figure = go.Figure(go.Scatter(y=[1, 2])).update_layout(xaxis_title_text="time (s)", yaxis_title_text="a & b")
    with pytest.warns(UserWarning, match="no alternative text.*adbook.plots.describe"):
        page = pio.renderers["adbook"].to_mimebundle(figure.to_dict())["text/html"]
    assert 'aria-label="a &amp; b against time (s)"' in page


def test_alternative_text_is_escaped():
    figure = plots.describe(go.Figure(), alt='a "quoted" <tag>')
    page = pio.renderers["adbook"].to_mimebundle(figure.to_dict())["text/html"]
    assert 'aria-label="a &quot;quoted&quot; &lt;tag&gt;"' in page


def test_empty_alternative_text_is_refused():
    with pytest.raises(ValueError, match="alt is empty"):
        plots.describe(go.Figure(), alt=" ")


def _luminance(color):
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("background", ["#ffffff", "#121212"])
def test_every_colour_contrasts_with_both_backgrounds(background):
    # WCAG 2.2, 1.4.11: graphics need a contrast of 3:1.
    for color in {look.color for look in METHODS.values()} | {GREY}:
        dark, light = sorted((_luminance(color), _luminance(background)))
        assert (light + 0.05) / (dark + 0.05) >= 3, color


def test_methods_of_one_figure_differ_in_dash_and_marker_not_by_colour_alone():
    names = ["mamba", "transformer", "source", "random", "reward withheld", "untrained"]
    for a, b in combinations((METHODS[name] for name in names), 2):
        assert a.color != b.color
        assert a.dash != b.dash
        assert a.symbol != b.symbol


def test_a_method_has_its_colour_in_every_kind_of_figure():
    shown = [FIGURES[name]() for name in ("in context", "cost", "loss")]
    lines = [trace for figure in shown for trace in figure.data if trace.name == "mamba"]
    assert {trace.line.color for trace in lines} == {METHODS["mamba"].color}
    assert FIGURES["bars"]().data[0].marker.color == METHODS["mamba"].color


def test_in_context_curve_plots_the_iqm_inside_its_interval():
    values = curves()
    band, middle = plots.in_context_curve({"mamba": values}, rng=rng()).data
    np.testing.assert_array_equal(middle.y, iqm(values))
    np.testing.assert_array_equal(middle.x, [1, 2, 3, 4])
    low, high = stratified_bootstrap(values, rng=rng())
    np.testing.assert_array_equal(band.y, [*high, *low[::-1]])
    assert (band.legendgroup, band.showlegend) == (middle.legendgroup, False)


def test_learning_curve_counts_the_environments_episodes_from_one():
    returns = np.arange(11.0)[:, None] + np.zeros(3)  # 11 histories, constant over 3 kept episodes
    band, middle = plots.learning_curves({"source": returns}, every=16).data
    np.testing.assert_array_equal(middle.x, [1, 17, 33])
    np.testing.assert_array_equal(middle.y, [5, 5, 5])
    np.testing.assert_array_equal(band.y, [9, 9, 9, 1, 1, 1])  # nine tenths and one tenth of 0…10


def test_learning_curves_of_several_sources_share_a_logarithmic_axis_of_steps():
    figure = plots.learning_curves({"PPO": np.ones((4, 3))}, steps={"PPO": [800, 1600, 2400]})
    np.testing.assert_array_equal(figure.data[1].x, [800, 1600, 2400])
    assert (figure.layout.xaxis.type, figure.layout.yaxis.title.text) == ("log", "score (0 random, 1 oracle)")


def test_bars_carry_the_interval_in_their_length_and_in_words():
    values = np.repeat([[0.25, 0.5, 0.5, 0.75]], 2, axis=0)
    figure = plots.score_bars({"mamba": values}, rng=rng())
    assert figure.data[0].x == (0.5,)
    assert figure.data[0].y == ("mamba<br>0.50 [0.50, 0.50]",)
    assert figure.data[0].error_x.array == (0,)


def test_alternative_text_says_what_an_interval_is_over():
    assert "mamba (interval over 3 seeds): " in FIGURES["in context"]().layout.meta["alt"]
    assert "random (one seed, interval over tasks): " in FIGURES["in context"]().layout.meta["alt"]
    assert "random (one seed, interval over tasks) " in FIGURES["bars"]().layout.meta["alt"]
    assert "8 (interval over 3 seeds): " in FIGURES["numbers"]().layout.meta["alt"]


def test_cost_states_the_measured_exponent():
    alt = FIGURES["cost"]().layout.meta["alt"]
    assert "mamba grows at the end as length to the power 1.0" in alt
    assert "transformer grows at the end as length to the power 2.0" in alt


def test_window_diagram_marks_the_kept_episodes():
    everything, kept = FIGURES["window"]().data
    np.testing.assert_array_equal(everything.x, np.arange(1, 11))
    np.testing.assert_array_equal(kept.x, [1, 5, 9])
    np.testing.assert_array_equal(kept.y, [-10, -6, -2])


def test_slider_replaces_every_line_by_that_of_its_setting():
    responses = rng().normal(size=(3, 2, 5))
    figure = plots.impulse_response(responses, settings=[1, 2, 3], slider="Δ", lines=["a", "b"], start=1)
    np.testing.assert_array_equal([trace.y for trace in figure.data], responses[1])
    steps = figure.layout.sliders[0].steps
    np.testing.assert_array_equal([step.args[0]["y"] for step in steps], responses)
    assert figure.layout.sliders[0].active == 1


def test_impulse_response_tells_how_long_ninety_percent_take():
    # Σ e^{-Δk}: 90 % of the infinite sum have passed after k steps with e^{-Δ(k+1)} ≤ 0.1, for Δ = 1 at k = 2. At
    # Δ = 0.1 the sum over 50 steps is 1 - e^{-5} of it: 1 - e^{-0.1(k+1)} ≥ 0.9 (1 - e^{-5}), at k = 22.
    assert "after 22 steps at Δ = 0.1 s and after 2 steps at 1 s" in FIGURES["impulse"]().layout.meta["alt"]


def test_wrong_shapes_and_quantities_are_refused():
    with pytest.raises(ValueError, match=r"'mamba' has shape \(4,\); it must be \(seeds, tasks, episodes\)"):
        plots.in_context_curve({"mamba": np.zeros(4)}, rng=rng())
    with pytest.raises(ValueError, match="curves is empty"):
        plots.in_context_curve({}, rng=rng())
    with pytest.raises(ValueError, match="unknown quantity 'reward'; choose one of score, return"):
        plots.in_context_curve({"mamba": curves()}, rng=rng(), quantity="reward")
    with pytest.raises(ValueError, match=r"'mse' has shape \(1, 2, 3\); it must be \(seeds, tasks\)"):
        plots.score_bars({"mse": np.zeros((1, 2, 3))}, rng=rng())
    with pytest.raises(ValueError, match=r"responses has shape \(2, 5\).*\(2, 1, any\)"):
        plots.impulse_response(np.zeros((2, 5)), settings=[1, 2], slider="Δ")


def test_panels_hold_the_curves_of_each_family_and_one_legend():
    families = {"reacher-goal": {"mamba": curves()}, "ant-dir": {"mamba": 2 * curves(), "transformer": curves()}}
    figure = panels.in_context_panels(families, rng=rng())
    named = [(trace.name, trace.xaxis, trace.showlegend) for trace in figure.data if trace.name]
    assert named == [("mamba", "x", True), ("mamba", "x2", False), ("transformer", "x2", True)]
    one, two = (trace.y for trace in figure.data if trace.name == "mamba")
    np.testing.assert_allclose(two, 2 * np.array(one))
    with pytest.raises(ValueError, match="families is empty"):
        panels.in_context_panels({}, rng=rng())
