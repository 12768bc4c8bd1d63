"""The benchmarks of scan and player: what is compared does the same work, and the records have what is shown."""

import json
import math
import sys
from functools import partial

import pytest
import torch

from adbook import bench_context, bench_exhibit, bench_player, bench_scan
from adbook.experiments import profile
from adbook.scan import selective_scan


@pytest.fixture
def few_methods(monkeypatch):
    """Two methods, and the library's own plain scan in mambapy's place, which need not be installed."""
    monkeypatch.setattr(bench_scan, "mambapy_scan", lambda: partial(selective_scan, backend="torch"))
    monkeypatch.setattr(bench_scan, "METHODS", {name: bench_scan.METHODS[name] for name in ("scan", "projections")})


def test_the_record_has_a_number_for_every_method_length_and_thread_count(few_methods):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = bench_scan.bench_scan(lengths=(32, 64), shapes={"tiny": (2, 40)}, rounds=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    ratios = {key: value for key, value in result.items() if key.endswith("_tiny")}
    assert set(ratios) == {
        "scan_ms_tiny",
        "scan_to_projections_tiny",
        "scan_in_rows_to_projections_tiny",
        "mambapy_to_scan_tiny",
        "speed_up_by_2_threads_tiny",
        "peak_to_own_memory_tiny",
    }
    assert all(0 < value < math.inf for value in ratios.values())
    sweep = result["sweep"]
    assert sweep["lengths"] == [32, 64]
    assert sweep["microseconds"].keys() == {"1", "2"}
    for by_method in (*sweep["microseconds"].values(), sweep["bytes"]):
        assert by_method.keys() == {"scan", "projections"}
        assert all(len(values) == 2 for values in by_method.values())


def test_the_benchmark_on_a_gpu_refuses_a_machine_without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU, and PyTorch sees none"):
        bench_scan.bench_gpu()


def test_peak_memory_counts_what_a_pass_takes():
    """Two projections of 8,000 tokens make their outputs and gradients of the inputs, in all 4 · (512 + 128 + ...)."""
    tokens, numbers = 8000, 128 + 2 * 256 + 256 + 128  # gradients of both inputs, and both outputs
    taken = bench_scan._peak("projections", 4, tokens // 4)
    assert 4 * tokens * numbers <= taken < 1.5 * 4 * tokens * numbers


def test_methods_that_are_compared_in_time_compute_the_same_function():
    torch.manual_seed(0)
    loop, fused = (partial(selective_scan, backend=name) for name in ("reference", "auto"))
    for rows in (False, True):
        results = []
        for function in (loop, fused):
            torch.manual_seed(0)
            results.append(bench_scan.scan(2, 20, function, rows)())
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_mambapy_is_asked_for_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "mambapy", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install mambapy==1.2.0 --no-deps"):
        bench_scan.bench_scan()


def test_the_cost_of_a_context_is_measured_for_both_backbones_at_every_length(monkeypatch):
    monkeypatch.setattr(bench_context, "TOKENS", 200)
    result = bench_context.bench_context(lengths=(20, 50), remembered=(10, 1000), rounds=1)
    for kind in ("training", "rollout"):
        assert result[kind].keys() == {"mamba", "transformer"}
        assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in result[kind].values())
    settings = profile("laptop")
    shape = settings.backbone
    state = 4 * shape.n_layers * shape.d_inner * (shape.d_conv + shape.d_state)
    assert result["memory"]["mamba"] == [state, state]
    cache = 4 * 2 * shape.n_layers * shape.d_model  # of a token
    assert result["memory"]["transformer"] == [10 * cache, 1000 * cache]
    assert abs(result["weights"]["transformer"] / result["weights"]["mamba"] - 1) < 0.05


def test_the_crossing_lies_where_the_speeds_of_a_power_law_meet():
    lengths = (10, 100, 1000)
    mamba, attention = [50.0] * 3, [20_000 / length for length in lengths]  # equal at 400
    assert bench_context._crossing(lengths, mamba, attention) == pytest.approx(400)
    assert bench_context._crossing(lengths, [1.0] * 3, attention) is None
    assert bench_context._crossing(lengths, [1e6] * 3, attention) == 10


@pytest.fixture
def tiny_recordings(monkeypatch):
    monkeypatch.setattr(bench_player, "_SIZES", {})
    monkeypatch.setattr(bench_player, "_SIZE", (1, 2))


def test_the_players_record_has_rates_and_sizes_of_every_player(chromium, tiny_recordings, tmp_path):
    players = (("ant-dir", 1), ("reacher-goal", 2))
    result = bench_player.bench_player(players, loads=1, seconds=1, site=tmp_path)
    assert result["drawn_ms"] > 0
    assert result["first_paint_ms"] > 0
    assert result["book"] == {"missing": "notebooks/05_in_context_rollouts.html is not built; run `make book` first"}
    assert result["players"].keys() == {"ant-dir, 1 agents", "reacher-goal, 2 agents"}
    for name, measured in result["players"].items():
        assert 0 < measured["pictures"] <= measured["frames"], name
        assert 0 < measured["frames_with_a_move"] <= measured["frames"], name
        assert measured["program_bytes"] < measured["payload_bytes"], name
    assert result["fewest_pictures_per_second"] == min(p["pictures"] for p in result["players"].values())


def test_a_players_payload_is_its_recording_in_base_64_beside_its_program(tiny_recordings):
    player = bench_player._player("reacher-goal", 2)
    sizes = bench_player._bytes(player)
    recorded = sum(len(value) for value in player.get_state().values() if isinstance(value, bytes))
    rest = sizes["payload_bytes"] - sizes["program_bytes"] - 4 * recorded / 3
    described = sum(
        len(json.dumps(getattr(player, name))) for name in ("scene", "agents", "tasks", "others", "returns")
    )
    assert described < rest < described + 4000  # also names and the layout's own state


def test_the_chapter_is_measured_where_the_book_is_built(chromium, tiny_recordings, tmp_path):
    bench_player._player("reacher-goal", 2).save_html(tmp_path / bench_player.CHAPTER)
    result = bench_player.bench_player((("reacher-goal", 1),), loads=1, seconds=0.1, site=tmp_path)
    assert result["book"].keys() == {"page", "first_paint_ms", "drawn_ms"}


def test_the_exhibits_record_compares_the_page_with_a_rollout(chromium, monkeypatch):
    monkeypatch.setattr(bench_exhibit, "RUNS", ("reacher-goal",))
    monkeypatch.setattr(bench_exhibit, "SIZES", {"reacher-goal": (3, 2)})
    result = bench_exhibit.bench_exhibit(tasks=4, loads=1)
    assert result["first_motion_ms"] > 0
    assert result["page_bytes"] < 400_000
    measured = result["families"]["reacher-goal"]
    assert measured["steps_per_second"] > 0
    assert measured["page"].shape == measured["rollout"].shape == (3,)
    low, high = measured["difference"].T
    assert measured["episodes_that_agree"] == f"{((low <= 0) & (high >= 0)).sum()} of 3"
    assert measured["page"] == pytest.approx(measured["rollout"], abs=6)  # an untrained one would be at -40


@pytest.mark.parametrize(("missing", "error", "remedy"), [
    ("playwright", ModuleNotFoundError, r"pip install -r requirements\.txt"),
    ("chromium", ValueError, "apt-get install chromium"),
])  # fmt: skip
def test_what_the_players_benchmark_needs_is_asked_for_before_any_work(monkeypatch, missing, error, remedy):
    monkeypatch.setattr(bench_player, "_player", None)
    if missing == "playwright":
        monkeypatch.setitem(sys.modules, "playwright.async_api", None)
    else:
        monkeypatch.setattr(bench_player.shutil, "which", lambda name: None)
    with pytest.raises(error, match=remedy):
        bench_player.bench_player()
