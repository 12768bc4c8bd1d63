"""The exhibit as readers use it in headless Chromium: mouse, finger and keys, five experiments, and what goes wrong."""

import re
import time

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import listen
from player_cases import policy
from playwright.sync_api import expect

import adbook
from adbook.mamba import MambaConfig

PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


@pytest.fixture
def visit(browser, exhibit_site):
    """Opens a page of the site; in the end none may have asked for anything elsewhere or said anything unexpected."""
    opened = []

    def open_(name="", expected=(), before=lambda page: None, **context):
        page = browser.new_page(**{"viewport": {"width": 900, "height": 700}, **context})
        opened.append((page, listen(page, exhibit_site), expected))
        before(page)
        page.goto(f"{exhibit_site}/{name}")
        return page

    yield open_
    for page, heard, expected in opened:
        page.close()
        assert heard.foreign == []
        assert [said for said in heard.said if not any(part in said for part in expected)] == []


def start(page, speed="64"):
    page.get_by_role("button", name="Let it learn").click()
    page.get_by_label("Speed").select_option(speed)
    return page


def episode(page):
    """The episode that it plays, once that is drawn; 0 before."""
    _drawn(page)
    found = re.match(r"Episode (\d+),", page.locator(".adl-now").inner_text())
    return int(found[1]) if found else 0


def reached(page, number):
    """Wait until it plays an episode, or a later one."""
    end = time.monotonic() + 60
    while episode(page) < number:
        assert time.monotonic() < end, page.locator(".adl-now").inner_text()
        page.wait_for_timeout(20)


def goal(page):
    """The goal that the page tells, once it is drawn."""
    _drawn(page)
    label = page.locator(".adl-stage").get_attribute("aria-label").replace("−", "-")
    return [float(x) for x in re.findall(r"-?\d+\.\d+", label)]


def told(page):
    return page.get_by_role("status").inner_text()


def returns(page):
    """Of the last ten episodes, and the levels that they are compared with."""
    label = page.locator(".adl-returns").get_attribute("aria-label").replace("−", "-")
    last = [float(x) for x in re.findall(r"-?[\d.]+\d", label.split(". ")[0].split(":")[1])]
    return last, {name: float(x) for name, x in re.findall(r"(source’s end|random) (-[\d.]+\d)", label)}


def place(page, across, down):
    """A pixel of the window, given as shares of the stage's width and height."""
    box = page.locator(".adl-stage").bounding_box()
    return box["x"] + across * box["width"], box["y"] + down * box["height"]


def _drawn(page):
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_it_starts_on_demand_and_learns(visit):
    page = visit()
    expect(page.locator(".adl-controls")).to_be_hidden()
    assert "frozen" in told(page)
    start(page)
    reached(page, 12)
    last, levels = returns(page)
    assert last[-1] > levels["random"] + 0.8 * (levels["source’s end"] - levels["random"])
    assert "8,192 numbers" in page.locator(".adbook-live").inner_text()


def test_pause_and_speed(visit):
    page = start(visit(), "1")
    page.get_by_role("button", name="Pause").click()
    _drawn(page)
    before = page.locator(".adl-now").inner_text()
    page.wait_for_timeout(200)
    assert page.locator(".adl-now").inner_text() == before
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".adl-now")).not_to_have_text(before)


def test_the_goal_is_dragged_with_the_mouse_and_stays_where_goals_of_training_lie(visit):
    page = start(visit())
    reached(page, 3)
    first = goal(page)
    page.mouse.move(*place(page, 0.7, 0.4))
    page.mouse.down(button="right")
    page.mouse.up(button="right")
    assert goal(page) == first
    page.mouse.down()
    page.mouse.move(*place(page, 0.7, 0.55), steps=3)
    assert "The goal moves" not in told(page)  # not yet dropped
    page.mouse.up()
    assert "The goal moves, the memory stays" in told(page)
    moved = goal(page)
    assert 0.05 < moved[0] < 0.2
    assert moved[1] == pytest.approx(0, abs=0.06)
    for across in (3, 0.7):  # beyond the stage, and beyond the horizon
        page.mouse.move(*place(page, 0.7, 0.55))
        page.mouse.down()
        page.mouse.move(*place(page, across, 0.55 if across > 1 else -1))
        page.mouse.up()
        assert np.hypot(*goal(page)) == pytest.approx(0.2, abs=0.01)


def test_the_goal_is_put_with_a_finger_which_else_scrolls(visit):
    page = start(visit(**PHONE))
    reached(page, 2)
    first = goal(page)
    page.touchscreen.tap(*place(page, 0.7, 0.55))
    assert "The goal moves" in told(page)
    assert goal(page) != first
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    prevented = """([x, y]) => {
      const stage = document.querySelector(".adl-stage");
      const touch = new Touch({ identifier: 1, target: stage, clientX: x, clientY: y });
      return !stage.dispatchEvent(new TouchEvent("touchstart", { touches: [touch], cancelable: true }));
    }"""
    assert page.evaluate(prevented, place(page, 0.7, 0.55))
    assert not page.evaluate(prevented, place(page, 0.1, 0.95))


def test_the_goal_is_moved_with_keys(visit):
    page = start(visit(), "1")
    x, y = goal(page)
    page.locator(".adl-stage").focus()
    for key in ("ArrowRight", "ArrowUp", "ArrowUp", "a"):
        page.keyboard.press(key)
    assert goal(page) == [pytest.approx(x + 0.01, abs=0.011), pytest.approx(y + 0.02, abs=0.011)]


def test_a_velocity_is_set_with_a_slider(visit):
    page = start(visit("cheetah.html"))
    reached(page, 2)
    slider = page.get_by_label("Goal", exact=True)
    slider.fill("2.5")
    assert goal(page) == [2.5]
    assert slider.get_attribute("aria-valuetext") == "2.50 m/s"
    assert "The goal moves" in told(page)
    slider.evaluate("(e) => { e.value = 1; e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('blur')); }")
    assert goal(page) == [2.5]  # it was not let go


def test_the_five_experiments(visit):
    page = start(visit())
    reached(page, 8)
    page.get_by_label("withhold the reward").check()
    assert "what it knew fades" in told(page)
    page.get_by_role("button", name="Forget").click()
    assert "the returns stay low" in told(page)
    page.get_by_label("withhold the reward").uncheck()
    assert "paid again" in told(page)
    reached(page, episode(page) + 2)
    page.get_by_label("no exploration").check()
    assert "best guess" in told(page)
    page.get_by_label("no exploration").uncheck()
    page.get_by_role("button", name="Forget").click()
    assert "as quick to learn" in told(page)
    first = goal(page)
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="New task").click()
    _drawn(page)
    expect(page.locator(".adl-now")).to_have_text("Episode 1, step 0")
    assert goal(page) != first


def test_it_pauses_when_the_page_is_out_of_sight(visit):
    page = start(visit(), "4")
    page.evaluate(
        """() => {
          Object.defineProperty(document, "hidden", { value: true, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    expect(page.get_by_role("button", name="Run")).to_be_visible()
    assert "Paused while" in told(page)


def test_it_waits_while_it_is_scrolled_away(visit):
    page = start(visit())
    page.evaluate("document.body.style.paddingBottom = '3000px'")
    page.evaluate("scrollTo(0, 2500)")
    _drawn(page)
    before = episode(page)
    page.wait_for_timeout(300)
    assert episode(page) <= before + 1
    page.evaluate("scrollTo(0, 0)")
    reached(page, before + 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", r"reacher-goal/weights.bin could not be loaded: the server says 404. Load the page again"),
        ("short", r"The weights' file is damaged: it has 5000 of \d+ bytes"),
        ("flipped", r"The weights' file is damaged: it has other bytes"),
        ("schema", r"schema version 99, this page reads 1"),
        ("bare", r"lacks what the exhibit must know of its robot"),
    ],
)
def test_a_network_at_fault_is_told_and_can_be_tried_again(visit, name, message):
    page = visit(f"{name}/", expected=("404",))
    button = page.get_by_role("button", name="Let it learn")
    button.click()
    expect(page.get_by_role("status")).to_have_text(re.compile(message))
    expect(page.locator(".adl-controls")).to_be_hidden()
    sound = page.url.replace(f"{name}/", "")
    page.route(
        "**/reacher-goal/*", lambda route: route.continue_(url=f"{sound}reacher-goal/{_last(route.request.url)}")
    )
    button.click()
    reached(page, 1)
    assert "adl-error" not in page.locator(".adbook-live").get_attribute("class")


def _last(url):
    return url.rsplit("/", 1)[1]


def test_without_mujoco_the_cheetah_says_so(visit):
    def without(page):
        page.route("**/mujoco/*", lambda route: route.fulfill(status=404))

    page = visit("cheetah.html", before=without, expected=("404",))
    page.get_by_role("button", name="Let it learn").click()
    expect(page.get_by_role("status")).to_have_text(
        re.compile("MuJoCo for browsers could not be loaded. Load the page")
    )


def test_what_fails_while_it_plays_is_told(visit):
    page = start(visit(before=lambda page: page.add_init_script("Number.isFinite = (x) => !window.broken;")))
    reached(page, 2)
    page.evaluate("window.broken = true")
    expect(page.get_by_role("status")).to_have_text(re.compile("action is not a number"))
    assert page.get_by_role("button", name="Run").is_visible()


def test_nothing_is_drawn_without_its_style(visit):
    page = visit(
        before=lambda page: page.route("**/exhibit.css", lambda route: route.abort()), expected=("ERR_FAILED",)
    )
    expect(page.locator(".adbook-exhibit")).to_have_text(re.compile("exhibit.css could not be loaded. Load the page"))
    assert page.locator("canvas").count() == 0


def test_with_reduced_motion_only_whole_episodes_are_drawn(visit):
    page = start(visit(reduced_motion="reduce"), "16")
    reached(page, 3)
    assert {re.search(r"step \d+", page.locator(".adl-now").inner_text()).group() for _ in range(20)} == {"step 0"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "started"), [("", False), ("", True), ("cheetah.html", True)])
def test_axe_finds_no_serious_fault(visit, name, scheme, started):
    page = visit(name, color_scheme=scheme)
    page.get_by_role("button", name="Let it learn").wait_for()
    if started:
        reached(start(page), 1)
    faults = [fault for fault in Axe().run(page).response["violations"] if fault["impact"] in ("serious", "critical")]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in faults] == []


def test_one_file_from_the_disk_runs_a_policy_of_ones_own(browser, tmp_path):
    small = policy(MambaConfig(d_model=16, n_layers=1))
    path = adbook.LiveReacher(small, goal=(0.05, 0.05)).save_html(tmp_path / "exhibit.html")
    page = browser.new_page()
    heard = listen(page, "file://")
    page.goto(path.as_uri())
    start(page)
    reached(page, 4)
    assert goal(page) == [0.05, 0.05]
    page.close()
    assert heard.said == []


@pytest.mark.parametrize(("wrong", "message"), [((0.3, 0.0), "at most 0.25 m"), ((0.1,), "2 finite numbers")])
def test_a_goal_out_of_reach_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        adbook.LiveReacher(policy(MambaConfig(d_model=16, n_layers=1)), goal=wrong)
