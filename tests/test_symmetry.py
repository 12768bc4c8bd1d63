"""The ant's symmetries: the simulator itself says that an image of a history is a history."""

import math
from dataclasses import replace

import numpy as np
import pytest

import adbook
from adbook.histories import LearningHistory
from adbook.symmetry import image, images
from adbook.tasks import Task

ANT = adbook.family("ant-dir")


def recorded(angle: float, steps: int = 30) -> tuple[LearningHistory, np.ndarray, np.ndarray]:
    """Random actions on one direction, as a history in 64 bits, and its first positions and speeds."""
    env = ANT.make(Task("ant-dir", (angle,), "train", 0))
    rng = np.random.default_rng(5)
    observation, _ = env.reset(seed=5)
    qpos, qvel = env.unwrapped.data.qpos.copy(), env.unwrapped.data.qvel.copy()
    rows = []
    for _ in range(steps):
        action = rng.uniform(-1, 1, 8)
        following, reward, *_ = env.step(action)
        rows.append((observation, action, reward, following))
        observation = following
    observations, actions, rewards, next_observations = (np.array(column) for column in zip(*rows, strict=True))
    end = np.arange(steps) == steps - 1
    about = {"task": {"family": "ant-dir", "goal": [angle], "split": "train", "index": 0}}
    return LearningHistory(observations, actions, rewards, next_observations, ~end & False, end, about), qpos, qvel


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_the_simulator_agrees_with_an_image(turns, mirrored):
    """From the image of the first state, the image's actions lead through its observations and rewards."""
    history, *_ = recorded(0.7)
    seen = image(history, turns, mirrored)
    env = ANT.make(Task(**seen.metadata["task"]))
    env.reset(seed=5)
    first = seen.observations[0]
    env.unwrapped.set_state(np.concatenate(([0, 0], first[:13])), first[13:])  # where it stands changes nothing
    for step, action in enumerate(seen.actions):
        observation, reward, *_ = env.step(action)
        # A rounding error grows as the ant tumbles: from 1e-15 by about a factor of ten every five steps of contact.
        np.testing.assert_allclose(observation, seen.next_observations[step], atol=1e-9)
        # The reward is of the change of position over a step of 0.05 s, and the goal's two numbers have 32 bits.
        assert reward == pytest.approx(seen.rewards[step], abs=1e-5)


def test_the_symmetries_are_a_group():
    """Four quarters, or two mirrors, bring everything back; a quarter undone by three is the history itself."""
    history, *_ = recorded(0.7, steps=3)
    for back in (image(image(history, 1), 3), image(image(history, 0, True), 0, True), image(history, 0)):
        for name in ("observations", "actions", "next_observations"):
            np.testing.assert_array_equal(getattr(back, name), getattr(history, name))
        assert back.metadata["task"]["goal"][0] == pytest.approx(0.7)
    assert image(image(history, 1), 2).metadata["image"] == [[1, False], [2, False]]


def test_images_keep_to_the_range_of_the_training_tasks():
    """Directions of the held-out arc, which `ood_tasks` use, are left out; the history itself comes first."""
    history, *_ = recorded(0.7, steps=3)
    angles = [one.metadata["task"]["goal"][0] for one in images(history)]
    turned = [0.7, 0.7 + math.pi / 2, 0.7 + math.pi, 0.7 + 1.5 * math.pi]
    mirrored = [2 * math.pi - 0.7, math.pi / 2 - 0.7, math.pi - 0.7, 1.5 * math.pi - 0.7]
    assert angles == pytest.approx([a for a in turned + mirrored if a < 1.75 * math.pi])
    assert len(angles) == 7  # 2π - 0.7 is in the arc


def test_no_image_of_a_training_task_is_a_test_task():
    """Neither of this split nor of MACAW's: they lie apart, if only as little as the split's own tasks do."""
    held_out = [t.goal[0] for kind in (ANT, adbook.family("ant-dir", "macaw")) for t in kind.test_tasks]
    own = np.array([task.goal[0] for task in ANT.train_tasks])
    turned = np.concatenate([sign * own + k * math.pi / 2 for sign in (1, -1) for k in range(4)])
    apart = np.abs((turned[:, None] - held_out + math.pi) % (2 * math.pi) - math.pi)
    assert apart.min() > 1e-5


def test_only_the_ant_is_turned():
    """Another family's history is refused, and so is a profile that asks for it."""
    history, *_ = recorded(0.7, steps=3)
    for wrong in (4, 1.0):
        with pytest.raises(ValueError, match=f"turns={wrong} must be a whole number from 0 to 3"):
            image(history, wrong)
    with pytest.raises(ValueError, match="mirrored=2 must be True or False"):
        image(history, 1, 2)
    other = replace(history, metadata=history.metadata | {"task": {"family": "reacher-goal", "goal": [0.1, 0.1]}})
    with pytest.raises(ValueError, match="only histories of ant-dir have images"):
        image(other, 1)
    with pytest.raises(ValueError, match="is for ant-dir; reacher-goal has"):
        adbook.profile(images=True)
