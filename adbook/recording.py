"""What a player carries of rollouts: checked against each other, quantised and packed, small enough for a page.

Symbols: ``A`` agents, ``n`` tasks, ``K`` episodes, ``T`` steps, ``F`` stored frames, ``Q`` coordinates that move
something drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from adbook.rollout import Rollout

MOST_BYTES = 210_000  # of a recording in a page, where bytes are text and four of them carry three
_STRIDES = (1, 2, 3, 4, 5)  # steps between two stored frames
_PLACES = 2**13  # from the lowest to the highest value of a coordinate, and
_LEVELS, _REWARD_LEVELS = 64, 1000  # from nothing to the largest value seen: as fine as a reader can tell

Insight = Mapping[str, Mapping[str, np.ndarray]]


def check(rollouts: Mapping[str, Rollout]) -> None:
    """Refuse what cannot be played side by side.

    Raises:
        ValueError: No rollout or more than four, or different families, tasks, or numbers of episodes.
    """
    if not 1 <= len(rollouts) <= 4:
        raise ValueError(f"{len(rollouts)} rollouts were given; the player shows one to four.")
    (name, first), *others = rollouts.items()
    for other, rollout in others:
        for what in ("family", "tasks"):
            if getattr(rollout, what) != getattr(first, what):
                raise ValueError(f"The rollouts {name!r} and {other!r} have different {what}; play them on the same.")
        if rollout.rewards.shape != first.rewards.shape:
            raise ValueError(
                f"The rollouts {name!r} and {other!r} have {first.rewards.shape} and {rollout.rewards.shape} tasks, "
                "episodes and steps; play both for the same number of episodes."
            )


def check_robot(rollout: Rollout, scene: Mapping[str, Any]) -> None:
    """Refuse positions of another robot than the one that `adbook.scene` describes.

    Raises:
        ValueError: The number of coordinates is another.
    """
    if rollout.qpos.shape[-1] != scene["coordinates"]:
        raise ValueError(
            f"qpos has {rollout.qpos.shape[-1]} coordinates and {rollout.family}'s robot {scene['coordinates']}; "
            "give a rollout of that family."
        )


def _check_positions(name: str, qpos: np.ndarray, lengths: np.ndarray) -> None:
    """Refuse positions (n, K, T + 1, nq) that are not finite before an episode's end."""
    played = np.arange(qpos.shape[2]) <= lengths[..., None]  # (n, K, T + 1)
    faults = np.argwhere(played & ~np.isfinite(qpos).all(-1))
    if len(faults):
        i, k, t = faults[0]
        raise ValueError(
            f"The rollout {name!r} has no finite qpos in task {i}, episode {k}, step {t}; record it again."
        )


def recording(
    rollouts: Mapping[str, Rollout], insight: Insight, scene: Mapping[str, Any], most_bytes: float = MOST_BYTES
) -> dict[str, Any]:
    """Pack rollouts as the traits of a `RolloutPlayer`.

    Args:
        rollouts: By the agent's name, as `check` wants them.
        insight: By the agent's name, what `adbook.Watched.insight` gives.
        scene: Of `adbook.scene`.
        most_bytes: In a page; fewer frames are kept to stay below.

    Raises:
        ValueError: The robot has other coordinates, positions that are not finite, insight of an unknown agent or other
            than `Watched` gives it, or too much data.
    """
    first = next(iter(rollouts.values()))
    for name, rollout in rollouts.items():
        check_robot(rollout, scene)
        _check_positions(name, rollout.qpos, rollout.lengths)
    data = _insight(insight, rollouts)
    room = most_bytes * 3 / 4 - len(data["seen"])
    data |= _frames(np.stack([r.qpos for r in rollouts.values()])[..., scene["used"]], room, most_bytes)
    return data | {
        "shape": [len(rollouts), *first.rewards.shape],
        "returns": [np.round(r.returns.astype(float), 4).tolist() for r in rollouts.values()],
        "lengths": [r.lengths.tolist() for r in rollouts.values()],
    }


def _deflate(x: np.ndarray) -> bytes:
    """Whole numbers in 16 bits, all low bytes and then all high bytes, deflated."""
    return zlib.compress(x.astype("<i2").reshape(-1).view(np.uint8).reshape(-1, 2).T.tobytes(), 9)


def _frames(qpos: np.ndarray, room: float, most_bytes: float) -> dict[str, Any]:
    """Coordinates (A, n, K, T + 1, Q) in so many frames as there is room for; after an early end the last stays."""
    there = qpos if qpos.size else np.zeros_like(qpos, shape=(1, 1, 1, 1, qpos.shape[-1]))
    low, high = np.nanmin(there, axis=(0, 1, 2, 3)), np.nanmax(there, axis=(0, 1, 2, 3))
    unit = np.maximum(high - low, 1e-9) / _PLACES
    steps = qpos.shape[-2] - 1
    stored = np.round((_held(qpos) - low) / unit).astype(int)
    for stride in _STRIDES:
        at = np.minimum(np.arange(-(-steps // stride) + 1) * stride, steps)
        packed = _deflate(np.diff(stored[..., at, :], axis=-2, prepend=0))  # neighbours differ by little
        if len(packed) <= room:
            return {"frames": packed, "stride": stride, "low": low.tolist(), "unit": unit.tolist()}
    raise ValueError(
        f"The recording takes {4 * len(packed) // 3000} kB in a page, where {max(0, int(room)) // 750} of "
        f"{most_bytes // 1000} kB are left for it beside the insight. Show fewer tasks or episodes."
    )


def _held(x: np.ndarray) -> np.ndarray:
    """X with every NaN along the second to last axis replaced by the last number before it."""
    there = np.isfinite(x).all(-1)
    last = np.maximum.accumulate(np.where(there, np.arange(x.shape[-2]), 0), axis=-1)
    return np.take_along_axis(x, last[..., None], axis=-2)


def _insight(insight: Insight, rollouts: Mapping[str, Rollout]) -> dict[str, Any]:
    """What networks saw and got, (names, A, n, K, T), in steps of the largest of each."""
    unknown = sorted(set(insight) - set(rollouts))
    if unknown:
        raise ValueError(f"insight is given for {unknown[0]!r}, which is not among the rollouts {', '.join(rollouts)}.")
    if not insight:
        return {"insight": {}, "seen": b""}
    shape = next(iter(rollouts.values())).rewards.shape
    for agent, values in insight.items():
        _check_insight(agent, values, shape)
    insight = {agent: {**values, "reward": rollouts[agent].rewards} for agent, values in insight.items()}
    known = {agent: _told(values) for agent, values in insight.items()}
    names = list(dict.fromkeys(name for own in known.values() for name in own))
    columns = [[np.broadcast_to(insight.get(agent, {}).get(name, 0.0), shape) for agent in rollouts] for name in names]
    values = np.nan_to_num(np.array(columns)).reshape(len(names), -1)
    levels = [_REWARD_LEVELS if name == "reward" else _LEVELS for name in names]
    units = np.abs(values).max(axis=1, initial=0) / levels
    units[units == 0] = 1.0
    contexts = {agent: int(values["context"]) for agent, values in insight.items() if "context" in values}
    described = {
        "names": names,
        "units": units.tolist(),
        "actions": sum(name.startswith("mean ") for name in names),
        "agents": [known.get(agent) for agent in rollouts],  # the names known of each, or None
        "contexts": [contexts.get(agent) for agent in rollouts],
    }
    return {"insight": described, "seen": _deflate(np.round(values / units[:, None]))}


def _check_insight(agent: str, values: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> None:
    size = sum(name.startswith("mean ") for name in values)
    needed = {f"{name} {j + 1}" for j in range(size) for name in ("mean", "std", "action")}
    if not needed or not needed <= set(values):
        raise ValueError(f"insight[{agent!r}] holds {', '.join(values)}; give what Watched.insight returned.")
    for name, x in values.items():
        if np.shape(x) != (() if name == "context" else shape):
            raise ValueError(
                f"insight[{agent!r}][{name!r}] has shape {np.shape(x)}; it must be {shape}, as the rewards."
            )


def _told(values: Mapping[str, np.ndarray]) -> list[str]:
    """The names of what says something; before the first episode all of them may."""
    return [name for name, x in values.items() if x.ndim and (x.size == 0 or np.isfinite(x).any())]
