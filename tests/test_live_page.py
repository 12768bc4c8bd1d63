"""The live player's page in headless Chromium; what a kernel would send is set by hand."""

import base64

import numpy as np
import pytest
from player_cases import pictures, place, policy, said

import adbook
from adbook.live import LivePlayer
from adbook.mamba import MambaConfig
from adbook.rollout import RandomPolicy

GOALS = {"reacher-goal": (0.1, 0.05), "pusher-goal": (0.05, 0.05), "half-cheetah-vel": 1.0, "ant-dir": 1.0}
STATE = "shape returns lengths frames low unit insight seen stride goals current_steps current"


def live_player(name="reacher-goal", **options):
    family = adbook.family(name)
    return LivePlayer(RandomPolicy(family.action_size), family, goal=GOALS[name], **{"pace": 0} | options)


def answer(page):
    """As if a kernel had answered the page's question."""
    page.evaluate("test.listeners['msg:custom'].forEach((hear) => hear({ kernel: true }))")
    place(page)


def held(player, **more):
    """What the kernel's player holds, for a page."""
    state = {name: getattr(player, name) for name in (*STATE.split(), "episode", "step", "planned", "goal")}
    encoded = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in state.items()} | more
    return [encoded, [name for name, value in state.items() if isinstance(value, bytes)]]


def send(page, *messages):
    """Set in the page what `held` gave, one after the other, each when the one before begins to be read."""
    page.evaluate(
        """async (messages) => {
          for (const [state, packed] of messages) {
            for (let turn = 0; turn < 3; turn++) await null; // less than any reading takes
            for (const name of packed) {
              state[name] = new DataView(Uint8Array.from(atob(state[name]), (c) => c.charCodeAt(0)).buffer);
            }
            // as one message has it
            const order = Object.keys(state).sort((a, b) => (a === "frames") - (b === "frames"));
            for (const name of order) test.model.set(name, state[name]);
          }
        }""",
        messages,
    )


def number(page, name):
    return float(page.get_by_label(f"Goal: {name}").input_value())


def test_without_a_kernel_it_is_a_recording(open_page):
    player = live_player()
    player.run(2, wait=True)
    player.goal = (-0.1, 0.1)
    player.run(1, wait=True)
    page = open_page(player)
    assert said(page).startswith("Episode 3 of 3, step 50 of 50. ")
    assert page.get_by_role("button", name="Run").count() == 0
    assert page.get_by_label("Goal: x").is_disabled()
    assert number(page, "x") == -0.1
    page.locator(".adp-map").click(position={"x": 60, "y": 60})
    assert page.evaluate("test.model.get('goal')") == [-0.1, 0.1]
    before = pictures(page, ".adp-robot")
    page.keyboard.press("Home")
    assert place(page)[1:] == (0, 0)
    assert number(page, "x") == 0.1  # the goal of the episode that is shown
    assert pictures(page, ".adp-robot") != before


def test_the_goal_is_dragged_on_the_map_and_typed(open_page):
    page = open_page(live_player())
    answer(page)
    box = page.locator(".adp-map").bounding_box()
    x, y, size = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, min(box["width"], box["height"]) / 2 - 10
    page.mouse.move(x + 0.4 * size, y - 0.2 * size)  # where the goal is: the map's edge is 0.25 m off
    page.mouse.down()
    page.mouse.move(x - 0.8 * size, y, steps=4)
    assert page.evaluate("test.model.get('goal')") == [pytest.approx(-0.2, abs=3e-3), pytest.approx(0, abs=3e-3)]
    page.evaluate("test.saved = 0; test.model.save_changes = () => { test.saved += 1; }; null")
    page.mouse.move(x - 5 * size, y, steps=2)  # beyond the edge
    place(page)
    assert page.evaluate("test.saved") == 0  # or every episode that begins in the meantime would have another goal
    page.mouse.up()
    place(page)
    assert page.evaluate("test.saved") == 1
    assert page.evaluate("Math.hypot(...test.model.get('goal'))") == pytest.approx(0.25, abs=1e-3)
    assert page.evaluate("Math.hypot(...test.model.get('goal'))") <= 0.25
    page.get_by_label("Goal: x").fill("0.02")
    page.get_by_label("Goal: y").fill("0.15")
    page.keyboard.press("Enter")
    place(page)
    assert page.evaluate("test.model.get('goal')") == [0.02, 0.15]
    page.get_by_label("Goal: y").fill("")
    page.keyboard.press("Enter")
    assert page.evaluate("test.model.get('goal')") == [0.02, 0.15]
    assert page.get_by_label("Goal: y").input_value() == "0.15"
    page.get_by_label("Goal: x").press("ArrowUp")  # a key of the field, not of the player
    assert page.evaluate("test.model.get('goal')") == [0.03, 0.15]


def test_the_goal_is_dragged_in_the_picture_and_elsewhere_the_camera_turns(open_page):
    page = open_page(live_player())
    answer(page)
    box = page.locator(".adp-robot").bounding_box()
    found = _find_goal(page)
    page.mouse.move(box["x"] + found[0], box["y"] + found[1])
    page.mouse.down()
    page.mouse.move(box["x"] + found[0] - 60, box["y"] + found[1], steps=3)
    page.mouse.up()
    place(page)
    moved = page.evaluate("test.model.get('goal')")
    assert moved[0] < 0.1 - 0.02
    assert moved[1] == pytest.approx(0.05, abs=0.01)  # seen from the front: to the left is −x
    page.evaluate("test.model.set('goals', [test.model.get('goal')])")  # no ghost is left beside the old goal
    again = _find_goal(page)
    assert again == pytest.approx([found[0] - 60, found[1]], abs=4)  # it is where the pointer let it go
    before = pictures(page, ".adp-robot")
    page.mouse.move(box["x"] + 20, box["y"] + box["height"] - 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 80, box["y"] + box["height"] - 20, steps=3)
    page.mouse.up()
    assert page.evaluate("test.model.get('goal')") == moved
    assert pictures(page, ".adp-robot") != before


def _find_goal(page):
    """The middle of what is painted in the goal's colour in the first robot's picture, in CSS pixels."""
    place(page)
    return page.evaluate(
        """() => {
          const canvas = document.querySelector(".adp-robot");
          const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
          const g = copy.getContext("2d", { willReadFrequently: true });
          g.drawImage(canvas, 0, 0);
          const { data, width } = g.getImageData(0, 0, copy.width, copy.height);
          const [xs, ys] = [[], []];
          for (let i = 0; i < data.length; i += 4) {
            const [r, g, b, a] = data.slice(i, i + 4);
            if (a > 200 && Math.abs(r - 194) < 6 && Math.abs(g - 65) < 6 && Math.abs(b - 12) < 6) {
              xs.push((i / 4) % width);
              ys.push(Math.floor(i / 4 / width));
            }
          }
          const middle = (v) => (Math.min(...v) + Math.max(...v)) / 2;
          const scale = canvas.clientWidth / width;
          return [middle(xs) * scale, middle(ys) * scale];
        }"""
    )


def test_running_streams_and_follows_until_the_reader_scrubs(open_page):
    mamba = policy(MambaConfig(d_model=8, n_layers=1))
    kernel = LivePlayer(mamba, adbook.family("reacher-goal"), goal=(0.1, 0.05), pace=0)
    page = open_page(kernel)
    answer(page)
    assert said(page).startswith("Episode 1 of 20, step 0 of 50")
    page.get_by_label("Episodes to run").fill("3")
    page.get_by_role("button", name="Run").click()
    assert page.evaluate("['running', 'episodes', 'follow'].map((name) => test.model.get(name))") == [True, 3, True]
    kernel.run(1, wait=True)
    send(page, held(kernel, planned=3))
    page.get_by_role("status").filter(has_text="Episode 1 of 3, step 50").wait_for()
    steps = iter(range(3))
    kernel.observe(lambda change: kernel._stop.set() if next(steps, None) is None else None, "current_steps")
    kernel.pace = 1
    kernel.run(1)
    kernel.wait()
    t = kernel.current_steps[0]
    assert 0 < t < 50
    send(page, held(kernel, planned=3))
    page.get_by_role("status").filter(has_text=f"Episode 2 of 3, step {t} ").wait_for()
    assert page.get_by_role("button", name="Stop").count() == 1
    assert (
        page.locator(".adp-sees").inner_text().replace("\n\n", "\n").startswith("Agent\nmamba\nSteps in its memory\n")
    )
    page.keyboard.press("Home")
    assert place(page)[1:] == (0, 0)
    assert page.evaluate("test.model.get('follow')") is False
    page.get_by_role("button", name="Back to live").click()
    assert page.evaluate("test.model.get('follow')") is True
    page.evaluate("test.model.set('running', false)")
    place(page)
    assert page.get_by_role("button", name="Back to live").count() == 0
    kernel.close()


@pytest.mark.parametrize(("name", "field", "typed", "goal"), [
    ("pusher-goal", "x", "0.1", [0.1, 0.05]),
    ("half-cheetah-vel", "velocity", "2.5", [2.5]),
    ("ant-dir", "direction", "450", [float(np.round(np.pi / 2, 4))]),  # once around
])  # fmt: skip
def test_every_familys_goal_can_be_typed_and_put_on_the_map(open_page, name, field, typed, goal):
    page = open_page(live_player(name))
    answer(page)
    before = pictures(page, ".adp-robot")
    page.get_by_label(f"Goal: {field}").fill(typed)
    page.keyboard.press("Enter")
    assert pictures(page, ".adp-robot") != before  # the goal to come is drawn
    assert page.evaluate("test.model.get('goal')") == goal
    page.locator(".adp-map").click(position={"x": 40, "y": 80})
    place(page)
    assert page.evaluate("test.model.get('goal')") != goal


def test_what_breaks_a_run_off_is_told_in_the_page(open_page):
    page = open_page(live_player())
    answer(page)
    page.evaluate("test.model.set('trouble', 'The run broke off: no reason')")
    page.get_by_role("alert").filter(has_text="no reason").wait_for()


def test_a_recording_that_arrives_while_another_is_read_is_taken_up(open_page):
    kernel = LivePlayer(
        policy(MambaConfig(d_model=8, n_layers=1)), adbook.family("reacher-goal"), goal=(0.1, 0.05), pace=0
    )
    page = open_page(kernel)
    answer(page)
    messages = []
    for _ in range(2):
        kernel.run(1, wait=True)
        messages.append(held(kernel))
    send(page, *messages)
    page.get_by_role("status").filter(has_text="Episode 2 of 2, step 50").wait_for()
