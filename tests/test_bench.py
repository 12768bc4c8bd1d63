"""The benchmark of the scan: what is compared does the same work, and the record has what the chapter draws."""

import math
from functools import partial

import pytest
import torch

from adbook import bench_scan
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
    assert result["gpu"].keys() == {"missing"} or "device" in result["gpu"]


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
    monkeypatch.setitem(__import__("sys").modules, "mambapy", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install mambapy==1.2.0 --no-deps"):
        bench_scan.bench_scan()
