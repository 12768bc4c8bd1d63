"""Generating histories: what is made and what is refused, seen from within one process."""

import errno
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_histories import ARRAYS, TINY, make_history

import adbook
from adbook import generation
from adbook.generation import record, run_paths
from adbook.histories import LearningHistory
from adbook.sources import DroQConfig, PPOConfig, SACConfig
from adbook.vectors import simulator

FAMILY = adbook.family("reacher-goal")


@pytest.fixture
def toy_source(monkeypatch):
    """A source that costs nothing; returns the list of (task index, seed) it was asked for."""
    asked = []

    def run(family, task, config, seed, on_steps):
        asked.append((task.index, seed))
        history = make_history(number=100 * task.index + seed)
        return [{name: getattr(history, name) for name in ARRAYS}]

    monkeypatch.setattr(generation, "run_source", run)
    return asked


def record_toy(folder):
    return record(FAMILY, FAMILY.train_tasks[:3], TINY, seeds=(0, 5), folder=folder, n_jobs=1, progress=False)


def files(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def test_recording_makes_a_file_a_task_and_seed_in_order(tmp_path, toy_source):
    paths = record_toy(tmp_path)
    assert toy_source == [(0, 0), (0, 5), (1, 0), (1, 5), (2, 0), (2, 5)]
    numbers = [LearningHistory.load(path).observations[0, 2] for path in paths]
    assert numbers == [0, 5, 100, 105, 200, 205]
    about = LearningHistory.load(paths[3]).metadata
    assert (about["task"]["index"], about["seed"], about["config"]["steps"]) == (1, 5, 100)
    assert (about["source"], about["simulator"]) == ("PPO", simulator("reacher-goal"))
    assert {"gymnasium", "mujoco", "torch", about["simulator"]} <= set(about["versions"])
    assert files(tmp_path) == sorted(path.name for path in paths)


def test_only_a_missing_history_is_made_again(tmp_path, toy_source):
    paths = record_toy(tmp_path)
    toy_source.clear()
    paths[2].unlink()
    before = {path: path.stat().st_mtime_ns for path in paths if path.exists()}
    assert record_toy(tmp_path) == paths
    assert toy_source == [(1, 0)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    toy_source.clear()
    record_toy(tmp_path)
    assert toy_source == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, TypeError("a mistake")])
def test_a_stopped_recording_goes_on_where_it_stopped(tmp_path, toy_source, monkeypatch, stop):
    plain = generation.run_source

    def stopped(family, task, config, seed, on_steps):
        if (task.index, seed) == (1, 5):
            raise stop
        return plain(family, task, config, seed, on_steps)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "run_source", stopped)
        with pytest.raises(stop if isinstance(stop, type) else type(stop)):
            record_toy(tmp_path)
    assert len(files(tmp_path)) == 3  # the finished runs, no temporary file, no lock
    toy_source.clear()
    assert all(path.exists() for path in record_toy(tmp_path))
    assert toy_source == [(1, 5), (2, 0), (2, 5)]


def test_a_run_that_fails_does_not_keep_the_others_from_their_end(tmp_path, toy_source, monkeypatch):
    plain = generation.run_source

    def diverging(family, task, config, seed, on_steps):
        if (task.index, seed) == (1, 5):
            raise ValueError("loc is nan\ntensor([nan])")
        return plain(family, task, config, seed, on_steps)

    monkeypatch.setattr(generation, "run_source", diverging)
    message = (
        r"1 of (6 runs failed, 5|1 runs failed, 0) are finished: PPO on reacher-goal/train-001, seed 5: .*: loc is nan$"
    )
    for _ in range(2):
        with pytest.warns(UserWarning, match="a run failed"), pytest.raises(ValueError, match=message):
            record_toy(tmp_path)
        assert len(files(tmp_path)) == 5
    assert toy_source == [(0, 0), (0, 5), (1, 0), (2, 0), (2, 5)]  # each once


def test_a_goal_in_whatever_form_is_the_same_run(tmp_path):
    task = FAMILY.train_tasks[0]
    for goal in (list(task.goal), np.array(task.goal), tuple(map(np.float64, task.goal))):
        again = replace(task, goal=goal)
        assert (again, repr(again)) == (task, repr(task))
        assert run_paths(FAMILY, [again], TINY, folder=tmp_path) == run_paths(FAMILY, [task], TINY, folder=tmp_path)


def test_files_on_a_read_only_disk_are_used(tmp_path, toy_source, monkeypatch):
    paths = record_toy(tmp_path)

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refused)
    assert record_toy(tmp_path) == paths


def test_another_setting_is_another_file(tmp_path):
    ant, macaw = adbook.family("ant-dir"), adbook.family("ant-dir", split="macaw")

    def path(family=ant, task=ant.train_tasks[0], config=TINY, seed=0):
        return run_paths(family, [task], config, seeds=[seed], folder=tmp_path)[0]

    other = PPOConfig(steps=100, n_envs=1, streams=1, n_steps=50, batch_size=50, n_epochs=1, gamma=0.9)
    paths = {path(), path(seed=1), path(config=other), path(task=ant.train_tasks[1]), path(macaw)}
    paths |= {path(config=SACConfig()), path(config=DroQConfig())}
    assert len(paths) == 7
    assert path() in paths


def test_a_folder_that_cannot_be_written_is_found_out_before_the_first_run(tmp_path, toy_source):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        record_toy(tmp_path / "file")
    assert toy_source == []


@pytest.mark.parametrize("seeds", [(), (-1,), 3, (0.5,), ("one",)])
def test_seeds_that_are_none_are_refused(tmp_path, toy_source, seeds):
    with pytest.raises(ValueError, match="must be whole numbers of at least 0, one or more"):
        record(FAMILY, FAMILY.train_tasks[:1], TINY, seeds=seeds, folder=tmp_path, progress=False)
    assert toy_source == []


def test_numpys_seeds_are_seeds(tmp_path, toy_source):
    seeds = {"seeds": np.arange(2), "folder": tmp_path}
    paths = record(FAMILY, FAMILY.train_tasks[:1], TINY, **seeds, n_jobs=1, progress=False)
    assert paths == run_paths(FAMILY, FAMILY.train_tasks[:1], TINY, seeds=(0, 1), folder=tmp_path)
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "tasks is empty"),
        ([FAMILY.train_tasks[0], 1], "1 is not a task"),
        ([FAMILY.train_tasks[0], replace(FAMILY.train_tasks[1], family="ant-dir")], "tasks of ant-dir given"),
        ([FAMILY.train_tasks[0], replace(FAMILY.train_tasks[1], goal=(9.0, 9.0))], r"goal=\(9.0, 9.0\) is not a point"),
    ],
)
def test_tasks_that_are_none_are_refused_before_the_first_run(tmp_path, toy_source, tasks, message):
    with pytest.raises(ValueError, match=message):
        record(FAMILY, tasks, TINY, folder=tmp_path, progress=False)
    assert toy_source == []


@pytest.mark.parametrize("changes", [{"n_jobs": 0}, {"n_jobs": "2"}, {"config": PPOConfig}])
def test_other_requests_that_make_no_sense_are_refused(tmp_path, toy_source, changes):
    request = {"family": FAMILY, "tasks": FAMILY.train_tasks[:1], "config": TINY, "folder": tmp_path} | changes
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* must be a"):
        record(**request, progress=False)
    assert toy_source == []


def test_settings_too_short_for_an_episode_are_refused_before_the_run(tmp_path, toy_source):
    short = PPOConfig(steps=40, n_envs=1, streams=1, n_steps=40, batch_size=40)
    with pytest.raises(ValueError, match="steps=40 over 1 environments are 40 steps each"):
        record(FAMILY, FAMILY.train_tasks[:1], short, folder=tmp_path, progress=False)


def test_workers_that_write_elsewhere_are_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_record_run", lambda *arguments: None)
    monkeypatch.setattr(generation, "_PATIENCE", 0.2)
    with pytest.raises(OSError, match=r"6 files are not here, .*give a folder that every worker sees"):
        record_toy(tmp_path)


def test_a_relative_folder_is_the_callers(tmp_path, toy_source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert record_toy("here") == run_paths(FAMILY, FAMILY.train_tasks[:3], TINY, seeds=(0, 5), folder=tmp_path / "here")


def test_a_worker_with_another_simulator_is_refused(tmp_path, monkeypatch):
    path = run_paths(FAMILY, FAMILY.train_tasks[:1], TINY, folder=tmp_path)[0]
    with pytest.raises(ValueError, match=r"this worker steps reacher-goal with .*, whoever asked for it with another"):
        generation._record_run(FAMILY, FAMILY.train_tasks[0], 0, TINY, path, "another", False)


def test_what_killed_processes_left_is_taken_away(tmp_path, toy_source):
    first = run_paths(FAMILY, FAMILY.train_tasks[:1], TINY, folder=tmp_path)[0]
    first.parent.mkdir(parents=True)
    for name in (f".{first.name}.0a1b2c3d.tmp", f".{first.name}.lock", f".{first.name}.steps"):
        (first.parent / name).write_bytes(b"17")
    paths = record_toy(tmp_path)
    assert files(tmp_path) == sorted(path.name for path in paths)
    for name in (f".{first.name}.lock", f".{first.name}.steps"):  # killed just after it had written the history
        (first.parent / name).write_bytes(b"17")
    record_toy(tmp_path)
    assert files(tmp_path) == sorted(path.name for path in paths)


def test_a_run_that_another_process_is_making_is_waited_for(tmp_path, toy_source):
    """And is not made twice: when the other has finished, its file is taken. Runs that nobody makes are made before."""
    path, free = run_paths(FAMILY, FAMILY.train_tasks[:2], TINY, folder=tmp_path)
    path.parent.mkdir(parents=True)
    program = f"""
import time
from pathlib import Path
from filelock import FileLock
with FileLock({str(path.with_name(f".{path.name}.lock"))!r}):
    print("locked", flush=True)
    for _ in range(600):
        if Path({str(free)!r}).exists():
            Path({str(path)!r}).write_bytes(b"the other's")
            break
        time.sleep(0.1)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        record(FAMILY, FAMILY.train_tasks[:2], TINY, folder=tmp_path, n_jobs=1, progress=False)
    assert path.read_bytes() == b"the other's"
    assert toy_source == [(1, 0)]


def test_workers_that_die_again_and_again_end_it(tmp_path, monkeypatch):
    def lost(*args, **kwargs):
        raise generation.BrokenProcessPool("killed")

    monkeypatch.setattr(generation, "_record_run", lost)
    with pytest.raises(ChildProcessError, match=r"workers died 3 times, and none of 6 runs was finished.*lower n_jobs"):
        record_toy(tmp_path)


def test_the_bar_counts_runs_and_steps_whoever_makes_them(tmp_path, toy_source, capsys):
    record(FAMILY, FAMILY.train_tasks[:2], TINY, folder=tmp_path, n_jobs=1)
    shown = capsys.readouterr().err
    assert "reacher-goal PPO 2/2 runs" in shown
    assert "200/200" in shown
    record(FAMILY, FAMILY.train_tasks[:2], TINY, folder=tmp_path, n_jobs=1)
    assert capsys.readouterr().err == ""


def test_the_bar_does_not_take_what_others_had_made_for_speed(tmp_path, capsys):
    path = tmp_path / "run.safetensors"
    with generation._bar("toy", [path], 100_000, show=True):
        for steps in (50_000, 50_010):  # another process's, long under way
            generation._steps_file(path).write_text(str(steps))
            time.sleep(1.2)  # the bar looks every second
    assert "50.0k/100k" in (shown := capsys.readouterr().err)
    assert "kstep/s" not in shown, shown


def test_a_run_in_progress_is_part_of_the_bar(tmp_path):
    path = tmp_path / "run.safetensors"
    tell = generation._teller(generation._steps_file(path))
    assert generation._steps(path) == 0
    tell(40)
    tell(50)  # within the same second: not written
    assert generation._steps(path) == 40
    generation._steps_file(path).write_text("")  # just being written
    assert generation._steps(path) == 0
    generation._teller(tmp_path / "nowhere" / "file")(3)  # cannot be written: of no importance to the run
    generation._steps_file(path).unlink()
    generation._steps_file(path).mkdir()  # an error of the file system, as a network's may have
    assert generation._steps(path) == 0
