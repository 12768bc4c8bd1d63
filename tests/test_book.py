"""The chapters as they are committed, and the book that is built from them, as a reader's browser sees it."""

import ast
import hashlib
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
import yaml
from browsing import listen
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_notebook, new_output
from playwright.sync_api import expect

from adbook.bench_player import serve
from adbook.book import BookError, build, build_site, execute, tidy
from adbook.experiments import PROFILES

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "book" / "_static"
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


# The chapters as committed


def test_contents_list_every_chapter_in_order():
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    listed = [entry["file"] for part in parts for entry in part["chapters"]]
    assert [name for name in listed if name.startswith("notebooks/")] == [f"notebooks/{path.stem}" for path in CHAPTERS]


@each_chapter
def test_chapter_is_committed_stripped(chapter):
    notebook = nbformat.read(chapter, as_version=4)
    nbformat.validate(notebook)
    assert "papermill" not in notebook.metadata
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in _code(notebook):
        assert (cell.outputs, cell.execution_count) == ([], None)
        assert "papermill" not in cell.metadata


@each_chapter
def test_chapter_keeps_the_house_style(chapter):
    notebook = nbformat.read(chapter, as_version=4)
    lengths = sorted(len(cell.source.splitlines()) for cell in _code(notebook))
    assert lengths[-1] <= 25
    assert lengths[len(lengths) // 2] <= 8
    for cell in _code(notebook):
        assert not re.search(r"^\s*class |pip install", cell.source, re.MULTILINE), cell.source


@each_chapter
def test_chapter_has_one_parameters_cell_of_literals(chapter):
    notebook = nbformat.read(chapter, as_version=4)
    cells = [cell for cell in _code(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1
    values = {}
    for statement in ast.parse(cells[0].source).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert values["profile"] == "laptop"


@pytest.mark.parametrize(("name", "allowed"), [("profile", "laptop"), ("family", "reacher-goal")])
@each_chapter
def test_chapter_refuses_a_bad_parameter_in_its_first_cell(chapter, name, allowed):
    parameters, first, *_ = _from_parameters(chapter)
    namespace = {}
    exec(parameters.source, namespace)
    if name not in namespace:  # the chapter on state space models is about no family
        assert (chapter.stem, name) == ("01_ssm_background", "family")
        return
    namespace[name] = "nope"
    with pytest.raises(ValueError, match="nope") as caught:
        exec(first.source, namespace)
    assert allowed in str(caught.value)


def test_papermill_reports_a_bad_parameter(tmp_path):
    chapter, out = ROOT / "notebooks" / "05_in_context_rollouts.ipynb", tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", chapter, out, "-p", "family", "ant-dri"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(r"ValueError: .*ant-dri.*ant-dir", result.stderr), result.stderr


# Building


def test_makefile_and_command_line_name_the_profiles():
    for command in (
        ["make", "book", "PROFILE=nope"],
        [sys.executable, "-m", "adbook", "book", "--profile", "nope"],
    ):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2
        assert "nope" in result.stderr
        assert ", ".join(PROFILES) in result.stderr


def test_a_failing_cell_is_named(tmp_path):
    chapter = _write(tmp_path / "09_bad.ipynb", [new_code_cell("profile = ''"), new_code_cell("1 / 0")])
    with pytest.raises(BookError, match=r"09_bad\.ipynb, cell \[3\] raised ZeroDivisionError"):
        execute("smoke", [chapter], tmp_path / "out")


def test_a_warning_of_sphinx_fails_the_build_and_keeps_the_old_site(tmp_path):
    stage, old = tmp_path / "stage", tmp_path / "html" / "index.html"
    stage.mkdir()
    old.parent.mkdir()
    old.write_text("old")
    (stage / "_config.yml").write_text("title: A\nonly_build_toc_files: true\n")
    (stage / "_toc.yml").write_text("format: jb-book\nroot: a\n")
    (stage / "a.md").write_text("# A\n\n{ref}`nowhere`\n")
    with pytest.raises(BookError, match="nowhere"):
        build_site(stage, tmp_path)
    assert old.read_text() == "old"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    thesis = tmp_path / "html" / "thesis"
    thesis.parent.mkdir()
    thesis.touch()
    with pytest.raises(BookError, match=r"html is there and is no earlier build's"):
        build("smoke", tmp_path)
    assert list(tmp_path.rglob("*")) == [thesis.parent, thesis]


CHART = {"text/html": '<div class="plotly-graph-div"></div>'}
LABELLED = {"text/html": '<div role="img" aria-label="A line"><div class="plotly-graph-div"></div></div>'}
IMAGE = {"image/png": "iVBORw0KGgo="}
CAPTION = {"figure": {"caption": "A line."}}


@pytest.mark.parametrize(
    ("output", "metadata", "fault"),
    [
        (new_output("stream", name="stderr", text="a.py:1: UserWarning: old\n  f()"), {}, "UserWarning: old"),
        (new_output("display_data", LABELLED), {}, "caption"),
        (new_output("display_data", CHART), CAPTION, r"adbook\.plots\.describe"),
        (new_output("display_data", IMAGE), CAPTION, r"mystnb\.image\.alt"),
        (new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}}), {}, "caption"),
    ],
)
def test_an_output_that_does_not_fit_a_page_is_refused(output, metadata, fault):
    cell = new_code_cell("f()", outputs=[output], execution_count=4, metadata={"mystnb": metadata})
    with pytest.raises(BookError, match=rf"^05\.ipynb, cell \[4\].*{fault}"):
        tidy(new_notebook(cells=[cell]), "05.ipynb")


@pytest.mark.parametrize(
    ("models", "fault"),
    [(["x" * 300_000], "a widget would take 300,"), (["x" * 250_000] * 7, "all widgets would take 1,75")],
)
def test_a_page_does_not_grow_heavy(models, fault):
    state = {str(i): {"state": {"frames": model}} for i, model in enumerate(models)}
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": state}}
    with pytest.raises(BookError, match=rf"^05\.ipynb: {fault}.*show fewer tasks or episodes"):
        tidy(new_notebook(metadata={"widgets": widgets}), "05.ipynb")


def test_what_fits_a_page_is_let_through():
    outputs = [
        new_output("stream", name="stderr", text="training: 100%|████| 3/3"),
        new_output("display_data", LABELLED),
    ]
    cell = new_code_cell("f()", outputs=outputs, metadata={"mystnb": CAPTION, "papermill": {"duration": 1}})
    notebook = tidy(new_notebook(cells=[cell], metadata={"papermill": {"input_path": "/home/me"}}), "05.ipynb")
    assert notebook.cells[0].outputs == outputs
    assert "papermill" not in str(notebook)


def test_vendored_files_are_what_their_list_says():
    listed = dict(
        re.findall(r"^\| `([^`]+)` .*`([0-9a-f]{64})` \|$", (STATIC / "VENDORED.md").read_text(), re.MULTILINE)
    )
    own = {"VENDORED.md", "book.css", "favicon.svg", "widgets-offline.js"}
    there = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.is_file()}
    there = {
        name: path
        for name, path in there.items()
        if name not in own and not name.startswith(("licences/", "pictures/"))
    }
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()} == listed


# The built book


def test_smoke_book_shows_no_error_and_no_warning(smoke_book):
    executed = sorted(smoke_book.notebooks.glob("*.ipynb"))
    assert [path.name for path in executed] == [path.name for path in CHAPTERS]
    for path in executed:
        notebook = nbformat.read(path, as_version=4)
        assert all(cell.execution_count for cell in _code(notebook)), path.name
        assert not [out for cell in _code(notebook) for out in cell.outputs if out.output_type == "error"]
    for path in _pages(smoke_book.site):
        assert not _soup(path).select(".output.traceback, .output.stderr, .system-message, .problematic"), path


def test_every_figure_has_a_caption_and_alternative_text(smoke_book):
    charts = 0
    for path in _pages(smoke_book.site):
        soup = _soup(path)
        for chart in soup.select("article .plotly-graph-div"):
            charts += 1
            assert _caption(chart), path
            assert chart.find_parent(attrs={"role": "img"})["aria-label"].strip(), path
        for image in soup.select("article img"):
            assert _caption(image), (path, image)
            # What Sphinx writes where nothing was given: the file's own name.
            assert Path(image.get("alt", "")).name not in ("", Path(image["src"]).name), (path, image)
    assert charts >= len(CHAPTERS)


# A widget is drawn into an element before the script that describes it.
UNDRAWN = (
    ".plotly-graph-div:not(:has(> .plot-container)), "
    "script[type='application/vnd.jupyter.widget-view+json']:not(.widget-subarea:not(:empty) + *)"
)
CLIPPED = (
    "[...document.querySelectorAll('.bd-article table')].filter(t => t.scrollWidth > t.parentNode.clientWidth).length"
)


@dataclass
class Visit:
    """What happened while a page was open."""

    page: str
    foreign: list[str] = field(default_factory=list)  # requests off the machine; they were blocked
    errors: list[str] = field(default_factory=list)  # of the console, of scripts, of requests
    undrawn: int = 0  # charts and widgets without a drawing
    unlabelled: int = 0  # drawings of widgets without a label
    clipped: int = 0  # tables that hide a column from a reader with a laptop
    overflow: int = 0  # pixels that a phone's reader would have to scroll sideways


@pytest.fixture(scope="module")
def served(smoke_book):
    """The built site's address on a plain file server."""
    with serve(smoke_book.site) as base:
        yield base


@pytest.fixture(scope="module")
def visits(smoke_book, served, browser):
    """Every page of the book, opened once."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found = [_visit(context, served, path.relative_to(smoke_book.site)) for path in _pages(smoke_book.site)]
    context.close()
    return found


def test_no_page_asks_for_anything_off_the_machine(visits):
    assert {visit.page: visit.foreign for visit in visits if visit.foreign} == {}


def test_no_page_reports_an_error(visits):
    assert {visit.page: visit.errors for visit in visits if visit.errors} == {}


def test_every_page_is_drawn_and_fits_its_screen(visits):
    assert {visit.page for visit in visits if visit.undrawn or visit.unlabelled or visit.clipped} == set()
    assert {visit.page: visit.overflow for visit in visits if visit.overflow > 0} == {}


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_player_moves_by_click_and_by_keyboard(smoke_book, served, browser, scheme):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    base = served if scheme == "http" else smoke_book.site.as_uri()
    page.goto(f"{base}/notebooks/05_in_context_rollouts.html")
    expect(page.locator(UNDRAWN)).to_have_count(0, timeout=60_000)  # what is drawn later would move the player
    timeline = page.get_by_role("slider", name="Time line").first
    said = page.locator(".adp-said").first
    expect(said).to_contain_text("Episode 1 of")
    before, box = said.inner_text(), timeline.bounding_box()
    timeline.click(position={"x": 0.95 * box["width"], "y": box["height"] / 2})
    expect(said).not_to_have_text(before)
    expect(said).not_to_contain_text("Episode 1 of")
    for key, told in (("Home", r"Episode 1 of \d+, step 0 "), ("ArrowRight", r"Episode 1 of \d+, step 1 ")):
        timeline.press(key)
        expect(said).to_contain_text(re.compile(told))
    page.close()


def _visit(context, base, path) -> Visit:
    page, visit = context.new_page(), Visit(path.as_posix())
    heard = listen(page, base)
    # Not "networkidle", which may come while a busy machine is still reading the page.
    page.goto(f"{base}/{path.as_posix()}", wait_until="load", timeout=120_000)
    with suppress(AssertionError):  # what is not drawn in time is counted, so that the test can name the page
        expect(page.locator(UNDRAWN)).to_have_count(0, timeout=60_000)
    visit.undrawn = page.locator(UNDRAWN).count()
    visit.unlabelled = page.locator("canvas:not([aria-label])").count()
    visit.clipped = page.evaluate(CLIPPED)
    page.set_viewport_size({"width": 390, "height": 800})
    visit.overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    page.close()
    visit.foreign = heard.foreign
    visit.errors = [text for text in heard.said if text.startswith("error: ")]
    return visit


def _pages(site: Path) -> list[Path]:
    pages = [
        *site.glob("book/*.html"),
        *site.glob("notebooks/*.html"),
        site / "index.html",
        site / "search.html",
    ]
    return sorted(pages)


def _soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


def _caption(node) -> str:
    """The caption of the innermost figure around a node that has one."""
    captions = (parent.find("figcaption") for parent in node.find_parents("figure"))
    return next((caption.get_text().strip() for caption in captions if caption), "")


def _from_parameters(chapter: Path) -> list:
    """The code cells of a chapter from the one tagged `parameters`."""
    cells = list(_code(nbformat.read(chapter, as_version=4)))
    return cells[next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])) :]


def _code(notebook):
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def _write(path: Path, cells: list) -> Path:
    cells[0].metadata["tags"] = ["parameters"]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), path)
    return path
