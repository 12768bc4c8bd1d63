"""Trials: changed settings, tasks of their own, and a file that keeps what was tried."""

import numpy as np
import pytest

from adbook import experiments, trials
from adbook.__main__ import main
from adbook.experiments import profile


def test_changes_reach_into_the_parts_of_a_profile():
    settings = trials.changed(profile(), ["training.updates=300", "window.hold=2", "head=mse", "source_seeds=[0]"])
    assert (settings.training.updates, settings.window.hold, settings.head) == (300, 2, "mse")
    assert settings.training.batch_size == profile().training.batch_size
    together = trials.changed(profile("laptop", "half-cheetah-vel"), ["kept=null", "window.every=26", "window.hold=4"])
    assert together.window.needed == 156  # of 156 episodes: without the other, "every" would not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("hold", "'hold' is not a change; write for example training.updates=3000"),
        ("window.holds=2", "no setting 'holds' here; choose from episodes, every, span, hold"),
        ("training.updates.x=2", "no setting 'x' here; choose from none"),
        ("window=3", "'window' has settings of its own; choose from window.episodes, window.every"),
        ("training.updates=0", "updates=0 must be a whole number of at least 1"),
        ("training.updates=3e3", "updates=3000.0 must be a whole number"),
        ("window.strays=high", "strays='high' must be a number from 0 to below 1"),
        ('images="no"', "images='no' must be True or False"),
    ],
)
def test_a_change_of_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        trials.changed(profile(), [change])


def test_a_trial_plays_tasks_of_its_own_and_is_noted_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    played = []
    monkeypatch.setattr(trials, "rollout", lambda p, f, tasks, **o: played.extend(tasks) or _rollout(p, f, tasks, **o))
    command, settings = ["trial", "--profile", "smoke"], profile("smoke")
    assert main([*command, "training.updates=4"]) == 0
    goals = {task.goal for task in settings.family.train_tasks + settings.family.test_tasks}
    assert len(played) == trials.N_TASKS
    assert not goals & {task.goal for task in played}
    assert main([*command, "training.updates=4", "training.observation_noise=0"]) == 0
    kept = trials.load_result("trials", experiments.RESULTS)["trials"]
    del kept[0]["settings"]["images"], kept[0]["settings"]["window"]["strays"]  # as a file from before there were any
    trials.save_result("trials", {"trials": kept}, experiments.RESULTS)
    assert main([*command, "training.updates=4"]) == 0  # once more
    assert capsys.readouterr().out.endswith("2 trials are noted\n")
    kept = trials.load_result("trials", experiments.RESULTS)["trials"]
    assert [row["changes"] for row in kept] == [
        ["training.updates=4", "training.observation_noise=0"],
        ["training.updates=4"],
    ]
    assert np.shape(kept[0]["returns"]) == (trials.N_TASKS, settings.window.episodes + 2)
    assert kept[0]["returns"] != kept[1]["returns"]
    for rate, there in ((3.1e-4, 3), (3.4e-4, 4)):  # settings are not rounded
        row = kept[1] | {"settings": kept[1]["settings"] | {"training": {"learning_rate": rate}}}
        assert len(trials.keep(row)) == there
    assert main([*command, "training.update=4"]) == 2
    assert "choose from updates, batch_size" in capsys.readouterr().err


_rollout = trials.rollout
