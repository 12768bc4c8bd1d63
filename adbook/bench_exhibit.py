"""The benchmark of the exhibit in a real browser: how soon it moves, how fast it plays, its size, what it reaches."""

from __future__ import annotations

import gzip
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from adbook.bench_player import BROWSER_FLAGS, WINDOW, chromium, serve
from adbook.checkpoints import CHECKPOINTS
from adbook.exhibit import stage
from adbook.export import RUNS
from adbook.policy import ADPolicy
from adbook.rollout import rollout
from adbook.tasks import family

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Episodes, and runs of each goal: the arm fails at a goal now and then, and a mean over few runs hangs on how often.
SIZES = {"reacher-goal": (20, 32), "pusher-goal": (10, 2), "half-cheetah-vel": (10, 2)}
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>The exhibit</title>
<div class="adbook-exhibit" data-family="reacher-goal"></div><script type="module" src="page.js"></script></html>"""

# From the click to the first picture after a step, in ms.
_MOTION = """() => new Promise((done) => {
  const stage = document.querySelector(".adl-stage");
  const began = performance.now();
  document.querySelector(".adl-start").click();
  const look = () => {
    const [, step] = /step (\\d+)/.exec(document.querySelector(".adl-now").textContent) || [];
    if (Number(step) > 0 && stage.width > 0) done(performance.now() - began);
    else requestAnimationFrame(look);
  };
  look();
})"""

# Returns of many runs, (runs, goals, episodes), and the steps a second that it took.
_PLAY = """async ([family, goals, episodes, runs]) => {
  const { Policy } = await import("./network.js");
  const { Session } = await import("./session.js");
  const get = async (name, read) => (await fetch(`${family}/${name}`))[read]();
  const policy = new Policy(await get("policy.json", "json"), await get("weights.bin", "arrayBuffer"));
  const environment = family === "reacher-goal"
    ? new (await import("./reacher.js")).Reacher()
    : await (await import("./mujoco.js")).robot(family, await get("robot.xml", "text"));
  const play = (goal, seed, count) => {
    const session = new Session(policy, environment, goal, seed);
    while (session.episodes.length < count) session.step();
    return session.episodes.map(({ total }) => total);
  };
  play(goals[0], 0, 5); // until the browser has compiled it
  const began = performance.now();
  const seed = (run, i) => 1000 * run + i;
  const one = (run) => goals.map((goal, i) => play(goal, seed(run, i), episodes));
  const returns = Array.from({ length: runs }, (_, run) => one(run));
  const steps = runs * goals.length * episodes * environment.horizon;
  return { returns, rate: (1000 * steps) / (performance.now() - began) };
}"""


def bench_exhibit(tasks: int = 64, loads: int = 5) -> dict[str, Any]:
    """Measure the exhibit in headless Chromium, from a file server on this machine.

    Args:
        tasks: goals of each family, drawn afresh, that the page and `adbook.rollout` play.
        loads: of the page, each in a new profile; their median counts.

    Returns:
        `first_motion_ms` from the click to the first picture after a step, on Reacher-Goal, and `page_bytes`, gzipped,
        of all that this page loads. By family: closed-loop `steps_per_second` (network and physics), mean returns by
        episode in the page and of a `rollout` on the same goals, the 95 % interval of their paired difference, and in
        how many of the episodes it holds 0.

    Raises:
        ModuleNotFoundError: if playwright is not installed.
        ValueError: if there is no Chromium.
    """
    from playwright.sync_api import sync_playwright  # tests' requirements, not the library's

    path = chromium()
    with TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = stage(Path(name))
        (folder / "index.html").write_text(_PAGE)
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        with serve(folder) as base:
            visits = [_visit(browser, base) for _ in range(loads)]
            page = browser.new_page()
            page.goto(base)
            families = {one: _compared(page, one, tasks) for one in RUNS}
        version = browser.version
        browser.close()
    motion, size = (median(column) for column in zip(*visits, strict=True))
    measured = {"first_motion_ms": motion, "page_bytes": size, "browser": version}
    return measured | {"tasks": tasks, "loads": loads, "families": families}


def _visit(browser: Browser, base: str) -> tuple[float, int]:
    """Milliseconds to the first motion, and bytes, gzipped, of all that the page asked for by then."""
    page, answers = browser.new_page(viewport=WINDOW), []
    page.on("response", lambda answer: answers.append(answer))  # a built-in function is refused
    page.goto(base)
    page.locator(".adl-start").wait_for()
    elapsed = page.evaluate(_MOTION)
    size = sum(len(gzip.compress(answer.body())) for answer in answers if answer.ok)
    page.close()
    return elapsed, size


def _compared(page: Page, name: str, tasks: int) -> dict[str, Any]:
    kind, (episodes, runs) = family(name), SIZES[name]
    fresh = kind.sample_tasks(tasks, np.random.default_rng(11))
    played = page.evaluate(_PLAY, [name, [task.goal for task in fresh], episodes, runs])
    policy = ADPolicy.from_pretrained(CHECKPOINTS / f"{name}-mamba")
    ours = np.mean([rollout(policy, kind, fresh, episodes=episodes, seed=run).returns for run in range(runs)], axis=0)
    theirs = np.mean(played["returns"], axis=0)
    difference = theirs - ours  # on the same goals, with other starts and other noise
    half = stats.sem(difference) * stats.t.ppf(0.975, tasks - 1)
    low, high = difference.mean(0) - half, difference.mean(0) + half
    return {
        "runs": runs,
        "steps_per_second": played["rate"],
        "page": theirs.mean(0),
        "rollout": ours.mean(0),
        "difference": np.stack((low, high), -1),
        "episodes_that_agree": f"{int(((low <= 0) & (high >= 0)).sum())} of {episodes}",
    }
