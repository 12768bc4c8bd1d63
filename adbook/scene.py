"""What the player needs to draw a family's robot: bodies, joints and shapes, read from the MuJoCo model.

The page computes forward kinematics from recorded `qpos` by itself; this module describes what there is to compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from adbook.relabel import PUSHER_MARK
from adbook.tasks import TaskFamily

_KINDS = {
    mujoco.mjtGeom.mjGEOM_SPHERE: "sphere",
    mujoco.mjtGeom.mjGEOM_CAPSULE: "capsule",
    mujoco.mjtGeom.mjGEOM_CYLINDER: "cylinder",
}
_JOINTS = {
    mujoco.mjtJoint.mjJNT_FREE: "free",
    mujoco.mjtJoint.mjJNT_SLIDE: "slide",
    mujoco.mjtJoint.mjJNT_HINGE: "hinge",
}


@dataclass(frozen=True)
class _View:
    """What the model does not say: how to look at it."""

    goal: str  # "point", "velocity" or "direction"
    tracked: str  # body whose path is drawn
    ground: float  # height of the ground, m
    look_at: tuple[float, float, float]  # m; relative to the tracked body if the camera follows it
    distance: float  # m, from there to the camera
    azimuth: float  # degrees, from the x axis; the camera looks the other way
    elevation: float  # degrees above the ground
    follow: bool = False
    aspect: float = 1.25  # width over height of the widest picture that does not show more at its sides
    goal_height: float = 0.0  # m, of a point
    goal_radius: float = 0.0  # m
    goal_origin: tuple[float, float] = (0.0, 0.0)  # m, from where a point counts


_VIEWS = {
    "reacher-goal": _View(
        "point", "fingertip", -0.01, (0, -0.02, 0), 0.9, -90, 62, aspect=0.95, goal_height=0.0, goal_radius=0.012
    ),
    "pusher-goal": _View(
        "point",
        "object",
        -0.325,
        (0.22, -0.22, -0.02),
        3.1,
        50,
        34,
        goal_height=-0.323,
        goal_radius=0.08,
        goal_origin=(*PUSHER_MARK[:2],),
    ),
    "half-cheetah-vel": _View("velocity", "torso", 0, (0, 0, 0.05), 4.8, -90, 10, follow=True),
    "ant-dir": _View("direction", "torso", 0, (0, 0, -0.1), 6.4, -60, 38, follow=True),
}
_NOT_DRAWN = {"target", "goal"}  # bodies that mark the goal: the player draws it itself


def scene(family: TaskFamily) -> dict[str, Any]:
    """Describe how a family's robot is built and looked at, in numbers, strings, lists and dicts alone.

    Lengths are in m, angles in degrees, quaternions as (w, x, y, z).

    Returns:
        `bodies`: for each its `parent` (index, -1 for the world), `pos`, `quat` in the parent, and `joints`, each with
        `kind`, `axis`, `pos` and `q`, the index of its first coordinate in `qpos`; `shapes`: for each its `kind`,
        `body`, the ends of its axis `from` and `to` in the body, `radius` and `role` ("robot", "object" or "frame");
        `tracked`: index of the body whose path is drawn; `used`: which of the `coordinates` of `qpos` move something
        drawn; `dt`: s between two steps; `view`: how to look at it.
    """
    env = family.make(family.train_tasks[0])
    model, dt = env.unwrapped.model, env.unwrapped.dt
    env.close()
    view = _VIEWS[family.name]
    bodies = [_body(model, i) for i in range(1, model.nbody)]  # without the world
    shapes = [_shape(model, i) for i in range(model.ngeom)]
    shapes = [shape for shape in shapes if shape]
    moving = {body for shape in shapes for body in _with_ancestors(shape["body"], bodies)}
    used = sorted({q for body in moving for joint in bodies[body]["joints"] for q in _coordinates(joint)})
    return {
        "family": family.name,
        "coordinates": model.nq,
        "dt": dt,
        "bodies": bodies,
        "shapes": shapes,
        "tracked": model.body(view.tracked).id - 1,
        "used": used,
        "view": vars(view),
    }


def _body(model: mujoco.MjModel, i: int) -> dict[str, Any]:
    first, count = int(model.body_jntadr[i]), int(model.body_jntnum[i])
    joints = [
        {
            "kind": _JOINTS[mujoco.mjtJoint(model.jnt_type[j])],
            "axis": _numbers(model.jnt_axis[j]),
            "pos": _numbers(model.jnt_pos[j]),
            "q": int(model.jnt_qposadr[j]),
        }
        for j in range(first, first + count)
    ]
    parent = int(model.body_parentid[i]) - 1
    return {
        "parent": parent,
        "pos": _numbers(model.body_pos[i]),
        "quat": _numbers(model.body_quat[i]),
        "joints": joints,
    }


def _shape(model: mujoco.MjModel, i: int) -> dict[str, Any] | None:
    kind, body = _KINDS.get(mujoco.mjtGeom(model.geom_type[i])), int(model.geom_bodyid[i])
    name = model.body(body).name
    if kind is None or name in _NOT_DRAWN or model.geom(i).name.startswith("side"):  # the walls around Reacher
        return None
    axis = np.zeros(9)
    mujoco.mju_quat2Mat(axis, model.geom_quat[i])
    half = axis.reshape(3, 3)[:, 2] * (0 if kind == "sphere" else model.geom_size[i, 1])  # the z axis, half the length
    role = "frame" if body == 0 else "object" if name == "object" else "robot"
    ends = {"from": _numbers(model.geom_pos[i] - half), "to": _numbers(model.geom_pos[i] + half)}
    return {"kind": kind, "body": body - 1, "radius": float(model.geom_size[i, 0]), "role": role} | ends


def _with_ancestors(body: int, bodies: list[dict[str, Any]]) -> list[int]:
    found = []
    while body >= 0:
        found.append(body)
        body = bodies[body]["parent"]
    return found


def _coordinates(joint: dict[str, Any]) -> range:
    return range(joint["q"], joint["q"] + (7 if joint["kind"] == "free" else 1))


def _numbers(x: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in x]
