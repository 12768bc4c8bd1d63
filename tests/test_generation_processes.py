"""Generating histories in several processes: the same everywhere, nothing twice, on again after whatever stopped it."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import joblib
import numpy as np
import psutil
import pytest
from test_generation import FAMILY, files
from test_histories import assert_equal

from adbook.generation import record, run_paths
from adbook.histories import read_histories
from adbook.sources import DroQConfig, PPOConfig, SACConfig

CONFIGS = (
    PPOConfig(steps=400, n_envs=2, streams=2, n_steps=50, batch_size=50, n_epochs=1),
    SACConfig(steps=200, n_envs=2, streams=1, learning_starts=50, batch_size=16),
    DroQConfig(steps=100, learning_starts=50, batch_size=16, updates=2),
)

PROGRAM = """
import sys
from adbook import generation
from adbook.generation import record
from test_generation_processes import CONFIGS, FAMILY

plain = generation._run_and_save
def told(family, task, *arguments):
    print("made", task.index, flush=True)
    plain(family, task, *arguments)

generation._run_and_save = told
record(FAMILY, FAMILY.train_tasks[:int(sys.argv[2])], CONFIGS[0], folder=sys.argv[1], n_jobs=1)
"""


@pytest.fixture
def start():
    """Start recordings in processes of their own; what hangs is killed, or later tests would run beside it."""
    started = []

    def start(*arguments, program=PROGRAM, **options) -> subprocess.Popen:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=Path(__file__).parent, start_new_session=True, **pipes, **options))
        return started[-1]

    yield start
    for process in started:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill it and its children, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def output_of(process: subprocess.Popen) -> str:
    """Wait for its end."""
    return process.communicate(timeout=300)[0]


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes: six runs, two of each source."""
    folder = tmp_path_factory.mktemp("alone")
    return record_all(folder, n_jobs=1)


def record_all(folder, n_jobs=-1, configs=CONFIGS):
    tasks = FAMILY.train_tasks[:2]
    return [
        p for config in configs for p in record(FAMILY, tasks, config, folder=folder, n_jobs=n_jobs, progress=False)
    ]


def assert_same_histories(paths, others):
    assert [path.name for path in paths] == [path.name for path in others]
    for path, other in zip(paths, others, strict=True):
        for one, two in zip(read_histories(path), read_histories(other), strict=True):
            assert_equal(one, two)


@contextmanager
def cluster(backend):
    """Within it joblib has two workers of a backend, which run on this machine."""
    if backend == "loky":
        yield
    elif backend == "dask":
        from distributed import Client, LocalCluster

        local = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
        with LocalCluster(**local) as made, Client(made), joblib.parallel_config("dask"):
            yield
    else:
        import ray
        from ray.util.joblib import register_ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        register_ray()
        with joblib.parallel_config("ray"):
            yield
        ray.shutdown()


@pytest.mark.parametrize(
    ("backend", "sources"),
    [("loky", 3), ("dask", 3), ("ray", 1)],  # Ray starts processes anew for each call, slowly
)
def test_workers_make_what_one_process_makes_though_one_of_them_is_killed(start, alone, tmp_path, backend, sources):
    program = "import sys; from test_generation_processes import CONFIGS, cluster, record_all\n"
    program += "with cluster(sys.argv[2]): record_all(sys.argv[1], configs=CONFIGS[:int(sys.argv[3])])"
    expected = alone[: 2 * sources]
    environment = os.environ | {"RAY_worker_niceness": "0"}  # Ray lets its workers give way to everything else
    process = start(tmp_path, backend, sources, program=program, env=environment)

    def busy():
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if any(file.path.endswith(".lock") for file in open_files(child, tmp_path))]

    wait_for(busy)[0].kill()
    output = output_of(process)
    assert process.returncode == 0, output
    assert_same_histories(expected, [tmp_path / path.relative_to(path.parents[1]) for path in expected])
    assert files(tmp_path) == sorted(path.name for path in expected)


def open_files(process, folder):
    try:
        return [file for file in process.open_files() if Path(file.path).is_relative_to(folder)]
    except psutil.Error:  # it has ended meanwhile
        return []


def test_threads_of_one_process_do_not_mix_their_dice(alone, tmp_path):
    with joblib.parallel_config("threading"):
        assert_same_histories(alone, record_all(tmp_path, n_jobs=2))


def test_after_sigkill_it_goes_on_and_nothing_half_is_left(start, tmp_path):
    paths = run_paths(FAMILY, FAMILY.train_tasks[:4], CONFIGS[0], folder=tmp_path)
    process = start(tmp_path, 4)
    wait_for(paths[0].exists)
    wait_for(lambda: any(name.endswith(".lock") for name in files(tmp_path)))
    kill(process)
    finished = {path: path.read_bytes() for path in paths if path.exists()}
    for path in finished:
        assert len(read_histories(path)) == 2
    again = start(tmp_path, 4)
    output = output_of(again)
    assert again.returncode == 0, output
    assert f"{4 - len(finished)}/{4 - len(finished)} runs" in output
    assert {path: path.read_bytes() for path in finished} == finished
    assert files(tmp_path) == sorted(path.name for path in paths)


def test_two_processes_make_each_run_once(start, tmp_path):
    processes = [start(tmp_path, 6) for _ in range(2)]
    outputs = [output_of(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    paths = run_paths(FAMILY, FAMILY.train_tasks[:6], CONFIGS[0], folder=tmp_path)
    assert files(tmp_path) == sorted(path.name for path in paths)
    assert all(len(read_histories(path)) == 2 for path in paths)
    made = [int(number) for output in outputs for number in re.findall(r"made (\d)", output)]
    assert sorted(made) == list(range(6))  # each of them once


def test_a_full_disk_ends_with_a_clear_message_and_intact_files(start, tmp_path):
    whole = record(FAMILY, FAMILY.train_tasks[:1], CONFIGS[0], folder=tmp_path, n_jobs=1, progress=False)
    before = whole[0].read_bytes()
    small = len(before) // 2  # no file may be larger: the system refuses the write as it does on a full disk
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small))}
    process = start(tmp_path, 2, **limit)
    output = output_of(process)
    assert process.returncode == 1
    assert re.search(r"no space left to write .*train-001.*what was finished before is intact: free some", output), (
        output
    )
    assert files(tmp_path) == [whole[0].name]
    assert whole[0].read_bytes() == before


def test_histories_of_one_run_differ(alone):
    one, two = read_histories(alone[0])
    assert not np.array_equal(one.actions, two.actions)
    assert (one.metadata["stream"], two.metadata["stream"]) == (0, 1)
