"""The player's page, driven by keyboard and mouse in headless Chromium, for every family."""

import re
import zlib
from dataclasses import replace

import mujoco
import numpy as np
import pytest
from player_cases import EPISODES, STEPS, pictures, place, policy, recorded, said

import adbook
from adbook.insight import Watched
from adbook.mamba import MambaConfig
from adbook.player import RolloutPlayer
from adbook.rollout import rollout

# ----------------------------------------------------------------------------------------------------------
# what is drawn


@pytest.mark.parametrize("name", sorted(adbook.FAMILIES))
def test_the_robot_in_the_page_stands_as_in_mujoco(open_page, name):
    rollout = recorded(name, tasks=1, episodes=2)
    player = RolloutPlayer(rollout)
    page = open_page(player)
    at = [0, 1, int(rollout.lengths[0].min())]
    drawn = page.evaluate(
        """(at) => at.flatMap((t) => [0, 1].map((k) => {
          const placed = test.kinematics(test.data.scene, test.data.qpos(0, 0, k, t));
          return placed.map(({ p, R }) => [...p, ...R]);
        }))""",
        at,
    )
    env = adbook.family(name).make(rollout.tasks[0]).unwrapped
    true = np.array([_bodies(env, rollout.qpos[0, k, t]) for t in at for k in (0, 1)])
    env.close()
    moving = [i for i, body in enumerate(player.scene["bodies"]) if _is_drawn(player.scene, i)]
    # Each coordinate is off by at most half a unit; an angle moves what hangs on it by that times at most 1.5 m.
    allowed = 1.5 * sum(unit / 2 for unit in player.unit) + 1e-5  # and the numbers of the scene have six digits
    assert len(moving) >= 2
    np.testing.assert_allclose(np.array(drawn)[:, moving], true[:, moving], rtol=0, atol=allowed)


def _bodies(env, qpos):
    env.data.qpos[:] = qpos
    mujoco.mj_kinematics(env.model, env.data)
    return [[*env.data.xpos[i], *env.data.xmat[i]] for i in range(1, env.model.nbody)]


def _is_drawn(scene, body):
    return any(shape["body"] == body for shape in scene["shapes"])


@pytest.mark.parametrize("name", sorted(adbook.FAMILIES))
def test_every_family_is_drawn_and_moves(open_page, name):
    page = open_page(RolloutPlayer(recorded(name, tasks=1, episodes=2)))
    page.evaluate("test.model.set('step', 0)")
    before = pictures(page, ".adp-robot")[0]
    page.evaluate("test.model.set('step', 8)")
    assert pictures(page, ".adp-robot")[0] != before
    assert len(before) > 8000  # an empty canvas of this size is a few hundred characters


def test_between_kept_frames_the_page_interpolates(open_page, monkeypatch):
    monkeypatch.setattr("adbook.recording._STRIDES", (4,))
    rollout = recorded()
    player = RolloutPlayer(rollout)
    page = open_page(player)
    drawn = np.array(page.evaluate("[4, 6, 50].map((t) => Array.from(test.data.qpos(0, 1, 2, t)))"))
    kept = rollout.qpos[1, 2].astype(float)
    expected = [kept[4], (kept[4] + kept[8]) / 2, kept[50]]  # 4 does not divide 50: the last frame is kept as well
    np.testing.assert_allclose(drawn[:2, :2], np.array(expected)[:2, :2], rtol=0, atol=max(player.unit))
    np.testing.assert_allclose(drawn[2, :2], expected[2][:2], rtol=0, atol=max(player.unit))


def test_after_an_early_end_the_robot_stays_where_it_was(open_page):
    rollout = recorded("ant-dir", tasks=1, episodes=2)
    rewards, actions, qpos = (x.copy() for x in (rollout.rewards, rollout.actions, rollout.qpos))
    rewards[0, 1, 30:], actions[0, 1, 30:], qpos[0, 1, 31:] = np.nan, np.nan, np.nan
    page = open_page(RolloutPlayer(replace(rollout, rewards=rewards, actions=actions, qpos=qpos)))
    same = page.evaluate("[30, 31, 200].map((t) => JSON.stringify(Array.from(test.data.qpos(0, 0, 1, t))))")
    assert len(set(same)) == 1
    page.evaluate("test.model.set('episode', 1)")
    assert "ended at step 30" in said(page)


# ----------------------------------------------------------------------------------------------------------
# how it is used


def test_keys_move_step_episode_and_task(open_page):
    page = open_page()
    page.get_by_role("group", name="Rollout player").focus()
    assert place(page) == (0, 0, 50)
    for key, expected in [
        ("ArrowLeft", (0, 0, 49)),
        ("PageDown", (0, 1, 0)),
        ("ArrowRight", (0, 1, 1)),
        ("PageUp", (0, 1, 0)),
        ("PageUp", (0, 0, 0)),
        ("ArrowDown", (1, 0, 0)),
        ("End", (1, 2, 50)),
        ("ArrowUp", (0, 2, 50)),
        ("Home", (0, 0, 0)),
        ("ArrowLeft", (0, 0, 0)),
    ]:
        page.keyboard.press(key)
        assert place(page) == expected, key
    assert page.get_by_role("slider").get_attribute("aria-valuetext") == "Episode 1 of 3, step 0 of 50"
    page.keyboard.press("+")
    assert page.get_by_label("Speed").input_value() == "2"


def test_click_and_drag_on_the_time_line_go_there(open_page):
    page = open_page()
    box = page.locator(".adp-timeline").bounding_box()
    inside = box["width"] - 108  # its margins are 46 pixels wide and, where the reference is named, 62

    def at(position):
        return box["x"] + 46 + position / EPISODES * inside, box["y"] + 70

    page.mouse.click(*at(1.5))
    assert place(page)[1:] == (1, pytest.approx(25, abs=1))
    before = pictures(page, ".adp-robot")
    page.mouse.move(*at(1.5))
    page.mouse.down()
    page.mouse.move(*at(2.2), steps=4)
    assert place(page)[1:] == (2, pytest.approx(10, abs=1))
    assert pictures(page, ".adp-robot") != before
    page.mouse.up()
    page.mouse.move(*at(0.1))
    assert place(page)[1] == 2  # the button is up


def test_the_map_and_the_menu_choose_a_task(open_page):
    page = open_page()
    goal = np.array(recorded().tasks[1].goal)
    box = page.locator(".adp-map").bounding_box()
    size = min(box["width"], box["height"]) / 2 - 10
    all_goals = np.array(
        [task.goal for task in adbook.family("reacher-goal").train_tasks] + [t.goal for t in recorded().tasks]
    )
    middle = (all_goals.min(0) + all_goals.max(0)) / 2
    dx, dy = (goal - middle) / np.linalg.norm(all_goals - middle, axis=1).max() * size
    page.locator(".adp-map").click(position={"x": box["width"] / 2 + dx, "y": box["height"] / 2 - dy})
    assert place(page)[0] == 1
    page.get_by_role("combobox", name="Task").select_option(index=0)
    assert place(page)[0] == 0


def test_dragging_a_robot_turns_the_camera_and_a_double_click_undoes_it(open_page):
    page = open_page()
    before = pictures(page, ".adp-robot")
    box = page.locator(".adp-robot").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y - 20, steps=3)
    page.mouse.up()
    assert pictures(page, ".adp-robot") != before
    page.mouse.dblclick(x, y)
    assert pictures(page, ".adp-robot") == before


def test_play_runs_through_the_episodes_and_stops_and_a_key_pauses_it(open_page):
    page = open_page()
    page.get_by_label("Speed").select_option("8")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").wait_for()
    page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Play").wait_for()  # its label again once the last episode is over
    assert place(page) == (0, 2, 50)


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_play_moves_the_robot_only_where_motion_is_welcome(open_page, motion):
    page = open_page(reduced_motion=motion)
    page.evaluate("test.steps = []; test.model.on('change:step', () => test.steps.push(test.model.get('step')))")
    page.get_by_label("Speed").select_option("8")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("test.model.get('episode') === 2")
    between = [step for step in page.evaluate("test.steps") if 0 < step < STEPS]
    assert bool(between) == (motion == "no-preference")


def test_what_it_says_follows_the_state(open_page):
    page = open_page()
    page.evaluate("test.model.set('episode', 2)")
    assert said(page).startswith("Episode 3 of 3, step 50 of 50. ")
    x, y = (f"{v:.2f}".replace("-", "−") for v in recorded().tasks[0].goal)
    assert said(page).endswith(f"cm from the goal. Task: test 1: {x}, {y} m.")
    robot = page.get_by_role("img").filter(has_not_text="Map").all()
    assert any((c.get_attribute("aria-label") or "").startswith("mamba in episode 3, step 50: ") for c in robot)
    for role, names in {
        "slider": ["Time line"],
        "combobox": ["Task", "Speed"],
        "button": ["Previous episode", "Step back", "Play", "Step forward", "Next episode"],
        "group": ["Rollout player"],
    }.items():
        for name in names:
            assert page.get_by_role(role, name=name, exact=True).count() == 1, name


def test_pictures_follow_the_theme_and_the_size(open_page):
    page = open_page()
    for act in (
        "document.documentElement.dataset.theme = 'dark'",
        "document.getElementById('widget').style.width = '500px'",
    ):
        before = pictures(page)
        page.evaluate(act)
        page.wait_for_function("(old) => document.querySelector('.adp-timeline').toDataURL() !== old", arg=before[-1])
        assert all(a != b for a, b in zip(before, pictures(page), strict=True))


@pytest.mark.parametrize("width", [800, 320])
@pytest.mark.parametrize("agents", [1, 4])
def test_nothing_is_wider_than_the_column(open_page, width, agents):
    names = ["mamba", "transformer", "source", "random"][:agents]
    page = open_page(RolloutPlayer(dict.fromkeys(names, recorded())), width=width)
    wide = page.evaluate(
        "[...document.querySelectorAll('.adbook-player *')].filter((e) => e.getBoundingClientRect().right >"
        f" document.getElementById('widget').getBoundingClientRect().x + {width} + 0.5).map((e) => e.className)"
    )
    assert wide == []


def test_scrubbing_keeps_up_with_the_screen(open_page):
    page = open_page(RolloutPlayer({"mamba": recorded(), "random": recorded(seed=2)}))
    drawn = page.evaluate(
        """async () => {
          const robot = document.querySelector(".adp-robot");
          const pictures = new Set();
          for (let i = 0; i < 20; i++) {
            test.model.set("step", i);
            await new Promise(requestAnimationFrame);
            await new Promise(requestAnimationFrame);
            pictures.add(robot.toDataURL());
          }
          return pictures.size;
        }"""
    )
    assert drawn == 20  # a picture for every step, in the frame after it was asked for


def test_removing_the_view_takes_its_listeners_along(open_page):
    page = open_page()
    assert page.evaluate("(test.remove(), Object.values(test.listeners).flat().length)") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"frames": p.frames[:40]}, "frames cannot be read"),
        (lambda p: {"frames": b"no zlib"}, "frames cannot be read"),
        (lambda p: {"frames": zlib.compress(b"short")}, r"there are 5 bytes of it instead of \d+"),
        (lambda p: {"shape": [1, 2, 0, 50]}, "The recording holds no episode"),
    ],
)
def test_a_damaged_recording_says_so_in_the_page(open_page, change, message):
    player = RolloutPlayer(recorded())
    for name, value in change(player).items():
        setattr(player, name, value)
    page = open_page(player)
    assert re.search(message, page.get_by_role("alert").inner_text())


# ----------------------------------------------------------------------------------------------------------
# several agents, and what the network sees


def test_insight_is_what_the_policy_would_do(open_page):
    family = adbook.family("reacher-goal")
    plain = policy(MambaConfig(d_model=16, n_layers=1))
    watched = Watched(plain)
    seen = rollout(watched, family, family.test_tasks[:2], episodes=2, seed=3)
    assert np.array_equal(seen.actions, rollout(plain, family, family.test_tasks[:2], episodes=2, seed=3).actions)
    insight = watched.insight(seen)
    assert set(insight) == {"mean 1", "std 1", "action 1", "mean 2", "std 2", "action 2", "change"}
    assert all(values.shape == (2, 2, 50) and np.isfinite(values).all() for values in insight.values())
    off = (insight["action 1"] - insight["mean 1"]) / insight["std 1"]
    free = np.abs(insight["action 1"]) < 1  # the others were clipped
    assert 0.7 < off[free].std() < 1.1  # 200 standard normal draws, less those clipped
    page = open_page(RolloutPlayer({"mamba": seen, "random": recorded(episodes=2)}, insight={"mamba": insight}))
    drawn = page.evaluate("test.data.seen(0, 1, 1, 20)")
    for name, values in (insight | {"reward": seen.rewards}).items():
        levels = 1000 if name == "reward" else 64
        assert drawn[name] == pytest.approx(values[1, 1, 20], abs=0.51 * float(np.abs(values).max()) / levels)
    assert page.evaluate("test.data.seen(1, 1, 1, 20)") is None
    page.evaluate("test.model.set('episode', 1); test.model.set('step', 20)")
    place(page)
    told = page.locator(".adp-sees").inner_text()
    assert "Steps in its memory\n70" in told.replace("\n\n", "\n")
