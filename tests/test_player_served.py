"""The player's page from a plain file server, as readers use it: mouse, keys and touch, light, dark, and on a phone."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import listen
from player_cases import policy, recorded
from playwright.sync_api import expect

import adbook
from adbook.bench_player import WINDOW, serve
from adbook.mamba import MambaConfig

PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
each_family = pytest.mark.parametrize("name", sorted(adbook.FAMILIES))
each_scheme = pytest.mark.parametrize("scheme", ["light", "dark"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of a page for every family with two agents, and of some for the accessibility check."""
    folder = tmp_path_factory.mktemp("site")
    for name in adbook.FAMILIES:
        _player(name).save_html(folder / f"{name}.html")
    for agents in (("mamba",), ("mamba", "transformer", "source", "random")):
        adbook.RolloutPlayer(dict.fromkeys(agents, recorded())).save_html(folder / f"{len(agents)}.html")
    damaged = adbook.RolloutPlayer(recorded())
    damaged.frames = damaged.frames[:40]
    damaged.save_html(folder / "damaged.html")
    with serve(folder) as base:
        yield base


def _player(name):
    rollouts = {"mamba": recorded(name, episodes=2), "random": recorded(name, episodes=2, seed=2)}
    if name != "reacher-goal":
        return adbook.RolloutPlayer(rollouts)
    watched, family = adbook.Watched(policy(MambaConfig(d_model=16, n_layers=1))), adbook.family(name)
    rollouts["mamba"] = adbook.rollout(watched, family, family.test_tasks[:2], episodes=2, seed=3)
    insight = {"mamba": watched.insight(rollouts["mamba"])}
    references = {"random": [-12.0, -9.0], "source": [-4.0, -3.0]}
    return adbook.RolloutPlayer(rollouts, references=references, insight=insight)


@pytest.fixture
def visit(browser, site):
    """Opens a page of the site; in the end none may have asked for anything elsewhere or said anything."""
    opened = []

    def open_(name, **context):
        page = browser.new_page(**{"viewport": WINDOW, **context})
        opened.append((page, listen(page, site)))
        page.goto(f"{site}/{name}.html")
        page.locator(".adbook-player").wait_for()
        return page

    yield open_
    for page, _ in opened:
        page.close()
    assert [(heard.foreign, heard.said) for _, heard in opened] == [([], [])] * len(opened)


class _Changes:
    """Tells what has changed in a page since it was last asked."""

    def __init__(self, page):
        self.page = page
        self.last = self._now()

    def __call__(self):
        before, self.last = self.last, self._now()
        return [now != old for now, old in zip(self.last, before, strict=True)]

    def _now(self):
        """Every robot's picture, and the text, once what was asked for is drawn."""
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        pictures = self.page.evaluate("[...document.querySelectorAll('.adp-robot')].map((c) => c.toDataURL())")
        return [*pictures, self.page.get_by_role("status").inner_text()]


ALL = [True, True, True]  # both robots, and the text


def _brightness(page):
    """Of the player's text and of what is behind it, from 0 to 255."""
    return page.evaluate(
        """[[".adbook-player", "color"], ["body", "backgroundColor"]].map(([where, what]) =>
          Math.max(...getComputedStyle(document.querySelector(where))[what].match(/[0-9]+/g).slice(0, 3)))"""
    )


def _at(page, name, episode, step=8):
    """Where a moment of two episodes is on the time line, whose margins are 46 and 10 pixels wide.

    A random ant falls after some tens of steps; from then on its picture stays.
    """
    box = page.get_by_role("slider", name="Time line").bounding_box()
    part = (episode + step / adbook.family(name).horizon) / 2
    return box["x"] + 46 + part * (box["width"] - 56), box["y"] + box["height"] / 2


@each_scheme
@each_family
def test_click_drag_and_keys_change_the_pictures_and_the_text(visit, name, scheme):
    page = visit(name, color_scheme=scheme)
    text, ground = _brightness(page)
    assert (text < 64 < 192 < ground) if scheme == "light" else (ground < 64 < 192 < text)
    changed = _Changes(page)
    page.mouse.click(*_at(page, name, 0))
    assert changed() == ALL
    page.mouse.down()
    assert not any(changed())
    page.mouse.move(*_at(page, name, 1), steps=5)
    assert changed() == ALL
    page.mouse.up()
    for key in ("ArrowLeft", "ArrowDown", "PageDown", "ArrowRight", "Home"):
        page.keyboard.press(key)
        assert changed() == ALL, key
    page.get_by_role("button", name="Next episode").click()
    assert changed() == ALL


@each_family
def test_on_a_phone_a_tap_and_a_swipe_move_it_and_it_fits(visit, name):
    page = visit(name, **PHONE)
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    page.get_by_role("slider", name="Time line").scroll_into_view_if_needed()
    changed = _Changes(page)
    page.touchscreen.tap(*_at(page, name, 0))
    assert changed() == ALL
    _swipe(page, _at(page, name, 0), _at(page, name, 1))
    assert changed() == ALL
    expect(page.get_by_role("status")).to_contain_text("Episode 2 of 2")


def _swipe(page, start, end):
    """A finger's way over the screen."""
    session = page.context.new_cdp_session(page)
    points = [[{"x": a + (b - a) * i / 5, "y": y} for a, b, y in [(start[0], end[0], start[1])]] for i in range(6)]
    kinds = ["touchStart", *["touchMove"] * 5, "touchEnd"]
    for kind, touched in zip(kinds, [*points, []], strict=True):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touched})


def test_the_pictures_follow_the_systems_colours(visit):
    page = visit("reacher-goal", color_scheme="light")
    before = _Changes(page).last
    page.emulate_media(color_scheme="dark")
    _wait_for_others(page, before)


def test_a_hidden_player_is_drawn_once_it_is_shown(visit):
    page = visit("reacher-goal")
    before = _Changes(page).last
    for display, width in (("none", 900), ("block", 700)):
        page.locator("#widget").evaluate("(e, display) => { e.style.display = display; }", display)
        page.set_viewport_size({"width": width, "height": 900})
    _wait_for_others(page, before)  # smaller ones


def _wait_for_others(page, before):
    """Until every robot's picture is another one."""
    page.wait_for_function(
        "(old) => [...document.querySelectorAll('.adp-robot')].every((c, i) => c.toDataURL() !== old[i])", arg=before
    )


@each_scheme
@pytest.mark.parametrize("name", ["1", "reacher-goal", "4", "damaged"])
def test_axe_finds_no_serious_fault(visit, name, scheme):
    page = visit(name, color_scheme=scheme)
    faults = [
        (fault["impact"], fault["id"], node["target"], node["failureSummary"])
        for fault in Axe().run(page).response["violations"]
        for node in fault["nodes"]
    ]
    assert [fault for fault in faults if fault[0] in ("serious", "critical")] == []
