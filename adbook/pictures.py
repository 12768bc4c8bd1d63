"""The README's pictures, taken in a browser: of the built book, and of the source algorithm in all four families."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from PIL import Image

from adbook.bench_player import BROWSER_FLAGS, CHAPTER, SITE, chromium, serve
from adbook.experiments import ROOT, profile, source_histories
from adbook.files import write_whole
from adbook.player import RolloutPlayer
from adbook.replay import source_rollout
from adbook.rollout import RandomPolicy, rollout
from adbook.tasks import FAMILIES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

FOLDER = ROOT / "book" / "_static" / "pictures"
_FIRST = "book/intro.html"  # the page with the exhibit
_LEARNT = 6  # s until the network has learnt
_EPISODES = 12  # of each source run
_PLACES = {"reacher-goal": 18, "pusher-goal": 70, "half-cheetah-vel": 90, "ant-dir": 60}  # steps that show something


def take_pictures(folder: Path = FOLDER, site: Path = SITE) -> list[Path]:
    """Take all pictures anew.

    Args:
        folder: Where they go, as PNG files and one film, WebP.
        site: The built book, in the laptop profile.

    Raises:
        FileNotFoundError: The book is not built.
        ValueError: There is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    if not (site / CHAPTER).is_file():
        raise FileNotFoundError(f"{site / CHAPTER} is not there; run `make book` first")
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        taken = [
            *_of_the_book(browser, folder, site),
            *_of_the_exhibit(browser, folder, site),
            *_of_the_families(browser, folder),
        ]
        browser.close()
    return taken


def _of_the_book(browser: Browser, folder: Path, site: Path) -> Iterator[Path]:
    """The player and the curve of the chapter on rollouts, in both themes."""
    for theme in ("light", "dark"):
        with serve(site) as base, _page(browser, f"{base}/{CHAPTER}", ".adp-said", theme) as page:
            page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
            player = page.locator(".adbook-player").first
            _show(player, episode=7, step=30)
            yield _save(player, folder / f"player-{theme}.png")
            yield _save(page.locator("#fig-05-seeds .plotly-graph-div"), folder / f"curve-{theme}.png")


def _of_the_families(browser: Browser, folder: Path) -> Iterator[Path]:
    """The last episode of the source on the first test task, beside random actions, of every family."""
    with TemporaryDirectory() as temporary:
        for name in FAMILIES:
            _family_player(name).save_html(Path(temporary, f"{name}.html"))
        with serve(temporary) as base:
            for name in FAMILIES:
                with _page(browser, f"{base}/{name}.html", ".adp-said") as page:
                    player = page.locator(".adbook-player")
                    _show(player, episode=_EPISODES - 1, step=_PLACES[name])
                    yield _save(player.locator(".adp-panels"), folder / f"{name}.png")


def _family_player(name: str) -> RolloutPlayer:
    settings = profile("laptop", name, n_test=1)
    source = source_rollout(source_histories(settings, "test")[:1], episodes=_EPISODES)
    policy = RandomPolicy(settings.family.action_size, settings.family.action_scale)
    random = rollout(policy, settings.family, settings.test_tasks, episodes=_EPISODES)
    return RolloutPlayer({"source": source, "random": random})


def _of_the_exhibit(browser: Browser, folder: Path, site: Path) -> Iterator[Path]:
    """The network that learns on the first page: a picture in both themes, and a film of the experiments."""
    for theme in ("light", "dark"):
        with serve(site) as base, _page(browser, f"{base}/{_FIRST}", ".adl-start", theme) as page:
            exhibit = _begun(page)
            page.wait_for_timeout(1000 * _LEARNT)
            yield _save(exhibit, folder / f"exhibit-{theme}.png")
    with serve(site) as base, _page(browser, f"{base}/{_FIRST}", ".adl-start") as page:
        yield _film(_begun(page), folder / "exhibit.webp")


def _begun(page: Page) -> Locator:
    exhibit = page.locator(".adbook-live")
    exhibit.scroll_into_view_if_needed()
    exhibit.get_by_role("button", name="Let it learn").click()
    exhibit.get_by_label("Speed").select_option("2")
    return exhibit


def _film(exhibit: Locator, path: Path) -> Path:
    """It learns; the goal is moved, its memory kept; it forgets, and learns again."""
    box = exhibit.locator(".adl-stage").bounding_box()
    below = {"x": 0.66 * box["width"], "y": 0.6 * box["height"]}
    frames, times = [], []
    for act in (
        lambda: None,
        lambda: exhibit.locator(".adl-stage").click(position=below),
        exhibit.get_by_role("button", name="Forget").click,
    ):
        act()
        began = time.monotonic()
        while time.monotonic() < began + _LEARNT:
            times.append(time.monotonic())
            frames.append(Image.open(BytesIO(exhibit.screenshot())).convert("RGB").reduce(2))
    durations = [round(1000 * (b - a)) for a, b in pairwise(times)]
    options = {"duration": [*durations, durations[-1]], "loop": 0, "quality": 70, "method": 6}
    return write_whole(
        path, lambda file: frames[0].save(file, "webp", save_all=True, append_images=frames[1:], **options)
    )


@contextmanager
def _page(browser: Browser, address: str, shown: str, theme: str = "light") -> Iterator[Page]:
    """A page on which something is shown."""
    page = browser.new_page(viewport={"width": 1360, "height": 900}, device_scale_factor=1.5, color_scheme=theme)
    page.set_default_timeout(120_000)
    page.goto(address)
    page.locator(shown).first.wait_for()
    yield page
    page.close()


def _show(player: Locator, episode: int, step: int) -> None:
    """Go to a place by the keys that a reader has."""
    line = player.get_by_role("slider", name="Time line")
    for key, times in (("Home", 1), ("PageDown", episode), ("ArrowRight", step)):
        for _ in range(times):
            line.press(key)
    line.evaluate("(node) => node.blur()")  # no frame around it


def _save(what: Locator, path: Path) -> Path:
    what.scroll_into_view_if_needed()
    what.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return write_whole(path, lambda file: file.write_bytes(what.screenshot()))
