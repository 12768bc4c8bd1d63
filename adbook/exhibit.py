"""The exhibit: a frozen network that learns live in the page, without a kernel, a server's help or a network.

Its scripts are modules in ``web/``: `random`, `reacher` (an arm), `mujoco` (other robots), `network` (a step of Mamba),
`session` (a policy at play), `pictures`, `exhibit` (what the reader does) and `told` (what to look for). A book serves
them as they are; `page` puts them where a page asks for them. `LiveReacher` is the same exhibit as a widget.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import traitlets

from adbook import experiments
from adbook.checkpoints import CHECKPOINTS
from adbook.embedded import WEB, Embedded, script
from adbook.export import RUNS, export, exported
from adbook.policy import ADPolicy
from adbook.results import load_result
from adbook.scene import scene
from adbook.tasks import MAX_VELOCITY, PUSH, REACH, Task, TaskFamily, family

_DRAWN = ("player_data", "player_draw", "pictures")
_MODULES = (*_DRAWN, "random", "reacher", "network", "session", "told", "exhibit", "widget")  # none imports a later one
_PACKAGE = "@mujoco/mujoco@3.14.0"  # of npm, Apache-2.0; its build for one thread: the other needs special headers
_SHA256 = "f845a07ab81303cc6579fec07136818bed21d44a31c1911340f61e06f4d11eee"
_LIMITS = {"reacher-goal": REACH, "pusher-goal": PUSH, "half-cheetah-vel": MAX_VELOCITY}  # of training, from 0 on
_FRESH = 64  # goals for new tasks that a page gets, drawn as training goals are


class LiveReacher(Embedded):
    """Any policy for Reacher-Goal, live: the reader moves the goal and watches the frozen network learn.

    All of it runs in the reader's browser, in JupyterLab and in the one file that `save_html` writes.

    Args:
        policy: with Mamba inside.
        goal: the first goal, (x, y) in m.
        seed: of the starts and the sampled actions.

    Raises:
        ValueError: the page cannot run the policy (see `adbook.export.export`), or the goal is out of reach.
        FileNotFoundError: there are no measured returns to compare with; the message names the command.
    """

    _esm = script(*_MODULES)
    _css = (WEB / "exhibit.css").read_text()

    header = traitlets.Dict().tag(sync=True)  # as `exported` gives it
    weights = traitlets.Bytes().tag(sync=True)
    goal = traitlets.List(traitlets.Float(), read_only=True).tag(sync=True)
    seed = traitlets.Int(read_only=True).tag(sync=True)

    def __init__(self, policy: ADPolicy, *, goal: tuple[float, float] = (-0.1, 0.12), seed: int = 0) -> None:
        """See the class."""
        kind = family("reacher-goal")
        task = Task(kind.name, goal, "sampled", 0)
        kind.check([task])
        header, weights = exported(policy, kind, about=about(kind))
        super().__init__(header=header, weights=weights)
        self.set_trait("goal", list(task.goal))
        self.set_trait("seed", seed)

    def __repr__(self) -> str:
        """What it holds; also the text that stands for it where widgets cannot be shown."""
        return f"{type(self).__name__}({sum(size for _, size in self.header['tensors']):,} weights)"


def stage(folder: Path) -> Path:
    """Write what a book's pages need: modules and style, MuJoCo's build for browsers, and every family's network.

    Where there is no npm to fetch MuJoCo with, that is said, and the arm alone, which needs none, runs in the pages.

    Raises:
        ValueError: what was fetched is not what it should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*_MODULES[:-1], "mujoco", "page"):
        shutil.copy(WEB / f"{name}.js", folder)
    shutil.copy(WEB / "exhibit.css", folder)
    for name in RUNS:
        kind = family(name)
        export(ADPolicy.from_pretrained(CHECKPOINTS / f"{name}-mamba"), folder / name, kind, about=about(kind))
        shutil.copy(_robot(kind), folder / name / "robot.xml")
    try:
        shutil.copytree(mujoco_build(), folder / "mujoco", dirs_exist_ok=True)
    except RuntimeError as error:
        print(f"\n{error}\nUntil the book is built with it, the arm alone runs in the pages.")
    return folder


def mujoco_build() -> Path:
    """Fetch MuJoCo's script and its WebAssembly from npm, once, and return the folder that holds them.

    Raises:
        RuntimeError: npm is not there, or could not fetch it.
        ValueError: what was fetched is not what it should be.
    """
    there = experiments.RUNS / _PACKAGE.replace("@", "").replace("/", "-")
    if there.is_dir():
        return there
    experiments.RUNS.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=experiments.RUNS) as name:
        archive, unpacked = _packed(Path(name)), Path(name, "mujoco")
        if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != _SHA256:
            raise ValueError(
                f"npm's {_PACKAGE} has the check sum {found} instead of {_SHA256}; look into it before use"
            )
        unpacked.mkdir()
        with tarfile.open(archive) as tar:
            for file in ("mujoco.js", "mujoco.wasm"):
                (unpacked / file).write_bytes(tar.extractfile(f"package/{file}").read())
        unpacked.rename(there)
    return there


def _packed(folder: Path) -> Path:
    """Let npm fetch its archive of MuJoCo."""
    if shutil.which("npm") is None:
        raise RuntimeError("npm is not installed, which brings MuJoCo for the book's pages: apt-get install npm")
    command = ["npm", "pack", _PACKAGE, "--pack-destination", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"npm could not fetch {_PACKAGE}, of which pages need MuJoCo:\n{result.stderr.strip()}")
    return next(folder.glob("*.tgz"))


def _robot(kind: TaskFamily) -> Path:
    """The file of a family's robot in gymnasium."""
    env = kind.make(kind.train_tasks[0])
    env.close()
    return Path(env.unwrapped.fullpath)


def about(kind: TaskFamily) -> dict[str, Any]:
    """What a page must know of a family: how to draw its robot, which goals there are, what others reach at some."""
    measured = load_result("sources")["families"][kind.name]
    levels = {"source’s end": measured["sources"]["ppo"]["train"]["end"], "random": measured["random"]["train"]}
    fresh = kind.sample_tasks(_FRESH, np.random.default_rng(0))
    goals = kind.train_tasks[: len(levels["random"])]
    return {
        "scene": scene(kind),
        "limits": (0, _LIMITS[kind.name]),
        "goals": [_rounded(task.goal, 3) for task in fresh],
        "measured": {"goals": [_rounded(task.goal, 3) for task in goals]}
        | {name: _rounded(level, 2) for name, level in levels.items()},
    }


def _rounded(numbers: list[float], digits: int) -> list[float]:
    return [round(x, digits) for x in numbers]
