"""Learning histories: record them, store them, thin them out, and cut context windows from them.

This module needs numpy, safetensors, joblib and tqdm only; the simulator is imported when something is recorded, so
that a machine without it can train from files.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from adbook.files import write_whole

if TYPE_CHECKING:
    from adbook.sources import PPOConfig
    from adbook.tasks import Task, TaskFamily

SCHEMA = 1  # of the file format below; raise it when a stored field changes meaning or shape
_RECORDING = 2  # raise it when the same settings and seed come to give other histories, so that none goes stale
_KIND = "adbook.LearningHistory"
_FIELDS = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")


class HistoryFileError(ValueError):
    """A file that does not hold learning histories this version can read."""


@dataclass(frozen=True, repr=False, eq=False)
class LearningHistory:
    """One source run on one task, in the order it happened. `T` steps, `O` observation size, `A` action size.

    Attributes:
        observations: (T, O) float32.
        actions: (T, A) float32, as applied (clipped to the action space).
        rewards: (T,) float32.
        next_observations: (T, O) float32; at the end of an episode the true last one, not the next episode's first.
        terminated: (T,) bool, the episode ended in a terminal state.
        truncated: (T,) bool, the episode ended at the horizon.
        metadata: family, task, source, configuration, seeds and versions; anything JSON can hold.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    metadata: dict[str, Any]

    def __post_init__(self):
        """Check lengths and values.

        Raises:
            ValueError: arrays of different lengths, no step, an unfinished last episode, or a value that is not finite.
        """
        lengths = {name: len(getattr(self, name)) for name in _FIELDS}
        if len(set(lengths.values())) != 1 or not lengths["rewards"]:
            raise ValueError(f"every field needs the same number of steps, at least one; got {lengths}")
        if not (self.terminated[-1] or self.truncated[-1]):
            raise ValueError("the last episode has not ended; cut the history after its last finished episode")
        for name in _FIELDS[:4]:
            finite = np.isfinite(getattr(self, name))
            if not finite.all():
                step = int(np.argwhere(~finite)[0][0])
                raise ValueError(f"{name} holds NaN or infinity, first at step {step} of {self._name}; record it again")

    @property
    def _name(self) -> str:
        return f"{self.metadata.get('task', 'an unnamed history')}"

    @property
    def episodes(self) -> tuple[slice, ...]:
        """The steps of each episode, in order."""
        ends = np.flatnonzero(self.terminated | self.truncated) + 1
        return tuple(slice(int(a), int(b)) for a, b in zip((0, *ends[:-1]), ends, strict=True))

    @property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of each episode, (episodes,) float64."""
        return np.array([self.rewards[e].sum(dtype=np.float64) for e in self.episodes])

    def every(self, k: int, phase: int = 0) -> "LearningHistory":
        """Keep whole episodes `phase`, `phase + k`, `phase + 2k`, …; steps inside an episode are never dropped.

        Raises:
            ValueError: k < 1, phase outside [0, k), or no episode is left.
        """
        if k < 1 or not 0 <= phase < k:
            raise ValueError(f"every(k={k}, phase={phase}) needs k >= 1 and 0 <= phase < k")
        kept = self.episodes[phase::k]
        if not kept:
            raise ValueError(f"every(k={k}, phase={phase}) keeps none of the {len(self.episodes)} episodes; lower them")
        index = np.concatenate([np.arange(e.start, e.stop) for e in kept])
        already, first = self.metadata.get("every", 1), self.metadata.get("phase", 0)
        thinning = {"every": k * already, "phase": first + phase * already}  # in episodes of the source run
        fields = {name: getattr(self, name)[index] for name in _FIELDS}
        return replace(self, **fields, metadata=self.metadata | thinning)

    def save(self, path: str | os.PathLike) -> Path:
        """Write one safetensors file; see `save_histories`."""
        return save_histories(path, [self])

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LearningHistory":
        """Read a file that holds one history; see `load_histories`."""
        histories = load_histories(path)
        if len(histories) != 1:
            raise HistoryFileError(f"{path} holds {len(histories)} histories; read it with load_histories")
        return histories[0]

    def to_minari(self, dataset_id: str):
        """Register the history as a Minari dataset, the standard form of offline reinforcement learning.

        Args:
            dataset_id: Minari's name, for example "reacher-goal/ppo-v0".

        Returns:
            The `minari.MinariDataset`, stored in Minari's own folder.
        """
        import minari  # here alone: nothing else needs it
        from minari.data_collector import EpisodeBuffer

        from adbook.tasks import Task, family

        buffers = [
            EpisodeBuffer(
                id=i,
                observations=np.concatenate((self.observations[e], self.next_observations[e][-1:])),
                actions=self.actions[e],
                rewards=self.rewards[e].tolist(),
                terminations=self.terminated[e].tolist(),
                truncations=self.truncated[e].tolist(),
            )
            for i, e in enumerate(self.episodes)
        ]
        about = self.metadata["task"]
        task = Task(**about | {"goal": tuple(about["goal"])})
        env = family(task.family, self.metadata["family_split"]).make(task)
        source, seed = self.metadata["source"], self.metadata["seed"]
        described = {"algorithm_name": source, "description": f"Learning history of {source} on {task}, seed {seed}."}
        with warnings.catch_warnings():  # Minari misses an author; the reader can add one to what it stores
            warnings.filterwarnings("ignore", message="`(code_permalink|author|author_email)` is set to None")
            return minari.create_dataset_from_buffers(dataset_id, buffers, env=env, eval_env=env.spec, **described)

    def __repr__(self) -> str:
        """Name the task and the shapes."""
        shapes = ", ".join(f"{name} {getattr(self, name).shape}" for name in _FIELDS[:3])
        return f"LearningHistory({self._name}: {len(self.episodes)} episodes; {shapes})"


def save_histories(path: str | os.PathLike, histories: Sequence[LearningHistory]) -> Path:
    """Write histories to one safetensors file, their metadata in its header; an interrupted write leaves no file.

    Inside an episode the next observation is the following step's observation, so only each episode's last one is
    stored: the file is half the size and nothing is lost.

    Raises:
        ValueError: no history, or one whose next observations do not continue its observations.
    """
    if not histories:
        raise ValueError("no history was given; there is nothing to save")
    arrays = {}
    for i, history in enumerate(histories):
        arrays |= {f"{i}/{name}": np.ascontiguousarray(array) for name, array in _stored(history).items()}
    header = {"kind": _KIND, "schema": str(SCHEMA), "json": json.dumps([h.metadata for h in histories])}
    return write_whole(path, lambda file: save_file(arrays, file, metadata=header))


def _stored(history: LearningHistory) -> dict[str, np.ndarray]:
    ends = history.terminated | history.truncated
    inside = ~ends[:-1]
    if not np.array_equal(history.next_observations[:-1][inside], history.observations[1:][inside]):
        raise ValueError(f"next_observations do not continue observations in {history!r}; give whole episodes in order")
    stored = {name: getattr(history, name) for name in _FIELDS if name != "next_observations"}
    return stored | {"last_observations": history.next_observations[ends]}


def load_histories(path: str | os.PathLike) -> list[LearningHistory]:
    """Read the histories of a file that `save_histories` wrote; the file is mapped, nothing is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        HistoryFileError: the file is truncated, foreign, or of another schema version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no histories at {path}; record them with adbook.histories.record")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = _read_header(path, file.metadata() or {})
            return [_restored(file, i, m) for i, m in enumerate(metadata)]
    except (SafetensorError, json.JSONDecodeError, KeyError, IndexError) as error:
        raise HistoryFileError(
            f"{path} is truncated, damaged or not a history file ({error!r}); delete it and record it again"
        ) from error


def _read_header(path: Path, header: dict[str, str]) -> list[dict[str, Any]]:
    if header.get("kind") != _KIND:
        raise HistoryFileError(f"{path} is not a file of learning histories; give one that save_histories wrote")
    if header["schema"] != str(SCHEMA):
        raise HistoryFileError(
            f"{path} has schema version {header['schema']}, this version reads {SCHEMA}; record the histories again"
        )
    return json.loads(header["json"])


def _restored(file: Any, i: int, metadata: dict[str, Any]) -> LearningHistory:
    fields = {name: file.get_tensor(f"{i}/{name}") for name in _FIELDS if name != "next_observations"}
    following = np.roll(fields["observations"], -1, axis=0)
    following[fields["terminated"] | fields["truncated"]] = file.get_tensor(f"{i}/last_observations")
    return LearningHistory(**fields, next_observations=following, metadata=metadata)


def content_hash(*parts: Any) -> str:
    """Twelve hexadecimal digits that change with any of `parts` (anything JSON can hold): the name of an artefact."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def record(
    family: "TaskFamily",
    tasks: Sequence["Task"],
    config: "PPOConfig",
    *,
    seeds: Iterable[int] = (0,),
    folder: str | os.PathLike = "runs/histories",
    n_jobs: int = -1,
    progress: bool = True,
) -> list[Path]:
    """Run the source algorithm on every task with every seed, and store one file a run.

    Runs are independent and go through joblib, over all cores by default (choose another backend with
    `joblib.parallel_config`). A file that is there is not made again: its name is a hash of everything that shapes it,
    and it appears only when its run has finished, so an interrupted call goes on where it stopped.

    Args:
        family: makes the environments.
        tasks: the tasks to learn.
        config: the source algorithm's settings.
        seeds: seeds of the source runs, one run a task and seed.
        folder: where the files go.
        n_jobs: processes; -1 for one a core.
        progress: show a bar with tasks done, environment steps a second and time left.

    Returns:
        The files, task by task and seed by seed; each holds `config.streams` histories.
    """
    from joblib import Parallel, delayed

    seeds = tuple(seeds)
    runs = [(task, seed) for task in tasks for seed in seeds]
    paths = run_paths(family, tasks, config, seeds=seeds, folder=folder)
    missing = [(task, seed, path) for (task, seed), path in zip(runs, paths, strict=True) if not path.exists()]
    jobs = (delayed(_record_run)(family, task, config, seed, path) for task, seed, path in missing)
    bar = tqdm(total=config.steps * len(missing), unit="step", unit_scale=True, disable=not (progress and missing))
    with bar:
        bar.set_description(f"{family.name} 0/{len(missing)} runs")
        finished = Parallel(n_jobs=n_jobs, return_as="generator_unordered")(jobs)
        for done, _ in enumerate(finished, 1):
            bar.set_description(f"{family.name} {done}/{len(missing)} runs")
            bar.update(config.steps)
    return paths


def run_paths(
    family: "TaskFamily",
    tasks: Sequence["Task"],
    config: "PPOConfig",
    *,
    seeds: Iterable[int] = (0,),
    folder: str | os.PathLike = "runs/histories",
) -> list[Path]:
    """Return the files that `record` with the same arguments makes, whether or not they are there."""
    seeds = tuple(seeds)
    return [_run_path(Path(folder), family, task, config, seed) for task in tasks for seed in seeds]


def _run_path(folder: Path, family: "TaskFamily", task: "Task", config: "PPOConfig", seed: int) -> Path:
    name = content_hash(SCHEMA, _RECORDING, family.split, asdict(task), type(config).__name__, asdict(config), seed)
    return folder / family.name / f"{task.split}-{task.index:03d}-seed{seed}-{name}.safetensors"


def _record_run(family: "TaskFamily", task: "Task", config: "PPOConfig", seed: int, path: Path) -> None:
    from adbook.sources import run_ppo

    about = {
        "task": asdict(task),
        "family_split": family.split,
        "source": "PPO",
        "config": asdict(config),
        "seed": seed,
        "versions": {name: version(name) for name in ("gymnasium", "mujoco", "stable-baselines3", "torch")},
    }
    streams = run_ppo(family, task, config, seed)
    save_histories(path, [LearningHistory(**s, metadata=about | {"stream": i}) for i, s in enumerate(streams)])


@dataclass(frozen=True)
class WindowConfig:
    """How context windows are cut: one episode in `every`, `episodes` of them, from the history's start or anywhere."""

    episodes: int = 8  # kept episodes in a window
    every: int = 10  # keep one episode in so many
    span: bool = True  # start at the history's start, so that a window shows the whole improvement; else anywhere

    def __post_init__(self):
        """Refuse settings that cannot be cut."""
        if self.episodes < 1 or self.every < 1:
            raise ValueError(f"episodes={self.episodes} and every={self.every} must both be at least 1")


class Windows:
    """Draws training windows from histories: whole kept episodes, side by side, cut or padded to one length.

    The phase of the downsampling is random, so that every episode is used and no two epochs see the same windows.
    """

    def __init__(self, histories: Sequence[LearningHistory], config: WindowConfig, horizon: int):
        """Prepare to draw from `histories`; `horizon` is the most steps an episode can have.

        Raises:
            ValueError: no history was given, or one is too short for the context.
        """
        if not histories:
            raise ValueError("no history was given; record some with adbook.histories.record")
        self.config, self.length = config, config.episodes * horizon
        needed = config.episodes * config.every
        self._episodes = [history.episodes for history in histories]
        for history, episodes in zip(histories, self._episodes, strict=True):
            if len(episodes) < needed:
                raise ValueError(
                    f"a context of {config.episodes} episodes, one in {config.every}, needs {needed} episodes, but "
                    f"{history!r} has {len(episodes)}; lower episodes or every, or record longer histories"
                )
        self.histories = list(histories)

    def sample(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw `n` windows of length `L = episodes * horizon`.

        Returns:
            observations (n, L, O), actions (n, L, A) and rewards (n, L) float32; starts (n, L) bool, first step of an
            episode; valid (n, L) bool, False for padding behind windows with short episodes.
        """
        picked = [self._one(int(i), rng) for i in rng.integers(len(self.histories), size=n)]
        return {name: np.stack([window[name] for window in picked]) for name in picked[0]}

    def _one(self, i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        config, episodes, history = self.config, self._episodes[i], self.histories[i]
        kept = episodes[int(rng.integers(config.every)) :: config.every]
        first = 0 if config.span else int(rng.integers(len(kept) - config.episodes + 1))
        chosen = kept[first : first + config.episodes]
        index = np.concatenate([np.arange(e.start, e.stop) for e in chosen])
        starts = np.zeros(self.length, bool)
        starts[np.cumsum([0, *(e.stop - e.start for e in chosen[:-1])])] = True
        valid = np.arange(self.length) < len(index)
        index = np.pad(index, (0, self.length - len(index)), mode="edge")
        fields = {name: getattr(history, name)[index] for name in ("observations", "actions", "rewards")}
        return fields | {"starts": starts, "valid": valid}


def window_returns(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return of every episode in windows that `Windows.sample` drew: (n, episodes)."""
    episode = batch["starts"].cumsum(axis=1) - 1  # (n, L)
    rewards = np.where(batch["valid"], batch["rewards"], 0)
    return np.stack([np.bincount(e, r) for e, r in zip(episode, rewards, strict=True)])
