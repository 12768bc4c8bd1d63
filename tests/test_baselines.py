"""The baselines with a profile's settings: what they are trained on, played on, and kept as."""

import numpy as np
import pytest

from adbook import experiments
from adbook.baselines import runs
from adbook.experiments import profile


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Nothing is there yet, and what is made goes to a folder of the test."""
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(runs, "BASELINES", tmp_path / "artifacts")
    return tmp_path


def test_both_are_trained_on_training_tasks_played_on_test_tasks_and_found_again(kept, monkeypatch):
    trained_on = []
    for name in ("meta_train", "meta_train_mql"):
        original = getattr(runs, name)
        monkeypatch.setattr(runs, name, lambda *a, f=original, **k: trained_on.append(a[-1]) or f(*a, **k))
    settings = profile("smoke")
    result = runs.baselines(settings, seeds=(0,))
    assert {split: set(methods) for split, methods in result["returns"].items()} == {
        "test": {"macaw", "macaw-online", "mql"},
        "ood": {"macaw-online", "mql"},
    }
    for methods in result["returns"].values():
        for method, returns in methods.items():
            assert np.shape(returns) == (1, settings.n_test, settings.episodes), method
            assert np.isfinite(returns).all()
    transitions, tasks = trained_on  # of MACAW and MQL; once each
    assert tasks == settings.train_tasks
    goals = runs.by_task(settings, "train", 0.9)
    assert set(goals) == {task.goal for task in settings.train_tasks}
    for mine, theirs in zip(transitions, goals.values(), strict=True):
        np.testing.assert_array_equal(mine.observations, theirs.observations)
    np.testing.assert_array_equal(
        runs.baselines(settings, seeds=(0,))["returns"]["test"]["mql"], result["returns"]["test"]["mql"]
    )
    assert len(trained_on) == 2


def test_macaw_trains_on_the_histories_of_training_tasks_and_adapts_to_those_of_its_test_task():
    settings = profile("smoke")
    train, test = (runs.by_task(settings, split, 0.9) for split in ("train", "test"))
    assert set(train) == {task.goal for task in settings.train_tasks}
    assert set(test) == {task.goal for task in settings.test_tasks}


def test_published_networks_play_alike(kept):
    settings = profile("smoke")
    before = [runs._play(settings, runs.agent(settings, method, "test"), "test") for method in ("macaw", "mql")]
    paths = runs.publish(settings)
    assert all(path.parent == runs.BASELINES and path.is_file() for path in paths)
    after = [runs._play(settings, runs.agent(settings, method, "test"), "test") for method in ("macaw", "mql")]
    for one, other in zip(before, after, strict=True):
        assert not np.array_equal(one, other)  # the published ones, of 16 bits, are played
        np.testing.assert_allclose(one, other, rtol=0.05)


def test_there_is_nothing_to_adapt_to_out_of_distribution(kept):
    with pytest.raises(ValueError, match="there are none of split 'ood'; use macaw-online"):
        runs.agent(profile("smoke"), "macaw", "ood")
    with pytest.raises(ValueError, match=r"unknown method 'macaws' .*did you mean 'macaw'"):
        runs.agent(profile("smoke"), "macaws", "test")
