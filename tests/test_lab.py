"""The player in the real JupyterLab: a server and a kernel of its own, and a browser that runs a notebook there."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from browsing import listen
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import expect

ALLOWED = ("debug: ",)  # Lab's own notes on what it does
# Lab's own objects, which it shows with --expose-app-in-browser.
_READY = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
_NOTEBOOK = "jupyterapp.shell.currentWidget.content"
_ACTIVE = f"{_NOTEBOOK}.activeCellIndex"
PATIENCE = 90_000  # milliseconds, for a busy machine: a kernel imports PyTorch


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, and the folder that it shows."""

    base: str
    folder: Path


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free port, without token, news or anybody's settings."""
    home = tmp_path_factory.mktemp("lab")
    folder = home / "notebooks"
    folder.mkdir()
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            _command(folder), env=_environment(home), cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield Lab(_address(server, home), folder)
        finally:
            server.terminate()  # it ends its kernels first
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _command(folder):
    return [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"),
        *("--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={folder}"),
        *("--IdentityProvider.token=", "--LabApp.extension_manager=readonly"),
    ]


def _environment(home):
    """With an empty folder wherever Jupyter, IPython and other programs keep settings."""
    folders = {
        name: home / name.lower()
        for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    for path in folders.values():
        path.mkdir()
    # Lab asks at its start whether it may fetch news.
    answer = folders["JUPYTER_CONFIG_DIR"] / "lab/user-settings/@jupyterlab/apputils-extension"
    answer.mkdir(parents=True)
    (answer / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    return {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")} | {
        name: str(path) for name, path in folders.items()
    }


def _address(server, home):
    """The server's address, once it has written it and so listens."""
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end and server.poll() is None:
        for path in (home / "jupyter_runtime_dir").glob("jpserver-*.json"):
            try:
                return json.loads(path.read_text())["url"].rstrip("/")
            except json.JSONDecodeError:
                pass  # half written
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start: {(home / 'log').read_text()}")


@contextmanager
def notebook(lab, browser, *cells):
    """A page of Lab with a new notebook of the given cells, all run; in the end it may not have complained."""
    path = lab.folder / f"{len(list(lab.folder.glob('*.ipynb')))}.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata=kernel), path)
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    try:
        page.set_default_timeout(PATIENCE)
        heard = listen(page, lab.base)
        page.goto(f"{lab.base}/lab/tree/{path.name}?reset")
        page.wait_for_function(_READY)
        _do(page, "await jupyterapp.commands.execute('notebook:run-all-cells')")  # without a kernel it does nothing
        printed(page)
        yield page
    finally:
        page.close()
    assert (heard.foreign, [text for text in heard.said if not text.startswith(ALLOWED)]) == ([], [])


def run(page, code):
    """Run code in a new cell at the end of the notebook, and return what it printed."""
    script = f"""
      const notebook = {_NOTEBOOK};
      notebook.activeCellIndex = notebook.widgets.length - 1;
      await jupyterapp.commands.execute("notebook:insert-cell-below");
      notebook.activeCell.model.sharedModel.setSource(code);
      await jupyterapp.commands.execute("notebook:run-cell");
    """
    _do(page, script, code)
    return printed(page)[-1]


def _do(page, script, code=None):
    """Wait for a script to end, with the page's patience, which a call of `evaluate` alone does not have."""
    page.evaluate(
        f"""(code) => {{
          window.done = false;
          (async () => {{ {script} }})().finally(() => {{ window.done = true; }});
        }}""",
        code,
    )
    page.wait_for_function("done")


def printed(page):
    """What each cell printed, from the notebook's model, since the page need not hold cells out of sight."""
    cells = page.evaluate(f"[...{_NOTEBOOK}.model.cells].map((cell) => [cell.executionCount, cell.outputs.toJSON()])")
    assert all(count for count, _ in cells), "a cell was not run"
    failed = ["\n".join(out["traceback"]) for _, outs in cells for out in outs if out["output_type"] == "error"]
    assert not failed, failed[0]
    return ["".join(out.get("text", "") for out in outs) for _, outs in cells]


# ----------------------------------------------------------------------------------------------------------
# a recording

MAKE = """
import sys
import adbook
from adbook.rollout import RandomPolicy
family = adbook.family("reacher-goal")
policy = RandomPolicy(family.action_size, family.action_scale)
player = adbook.RolloutPlayer(adbook.rollout(policy, family, family.test_tasks[:2], episodes=3, seed=1))
print("a line\\n" * 80)  # so that the player is out of sight when it is made
"""


@pytest.fixture(scope="module")
def page(lab, browser):
    """A notebook in which one player is shown twice."""
    with notebook(lab, browser, MAKE, "player", "player") as page:
        yield page


@pytest.fixture
def shown(page):
    """Both views of the player, at the beginning of the recording."""
    run(page, "player.task, player.episode, player.step = 0, 0, 0")
    views = page.get_by_role("group", name="Rollout player").all()
    for view in views:
        _says(view, "Episode 1 of 3, step 0 of 50.")
    return views


def _says(view, text):
    expect(view.get_by_role("status")).to_contain_text(text, timeout=PATIENCE)


def _picture(view):
    return view.locator(".adp-robot").evaluate("(canvas) => canvas.toDataURL()")


def _changes_from(view, before):
    robot = view.locator(".adp-robot").element_handle()
    view.page.wait_for_function("([robot, before]) => robot.toDataURL() !== before", arg=[robot, before])


def test_the_kernel_is_this_python(page):
    assert run(page, "print(sys.executable)").strip() == sys.executable


def test_python_moves_the_pictures(page, shown):
    before = [_picture(view) for view in shown]
    run(page, "player.episode = 1")
    for view, picture in zip(shown, before, strict=True):
        _says(view, "Episode 2 of 3, step 0 of 50.")
        _changes_from(view, picture)


KEYS = {"ArrowRight": (0, 0, 1), "PageDown": (0, 1, 0), "ArrowDown": (1, 0, 0)}


@pytest.mark.parametrize(("key", "place"), KEYS.items())
def test_python_reads_where_a_key_has_moved_it(page, shown, key, place):
    before, line = _picture(shown[0]), shown[0].get_by_role("slider", name="Time line")
    line.focus()
    active = page.evaluate(_ACTIVE)
    line.press(key)
    for view in shown:
        _says(view, f"Episode {place[1] + 1} of 3, step {place[2]} of 50.")
    _changes_from(shown[0], before)
    assert page.evaluate(_ACTIVE) == active  # the key was not Lab's as well, which goes to another cell
    assert run(page, "print((player.task, player.episode, player.step))").strip() == str(place)


def test_the_mouse_moves_it(page, shown):
    line = shown[1].get_by_role("slider", name="Time line")
    line.scroll_into_view_if_needed()
    box = line.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 12, box["y"] + 70)
    _says(shown[0], "Episode 3 of 3, step ")
    assert run(page, "print(player.episode)").strip() == "2"


def test_a_slider_that_is_linked_in_the_page_moves_it(page, shown):
    link = "slider = ipywidgets.IntSlider(max=2); link = ipywidgets.jslink((slider, 'value'), (player, 'episode'))"
    run(page, f"import ipywidgets; {link}; display(slider)")
    page.locator(".widget-slider [role=slider]").last.press("ArrowRight")
    for view in shown:
        _says(view, "Episode 2 of 3, step 0 of 50.")
    run(page, "link.unlink()")


def test_the_picture_follows_labs_theme(page, shown):
    before = _picture(shown[0])
    page.evaluate("jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    _changes_from(shown[0], before)


# ----------------------------------------------------------------------------------------------------------
# live mode

LIVE = """
import torch
import adbook
from adbook.mamba import MambaConfig
torch.manual_seed(0)
policy = adbook.ADPolicy(adbook.PolicyConfig(8, 2, backbone=MambaConfig(d_model=16, n_layers=1)))
live = adbook.LivePlayer(policy, adbook.family("reacher-goal"), goal=(0.1, 0.05), episodes=2, pace=4)
moves = []
live.observe(lambda change: moves.append(change.new), "goal")
"""


def test_a_live_run_is_watched_and_its_goal_dragged_in_between(lab, browser):
    with notebook(lab, browser, LIVE, "live") as page:
        view = page.get_by_role("group", name="Rollout player")
        view.get_by_role("button", name="Run").click()
        view.get_by_role("button", name="Stop").wait_for()
        seen = _places(view, "Episode 2 of 2, step 50 of 50.")
        assert len({place for place in seen if re.search(r"step (?!0 |50 )", place)}) > 3  # it was streamed
        view.get_by_role("button", name="Run").wait_for()
        assert run(page, "print(live.rollouts['mamba'].returns.shape, live.running)").strip() == "(1, 2) False"
        _drag_goal(view)
        view.get_by_role("button", name="Run").click()
        _says(view, "Episode 4 of 4, step 50 of 50.")
        goals, moves = json.loads(run(page, "import json; print(json.dumps([live.goals, moves]))"))
        assert goals[:2] == [[0.1, 0.05]] * 2
        assert goals[2:] == [moves[-1]] * 2
        assert moves[-1][0] < 0
        expected = "same = adbook.rollout(policy, live._family, live.rollouts['mamba'].tasks, episodes=2)"
        check = f"{expected}; print((same.rewards == live.rollouts['mamba'].rewards[:, :2]).all())"
        assert run(page, check).strip() == "True"
        view.get_by_role("button", name="Forget").click()
        _says(view, "Episode 1 of ")
        assert run(page, "print(live.shape[2])").strip() == "0"


def _places(view, last):
    """All that a view says until it says `last`."""
    return view.get_by_role("status").evaluate(
        """(said, last) => new Promise((done) => {
          const all = [];
          const look = () => {
            all.push(said.textContent);
            if (!said.textContent.startsWith(last)) return;
            changes.disconnect();
            done(all);
          };
          const changes = new MutationObserver(look);
          changes.observe(said, { childList: true, characterData: true, subtree: true });
          look();
        })""",
        last,
        timeout=PATIENCE,
    )


def _drag_goal(view):
    """From the map's middle to its left."""
    goals = view.locator(".adp-map")
    goals.scroll_into_view_if_needed()
    box, mouse = goals.bounding_box(), view.page.mouse
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    mouse.move(x, y)
    mouse.down()
    mouse.move(x - 40, y, steps=4)
    mouse.up()


# ----------------------------------------------------------------------------------------------------------
# a network that learns in the page

MAKE_EXHIBIT = """
import torch
import adbook
from adbook.policy import ADPolicy, PolicyConfig
exhibit = adbook.LiveReacher(ADPolicy(PolicyConfig(8, 2, backbone=adbook.MambaConfig(d_model=16, n_layers=1))))
"""


def test_the_exhibit_plays_without_its_kernel(lab, browser):
    with notebook(lab, browser, MAKE_EXHIBIT, "exhibit") as page:
        view = page.get_by_role("region", name="A network that learns as you watch")
        view.get_by_role("button", name="Let it learn").click()
        view.get_by_label("Speed").select_option("64")
        run(page, "del exhibit")
        expect(view.locator(".adl-now")).to_contain_text(re.compile(r"Episode ([3-9]|\d\d+),"), timeout=PATIENCE)
