"""The player: what it stores, and its page driven by keyboard and mouse in headless Chromium."""

import base64
import json
import math
from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np
import pytest

import adbook
from adbook.player import Player
from adbook.rollout import RandomPolicy, rollout

EPISODES, STEPS = 3, 50
FILES = Path(adbook.__file__).parent
SOURCES = {suffix: (FILES / f"player{suffix}").read_text() for suffix in (".js", ".css")}
PAGE = """<!doctype html><html data-theme="light"><meta charset="utf-8"><style>{css}</style>
<body><div id="here" style="width:{width}px"></div><script type="module">
const state = {state}, listeners = {{}};
for (const name of ["angles", "rewards"])
  state[name] = new DataView(Uint8Array.from(atob(state[name]), (c) => c.charCodeAt(0)).buffer);
const model = {{
  get: (name) => state[name],
  set: (name, value) => {{
    if (state[name] === value) return;
    state[name] = value;
    (listeners["change:" + name] || []).forEach((f) => f());
  }},
  on: (event, f) => (listeners[event] ||= []).push(f),
  off: (event, f) => (listeners[event] = listeners[event].filter((g) => g !== f)),
  save_changes: () => {{}},
}};
const player = await import(URL.createObjectURL(new Blob([{esm}], {{ type: "text/javascript" }})));
const remove = player.default.render({{ model, el: document.getElementById("here") }});
window.test = {{ model, remove, listeners, data: player.decode(model) }};
</script>"""


@pytest.fixture(scope="module")
def family():
    return adbook.family("reacher-goal")


@pytest.fixture(scope="module")
def recorded(family):
    return rollout(RandomPolicy(2), family, family.test_tasks[:2], episodes=EPISODES, seed=1)


@pytest.fixture
def open_page(browser, recorded):
    """Opens the player of the recorded rollout; in the end no page may have failed or asked for a file."""
    pages, troubles = [], []

    def opened(width=740, **context):
        page = browser.new_page(**context)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: troubles.append(request.url))
        page.set_content(_page(Player(recorded, references={"random": [-12.0, -9.0]}), width))
        page.wait_for_function("window.test")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert [t for t in troubles if not t.startswith("blob:")] == []


def _page(player, width):
    state = {name: getattr(player, name) for name in player.keys if not name.startswith("_")}
    state = {n: base64.b64encode(v).decode() if isinstance(v, bytes) else v for n, v in state.items()}
    state = {n: v for n, v in state.items() if isinstance(v, str | int | float | list)}
    return PAGE.format(css=SOURCES[".css"], esm=json.dumps(SOURCES[".js"]), state=json.dumps(state), width=width)


def _slider(page, name):
    return page.get_by_role("slider", name=name, exact=True)


def _outputs(page):
    return page.locator("output").all_inner_texts()  # return, reward, distance, episode, step


def _text(value, digits):
    return f"{value:.{digits}f}".replace("-", "−")


# ----------------------------------------------------------------------------------------------------------
# the page


def test_fingertip_in_the_page_is_mujocos(open_page, recorded, family):
    page = open_page()
    drawn = page.evaluate(
        "[0, 1].map((i) => [...Array(3).keys()].map((k) =>"
        " [...Array(51).keys()].map((t) => test.data.pose(i, k, t).tip)))"
    )
    env = family.make(recorded.tasks[0]).unwrapped
    true = np.array([_fingertip(env, q) for q in recorded.qpos.reshape(-1, 4)]).reshape(2, EPISODES, 51, 2)
    env.close()
    # Each angle is off by at most half a unit, π/65536; q0 moves both links (0.21 m), q1 the second (0.11 m).
    # The arm winds up: angles beyond a turn have to come out right as well.
    assert np.abs(recorded.qpos[..., 0]).max() > 2 * math.pi
    np.testing.assert_allclose(drawn, true, rtol=0, atol=0.32 * math.pi / 65536 + 1e-12)


def _fingertip(env, q):
    env.data.qpos[:] = q
    mujoco.mj_kinematics(env.model, env.data)
    return env.data.body("fingertip").xpos[:2].copy()


def test_rewards_and_returns_in_the_page_are_the_rollouts(open_page, recorded):
    page = open_page()
    drawn = page.evaluate("[0, 1].map((i) => test.data.rewardsOf(i))")
    unit = np.abs(recorded.rewards).max() / 32767
    np.testing.assert_allclose(drawn, recorded.rewards.reshape(2, -1), rtol=0, atol=0.51 * unit)  # half a unit
    np.testing.assert_allclose(page.evaluate("test.data.returns(1)"), recorded.returns[1], rtol=0, atol=5.1e-5)


def test_keys_on_the_sliders_move_episode_and_step(open_page, recorded, family):
    page = open_page()
    assert _outputs(page)[3:] == ["1 of 3", "50 of 50"]
    _slider(page, "Episode").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    total, reward, distance, episode, step = _outputs(page)
    assert (episode, step) == ("2 of 3", "49 of 50")
    assert _slider(page, "Step").get_attribute("aria-valuetext") == "49 of 50"
    assert total == _text(recorded.returns[0, 1], 2)
    assert reward == _text(recorded.rewards[0, 1, 48], 3)
    env = family.make(recorded.tasks[0]).unwrapped
    true = 100 * np.linalg.norm(_fingertip(env, recorded.qpos[0, 1, 49]) - recorded.tasks[0].goal)
    env.close()
    # shown to 0.1 cm, of positions to 0.0016 cm
    assert float(distance.removesuffix(" cm")) == pytest.approx(true, abs=0.05 + 0.0016)
    page.keyboard.press("Home")
    assert _outputs(page)[1] == "–"  # no step has been made yet
    assert _outputs(page)[4] == "0 of 50"


def test_task_picker_shows_the_other_task(open_page, recorded):
    page = open_page()
    page.get_by_role("combobox", name="Task").select_option(index=1)
    assert _outputs(page)[0] == _text(recorded.returns[1, 0], 2)


def test_click_on_the_curve_goes_to_the_episode_and_on_the_rewards_to_the_step(open_page):
    page = open_page()
    curve, rewards = page.locator("canvas.adp-chart").all()
    box = curve.bounding_box()
    curve.click(position={"x": box["width"] - 13, "y": 60})
    rewards.click(position={"x": 44, "y": 60})
    assert _outputs(page)[3:] == ["3 of 3", "1 of 50"]


def test_play_runs_through_the_episodes_and_stops_and_a_slider_pauses_it(open_page):
    page = open_page()
    page.get_by_label("Speed").select_option("5")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").wait_for()
    _slider(page, "Step").press("ArrowLeft")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Play").wait_for()  # its label again once the last episode is over
    assert _outputs(page)[3:] == ["3 of 3", "50 of 50"]


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_play_moves_the_arm_only_where_motion_is_welcome(open_page, motion):
    page = open_page(reduced_motion=motion)
    page.evaluate("test.steps = []; test.model.on('change:step', () => test.steps.push(test.model.get('step')))")
    page.get_by_label("Speed").select_option("5")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("test.model.get('episode') === 2")
    between = [step for step in page.evaluate("test.steps") if 0 < step < STEPS]
    assert bool(between) == (motion == "no-preference")


def test_every_control_and_picture_has_a_name_that_follows_the_state(open_page, recorded):
    page = open_page()
    for role, names in {
        "slider": ["Episode", "Step"],
        "combobox": ["Task", "Speed"],
        "button": ["Play"],
        "group": ["Rollout player"],
    }.items():
        for name in names:
            assert page.get_by_role(role, name=name, exact=True).count() == 1
    _slider(page, "Episode").press("End")
    arm, curve, rewards = (c.get_attribute("aria-label") for c in page.get_by_role("img").all())
    assert arm.startswith("Two-link arm in episode 3, step 50: the fingertip is")
    assert f"{_text(recorded.returns[0, 0], 2)} in episode 1" in curve
    assert rewards.startswith("Reward by step in episode 3")


def test_pictures_follow_the_step_the_size_and_the_theme(open_page):
    page = open_page()
    for act, changed in (
        (lambda: _slider(page, "Step").press("PageDown"), [True, False, True]),  # the returns stay
        (lambda: page.evaluate("document.documentElement.dataset.theme = 'dark'"), [True] * 3),
        (lambda: page.evaluate("document.getElementById('here').style.width = '600px'"), [True] * 3),
    ):
        before = _pictures(page)
        act()
        page.wait_for_function("(old) => document.querySelector('canvas').toDataURL() !== old", arg=before[0])
        assert [a != b for a, b in zip(before, _pictures(page), strict=True)] == changed


def _pictures(page):
    return page.evaluate("[...document.querySelectorAll('canvas')].map((c) => c.toDataURL())")


@pytest.mark.parametrize("width", [740, 320])
def test_nothing_is_wider_than_the_column(open_page, width):
    page = open_page(width=width)
    wide = page.evaluate(
        "[...document.querySelectorAll('.adbook-player *')].filter((e) => e.getBoundingClientRect().right >"
        f" document.getElementById('here').getBoundingClientRect().x + {width} + 0.5).map((e) => e.className)"
    )
    assert wide == []


def test_removing_the_view_takes_its_listeners_along(open_page):
    page = open_page()
    assert page.evaluate("(test.remove(), Object.values(test.listeners).flat().length)") == 0


# ------------------------------------------------------------------------------------------------------------
# Python


def test_angles_beyond_a_turn_are_stored_to_the_same_precision(recorded):
    qpos = recorded.qpos.copy()
    qpos[..., 0] = np.linspace(-40, 40, qpos[..., 0].size).reshape(qpos.shape[:-1])
    stored = np.frombuffer(Player(replace(recorded, qpos=qpos)).angles, "<i2").reshape(*qpos.shape[:-1], 2)
    error = np.angle(np.exp(1j * (stored * math.pi / 32768 - qpos[..., :2].astype(float))))
    assert np.abs(error).max() <= math.pi / 65536 + 1e-12  # half a unit; the sum of 64-bit numbers near 40 rounds


def test_state_is_small(recorded):
    player = Player(recorded)
    steps = recorded.rewards.size
    assert len(player.angles) + len(player.rewards) == 4 * steps * 51 // 50 + 2 * steps


def test_a_rollout_without_any_reward_can_be_shown(recorded):
    assert Player(replace(recorded, rewards=np.zeros_like(recorded.rewards))).reward_unit == 1


def test_another_family_is_refused_by_name(recorded):
    with pytest.raises(ValueError, match=r"'ant-dir' yet; it draws 'reacher-goal'"):
        Player(replace(recorded, family="ant-dir"))


@pytest.mark.parametrize(("name", "value"), [("task", 2), ("episode", -1), ("step", 51)])
def test_a_position_out_of_range_is_refused(recorded, name, value):
    player = Player(recorded)
    with pytest.raises(ValueError, match=f"{name} is {value}; it must lie between 0 and"):
        setattr(player, name, value)


def test_a_reference_needs_one_return_a_task(recorded):
    with pytest.raises(ValueError, match=r"references\['source'\] has shape \(3,\); it must be \(2,\)"):
        Player(recorded, references={"source": [-1, -2, -3]})
