"""The baselines with a profile's settings: what they are trained on, played on, and kept as."""

from types import SimpleNamespace

import numpy as np
import pytest

from adbook import experiments
from adbook.baselines import runs
from adbook.experiments import profile
from adbook.results import load_result, save_result


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
    result = runs.baselines(settings, seeds=(0,), n_jobs=1)
    for split, methods in {"test": {"macaw", "macaw-online", "mql"}, "ood": {"macaw-online", "mql"}}.items():
        returns = runs.returns(result, split)
        assert set(returns) == methods
        for method, values in returns.items():
            assert values.shape == (1, settings.n_test, settings.episodes), method
            assert np.isfinite(values).all()
    transitions, tasks = trained_on  # of MACAW and MQL; once each
    assert tasks == settings.train_tasks
    goals = runs.by_task(settings, "train", 0.9)
    assert set(goals) == {task.goal for task in settings.train_tasks}
    for mine, theirs in zip(transitions, goals.values(), strict=True):
        np.testing.assert_array_equal(mine.observations, theirs.observations)
    again = runs.returns(runs.baselines(settings, seeds=(0,), n_jobs=1), "test")
    np.testing.assert_array_equal(again["mql"], runs.returns(result, "test")["mql"])
    assert len(trained_on) == 2


def test_seeds_that_a_result_holds_are_not_made_again(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(runs, "_train", lambda *_: None)
    monkeypatch.setattr(runs, "_with_seed", lambda settings, *_: made.append(settings.seed) or {"seed": settings.seed})
    first = runs.baselines(profile("smoke"), seeds=(4,), n_jobs=1)
    known = load_result("b", save_result("b", first, tmp_path).parent)
    longer = runs.baselines(profile("smoke"), seeds=(0, 4), known=known, n_jobs=1)
    assert longer["each"] == [{"seed": 0}, {"seed": 4}]
    assert made == [4, 0]
    runs.baselines(profile("smoke", n_tasks=3), seeds=(4,), known=known, n_jobs=1)
    assert made == [4, 0, 4]  # of other settings


def test_all_agents_are_made_before_the_first_plays(monkeypatch):
    """To make one can be a parallel job itself, which another one that runs would wait for, for ever."""
    made, trained = [], SimpleNamespace(about={"minutes": 1.0})
    monkeypatch.setattr(runs, "_TRAINED", dict.fromkeys(("macaw", "mql"), lambda *_, **__: trained))
    monkeypatch.setattr(runs, "agent", lambda *args, **_: made.append(args))
    monkeypatch.setattr(runs, "Parallel", lambda **_: lambda jobs: (len(made) for _ in jobs))
    returns = runs._with_seed(profile("smoke", "half-cheetah-vel"), runs.METHODS, recompute=False)["returns"]
    assert {n for methods in returns.values() for n in methods.values()} == {8}  # of three splits


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


def test_what_cannot_be_played_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(runs, "_TRAINED", {})  # a KeyError if it is asked
    monkeypatch.setattr(runs, "trained_macaw", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(runs, "trained_mql", lambda *_, **__: pytest.fail("trained"))
    settings = profile("smoke")
    for method, split, message in (
        ("maccaw", "test", r"unknown method 'maccaw' \(did you mean 'macaw'\?\)"),
        ("mql", "tests", r"unknown split 'tests' \(did you mean 'test'\?\)"),
        ("macaw", "ood", "there are none of split 'ood'; use macaw-online"),
        ("macaw", "macaw", "tasks is empty"),  # Reacher-Goal has no such split
    ):
        with pytest.raises(ValueError, match=message):
            runs.agent(settings, method, split)
    with pytest.raises(ValueError, match="unknown method 'nope'"):
        runs.baselines(settings, methods=("mql", "nope"), n_jobs=1)
    with pytest.raises(ValueError, match=r"seeds=\(0, 0\) must be different"):
        runs.baselines(settings, seeds=(0, 0), n_jobs=1)


def test_they_play_the_means_of_their_actions(monkeypatch):
    asked = []
    monkeypatch.setattr(
        runs, "evaluate", lambda *args, **options: asked.append(options) or SimpleNamespace(returns=np.ones(1))
    )
    runs._play(profile("smoke"), None, "test")
    assert asked == [{"deterministic": True}]
