"""The four environments: MuJoCo robots of gymnasium whose goal is hidden.

The goal enters the reward and nothing else. It is never in the observation, so an agent has to find it out by acting
and reading rewards. Reward definitions follow PEARL, VariBAD, MACAW and MQL for Half-Cheetah-Vel and Ant-Dir, and
gymnasium's Reacher-v5 and Pusher-v5 for the other two (control weight 0.1).
"""

import math
from collections.abc import Sequence

import mujoco
import numpy as np
from gymnasium import spaces, utils
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.pusher_v5 import PusherEnv
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv

Goal = float | Sequence[float]


class HiddenGoal:
    """What the four environments share: a goal that may be moved between two episodes, ``env.unwrapped.goal = (x, y)``.

    Attributes:
        goal_size: length of the goal.
        goal_range: smallest and largest value of it, or of its norm if it has two numbers.
    """

    goal_size: int
    goal_range: tuple[float, float]
    _allowed: str

    @classmethod
    def check_goal(cls, goal: Goal) -> np.ndarray:
        """Return the goal as a vector, (goal_size,) float64, or raise ValueError where it is out of range."""
        try:
            vector = np.atleast_1d(np.array(goal, dtype=np.float64))  # a copy: the caller's may change
        except (TypeError, ValueError):  # text, or lists of unequal lengths
            vector = np.empty(0)
        size, (low, high) = cls.goal_size, cls.goal_range
        value = vector[0] if vector.size == 1 else float(np.linalg.norm(vector))
        if vector.shape != (size,) or not (np.isfinite(vector).all() and low <= value <= high):
            raise ValueError(
                f"goal={goal!r} is not {cls._allowed}; pass {size} finite number{'s' * (size > 1)} in that range"
            )
        return vector

    @property
    def goal(self) -> np.ndarray:
        """The goal, (goal_size,) float64; setting another raises ValueError where it is out of range."""
        return self._goal

    @goal.setter
    def goal(self, goal: Goal) -> None:
        self._goal = self.check_goal(goal)


class ReacherGoalEnv(HiddenGoal, ReacherEnv):
    """Reacher-v5 with a hidden goal.

    Observation (8): cos q0, cos q1, sin q0, sin q1, q̇0, q̇1 (rad/s), fingertip x, y (m). Action (2): joint torques in
    [-1, 1]. Reward: -‖fingertip - goal‖ - 0.1 ‖a‖². Gymnasium's observation also holds the target and its offset from
    the fingertip: both would give the goal away.
    """

    goal_size, goal_range = 2, (0.0, 0.25)
    _allowed = "a point (x, y) at most 0.25 m from the base"

    def __init__(self, goal: Goal = (0.1, -0.1), **kwargs):
        """Place the hidden goal at `goal`, (x, y) in m, at most 0.25 m from the arm's base."""
        self.goal = goal
        super().__init__(reward_control_weight=0.1, **kwargs)
        utils.EzPickle.__init__(self, goal=goal, **kwargs)
        self.observation_space = spaces.Box(-np.inf, np.inf, (8,), np.float64)
        self._tip = self.data.xpos[self.model.body("fingertip").id]  # a view that MuJoCo keeps current

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply two torques for 0.02 s."""
        self.do_simulation(action, self.frame_skip)
        distance = math.hypot(self._tip[0] - self.goal[0], self._tip[1] - self.goal[1])
        control = self._reward_control_weight * float(np.dot(action, action))
        if self.render_mode == "human":
            self.render()
        info = {"distance": distance, "reward_dist": -distance, "reward_ctrl": -control}
        return self._get_obs(), -distance - control, False, False, info

    def reset_model(self) -> np.ndarray:
        """Start near the straight arm; the target body is moved to the goal for drawing only."""
        noise = self.np_random.uniform(-0.1, 0.1, self.model.nq), self.np_random.uniform(-0.005, 0.005, self.model.nv)
        position, velocity = self.init_qpos + noise[0], self.init_qvel + noise[1]
        position[-2:], velocity[-2:] = self.goal, 0.0
        self.set_state(position, velocity)
        return self._get_obs()

    def _get_obs(self) -> np.ndarray:
        angle = self.data.qpos[:2]
        return np.concatenate((np.cos(angle), np.sin(angle), self.data.qvel[:2], self._tip[:2]))


class PusherGoalEnv(HiddenGoal, PusherEnv):
    """Pusher-v5 with a hidden goal, `goal` = (x, y) in m relative to the table's centre mark.

    Observation (20): 7 joint angles, 7 joint velocities, fingertip xyz, object xyz. Action (7): torques in [-2, 2].
    Reward: -‖object - goal‖ - 0.5 ‖object - fingertip‖ - 0.1 ‖a‖². The object's start is random in every episode and
    does not depend on the goal: a start kept away from the goal would give it away.
    """

    goal_size, goal_range = 2, (0.0, 0.25)
    _allowed = "a point (x, y) at most 0.25 m from the table's mark"

    def __init__(self, goal: Goal = (0.0, 0.0), **kwargs):
        """Place the hidden goal at `goal`, (x, y) in m, at most 0.25 m from the table's centre mark."""
        self.goal = goal
        super().__init__(**kwargs)
        utils.EzPickle.__init__(self, goal=goal, **kwargs)
        self.observation_space = spaces.Box(-np.inf, np.inf, (20,), np.float64)

    def reset_model(self) -> np.ndarray:
        """Draw the object's start as Pusher-v5 does, at least 0.17 m from the table's centre mark."""
        position = self.init_qpos.copy()
        position[-4:-2] = self._object_start()
        position[-2:] = self.goal[1], self.goal[0]  # MuJoCo's slides are ordered y, x
        velocity = self.init_qvel + self.np_random.uniform(-0.005, 0.005, self.model.nv)
        velocity[-4:] = 0.0
        self.set_state(position, velocity)
        return self._get_obs()

    def _object_start(self) -> np.ndarray:
        while True:
            start = np.array([self.np_random.uniform(-0.3, 0.0), self.np_random.uniform(-0.2, 0.2)])
            if np.linalg.norm(start) > 0.17:
                return start

    def _get_obs(self) -> np.ndarray:
        joints = self.data.qpos[:7], self.data.qvel[:7]
        return np.concatenate((*joints, self.get_body_com("tips_arm"), self.get_body_com("object")))


class HalfCheetahVelEnv(HiddenGoal, HalfCheetahEnv):
    """HalfCheetah-v5 that is asked for a hidden forward velocity, `goal` in m/s.

    Observation (17) and action (6) are HalfCheetah-v5's. Reward: -|v_x - goal| - 0.05 ‖a‖². Never terminates.
    """

    goal_size, goal_range = 1, (-3.0, 5.0)
    _allowed = "a velocity from -3 to 5 m/s"

    def __init__(self, goal: Goal = 1.0, **kwargs):
        """Ask for the forward velocity `goal`, in m/s, from -3 to 5."""
        self.goal = goal
        super().__init__(**kwargs)
        utils.EzPickle.__init__(self, goal=goal, **kwargs)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """Load the model without MuJoCo's remark, and log file, on a deprecated attribute of gymnasium's XML."""
        handler = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda message: None)
        try:
            return super()._initialize_simulation()
        finally:
            mujoco.set_mju_user_warning(handler)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply six torques for 0.05 s."""
        observation, _, terminated, truncated, info = super().step(action)
        error = abs(float(info["x_velocity"]) - self.goal[0])
        control = 0.05 * float(np.dot(action, action))
        info |= {"velocity_error": error, "reward_forward": -error, "reward_ctrl": -control}
        return observation, -error - control, terminated, truncated, info


class AntDirEnv(HiddenGoal, AntEnv):
    """Ant-v5 that is paid for velocity along a hidden direction, `goal` in rad.

    Observation (27, without contact forces) and action (8) are Ant-v5's. Reward: v · (cos goal, sin goal) - 0.5 ‖a‖²
    - contact cost + 1 while healthy; the episode ends when the torso's height leaves [0.2, 1.0] m.
    """

    goal_size, goal_range = 1, (0.0, 2 * math.pi)
    _allowed = "a direction from 0 to 2π rad"

    def __init__(self, goal: Goal = 0.0, **kwargs):
        """Pay for moving along `goal`, an angle in rad from 0 to 2π."""
        self.goal = goal
        super().__init__(include_cfrc_ext_in_observation=False, **kwargs)
        utils.EzPickle.__init__(self, goal=goal, **kwargs)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply eight torques for 0.05 s."""
        observation, reward, terminated, truncated, info = super().step(action)
        direction = math.cos(self.goal[0]), math.sin(self.goal[0])
        forward = float(np.dot(direction, (info["x_velocity"], info["y_velocity"])))
        reward = float(reward - info["reward_forward"] + forward)
        return observation, reward, terminated, truncated, info | {"reward_forward": forward}
