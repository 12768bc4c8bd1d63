"""The four families: one dynamics, many rewards, and an observation that keeps the goal to itself."""

import copy
import math
import pickle

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.stats import qmc

import adbook
from adbook.tasks import FAMILIES, Task

IDS = {
    "reacher-goal": "adbook/ReacherGoal-v0",
    "pusher-goal": "adbook/PusherGoal-v0",
    "half-cheetah-vel": "adbook/HalfCheetahVel-v0",
    "ant-dir": "adbook/AntDir-v0",
}
HORIZON = {"reacher-goal": 50, "pusher-goal": 100, "half-cheetah-vel": 200, "ant-dir": 200}
SIZES = {"reacher-goal": (8, 2), "pusher-goal": (20, 7), "half-cheetah-vel": (17, 6), "ant-dir": (27, 8)}
GOAL_JOINTS = {"reacher-goal": 2, "pusher-goal": 2, "half-cheetah-vel": 0, "ant-dir": 0}
STEPS = 12  # enough to touch the ground or the table

each_family = pytest.mark.parametrize("name", FAMILIES)


def play(env: gymnasium.Env, seed: int, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Observations (steps + 1, O) and rewards (steps,) under random actions that the seed fixes."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    observations, rewards = [observation], []
    for _ in range(steps):
        observation, reward, *_ = env.step(rng.uniform(env.action_space.low, env.action_space.high))
        observations.append(observation)
        rewards.append(reward)
    env.close()
    return np.array(observations), np.array(rewards)


@each_family
# The checker advises finite bounds, which MuJoCo's observations do not have, and actions within ±1 (Pusher's: ±2).
@pytest.mark.filterwarnings("ignore:.*A Box observation space (minimum|maximum) value is:UserWarning")
@pytest.mark.filterwarnings("ignore:.*recommend using a symmetric and normalized space:UserWarning")
def test_gymnasium_finds_no_fault(name):
    family = adbook.family(name)
    check_env(family.make(family.test_tasks[0]).unwrapped, skip_render_check=True)


@each_family
def test_sizes_and_horizon_are_those_of_the_environment(name):
    family = adbook.family(name)
    assert (family.observation_size, family.action_size) == SIZES[name]
    assert family.horizon == HORIZON[name]
    env = family.make(family.train_tasks[0])
    observation, _ = env.reset(seed=0)
    assert observation.shape == SIZES[name][:1]
    np.testing.assert_array_equal(env.action_space.high, family.action_scale)
    np.testing.assert_array_equal(env.action_space.low, -family.action_scale)
    steps, ended = 0, False
    while not ended:  # without torque nothing falls over, so only the horizon can end it
        _, _, terminated, truncated, _ = env.step(np.zeros(family.action_size))
        steps, ended = steps + 1, terminated or truncated
    assert (steps, terminated, truncated) == (HORIZON[name], False, True)


@each_family
def test_the_seed_fixes_a_trajectory(name):
    family = adbook.family(name)
    first, again, other = (play(family.make(family.test_tasks[1]), seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0][0], other[0][0])  # the start is drawn, too
    assert not np.array_equal(first[1], other[1])


@each_family
def test_two_goals_share_start_and_dynamics_and_differ_in_reward(name):
    """The definition of a family: same S, A, P and start distribution, exactly; another r."""
    family = adbook.family(name)
    one, two = (play(family.make(task), seed=5) for task in family.train_tasks[:2])
    np.testing.assert_array_equal(one[0], two[0])
    assert (one[1] != two[1]).all()


@each_family
def test_observation_is_the_same_function_of_the_state_for_two_goals(name):
    family = adbook.family(name)
    one, two = (family.make(task).unwrapped for task in (family.train_tasks[0], family.ood_tasks[0]))
    play(one, seed=1)
    two.reset(seed=2)
    own = GOAL_JOINTS[name]
    position, velocity = one.data.qpos.copy(), one.data.qvel.copy()
    for env in (one, two):
        if own:
            position[-own:] = env.data.qpos[-own:]
            velocity[-own:] = env.data.qvel[-own:]
        env.set_state(position, velocity)
    np.testing.assert_array_equal(one._get_obs(), two._get_obs())


@each_family
def test_a_moved_goal_is_the_goal_of_the_next_episode(name):
    family = adbook.family(name)
    one, two = family.train_tasks[:2]
    moved = family.make(one)
    play(moved, 3)
    moved.unwrapped.goal = two.goal
    assert moved.unwrapped.goal.tolist() == list(two.goal)
    for ours, expected in zip(play(moved, 4), play(family.make(two), 4), strict=True):
        np.testing.assert_array_equal(ours, expected)
    with pytest.raises(ValueError, match=r"goal=99.* is not a "):
        moved.unwrapped.goal = 99.0
    assert moved.unwrapped.goal.tolist() == list(two.goal)


@pytest.mark.parametrize("name", ["reacher-goal", "pusher-goal"])
def test_the_drawn_goal_does_not_reach_the_observation(name):
    family = adbook.family(name)
    env = family.make(family.test_tasks[0]).unwrapped
    env.reset(seed=0)
    before = env._get_obs()
    position = env.data.qpos.copy()
    position[-2:] += 0.05  # the goal's own joints
    env.set_state(position, env.data.qvel)
    np.testing.assert_array_equal(env._get_obs(), before)


def reward_by_hand(name: str, before: mujoco.MjData, env: gymnasium.Env, action: np.ndarray) -> float:
    """The reward from the table of definitions and the simulator's state; nothing of adbook is called."""
    data, goal, effort = env.unwrapped.data, env.get_wrapper_attr("goal"), float(np.sum(action**2))
    if name == "reacher-goal":  # two links of 0.1 and 0.11 m
        first, second = data.qpos[0], data.qpos[0] + data.qpos[1]
        x = 0.1 * math.cos(first) + 0.11 * math.cos(second)
        y = 0.1 * math.sin(first) + 0.11 * math.sin(second)
        return -math.dist((x, y), goal) - 0.1 * effort
    if name == "pusher-goal":
        # MuJoCo places bodies at the start of its last substep: 0.01 s before, by its own semi-implicit Euler
        seen = mujoco.MjData(env.unwrapped.model)
        seen.qpos[:] = data.qpos - 0.01 * data.qvel
        mujoco.mj_kinematics(env.unwrapped.model, seen)
        cylinder, tip = seen.body("object").xpos, seen.body("tips_arm").xpos
        mark = (0.45 + goal[0], -0.05 + goal[1], -0.323)
        return -math.dist(cylinder, mark) - 0.5 * math.dist(cylinder, tip) - 0.1 * effort
    if name == "half-cheetah-vel":
        velocity = (data.qpos[0] - before.qpos[0]) / 0.05
        return -abs(velocity - goal[0]) - 0.05 * effort
    moved = data.body("torso").xpos - before.body("torso").xpos
    forward = (moved[0] * math.cos(goal[0]) + moved[1] * math.sin(goal[0])) / 0.05
    contact = 5e-4 * float(np.sum(np.clip(data.cfrc_ext, -1, 1) ** 2))
    return forward - 0.5 * effort - contact + (0.2 <= data.qpos[2] <= 1.0)


# Reacher reads its fingertip where the last stage of RK4 put it, at the end of the step but to lower order: off by
# about h³ × jerk / 6 × reach = 1e-6 × (200 / 1 rad/s³) / 6 × 0.21 m = 7e-6 m (more only while the elbow is stopped at
# 3 rad, which these few steps do not reach). The others are exact but for rounding.
TOLERANCE = {"reacher-goal": 3e-5, "pusher-goal": 1e-9, "half-cheetah-vel": 1e-9, "ant-dir": 1e-9}


@each_family
@pytest.mark.parametrize("split", ["train", "test", "ood"])
def test_reward_equals_a_hand_calculation(name, split):
    family = adbook.family(name)
    env = family.make(getattr(family, f"{split}_tasks")[3])
    env.reset(seed=7)
    rng = np.random.default_rng(7)
    for _ in range(STEPS):
        action = rng.uniform(env.action_space.low, env.action_space.high)
        before = copy.copy(env.unwrapped.data)
        _, reward, *_ = env.step(action)
        by_hand = reward_by_hand(name, before, env, action)
        assert reward == pytest.approx(by_hand, abs=TOLERANCE[name], rel=0)


@pytest.mark.parametrize(("height", "ends"), [(0.5, False), (1.2, True)])  # m; falls 1 cm in the step
def test_the_ants_episode_ends_above_its_healthy_height_and_the_bonus_with_it(height, ends):
    family = adbook.family("ant-dir")
    env = family.make(family.train_tasks[0])
    env.reset(seed=0)
    position = env.unwrapped.data.qpos.copy()
    position[2] = height
    env.unwrapped.set_state(position, np.zeros(14))
    _, _, terminated, _, info = env.step(np.zeros(8))
    assert terminated is ends
    assert info["reward_survive"] == float(not ends)


def radical_inverse(i: int, base: int) -> float:
    """The i-th number of the van der Corput sequence."""
    value, weight = 0.0, 1 / base
    while i:
        i, digit = divmod(i, base)
        value, weight = value + digit * weight, weight / base
    return value


def on_unit_square(name: str, goals: np.ndarray) -> np.ndarray:
    """Where goals (n, d) lie in their range, area to area: (n, d) in [0, 1]."""
    if name == "half-cheetah-vel":
        return goals / 3.0
    if name == "ant-dir":
        return goals / (1.75 * np.pi)
    radius = {"reacher-goal": 0.2, "pusher-goal": 0.15}[name]
    angle = np.arctan2(goals[:, 1], goals[:, 0]) % (2 * np.pi)
    return np.stack(((np.linalg.norm(goals, axis=1) / radius) ** 2, angle / (2 * np.pi)), 1)


def goals_of(tasks: tuple[Task, ...]) -> np.ndarray:
    return np.array([task.goal for task in tasks])


@each_family
def test_training_goals_are_the_halton_sequence(name):
    goals = on_unit_square(name, goals_of(adbook.family(name).train_tasks))
    expected = [[radical_inverse(i + 1, base) for base in (2, 3)] for i in range(128)]
    np.testing.assert_allclose(goals, np.array(expected)[:, : goals.shape[1]], atol=1e-12)


@each_family
@pytest.mark.parametrize("n", [8, 16, 32, 128])
def test_any_first_tasks_cover_the_range_more_evenly_than_chance(name, n):
    points = on_unit_square(name, goals_of(adbook.family(name).train_tasks[:n]))
    d = points.shape[1]
    # Expectation of the squared centred discrepancy of n independent uniform points (Hickernell 1998).
    by_chance = ((5 / 4) ** d - (13 / 12) ** d) / n
    assert qmc.discrepancy(points, method="CD") < by_chance / 2


@each_family
def test_splits_are_fixed_disjoint_and_in_their_ranges(name):
    family = adbook.family(name)
    splits = {"train": family.train_tasks, "test": family.test_tasks, "ood": family.ood_tasks}
    assert [len(tasks) for tasks in splits.values()] == [128, 16, 16]
    assert len({task.goal for tasks in splits.values() for task in tasks}) == 160
    for split, tasks in splits.items():
        assert [(task.family, task.split, task.index) for task in tasks] == [
            (name, split, i) for i in range(len(tasks))
        ]
    inside = np.concatenate((goals_of(family.train_tasks), goals_of(family.test_tasks)))
    outside = goals_of(family.ood_tasks)
    low, high = {
        "reacher-goal": (0, 0.2), "pusher-goal": (0, 0.15), "half-cheetah-vel": (0, 3), "ant-dir": (0, 1.75 * np.pi)
    }[name]  # fmt: skip
    inside, outside = (g[:, 0] if g.shape[1] == 1 else np.linalg.norm(g, axis=1) for g in (inside, outside))
    assert inside.min() >= low
    assert inside.max() <= high
    assert ((outside < low) | (outside > high)).all()
    assert family == adbook.family(name)


# Histories and results on disk belong to these goals.
FIRST_TEST_GOALS = {
    "reacher-goal": (0.04963727, -0.0718277),
    "pusher-goal": (0.03722795, -0.05387077),
    "half-cheetah-vel": (0.57173073,),
    "ant-dir": (1.04775128,),
}


@each_family
def test_test_goals_have_not_moved(name):
    np.testing.assert_allclose(adbook.family(name).test_tasks[0].goal, FIRST_TEST_GOALS[name], atol=1e-7)


def test_macaw_split_of_half_cheetah():
    family = adbook.family("half-cheetah-vel", split="macaw")
    grid = [0.075 + 0.075 * i for i in range(40)]  # linspace(0.075, 3, 40)
    test = [grid[i] for i in (2, 7, 15, 23, 26)]
    np.testing.assert_allclose(goals_of(family.test_tasks)[:, 0], test, atol=1e-12)
    expected = [v for i, v in enumerate(grid) if i not in (2, 7, 15, 23, 26)]
    np.testing.assert_allclose(goals_of(family.train_tasks)[:, 0], expected, atol=1e-12)


def test_macaw_split_of_ant():
    family = adbook.family("ant-dir", split="macaw")
    assert (len(family.train_tasks), len(family.test_tasks)) == (45, 5)
    degrees = np.degrees(goals_of(family.test_tasks)[:, 0])
    np.testing.assert_allclose(degrees, [360 / 50 * i for i in (6, 17, 23, 30, 41)], atol=1e-9)


def test_no_direction_is_outside_of_macaws_circle():
    family = adbook.family("ant-dir", split="macaw")
    assert family.ood_tasks == ()
    sampled = goals_of(family.sample_tasks(200, np.random.default_rng(0)))
    assert (sampled > 1.75 * np.pi).any()  # chance of none: (7/8)^200 = 3e-12
    assert sampled.max() < 2 * np.pi


@each_family
def test_sampled_tasks_follow_the_generator_and_the_range(name):
    family = adbook.family(name)
    one, same, other = (family.sample_tasks(64, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == same
    assert not {task.goal for task in one} & {task.goal for task in other}
    points = on_unit_square(name, goals_of(one))
    assert ((points >= 0) & (points <= 1)).all()
    # each quarter of the range holds 16 ± 3.5 of 64; six standard deviations
    counts = np.histogram(points[:, 0], bins=4, range=(0, 1))[0]
    assert (np.abs(counts - 16) <= 6 * math.sqrt(64 * 0.25 * 0.75)).all()
    assert counts.min() > 0


@each_family
def test_gymnasium_makes_the_same_environment_by_its_id(name):
    family = adbook.family(name)
    task = family.test_tasks[2]
    goal = task.goal if len(task.goal) > 1 else task.goal[0]  # a plain number is welcome
    by_id, by_family = gymnasium.make(IDS[name], goal=goal), family.make(task)
    for one, two in zip(play(by_id, 0), play(by_family, 0), strict=True):
        np.testing.assert_array_equal(one, two)


@each_family
def test_environments_and_families_survive_pickling(name):
    family = pickle.loads(pickle.dumps(adbook.family(name)))
    assert family == adbook.family(name)
    env = family.make(family.test_tasks[4]).unwrapped
    revived = pickle.loads(pickle.dumps(env))
    for one, two in zip(play(env, 0), play(revived, 0), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("reacher", "did you mean 'reacher-goal'"),
        ("ant_dir", "did you mean 'ant-dir'"),
        ("walker", "choose one of reacher-goal, pusher-goal, half-cheetah-vel, ant-dir"),
        (None, "unknown task family None"),
    ],
)
def test_an_unknown_family_is_answered_with_the_known_ones(wrong, hint):
    with pytest.raises(ValueError, match=hint) as error:
        adbook.family(wrong)
    assert repr(wrong) in str(error.value)


@pytest.mark.parametrize(("name", "allowed"), [("reacher-goal", "default$"), ("ant-dir", "default, macaw$")])
def test_an_unknown_split_is_answered_with_the_known_ones(name, allowed):
    with pytest.raises(ValueError, match=f"unknown split 'macau'.*; choose one of {allowed}"):
        adbook.family(name, split="macau")


@pytest.mark.parametrize("name", ["reacher-goal", "pusher-goal"])
def test_macaw_has_no_split_of_the_arms(name):
    with pytest.raises(ValueError, match="unknown split 'macaw'"):
        adbook.family(name, split="macaw")


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("reacher-goal", 0.1),
        ("reacher-goal", (0.1, 0.1, 0.1)),
        ("reacher-goal", (0.3, 0.0)),
        ("reacher-goal", (math.nan, 0.0)),
        ("reacher-goal", "left"),
        ("pusher-goal", [[0.1], [0.1, 0.2]]),
        ("pusher-goal", (0.0, -0.26)),
        ("half-cheetah-vel", (1.0, 2.0)),
        ("half-cheetah-vel", math.inf),
        ("half-cheetah-vel", None),
        ("ant-dir", -1),  # ±1 for forwards and backwards, as some public code has it, is no angle
        ("ant-dir", 360),
    ],
)
def test_a_goal_that_cannot_be_is_refused(name, goal):
    with pytest.raises(ValueError, match=r"goal=.* is not a .*; pass \d finite number") as error:
        gymnasium.make(IDS[name], goal=goal)
    assert f"goal={goal!r}" in str(error.value)


@pytest.mark.parametrize("goal", [("0.1", "0.1"), "left", [[0.1, 0.1]], None])
def test_a_goal_that_is_no_number_makes_no_task(goal):
    with pytest.raises(ValueError, match=r"goal=.* must be a number, or several in a row"):
        Task("reacher-goal", goal, "sampled", 0)


def test_a_task_of_another_family_is_refused():
    task = adbook.family("ant-dir").test_tasks[0]
    with pytest.raises(ValueError, match=r"ant-dir/test-000 is not a task of 'reacher-goal'.*family\('ant-dir'\)"):
        adbook.family("reacher-goal").make(task)


def test_nothing_is_written_or_said_when_a_family_is_made(tmp_path, monkeypatch, capfd):
    """MuJoCo answers gymnasium's HalfCheetah file with a remark and a log file in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in FAMILIES:
        family = adbook.family(name)
        family.make(family.train_tasks[0]).close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
