"""Generate learning histories: many source runs, in parallel, on one machine or a cluster, and never twice.

A run's file has a name that is a hash of all that shapes it (task, settings, seed, and whether EnvPool or gymnasium
steps the environments), and appears in one step when its run has ended. So a call that was stopped, or killed, goes on
where it was, and several calls on one folder share the work.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from operator import index
from pathlib import Path

from filelock import FileLock, Timeout
from joblib import Parallel, delayed
from tqdm import tqdm

from adbook.checks import check_known
from adbook.files import check_writable, content_hash, remove_leftovers
from adbook.histories import SCHEMA, LearningHistory, save_histories
from adbook.sources import SourceConfig, check_horizon, run_source, source_name
from adbook.tasks import Task, TaskFamily
from adbook.vectors import SIMULATORS, simulator

_RECORDING = 3  # raise it when the same settings and seed come to give other histories, so that none goes stale
_PATIENCE = 10.0  # s, for a file that a worker has written to appear
_LOSSES = 3  # times in a row that workers are lost, and no run finished, before a call gives up
_one_run = threading.Lock()  # stable-baselines3 draws from global generators: two runs in one process would mix


def record(
    family: TaskFamily,
    tasks: Sequence[Task],
    config: SourceConfig,
    *,
    seeds: Iterable[int] = (0,),
    folder: str | os.PathLike = "runs/histories",
    n_jobs: int = -1,
    progress: bool = True,
) -> list[Path]:
    """Run the source algorithm on every task with every seed, and store one file a run.

    Runs are independent and go through joblib, one process a core by default. On a cluster, call it under
    `joblib.parallel_config("ray")` or `("dask")`; `folder` must then be one that every worker sees. The same seed gives
    the same history, whatever the backend and the number of workers. Runs whose worker dies are started again. A run
    that fails, because its policy diverges, does not keep the others from their end.

    Args:
        family: makes the environments.
        tasks: the tasks to learn.
        config: the source algorithm and its settings.
        seeds: seeds of the source runs, one run a task and seed.
        folder: where the files go.
        n_jobs: processes; -1 for one a core, -2 for all cores but one.
        progress: show a bar with runs done, environment steps a second and time left.

    Returns:
        The files, task by task and seed by seed; each holds `config.streams` histories.

    Raises:
        ValueError: no task or one of another family, no seed or one that is none, settings too short for an episode,
            or a worker without this machine's EnvPool (or with one, where this machine has none); or runs failed.
        OSError: the folder cannot be written, or is not the workers' too, or the disk is full; finished files are
            intact.
        ChildProcessError: workers were lost again and again without a run having finished in between.
    """
    tasks = list(tasks)
    family.check(tasks)
    check_horizon(family, config)
    if type(n_jobs) is not int or n_jobs == 0:
        raise ValueError(f"n_jobs={n_jobs!r} must be a whole number of processes, or -1 for one a core")
    seeds = _checked_seeds(seeds)
    paths = run_paths(family, tasks, config, seeds=seeds, folder=Path(folder).absolute())
    runs = dict(zip(paths, [(task, seed) for task in tasks for seed in seeds], strict=True))
    unfinished = [path for path in paths if not path.is_file()]
    with suppress(OSError):  # files on a read-only disk can be used all the same
        for path in set(paths) - set(unfinished):
            _sweep(path)  # after a process that was killed just after it had written the file
    if not unfinished:
        return paths
    check_writable(unfinished[0].parent)
    wait, losses, stepped_by = False, 0, simulator(family.name)
    with _bar(f"{family.name} {source_name(config)}", unfinished, config.steps, show=progress):
        while missing := [path for path in unfinished if not path.is_file()]:
            jobs = (delayed(_record_run)(family, *runs[path], config, path, stepped_by, wait) for path in missing)
            try:
                failed = [error for error in Parallel(n_jobs=n_jobs)(jobs) if error]
                if failed:
                    finished = sum(path.is_file() for path in missing)
                    told = f"{len(failed)} of {len(missing)} runs failed, {finished} are finished: {failed[0]}"
                    raise ValueError(told) from failed[0]
                if wait:
                    _check_arrived(missing)
                wait = True  # what is missing now, another process is making: wait for it, or for its end
            except _lost_worker_errors() as error:
                losses = 1 if any(path.is_file() for path in missing) else losses + 1
                if losses == _LOSSES:
                    raise ChildProcessError(
                        f"workers died {losses} times, and none of {len(missing)} runs was finished ({error!r}); if "
                        "memory is short, lower n_jobs; the same call goes on where it stopped"
                    ) from error
    return paths


def run_paths(
    family: TaskFamily,
    tasks: Sequence[Task],
    config: SourceConfig,
    *,
    seeds: Iterable[int] = (0,),
    folder: str | os.PathLike = "runs/histories",
    stepped_by: str | None = None,
) -> list[Path]:
    """Return the files that `record` with the same arguments makes, whether or not they are there.

    `stepped_by` is one of `adbook.vectors.SIMULATORS`; None is the one that this machine has.
    """
    seeds, stepped_by = _checked_seeds(seeds), stepped_by or simulator(family.name)
    check_known("simulator", stepped_by, SIMULATORS)
    return [_run_path(Path(folder), family, task, config, seed, stepped_by) for task in tasks for seed in seeds]


def _run_path(folder: Path, family: TaskFamily, task: Task, config: SourceConfig, seed: int, stepped_by: str) -> Path:
    source = source_name(config)
    name = content_hash(SCHEMA, _RECORDING, family.split, asdict(task), source, asdict(config), seed, stepped_by)
    return folder / family.name / f"{source.lower()}-{task.split}-{task.index:03d}-seed{seed}-{name}.safetensors"


def _checked_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    try:
        checked = tuple(index(seed) for seed in seeds)
    except TypeError:
        checked = ()
    if not checked or min(checked) < 0:
        raise ValueError(f"seeds={seeds!r} must be whole numbers of at least 0, one or more, such as (0, 1)")
    return checked


def _record_run(
    family: TaskFamily, task: Task, seed: int, config: SourceConfig, path: Path, stepped_by: str, wait: bool
) -> ValueError | None:
    """Make one file, unless it is there, or another process is making it and we are not to wait.

    An error of the run itself is shown at once and returned, for the other runs to go on.
    """
    if simulator(family.name) != stepped_by:
        raise ValueError(
            f"this worker steps {family.name} with {simulator(family.name)}, whoever asked for it with {stepped_by}; "
            "install the same version of EnvPool on all machines, or on none"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _one_run, FileLock(_lock_file(path), blocking=wait):
            try:
                if not path.is_file():
                    remove_leftovers(path)
                    _run_and_save(family, task, seed, config, path)
            except (ArithmeticError, RuntimeError, ValueError) as error:  # what networks and simulators raise
                reason = f"{error}".partition("\n")[0]
                failure = ValueError(f"{source_name(config)} on {task}, seed {seed}: {type(error).__name__}: {reason}")
                warnings.warn(f"a run failed, {failure}", stacklevel=2)
                return failure
            finally:
                _sweep(path)
    except Timeout:
        pass
    return None


def _run_and_save(family: TaskFamily, task: Task, seed: int, config: SourceConfig, path: Path) -> None:
    packages = ["gymnasium", "mujoco", "stable-baselines3", "torch"]
    packages += ["envpool"] * (simulator(family.name) == "envpool")
    about = {
        "task": asdict(task),
        "family_split": family.split,
        "source": source_name(config),
        "config": asdict(config),
        "seed": seed,
        "simulator": simulator(family.name),
        "versions": {name: version(name) for name in packages},
    }
    streams = run_source(family, task, config, seed, on_steps=_teller(_steps_file(path)))
    save_histories(path, [LearningHistory(**s, metadata=about | {"stream": i}) for i, s in enumerate(streams)])


def _check_arrived(paths: Sequence[Path]) -> None:
    """Find out that the workers' files are not where ours are; a network's folder may show them a little late."""
    end = time.monotonic() + _PATIENCE
    while lost := [path for path in paths if not path.is_file()]:
        if time.monotonic() > end:
            told = (
                f"the workers have finished, but {len(lost)} files are not here, the first of them {lost[0]}; give a "
            )
            raise OSError(f"{told}folder that every worker sees under the same name")
        time.sleep(0.1)


def _lost_worker_errors() -> tuple[type[Exception], ...]:
    """What the backends raise when a worker died rather than failed (Dask tries again by itself before it does)."""
    errors = [BrokenProcessPool]
    if "ray" in sys.modules:
        from ray.exceptions import RayActorError, WorkerCrashedError

        errors += [RayActorError, WorkerCrashedError]
    if "distributed" in sys.modules:
        from distributed import KilledWorker

        errors.append(KilledWorker)
    return tuple(errors)


def _lock_file(path: Path) -> Path:
    """What a process holds while it makes a run's file."""
    return path.with_name(f".{path.name}.lock")


def _steps_file(path: Path) -> Path:
    """Where a run in progress tells how many steps it has made, for bars in whatever process."""
    return path.with_name(f".{path.name}.steps")


def _sweep(path: Path) -> None:
    """Remove what stood beside a run's file while it was made."""
    _steps_file(path).unlink(missing_ok=True)
    _lock_file(path).unlink(missing_ok=True)  # who waits for it finds the run's file, or makes it


def _teller(file: Path) -> Callable[[int], None]:
    """A function that writes a number of steps to a file, at most once a second."""
    told = 0.0

    def tell(steps: int) -> None:
        nonlocal told
        if time.monotonic() > told + 1:
            told = time.monotonic()
            with suppress(OSError):  # of no importance beside the run itself
                file.write_text(str(steps))

    return tell


@contextmanager
def _bar(name: str, paths: Sequence[Path], steps: int, *, show: bool) -> Iterator[None]:
    """Show the progress of runs of so many steps, whoever makes them, until the block ends."""
    for path in paths:
        _steps_file(path).unlink(missing_ok=True)  # of a process that was killed; a living one writes it again
    # smoothing=0: the estimate is the mean speed so far, for runs end in bursts
    bar = tqdm(total=steps * len(paths), unit="step", unit_scale=True, smoothing=0, disable=not show)

    def refresh() -> None:
        done = sum(path.is_file() for path in paths)
        bar.set_description(f"{name} {done}/{len(paths)} runs", refresh=False)
        made = done * steps + sum(_steps(path) for path in paths)
        if not bar.n:  # what came before the first steps we see, the workers' imports, says nothing of the speed
            bar.reset()
            bar.initial = made  # and nor do these steps, many of which other processes may have made
        bar.n = max(bar.n, made)
        bar.refresh()

    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            refresh()

    watcher = threading.Thread(target=watch, daemon=True)
    with bar:
        if show:
            watcher.start()
        try:
            yield
        finally:
            ended.set()
            if show:
                watcher.join()
                refresh()


def _steps(path: Path) -> int:
    try:
        return int(_steps_file(path).read_text() or 0)
    except (OSError, ValueError):  # not begun, or over, or just being written
        return 0
