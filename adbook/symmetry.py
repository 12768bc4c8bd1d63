"""The symmetries of the ant: from the history of one direction, the histories of up to seven others.

The ant has four equal legs. Turn the world by a quarter, or look at it in a mirror, rename the legs, and the same
physics runs on: a history of direction θ has become one of direction θ + π/2, or −θ, that PPO could have recorded as
well, rewards included. On observations and actions each of the eight symmetries is a signed permutation.

| numbers of an observation | what they are                                  | after a quarter turn     |
|---------------------------|------------------------------------------------|--------------------------|
| 0                         | height                                         | as before                |
| 1–4                       | the torso's rotation, quaternion (w, x, y, z)  | (w, −y, x, z)            |
| 5–12                      | hip and ankle of legs 1–4, rad                 | those of the leg before  |
| 13–15, 16–18              | velocity (world), angular velocity (body)      | (−y, x, z) each          |
| 19–26                     | speeds of hips and ankles, rad/s               | as the angles            |
"""

import math
from dataclasses import replace

import numpy as np

from adbook.histories import LearningHistory
from adbook.tasks import HELD_OUT_ARC

FAMILY = "ant-dir"
# Legs stand at 45°, 135°, 225° and 315°. Ankles 1 and 2 bend about (−1, 1) and (1, 1): a quarter turn makes the
# opposite of the second axis of the first, and so on round. Hips bend about the vertical, which stays.
_ANKLE_SIGNS = np.array([1, -1, -1, 1])  # of leg 1's bend, in the legs' own axes
_MOTORS = (3, 0, 1, 2)  # the leg of each pair of actions


def _legs(order: list[int], hip: int, ankle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and sign of (4 legs × hip, ankle), where leg i of the image is leg order[i] of the original."""
    index = np.array([[2 * leg, 2 * leg + 1] for leg in order]).ravel()
    return index, np.stack([np.full(4, hip), ankle], 1).ravel()


def _observation(legs: tuple[np.ndarray, np.ndarray], vector: tuple, axial: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Index and sign (27,) from those of the legs (8,) and of the two kinds of vectors (3,)."""
    parts = [([0], [1]), ([0], [1]), axial, legs, vector, axial, legs]
    starts = np.cumsum([0] + [len(index) for index, _ in parts])
    index = np.concatenate([start + np.array(part) for start, (part, _) in zip(starts, parts, strict=False)])
    return index, np.concatenate([sign for _, sign in parts])


def _action(legs: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Index and sign (8,) in the order of the motors."""
    place = np.array([[2 * leg, 2 * leg + 1] for leg in _MOTORS]).ravel()  # of each action, among the legs
    index, sign = legs
    return np.argsort(place)[index[place]], sign[place]


_BEFORE = [3, 0, 1, 2]
_TURNED = _legs(_BEFORE, 1, _ANKLE_SIGNS * _ANKLE_SIGNS[_BEFORE])
_TURN = _observation(_TURNED, ([1, 0, 2], [-1, 1, 1]), ([1, 0, 2], [-1, 1, 1])), _action(_TURNED)
_MIRRORED = _legs([3, 2, 1, 0], -1, np.ones(4, int))
_MIRROR = _observation(_MIRRORED, ([0, 1, 2], [1, -1, 1]), ([0, 1, 2], [-1, 1, -1])), _action(_MIRRORED)


def image(history: LearningHistory, turns: int, mirrored: bool = False) -> LearningHistory:
    """Return what a history of Ant-Dir looks like in a mirror (along x), and then turned by `turns` quarters.

    Args:
        history: of direction θ.
        turns: 0 to 3, counter-clockwise.
        mirrored: whether y becomes −y first.

    Returns:
        A history of direction (−θ if mirrored, else θ) + turns · π/2, in [0, 2π); `metadata["image"]` lists what was
        done, [turns, mirrored] each time.

    Raises:
        ValueError: a history of another family; turns or mirrored are none.
    """
    about = history.metadata.get("task")
    if not isinstance(about, dict) or about.get("family") != FAMILY:
        raise ValueError(f"only histories of {FAMILY} have images, and {history!r} is none")
    if type(turns) is not int or turns not in range(4):
        raise ValueError(f"turns={turns!r} must be a whole number from 0 to 3")
    if type(mirrored) is not bool:
        raise ValueError(f"mirrored={mirrored!r} must be True or False")
    fields = {name: getattr(history, name) for name in ("observations", "next_observations", "actions")}
    (angle,) = about["goal"]
    for observation, action in [_MIRROR] * mirrored + [_TURN] * turns:
        for name, values in fields.items():
            index, sign = action if name == "actions" else observation
            fields[name] = values[:, index] * sign.astype(values.dtype)
    angle = ((-angle if mirrored else angle) + turns * math.pi / 2) % (2 * math.pi) % (2 * math.pi)  # never 2π itself
    task = about | {"goal": [angle]}
    done = [*history.metadata.get("image", []), [turns, mirrored]]
    return replace(history, **fields, metadata=history.metadata | {"task": task, "image": done})


def images(history: LearningHistory) -> list[LearningHistory]:
    """Return a history of Ant-Dir and all its images in the range of the training tasks: up to eight histories.

    Raises:
        ValueError: a history of another family.
    """
    all_eight = (image(history, turns, mirrored) for mirrored in (False, True) for turns in range(4))
    return [one for one in all_eight if one.metadata["task"]["goal"][0] < HELD_OUT_ARC[0]]
