"""Fixtures that several test modules share, and the rule that CI skips nothing."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# No services of the browser's own: every request that a test sees is a page's.
BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on the CPU


@dataclass(frozen=True)
class BuiltBook:
    """A book in a folder of its own: the site, and the executed notebooks it was made from."""

    site: Path
    notebooks: Path


@pytest.fixture(scope="session")
def smoke_book(tmp_path_factory) -> BuiltBook:
    """The book in the smoke profile, made from nothing, in a folder apart from the reader's own runs."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "adbook", "book", "--profile", "smoke", "--output", folder]
    environment = os.environ | {"ADBOOK_RUNS": str(folder / "runs"), "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
    return BuiltBook(folder / "html", folder / "stage" / "notebooks")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; where there is none, a skip that names the remedy (under CI a failure)."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium: install it (Debian, Ubuntu: apt-get install chromium)")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        yield running
        running.close()


def pytest_sessionfinish(session):
    """Under CI a skipped test fails the run: what is not tested there is tested nowhere."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter and reporter.stats.get("skipped") and session.exitstatus == 0:
        reporter.write_line("\nCI=true: skipped tests count as failures", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
