"""The book's experiments: presets of every stage, and functions that load an artefact or make it, saying which.

An artefact's name holds a hash of everything that shapes it, so the same settings give the same name, nothing is
computed twice, and nothing stale is used. What is made goes to `runs/`.
"""

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from adbook import generation, metrics, symmetry
from adbook.checks import check_known, check_seed, check_whole
from adbook.datasets import SPLITS, load_histories, thinned
from adbook.histories import LearningHistory, read_histories
from adbook.mamba import Mamba, MambaConfig
from adbook.policy import ADPolicy, PolicyConfig
from adbook.recipes import recipe
from adbook.rollout import RandomPolicy, Rollout, rollout
from adbook.sources import PPOConfig
from adbook.tasks import MACAW, Task, TaskFamily
from adbook.tasks import family as task_family
from adbook.training import TrainingConfig
from adbook.transformer import Transformer, TransformerConfig
from adbook.windows import WindowConfig

AGENTS = ("mamba", "transformer", "decision-transformer")
PROFILES = ("smoke", "laptop", "paper")
ROOT = Path(__file__).resolve().parents[1]
# Wherever a chapter is run from, its artefacts are the repository's; ADBOOK_RUNS puts them elsewhere.
RUNS = Path(os.environ.get("ADBOOK_RUNS") or ROOT / "runs").expanduser()
RESULTS = ROOT / "artifacts" / "results"


@dataclass(frozen=True)
class Profile:
    """The settings of every stage of one experiment."""

    name: str
    family: TaskFamily
    n_tasks: int  # training tasks, the first n of the family's
    source: PPOConfig
    window: WindowConfig
    episodes: int  # of a rollout
    seed: int = 0  # of the model: initial weights, windows, noise, rollouts
    n_test: int = 16  # test (and out-of-distribution) tasks
    source_seeds: tuple[int, ...] = (0,)  # source runs a training task
    kept: int | None = None  # most episodes kept of each history, at equal distances; None: all
    images: bool = False  # Ant-Dir: train on turned and mirrored histories too, see `adbook.symmetry`
    backbone: MambaConfig | TransformerConfig = field(default_factory=MambaConfig)
    head: str = "gaussian"
    return_to_go: bool = False  # True: the policy is conditioned on it
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        """Refuse what the family or the source cannot give, before any long work.

        Raises:
            ValueError: a seed that is none, more tasks than the family has, or a context longer than the source's
                histories.
        """
        check_seed(self.seed)
        for name in ("episodes", "n_tasks", "n_test"):
            check_whole(name, getattr(self, name))
        check_whole("kept", 1 if self.kept is None else self.kept)
        for name in ("images", "return_to_go"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        for name, tasks in (("n_tasks", self.family.train_tasks), ("n_test", self.family.test_tasks)):
            if getattr(self, name) > len(tasks):
                raise ValueError(f"{name}={getattr(self, name)} must be from 1 to {len(tasks)} for {self.family.name}")
        if (
            not isinstance(self.source_seeds, tuple)
            or not self.source_seeds
            or len(set(self.source_seeds)) < len(self.source_seeds)
        ):
            raise ValueError(f"source_seeds={self.source_seeds} must be different seeds, one or more")
        if self.images and self.family.name != symmetry.FAMILY:
            raise ValueError(f"images=True is for {symmetry.FAMILY}; {self.family.name} has no symmetries to use")
        _ = self.policy  # its own checks
        per_stream = self.stream_episodes
        if self.kept is not None:  # at most: what is left by equal distances, `Windows` checks
            per_stream = min(per_stream, self.kept)
        if self.window.needed > per_stream:
            raise ValueError(
                f"a context of {self.window.context} exceeds a history of {per_stream} episodes; lower episodes or "
                "every, or raise kept or the source's steps"
            )

    def tasks(self, split: str) -> tuple[Task, ...]:
        """The tasks of a split that this profile uses: "train", "test", "ood" or "macaw".

        Raises:
            ValueError: unknown split.
        """
        check_known("split", split, ("train", "test", "ood", "macaw"))
        return getattr(self, f"{split}_tasks")

    @property
    def train_tasks(self) -> tuple[Task, ...]:
        """The training tasks that this profile uses."""
        return self.family.train_tasks[: self.n_tasks]

    @property
    def test_tasks(self) -> tuple[Task, ...]:
        """The held-out tasks that this profile uses."""
        return self.family.test_tasks[: self.n_test]

    @property
    def ood_tasks(self) -> tuple[Task, ...]:
        """The out-of-distribution tasks that this profile uses."""
        return self.family.ood_tasks[: self.n_test]

    @property
    def macaw_tasks(self) -> tuple[Task, ...]:
        """The test tasks of MACAW's split, for published numbers; none where the family is not in it."""
        return task_family(self.family.name, "macaw").test_tasks if self.family.name in MACAW else ()

    @property
    def stream_episodes(self) -> int:
        """Whole episodes in one history of the source."""
        return self.source.steps_each // self.family.horizon

    @property
    def agent(self) -> str:
        """Which of `AGENTS` it is."""
        return "decision-transformer" if self.return_to_go else self.policy.backbone_name

    @property
    def policy(self) -> PolicyConfig:
        """Shape of the policy."""
        family = self.family
        sizes = family.observation_size, family.action_size, family.action_scale
        return PolicyConfig(*sizes, backbone=self.backbone, head=self.head, return_to_go=self.return_to_go)


# Episodes of a window and of a rollout; in the paper's profile both are twice as many.
_EPISODES = {"reacher-goal": (8, 20), "pusher-goal": (18, 20), "half-cheetah-vel": (10, 10), "ant-dir": (6, 20)}

# Observations that are noisier than they will be keep a network from copying its own past to the letter; chapter 4 has
# what was tried. `kept` saves memory and moving of data, and comes with windows that take any episode of each stretch;
# where that was compared, on Half-Cheetah-Vel, all episodes in even steps did better for Mamba.
_LAPTOP = {
    "reacher-goal": {"training": TrainingConfig(updates=3000, observation_noise=0.1)},
    "pusher-goal": {"kept": 50, "training": TrainingConfig(updates=3000, batch_size=11, observation_noise=0.1)},
    "half-cheetah-vel": {"training": TrainingConfig(updates=3000, batch_size=10, observation_noise=0.15)},
    "ant-dir": {
        "n_tasks": 20,
        "kept": 48,
        "images": True,
        "window": WindowConfig(6, None, strays=0.3),  # without strays it copies its own way instead of reading rewards
        "training": TrainingConfig(updates=6000, batch_size=16, observation_noise=0.15),
    },
}

# Only what differs from `Profile`'s defaults, each with its reason.
_PRESETS = {
    "smoke": {  # every line runs in seconds; no number means anything
        "n_tasks": 4,
        "n_test": 2,
        "window": WindowConfig(episodes=2, every=2),
        "backbone": MambaConfig(d_model=16, n_layers=2),
        "training": TrainingConfig(updates=6, batch_size=2, warmup=2, checkpoint_every=3),
        "episodes": 6,
    },
    "laptop": {},
    "paper": {  # the paper's scale: 6 to 8 layers, width 384 to 512, one GPU
        "source_seeds": (0, 1, 2, 3),
        "backbone": MambaConfig(d_model=384, n_layers=6),
        "training": TrainingConfig(updates=50_000, batch_size=128, learning_rate=3e-4, warmup=1000),
    },
}


def check_profile(name: str) -> None:
    """Raise ValueError if `name` is no profile; the message lists them."""
    check_known("profile", name, PROFILES)


def profile(name: str = "laptop", family: str = "reacher-goal", seed: int = 0, **changes) -> Profile:
    """Return the settings of a profile.

    Args:
        name: "smoke", "laptop" or "paper".
        family: name of a task family.
        seed: of the model.
        **changes: fields of `Profile` to set otherwise, for example `head="mse"`.

    Raises:
        ValueError: unknown profile, family or field, or settings that do not fit each other.
    """
    check_profile(name)
    allowed = [f for f in Profile.__dataclass_fields__ if f not in ("name", "family", "seed")]
    for key in changes:
        check_known("setting", key, allowed)
    kind = task_family(family)
    best = recipe(family)
    tiny = {"steps": 32 * kind.horizon, "n_envs": 4, "streams": 2, "batch_size": 200, "n_epochs": 2}
    source = replace(best.config, **{"smoke": tiny, "laptop": {}, "paper": {"streams": 16}}[name])
    context, played = (n * (1 + (name == "paper")) for n in _EPISODES[family])
    every = max(1, source.steps_each // kind.horizon // context)  # so that a window reaches to the end of a history
    own = _LAPTOP[family] if name == "laptop" else {}
    window = WindowConfig(context, None if "kept" in own else every)
    preset = {"n_tasks": best.train, "source": source, "window": window, "episodes": played} | own | _PRESETS[name]
    return Profile(name, kind, seed=seed, **preset | changes)


def as_agent(settings: Profile, agent: str) -> Profile:
    """Put another agent in Mamba's place: same data, windows and tokens, and as many weights, within 5 %.

    Args:
        settings: a profile with a Mamba.
        agent: "mamba"; "transformer", which attends to a whole window; or "decision-transformer", the same one
            conditioned on return-to-go.

    Raises:
        ValueError: unknown agent, or a profile of another one.
    """
    check_known("agent", agent, AGENTS)
    if settings.agent != "mamba":
        raise ValueError(f"a profile of the {settings.agent} cannot be made one of another agent; start from a Mamba's")
    if agent == "mamba":
        return settings
    backbone = _of_the_same_size(settings.backbone, settings.window.episodes * settings.family.horizon)
    training = replace(settings.training, learning_rate=settings.training.learning_rate / 2)  # as attention needs
    return replace(settings, backbone=backbone, training=training, return_to_go=agent == "decision-transformer")


def _of_the_same_size(mamba: MambaConfig, context: int) -> TransformerConfig:
    """A transformer of Mamba's depth and width, with as wide a network in its blocks as brings its weights closest."""
    shape = TransformerConfig(mamba.d_model, mamba.n_layers, context=context)
    with torch.device("meta"):
        models = Mamba(mamba), *(Transformer(replace(shape, mlp=mlp)) for mlp in (1, 2))
        wanted, one, two = (sum(p.numel() for p in model.parameters()) for model in models)
    return replace(shape, mlp=round(8 * (1 + (wanted - one) / (two - one))) / 8)


def source_histories(settings: Profile, split: str = "train", *, progress: bool = True) -> list[LearningHistory]:
    """Load the source histories of the tasks of a split, recording those that are missing.

    Args:
        settings: the profile.
        split: of tasks; histories of all but "train" only normalise scores and are never trained on.
        progress: show a bar while recording.
    """
    tasks = settings.tasks(split)
    seeds = settings.source_seeds if split == "train" else (0,)
    where = {"seeds": seeds, "folder": RUNS / "histories"}
    paths = generation.run_paths(settings.family, tasks, settings.source, **where)
    missing = sum(not path.exists() for path in paths)
    generation.record(settings.family, tasks, settings.source, **where, progress=progress)
    print(f"{split} histories: recorded {missing} source runs, loaded {len(paths) - missing}")
    histories = (history for path in paths for history in read_histories(path))
    return shown(settings, histories) if split == "train" else list(histories)


def shown(settings: Profile, histories: Iterable[LearningHistory]) -> list[LearningHistory]:
    """What training is shown of the histories of its tasks: a part of each, or more than they were."""
    if settings.kept is not None:
        histories = (thinned(history, settings.kept) for history in histories)
    if settings.images:
        histories = (image for history in histories for image in symmetry.images(history))
    return list(histories)


def reread_episodes(settings: Profile) -> int:
    """Episodes that fit into an agent's window beside the one that it plays; 0 if it never has to forget any."""
    horizon, window = settings.family.horizon, getattr(settings.policy.backbone, "context", None)
    return 0 if window is None or settings.episodes * horizon <= window else window // horizon - 1


@dataclass(frozen=True, eq=False)  # arrays have no one answer to ==
class References:
    """The two ends of the normalised score, task by task.

    Attributes:
        random: (tasks,) mean return of uniformly random actions: score 0.
        source: (tasks,) mean return of the last tenth of the source's episodes: score 1.
        start: (tasks,) mean return of the source's first tenth.
    """

    random: np.ndarray
    source: np.ndarray
    start: np.ndarray

    def score(self, returns: np.ndarray) -> np.ndarray:
        """Normalise returns (tasks, …): 0 is random, 1 the source's end."""
        return metrics.normalized_score(returns, self.random, self.source)


def references(settings: Profile, split: str = "test") -> References:
    """Measure random actions and the source's start and end on the tasks of a split.

    Where the data set holds the source's runs on these tasks, nothing is recorded.
    """
    tasks = settings.tasks(split)
    by_task = {task: [] for task in tasks}
    best = recipe(settings.family.name)
    there = settings.source == best.config and split in SPLITS and len(tasks) <= getattr(best, split)
    histories = load_histories(settings.family.name, split=split) if there else source_histories(settings, split)
    for history in histories:
        task = Task(**history.metadata["task"])
        if task in by_task:  # the data set can hold more
            returns = history.metadata.get("source_returns", history.episode_returns)  # a thinned one keeps them all
            by_task[task].append(np.array(returns))
    ends = [[r[len(r) - max(1, len(r) // 10) :].mean() for r in by_task[task]] for task in tasks]
    starts = [[r[: max(1, len(r) // 10)].mean() for r in by_task[task]] for task in tasks]
    uniform = RandomPolicy(settings.family.action_size, settings.family.action_scale)
    played = rollout(uniform, settings.family, tasks, episodes=20, seed=0)
    return References(played.returns.mean(1), np.mean(ends, 1), np.mean(starts, 1))


def evaluate(settings: Profile, policy: ADPolicy, split: str = "test", **options) -> Rollout:
    """Roll a policy out on the tasks of a split with frozen weights; options are those of `adbook.rollout`."""
    options = {"episodes": settings.episodes, "seed": settings.seed} | options
    return rollout(policy, settings.family, settings.tasks(split), **options)


def describe(settings: Profile) -> dict:
    """Return the settings as plain JSON: what a result's file keeps of them."""
    described = {}
    for key in Profile.__dataclass_fields__:
        value = getattr(settings, key)
        described[key] = asdict(value) if hasattr(value, "__dataclass_fields__") else value
    family = settings.family
    policy = {"policy": asdict(settings.policy), "backbone_kind": settings.policy.backbone_name}
    return described | policy | {"family": family.name, "split": family.split}


def completed(described: dict) -> dict:
    """Return settings of a result's file as `describe` would give them now: those that it lacks at their defaults."""
    defaults = {f.name: f.default for f in fields(Profile) if f.default is not MISSING}
    kept = {name: value for name, value in described.items() if name != "recorded"}  # a setting of old, always True
    return defaults | kept | {"window": asdict(WindowConfig(**described["window"]))}


def provenance() -> dict:
    """Return what a result's file says of where it comes from: machine, version of torch, date and commit."""
    cores = f"{os.cpu_count()} cores"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {cores}"
    date = datetime.now(UTC).date().isoformat()
    return {"machine": device, "torch": torch.__version__, "date": date, "commit": _commit()}


def _commit() -> str:
    """The repository's commit, marked if the code differs from it; "unknown" outside of a clone or without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "adbook", "requirements.txt")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit
