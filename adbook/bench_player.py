"""The benchmark of the rollout player, in a real browser: how soon it is there, how it follows the mouse, its size.

Also what the tests need for the same: where Chromium is, how it is started, and a plain file server.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ipywidgets.embed import dependency_state

from adbook.experiments import ROOT
from adbook.player import RolloutPlayer
from adbook.rollout import RandomPolicy, rollout
from adbook.tasks import FAMILIES, family

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page, Playwright

# No services of the browser's own: every request is a page's.
BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WINDOW = {"width": 1280, "height": 900}
SITE, CHAPTER = ROOT / "_build" / "html", "notebooks/05_in_context_rollouts.html"
AGENTS = ("mamba", "transformer", "source", "random")
PLAYERS = (*((name, 2) for name in sorted(FAMILIES)), ("reacher-goal", 4))
_SIZES = {"reacher-goal": (16, 20)}  # tasks and episodes; of the other families:
_SIZE = (2, 4)
_ACTIONS = 0.3  # of the largest ones: beyond, a random ant soon falls and its picture stays
_FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
_MOUSE_RATE, _SPEED = 100, 600  # moves, more than frames, and pixels a second

# Runs in a page before its own scripts, and looks at the first player's canvases in every animation frame.
_WATCH = """{
  const bench = window.bench = { drawn: [], drawnAt: 0, complete: false, count: null };
  const picture = (canvas) => { // a hash of all pixels, 0 if there is none
    if (!canvas.width || !canvas.height) return 0;
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let hash = 0;
    for (const x of new Uint32Array(data.buffer)) hash = (Math.imul(hash, 31) + x) | 0;
    return hash;
  };
  let last = 0;
  let moved = false;
  addEventListener("pointermove", () => { moved = true; }, true);
  const frame = () => {
    const player = document.querySelector(".adbook-player");
    const canvases = player ? [...player.querySelectorAll(".adp-robot, .adp-map, .adp-timeline")] : [];
    if (!bench.complete) {
      const fresh = canvases.filter((canvas) => !bench.drawn.includes(canvas) && picture(canvas));
      if (fresh.length) bench.drawnAt = performance.now(); // milliseconds since the navigation began
      bench.drawn.push(...fresh);
      bench.complete = canvases.length > 0 && bench.drawn.length === canvases.length;
    } else if (bench.count) {
      const now = picture(document.querySelector(".adp-robot"));
      bench.count.frames += 1;
      bench.count.frames_with_a_move += moved;
      moved = false;
      bench.count.pictures += now !== last;
      last = now;
    }
    requestAnimationFrame(frame);
  };
  bench.start = () => {
    last = picture(document.querySelector(".adp-robot"));
    bench.count = { frames: 0, frames_with_a_move: 0, pictures: 0 };
  };
  requestAnimationFrame(frame);
}"""


def bench_player(
    players: Sequence[tuple[str, int]] = PLAYERS, loads: int = 5, seconds: float = 2.0, site: Path = SITE
) -> dict[str, Any]:
    """Measure the player in headless Chromium, in pages from a file server on this machine.

    The recordings are of small random actions: 16 tasks of 20 episodes on Reacher-Goal, 2 of 4 on the other families.

    Args:
        players: Family and number of agents, one to four, of each player.
        loads: Of a page, each in a new profile; their median counts.
        seconds: For which the mouse drags along a time line.
        site: Folder of the built book; where it is not built, the result says so.

    Returns:
        For the last player, alone in a page, milliseconds from the start of navigation until the `first_paint_ms`
        (contentful) and until every canvas has a picture, `drawn_ms`. The same for the first player of the chapter on
        rollouts in `book`. For each player in `players`, a second, while the mouse drags along its time line:
        animation `frames`, those before which the mouse moved (`frames_with_a_move`; a busy machine sends fewer than
        there are frames) and those in which the first robot's picture was a new one (`pictures`). Bytes of its state
        in a page of the book (`payload_bytes`), of these its JavaScript and CSS (`program_bytes`), and of the file
        that `save_html` writes (`file_bytes`).

    Raises:
        ModuleNotFoundError: if playwright is not installed; the message says how to.
        ValueError: if there is no Chromium.
    """
    start, path = _playwright(), chromium()  # refuse before the work
    made = {f"{name}, {agents} agents": _player(name, agents) for name, agents in players}

    async def measure() -> dict[str, Any]:
        async with (
            start() as playwright,
            await playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS) as browser,
        ):
            with TemporaryDirectory() as folder:
                return await _alone(browser, made, folder, loads, seconds) | {
                    "book": await _book(browser, site, loads),
                    "browser": browser.version,
                }

    measured = asyncio.run(measure())
    fewest = min(player["pictures"] for player in measured["players"].values())
    return {"fewest_pictures_per_second": fewest, "loads": loads, "seconds": seconds, "window": WINDOW} | measured


def chromium() -> str:
    """Return where a Chromium or Chrome is on this machine.

    Raises:
        ValueError: if there is none.
    """
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        raise ValueError("no Chromium: install it (Debian, Ubuntu: apt-get install chromium)")
    return path


@contextmanager
def serve(folder: str | Path) -> Iterator[str]:
    """Serve a folder's files on a free port of this machine; gives the address without a slash at the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _playwright() -> Callable[[], AbstractAsyncContextManager[Playwright]]:
    try:
        from playwright.async_api import async_playwright
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("playwright is not installed: pip install -r requirements.txt") from error
    return async_playwright


def _player(name: str, agents: int) -> RolloutPlayer:
    played = family(name)
    tasks, episodes = _SIZES.get(name, _SIZE)
    policy = RandomPolicy(played.action_size, _ACTIONS * played.action_scale)
    rollouts = {
        agent: rollout(policy, played, played.test_tasks[:tasks], episodes=episodes, seed=seed)
        for seed, agent in enumerate(AGENTS[:agents])
    }
    return RolloutPlayer(rollouts)


def _bytes(player: RolloutPlayer) -> dict[str, int]:
    """What a page of the book carries for it: the state of the widget, its recording in base 64."""
    state = dependency_state(player, drop_defaults=False)
    own = state[player.model_id]["state"]
    return {
        "payload_bytes": len(json.dumps(state)),
        "program_bytes": sum(len(json.dumps(own[part])) for part in ("_esm", "_css")),
    }


async def _alone(
    browser: Browser, players: dict[str, RolloutPlayer], folder: str, loads: int, seconds: float
) -> dict[str, Any]:
    """Each player's rates and sizes, and the first paint of the last one."""
    measured = {}
    with serve(folder) as base:
        for name, player in players.items():
            file = player.save_html(Path(folder, f"{len(measured)}.html"))
            sizes = _bytes(player) | {"file_bytes": file.stat().st_size}
            measured[name] = await _scrub(browser, f"{base}/{file.name}", seconds) | sizes
        return await _first_paint(browser, f"{base}/{file.name}", loads) | {"players": measured}


async def _open(browser: Browser, address: str) -> Page:
    """A page in a profile of its own, once its first player is drawn."""
    page = await browser.new_page(viewport=WINDOW)
    page.set_default_timeout(120_000)  # a page of the book on a busy machine
    await page.add_init_script(_WATCH)
    await page.goto(address)
    await page.wait_for_function(f"bench.complete && {_FIRST_PAINT}")  # the paint is reported after it was shown
    return page


async def _first_paint(browser: Browser, address: str, loads: int) -> dict[str, float]:
    rows = []
    for _ in range(loads):
        page = await _open(browser, address)
        rows.append(await page.evaluate(f"[{_FIRST_PAINT}, bench.drawnAt]"))
        await page.close()
    paints, drawn = zip(*rows, strict=True)
    return {"first_paint_ms": median(paints), "drawn_ms": median(drawn)}


async def _book(browser: Browser, site: Path, loads: int) -> dict[str, Any]:
    if not (site / CHAPTER).is_file():
        return {"missing": f"{CHAPTER} is not built; run `make book` first"}
    with serve(site) as base:
        return {"page": CHAPTER} | await _first_paint(browser, f"{base}/{CHAPTER}", loads)


async def _scrub(browser: Browser, address: str, seconds: float) -> dict[str, float]:
    """Drag to and fro along the time line and count, a second."""
    page = await _open(browser, address)
    session = await page.context.new_cdp_session(page)  # Playwright's own moves ask the page several questions each

    async def mouse(kind: str, x: float) -> None:
        move = {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
        await session.send("Input.dispatchMouseEvent", move)

    box = await page.locator(".adp-timeline").bounding_box()
    left, width, y = box["x"] + 60, box["width"] - 80, box["y"] + box["height"] / 2
    await mouse("mousePressed", left)
    await page.evaluate("bench.start()")
    begin, moves = time.perf_counter(), []
    while (passed := time.perf_counter() - begin) < seconds:
        x = left + width - abs(_SPEED * passed % (2 * width) - width)
        moves.append(asyncio.create_task(mouse("mouseMoved", x)))  # a mouse does not wait for the page
        await asyncio.sleep(1 / _MOUSE_RATE)
    count = await page.evaluate("bench.count")
    passed = time.perf_counter() - begin
    await asyncio.gather(*moves)
    await page.close()
    return {name: value / passed for name, value in count.items()}
