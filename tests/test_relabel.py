"""Rewards of another task: what the simulator pays there for the same motion."""

import numpy as np
import pytest

import adbook
from adbook.relabel import repaid
from adbook.tasks import Task

GOALS = {
    "reacher-goal": ((0.1, -0.05), (-0.15, 0.1)),
    "pusher-goal": ((0.1, 0.05), (-0.1, -0.12)),
    "half-cheetah-vel": ((0.5,), (2.0,)),
    "ant-dir": ((0.3,), (4.0,)),
}


def played(name: str, goal: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """Observations before and after, and rewards, of one and the same motion, whatever the goal."""
    family = adbook.family(name)
    env, rng, rows = family.make(Task(name, goal, "sampled", 0)), np.random.default_rng(0), []
    for episode in range(2):
        before, _ = env.reset(seed=episode)
        if name == "pusher-goal":  # so that the object moves, and it shows whether its place is read before or after
            env.unwrapped.data.qvel[-4:-2] = 0.5, -0.3
        action, over = np.zeros(family.action_size), False
        while not over:
            action = 0.8 * action + 0.4 * rng.standard_normal(family.action_size)  # smooth, so that bodies move
            after, reward, terminated, truncated, _ = env.step(np.clip(action, -1, 1) * family.action_scale)
            rows.append((before, after, reward))
            before, over = after, terminated or truncated
    return tuple(np.array(column) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("name", adbook.FAMILIES)
def test_the_simulator_would_have_paid_as_much(name):
    goal, other = GOALS[name]
    before, after, rewards = played(name, goal)
    same, _, truth = played(name, other)
    np.testing.assert_array_equal(before, same)  # the goal changes nothing but the reward
    error = repaid(name, before, after, rewards, goal, other) - truth
    if name in ("reacher-goal", "pusher-goal"):
        np.testing.assert_allclose(error, 0, atol=1e-12)
    else:  # velocities are read at a step's ends: most of what the other goal changes is told, not all of it
        assert np.sqrt((error**2).mean()) < 0.3 * np.sqrt(((rewards - truth) ** 2).mean())


def test_the_same_goal_changes_nothing():
    before, after, rewards = played("ant-dir", (0.3,))
    assert repaid("ant-dir", before, after, rewards, [0.3], (0.3,)) is rewards


def test_an_unknown_family_and_goals_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="unknown task family 'walker'"):
        repaid("walker", *np.zeros((3, 1, 8)), (0.0,), (1.0,))
    with pytest.raises(ValueError, match="must be of one size"):
        repaid("reacher-goal", *np.zeros((3, 1, 8)), (0.1,), (1.0, 0.2))
