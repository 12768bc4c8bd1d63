"""The exhibit in Firefox: the same network, and a mouse, a finger and keys."""

import re

import firefox
import pytest

LABEL = "document.querySelector('.adl-stage').getAttribute('aria-label')"
TOLD = "document.querySelector('[role=status]').textContent"
RIGHT, UP = "\ue014", "\ue013"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Firefox; where there is none, a skip that names the remedy (under CI a failure)."""
    if not firefox.find():
        pytest.skip("there is no Firefox: apt-get install firefox-esr")
    with firefox.Firefox(tmp_path_factory.mktemp("profile")) as running:
        yield running


def click(browser, name):
    where = f"""(() => {{
      const found = [...document.querySelectorAll("button")].find((b) => b.textContent === "{name}");
      found.scrollIntoView({{ block: "center" }});
      const box = found.getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    }})()"""
    browser.point(browser.evaluate(where))


def start(browser, address, **options):
    browser.open(address, **options)
    browser.wait_for("document.querySelector('.adl-start')")
    click(browser, "Let it learn")
    browser.wait_for("document.querySelector('.adl-ready')")


def reached(browser, episode):
    number = "Number((/^Episode (\\d+)/.exec(document.querySelector('.adl-now').textContent) || [])[1])"
    browser.wait_for(f"{number} >= {episode}", 60)


def pace(browser, times):
    browser.evaluate(f"document.querySelector('.adl-controls select').value = {times}")


def returns(browser):
    label = browser.evaluate("document.querySelector('.adl-returns').getAttribute('aria-label')").replace("−", "-")
    return [float(x) for x in re.findall(r"-?[\d.]+\d", label.split(". ")[0].split(":")[1])]


def goal(browser):
    label = browser.evaluate(f"new Promise(requestAnimationFrame).then(() => {LABEL})").replace("−", "-")
    return [float(x) for x in re.findall(r"-?\d+\.\d+", label)]


@pytest.mark.parametrize(("page", "better"), [("", 4), ("cheetah.html", 50)])
def test_it_learns(browser, exhibit_site, page, better):
    start(browser, f"{exhibit_site}/{page}")
    reached(browser, 2)
    first = returns(browser)[0]
    pace(browser, 64)
    reached(browser, 8)
    assert returns(browser)[-1] > first + better
    assert [said for said in browser.said if "favicon" not in said] == []


@pytest.mark.parametrize("kind", ["mouse", "touch"])
def test_the_goal_is_put_somewhere_else(browser, exhibit_site, kind):
    size = (390, 844) if kind == "touch" else (900, 700)
    start(browser, f"{exhibit_site}/", size=size)
    pace(browser, 64)
    reached(browser, 2)
    box = browser.evaluate("document.querySelector('.adl-stage').getBoundingClientRect()")
    x, y = box["x"] + 0.7 * box["width"], box["y"] + 0.55 * box["height"]
    browser.point((x - 40, y - 40), (x, y), kind=kind)
    assert goal(browser)[0] > 0.05
    assert "The goal moves" in browser.evaluate(TOLD)


def test_the_goal_is_moved_with_keys(browser, exhibit_site):
    start(browser, f"{exhibit_site}/")
    x, y = goal(browser)
    browser.evaluate("document.querySelector('.adl-stage').focus()")
    for key in (RIGHT, UP, UP):
        browser.press(key)
    assert goal(browser) == [pytest.approx(x + 0.01, abs=0.011), pytest.approx(y + 0.02, abs=0.011)]
