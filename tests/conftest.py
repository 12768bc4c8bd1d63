"""Fixtures that several test modules share, and the rule that CI skips nothing."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on the CPU


@dataclass(frozen=True)
class BuiltBook:
    """A book in a folder of its own: the site, and the executed notebooks it was made from."""

    site: Path
    notebooks: Path


def pytest_collection_modifyitems(items):
    """Put what reads the smoke book last: it is built beside the other tests, most of which keep one core busy."""
    items.sort(key=lambda item: "smoke_book" in item.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def _book_in_the_making(request, tmp_path_factory):
    """The process that makes the smoke book from nothing, and its folder, apart from the reader's own runs."""
    if not any("smoke_book" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "adbook", "book", "--profile", "smoke", "--output", folder]
    environment = os.environ | {"ADBOOK_RUNS": str(folder / "runs"), "TRITON_INTERPRET": "0"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    yield process, folder
    process.terminate()
    process.wait()


@pytest.fixture(scope="session")
def smoke_book(_book_in_the_making) -> BuiltBook:
    """The book in the smoke profile."""
    process, folder = _book_in_the_making
    code, log = process.wait(), (folder / "log").read_text()
    assert code == 0, log
    print(log)
    return BuiltBook(folder / "html", folder / "stage" / "notebooks")


@pytest.fixture
def threads():
    """A source leaves torch on one thread; the tests that follow get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where Chromium is; where there is none, a skip that names the remedy (under CI a failure)."""
    from adbook import bench_player

    try:
        return bench_player.chromium()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def browser(chromium):
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    from adbook.bench_player import BROWSER_FLAGS

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=BROWSER_FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def exhibit_site(tmp_path_factory):
    """The address of the exhibit's pages (see `exhibit_cases`)."""
    from exhibit_cases import write_site

    from adbook.bench_player import serve

    with serve(write_site(tmp_path_factory.mktemp("exhibit"))) as base:
        yield base


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a player; in the end no page may have failed, complained or asked for a file."""
    from player_cases import player_page, recorded

    from adbook.player import RolloutPlayer

    pages, troubles = [], []

    def opened(player=None, width=800, **context):
        page = browser.new_page(**context)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("request", lambda request: troubles.append(request.url))
        player = player or RolloutPlayer(recorded(), references={"random": [-12.0, -9.0]})
        page.set_content(player_page(player, width, tmp_path))
        page.wait_for_function("window.test")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert [t for t in troubles if not t.startswith("blob:")] == []


def pytest_sessionfinish(session):
    """Under CI a skipped test fails the run: what is not tested there is tested nowhere."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter and reporter.stats.get("skipped") and session.exitstatus == 0:
        reporter.write_line("\nCI=true: skipped tests count as failures", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
