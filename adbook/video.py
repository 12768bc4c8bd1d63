"""Videos of rollouts: one to four agents side by side, each under a caption, episode after episode.

Symbols: ``A`` agents, ``K`` episodes, ``T`` steps, as in `adbook.rollout`; ``k`` an episode, ``t`` a step.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

from adbook.files import write_whole
from adbook.look import style
from adbook.recording import check, check_robot
from adbook.rollout import Rollout
from adbook.scene import scene
from adbook.studio import Studio
from adbook.tasks import family

_MOST_FPS = {".mp4": 50, ".gif": 25}
_LEAST = {"width": 192, "height": 96}  # pixels: a caption needs as many
_MOST_PIXELS = 4096  # of width and height
_INK = (40, 40, 40)


def write_video(
    path: str | os.PathLike[str],
    rollouts: Mapping[str, Rollout],
    *,
    task: int = 0,
    episodes: Sequence[int] | None = None,
    width: int = 480,
    height: int = 360,
    speed: float = 1.0,
    progress: bool = True,
) -> Path:
    """Film agents at one task with MuJoCo's own renderer.

    An episode lasts until its last agent has ended; one that ended before holds its pose. Frames are left out so that
    there are at most 50 a second, 25 in a GIF.

    Args:
        path: File to write, ``.mp4`` (H.264) or ``.gif``; missing folders are made, and it is replaced in one step.
        rollouts: What is shown, by the agent's name: of the same tasks and as many episodes.
        task: Index of the task.
        episodes: Indices of the episodes, in this order; all if not given.
        width: Of an agent's picture, pixels; even for ``.mp4``.
        height: Of the pictures, pixels; even for ``.mp4``.
        speed: Times real time.
        progress: Show a bar that counts frames.

    Returns:
        The path written.

    Raises:
        ValueError: Another suffix, rollouts that do not fit each other, an index or a number out of range.
        TypeError: An index or a size that is no whole number.
        RuntimeError: There is no renderer; the message says what to install.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    check(rollouts)
    task, width, height = (operator.index(number) for number in (task, width, height))
    _check_film(suffix, width, height, speed)
    episodes = _checked_episodes(next(iter(rollouts.values())), task, episodes)
    robots = family(next(iter(rollouts.values())).family)
    described, size = scene(robots), max(8, min(height // 20, width // 26))  # of the letters, pixels
    panels = [_Panel(name, i, rollout, task, described) for i, (name, rollout) in enumerate(rollouts.items())]
    stride = max(1, math.ceil(speed / (described["dt"] * _MOST_FPS[suffix]) - 1e-9))  # steps from frame to frame
    fps = speed / (stride * described["dt"])
    times = [(k, t) for k in episodes for t in _times(max(int(panel.lengths[k]) for panel in panels), stride)]
    write = {".mp4": _write_mp4, ".gif": _write_gif}[suffix]
    studio = Studio(robots, width, height - _caption_height(size))
    with closing(studio), tqdm(times, unit="frame", disable=not progress) as bar:
        frames = (np.hstack([panel.draw(studio, size, k, t) for panel in panels]) for k, t in bar)
        return write_whole(path, lambda file: write(file, frames, len(times), fps))


def _check_film(suffix: str, width: int, height: int, speed: float) -> None:
    if suffix not in _MOST_FPS:
        raise ValueError(f"The suffix is {suffix!r}; let the file's name end in .mp4 or .gif.")
    kind = "an even number" if suffix == ".mp4" else "a whole number"
    for name, size in (("width", width), ("height", height)):
        if not _LEAST[name] <= size <= _MOST_PIXELS or size % (2 if suffix == ".mp4" else 1):
            limits = f"from {_LEAST[name]} to {_MOST_PIXELS} pixels"
            raise ValueError(f"{name} is {size}; in {suffix} it must be {kind} {limits}.")
    if not 0.01 <= speed <= 1000:
        raise ValueError(f"speed is {speed}; it must lie between 0.01 and 1000: 1 is real time, 2 is twice as fast.")


def _checked_episodes(rollout: Rollout, task: int, episodes: Sequence[int] | None) -> list[int]:
    n, there = rollout.returns.shape
    if not 0 <= task < n:
        raise ValueError(f"task is {task}; it must lie between 0 and {n - 1}.")
    episodes = [operator.index(k) for k in (range(there) if episodes is None else episodes)]
    if not episodes:
        raise ValueError("There is no episode to film; give the index of one, or play one first.")
    for k in episodes:
        if not 0 <= k < there:
            raise ValueError(f"episodes holds {k}; an index must lie between 0 and {there - 1}.")
    return episodes


def _times(last: int, stride: int) -> list[int]:
    """Steps that become frames: one in `stride`, and the last."""
    return [min(i * stride, last) for i in range(-(-last // stride) + 1)]


class _Panel:
    """One agent's part of the film: its robot under a caption.

    Attributes:
        lengths: ``(K,)``, steps of each episode.
    """

    def __init__(self, name: str, position: int, rollout: Rollout, task: int, described: Mapping[str, Any]) -> None:
        check_robot(rollout, described)
        self._name, self._rollout, self._task = name, rollout, task
        self._color = ImageColor.getrgb(style(name, position).color)
        self._dt, self._kind = described["dt"], described["view"]["goal"]
        self.lengths = rollout.lengths[task]

    def draw(self, studio: Studio, size: int, k: int, t: int) -> np.ndarray:
        """The panel at step `t` of episode `k`, ``(height, width, 3)`` uint8, in letters of `size` pixels."""
        goal, length = self._goal(k), int(self.lengths[k])
        way = self._rollout.qpos[self._task, k, : min(t, length) + 1].astype(float)  # (steps + 1, nq)
        picture = studio.picture(way[-1], goal, np.divide(self._color, 255))
        reward = np.nansum(self._rollout.rewards[self._task, k, :t], dtype=float)
        status = f"ended after {length * self._dt:.1f} s" if t > length else self._status(way, goal)
        rows = ((self._name, self._number(k)), (f"return {reward:.1f}", status))
        return np.vstack([_caption(rows, self._color, picture.shape[1], size), picture])

    def _goal(self, k: int) -> Sequence[float]:
        """The task's, unless the reader of a live player moved it."""
        goals = self._rollout.metadata.get("goals")
        return goals[k] if goals else self._rollout.tasks[self._task].goal

    def _number(self, k: int) -> str:
        """A source's rollout shows a few of many episodes, and says which."""
        about = self._rollout.metadata
        if "of" in about:
            return f"episode {about['episodes'][self._task][k] + 1} of {about['of'][self._task]}"
        return f"episode {k + 1} of {len(self.lengths)}"

    def _status(self, way: np.ndarray, goal: Sequence[float]) -> str:
        """What a picture does not show: the velocity, over the last half second."""
        if self._kind == "point":
            return ""
        steps = min(len(way) - 1, round(0.5 / self._dt))
        velocity = (way[-1, :2] - way[-1 - steps, :2]) / (max(steps, 1) * self._dt)
        if self._kind == "velocity":
            return f"wanted {goal[0]:.2f}, now {velocity[0]:.2f} m/s"
        return f"{velocity @ (math.cos(goal[0]), math.sin(goal[0])):.2f} m/s along the arrow"


def _caption_height(size: int) -> int:
    return round(3.2 * size)


def _caption(rows: Sequence[tuple[str, str]], color: tuple[int, int, int], width: int, size: int) -> np.ndarray:
    """Two rows of a left and a right text, the first left one in the agent's colour, ``(height, width, 3)`` uint8."""
    image = Image.new("RGB", (width, _caption_height(size)), "white")
    draw, font = ImageDraw.Draw(image), _font(size)
    for row, (left, right) in enumerate(rows):
        top, room = round((0.3 + 1.35 * row) * size), width - 1.5 * size - draw.textlength(right, font)
        while len(left) > 2 and draw.textlength(left, font) > room:
            left = left[:-2] + "…"
        draw.text((size / 2, top), left, fill=_INK if row else color, font=font)
        draw.text((width - size / 2, top), right, fill=_INK, font=font, anchor="ra")
    return np.asarray(image)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # Pillow's own: it is on every machine


def _write_mp4(file: Path, frames: Iterator[np.ndarray], count: int, fps: float) -> None:
    import imageio_ffmpeg  # itself: imageio takes the format from a name's end, and the temporary one has another

    first = next(frames)
    options = {"quality": 7, "macro_block_size": 2, "output_params": ["-f", "mp4", "-movflags", "+faststart"]}
    with closing(imageio_ffmpeg.write_frames(file, first.shape[1::-1], fps=fps, **options)) as writer:
        writer.send(None)
        for frame in itertools.chain([first], frames):
            writer.send(frame)


def _write_gif(file: Path, frames: Iterator[np.ndarray], count: int, fps: float) -> None:
    import imageio.v3 as imageio

    # A GIF counts in hundredths of a second; the ends are rounded, so that no error adds up.
    ends = np.round(100 / fps * np.arange(count + 1)).astype(int)
    durations = (10 * np.diff(ends)).tolist()  # ms
    with imageio.imopen(file, "w", plugin="pillow", extension=".gif") as writer:
        for frame in frames:
            writer.write(frame, bits=8, duration=durations, loop=0)
