"""Pictures of a family's robot in any pose, by MuJoCo's own renderer, off screen and with or without a display."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Sequence

import glfw
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from PIL import ImageColor

from adbook.scene import scene
from adbook.tasks import TaskFamily

_GOAL, _OBJECT, _FRAME = (np.divide(ImageColor.getrgb(color), 255) for color in ("#C2410C", "#B8872B", "#A3ADB8"))
_LIGHT = (0.19, 0.28, -0.94)  # the way it shines: a little aside, or a robot would stand on its shadow
_REMEDY = (
    "MuJoCo found no graphics to draw with. On Debian or Ubuntu: apt-get install libegl1 libopengl0 libgl1-mesa-dri. "
    "Or: apt-get install libosmesa6, and set MUJOCO_GL=osmesa before Python starts."
)


class Studio:
    """A robot, a camera where the player's is, and a bright room.

    Args:
        family: Whose robot it is.
        width: Of a picture, pixels.
        height: Of a picture, pixels.

    Raises:
        RuntimeError: There is no renderer; the message says what to install.
    """

    def __init__(self, family: TaskFamily, width: int, height: int) -> None:
        """See the class."""
        described = scene(family)
        self._view, self._tracked = described["view"], described["tracked"] + 1
        env = family.make(family.train_tasks[0])
        self._model, self._data = env.unwrapped.model, env.unwrapped.data
        env.close()
        _furnish(self._model)
        self._robot = _painted(self._model)
        # As wide as the player's view, and a tenth more: a picture cannot be turned to look for what it cuts off.
        self._model.vis.global_.fovy = 2.2 * math.degrees(
            math.atan(0.5 / (1.9 * min(width / height, self._view["aspect"])))
        )
        camera = {
            "lookat": np.array(self._view["look_at"], float),
            "distance": self._view["distance"],
            "azimuth": self._view["azimuth"] + 180,  # MuJoCo's is from the camera to the target
            "elevation": -self._view["elevation"],
        }
        self._renderer = _renderer(self._model, self._data, camera, width, height)
        self._renderer.viewer.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False

    def picture(self, qpos: np.ndarray, goal: Sequence[float], color: Sequence[float]) -> np.ndarray:
        """Draw a pose.

        Args:
            qpos: ``(nq,)``, rad and m; of Reacher and Pusher it holds the goal's place too.
            goal: The task's, of which Ant's direction is drawn as an arrow.
            color: Red, green and blue of the robot, from 0 to 1.

        Returns:
            ``(height, width, 3)`` uint8.
        """
        self._data.qpos[:] = qpos
        mujoco.mj_forward(self._model, self._data)
        self._model.geom_rgba[self._robot, :3] = color
        if self._view["follow"]:
            self._follow()
        if self._view["goal"] == "direction":
            self._renderer.viewer.add_marker(**_arrow(self._data.xpos[self._tracked], goal[0]))
        self._renderer.viewer.make_context_current()  # there may be another studio, or a rendered environment
        return self._renderer.render("rgb_array")

    def close(self) -> None:
        """Give the graphics back, MuJoCo's share first: freed later, it would take the next studio's with it."""
        self._renderer.viewer.make_context_current()
        self._renderer.viewer.con.free()
        self._renderer.close()

    def _follow(self) -> None:
        """Move the camera, at one height or the picture would bob, and the light: shadows fall near it only."""
        x, y = self._data.xpos[self._tracked][:2]
        z = self._model.body_pos[self._tracked][2]
        self._renderer.viewer.cam.lookat[:] = np.add((x, y, z), self._view["look_at"])
        self._data.light_xpos[:], self._data.light_xdir[:] = (x, y, 3), _LIGHT


def _furnish(model: mujoco.MjModel) -> None:
    """Light the room evenly; a checkered floor becomes one of two light greys, and the sky plain."""
    light = model.vis.headlight
    light.ambient[:], light.diffuse[:], light.specular[:] = 0.55, 0.35, 0.1
    model.light_ambient[:], model.light_diffuse[:], model.light_specular[:] = 0, 0.3, 0
    model.mat_specular[:] = 0
    # A software renderer spends most of its time on shadows: fewer texels, and over less of the ground.
    model.vis.quality.shadowsize, model.vis.map.shadowclip = 1024, 0.7
    for i in range(model.ntex):
        size = model.tex_height[i] * model.tex_width[i] * model.tex_nchannel[i]
        texels = model.tex_data[model.tex_adr[i] :][:size]
        sky = model.tex_type[i] == mujoco.mjtTexture.mjTEXTURE_SKYBOX
        texels[:] = 238 if sky else np.where(texels > 100, 235, 215)


def _painted(model: mujoco.MjModel) -> list[int]:
    """Paint what is not the robot, and return the indices of the robot's shapes."""
    robot, rgba = [], model.geom_rgba
    for g in range(model.ngeom):
        body = model.body(model.geom_bodyid[g]).name
        if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_PLANE:
            rgba[g, :3] = 1 if model.nmat else 0.94
            if not model.nmat:  # a table: without an edge, for behind it there is no sky
                model.geom_size[g, :2] = 0
        elif body == "world":  # the arm's foot, and walls around it, which would only be in the way
            rgba[g] = 0 if model.geom(g).name.startswith("side") else (*_FRAME, 1)
        elif body in ("target", "goal", "object"):
            rgba[g, :3] = _OBJECT if body == "object" else _GOAL
        elif rgba[g, :3].max() > 0.2:  # the dark eyes of Pusher's robot stay
            robot.append(g)
    return robot


def _arrow(center: np.ndarray, angle: float) -> dict[str, object]:
    """A marker above `center` that points along `angle`, rad; on the ground the robot would hide it."""
    along, left = (math.cos(angle), math.sin(angle), 0), (-math.sin(angle), math.cos(angle), 0)
    return {
        "type": mujoco.mjtGeom.mjGEOM_ARROW,
        "pos": np.array([*center[:2], 1.25]),
        "mat": np.array([left, (0, 0, 1), along]).T.flatten(),  # an arrow points along its own z
        "size": np.array([0.05, 0.05, 1.6]),
        "rgba": np.array([*_GOAL, 1]),
    }


def _renderer(
    model: mujoco.MjModel, data: mujoco.MjData, camera: dict[str, object], width: int, height: int
) -> MujocoRenderer:
    """Gymnasium's renderer, on the first graphics that work: those that MUJOCO_GL names, or a display's, or EGL.

    Gymnasium's own choice is GLFW also on a Linux without a display, where the window that it gets is none.
    """
    model.vis.global_.offwidth, model.vis.global_.offheight = width, height
    display = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    given, failure = os.environ.get("MUJOCO_GL"), None
    for graphics in [given] if given else ["glfw", "egl"] if display else ["egl"]:
        os.environ["MUJOCO_GL"] = graphics  # the way to tell gymnasium
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", glfw.GLFWError)  # of a display that cannot be used: the next is tried
                renderer = MujocoRenderer(model, data, camera, width, height, camera_id=-1)
                renderer.render("rgb_array")  # the graphics are first asked for here
            return renderer
        except Exception as error:  # of many kinds: a library, a driver or a device may be missing
            failure = error
        finally:
            del os.environ["MUJOCO_GL"]
            if given is not None:
                os.environ["MUJOCO_GL"] = given
    raise RuntimeError(_REMEDY) from failure
