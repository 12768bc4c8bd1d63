"""The book, from notebooks to a static site: execute the chapters, stage them with the prose, build pages.

    notebooks/*.ipynb ──papermill──► _build/stage/notebooks/ ─┐
    _config.yml, _toc.yml, book/ ─────────────copy───────────┴─► jupyter-book ─► _build/html

The site is built beside the old one and moved into its place at the end, so a failure leaves the last good
one alone. Results that chapters keep in `runs/` make a second build quick; the pages themselves are always
built afresh, because a page that is not read again repeats none of its warnings.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from adbook import exhibit
from adbook.experiments import ROOT, check_profile

_WIDGET, _STATE = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("view", "state"))
_MOST_BYTES = {"a widget": 300_000, "all widgets": 1_500_000}  # that a page carries
_WARNING = re.compile(r"^.*\w*Warning: .*$", re.MULTILINE)


class BookError(RuntimeError):
    """The book could not be built; the message says where it stopped and what to do."""


def build(profile: str = "laptop", output: Path | None = None) -> Path:
    """Execute every chapter and build the site.

    Args:
        profile: each chapter gets it as its parameter `profile`.
        output: the folder that receives `stage/` and `html/`; `_build/` of the repository if not given.

    Returns:
        The site's folder, `output/html`.

    Raises:
        ValueError: the profile is unknown.
        BookError: a chapter failed, warned or shows a figure without its texts, or Sphinx warned.
    """
    check_profile(profile)
    chapters = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not chapters:
        raise BookError(f"no chapters in {ROOT / 'notebooks'}: install adbook with `pip install -e .` from a clone")
    output = (output or ROOT / "_build").resolve()
    stage = output / "stage"
    for folder, made in ((stage, "_toc.yml"), (output / "html", "objects.inv")):  # by an earlier build
        if folder.exists() and not (folder / made).is_file():
            raise BookError(f"{folder} is there and is no earlier build's; move it away, or choose another --output")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    for name in ("_toc.yml", "_config.yml"):
        shutil.copy(ROOT / name, stage)
    execute(profile, chapters, stage / "notebooks")
    shutil.copytree(ROOT / "book", stage / "book")
    exhibit.stage(stage / "book" / "_static" / "live")
    return build_site(stage, output)


def execute(profile: str, chapters: Sequence[Path], output: Path) -> list[Path]:
    """Run chapters by papermill, one after another, each in a fresh kernel of this Python; print the times.

    Returns:
        The executed notebooks' paths, in `output`, under their own names.

    Raises:
        BookError: a cell raised, warned or shows a figure without its texts, or a kernel died; the message
            names the chapter and the cell.
    """
    output.mkdir(parents=True, exist_ok=True)
    executed = []
    for number, chapter in enumerate(chapters, start=1):
        print(f"[{number}/{len(chapters)}] {chapter.stem:<24}", end="", flush=True)
        start = time.perf_counter()
        executed.append(_execute_one(profile, chapter, output / chapter.name))
        print(f"{time.perf_counter() - start:7.1f} s", flush=True)
    return executed


def build_site(stage: Path, output: Path) -> Path:
    """Turn the staged book into `output/html`, which it replaces; any Sphinx warning is an error.

    Raises:
        BookError: Sphinx reported something; the message holds its report.
    """
    print(f"{'pages':<30}", end="", flush=True)
    start = time.perf_counter()
    program = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    options = ["--path-output", str(stage), "-W", "--keep-going", "-q"]
    result = subprocess.run(
        [sys.executable, "-c", program, "build", str(stage), *options], capture_output=True, text=True
    )
    if result.returncode:
        raise BookError(f"the pages could not be built:\n{result.stdout}\n{result.stderr}".rstrip())
    site, old = output / "html", output / "html.old"
    shutil.rmtree(old, ignore_errors=True)
    if site.exists():
        os.replace(site, old)
    os.replace(stage / "_build" / "html", site)
    shutil.rmtree(old, ignore_errors=True)
    print(f"{time.perf_counter() - start:7.1f} s", flush=True)
    return site


def tidy(notebook: NotebookNode, name: str) -> NotebookNode:
    """Check an executed notebook's outputs and drop what only concerns the machine that ran it.

    Raises:
        BookError: a cell warned on its error stream (progress bars go there too; pages leave it out), or
            shows a figure without a caption or without alternative text, or a widget is too heavy for a page.
    """
    fault = _weight(notebook.metadata.get("widgets", {}).get(_STATE, {}).get("state", {}))
    if fault:
        raise BookError(f"{name}: {fault}")
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        for output in cell.get("outputs", []):
            fault = _fault(output, cell.metadata.get("mystnb", {}))
            if fault:
                raise BookError(f"{name}, cell [{cell.execution_count}] {fault}")
    return notebook


def _fault(output: NotebookNode, options: NotebookNode) -> str | None:
    """What makes an output unfit for a page, if anything; `options` are the cell's `mystnb` metadata."""
    warning = _WARNING.search(output.get("text", "")) if output.get("name") == "stderr" else None
    if warning:
        return f"warns: {warning.group().strip()}"
    data = output.get("data", {})
    chart = "plotly-graph-div" in data.get("text/html", "")
    image = any(mime.startswith("image/") for mime in data)
    if not (chart or image or _WIDGET in data):
        return None
    if not options.get("figure", {}).get("caption"):
        return "shows a figure without a caption: set mystnb.figure.caption in the cell's metadata"
    if chart and not re.search(r'aria-label="[^"]', data["text/html"]):
        return "shows a chart without alternative text: use adbook.plots.describe(figure, alt)"
    if image and not options.get("image", {}).get("alt"):
        return "shows an image without alternative text: set mystnb.image.alt in the cell's metadata"
    return None


def _weight(state: dict) -> str | None:
    """What is too heavy among the widgets of a page, if anything."""
    sizes = [len(json.dumps(model)) for model in state.values()]
    for what, size in (("a widget", max(sizes, default=0)), ("all widgets", sum(sizes))):
        if size > _MOST_BYTES[what]:
            most = _MOST_BYTES[what]
            return f"{what} would take {size:,} bytes of the page; at most {most:,}: show fewer tasks or episodes"
    return None


def _execute_one(profile: str, chapter: Path, target: Path) -> Path:
    # Jupyter looks here first: the kernel is this Python's, whatever kernels a user has installed elsewhere.
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
    # The debugger's remark on frozen modules is of no use to a reader.
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    parameters = {} if profile == "laptop" else {"profile": profile}  # laptop is what every chapter says itself
    options = {
        "kernel_name": "python3",
        "cwd": ROOT,
        "coalesce_streams": True,  # lines that are printed a moment apart are one output
        "progress_bar": {"leave": False, "desc": chapter.stem} if sys.stderr.isatty() else False,
        # Each kernel would remark that it listens on the local machine unencrypted.
        "extra_arguments": ["--IPKernelApp.log_level=ERROR"],
    }
    try:
        papermill.execute_notebook(chapter, target, parameters, **options)
    except PapermillExecutionError as error:
        raise BookError(_report(chapter, error)) from None
    except DeadKernelError:
        raise BookError(f"{chapter.name}: the kernel died, most often for want of memory") from None
    nbformat.write(tidy(nbformat.read(target, as_version=4), chapter.name), target)
    return target


def _report(chapter: Path, error: PapermillExecutionError) -> str:
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    return f"{chapter.name}, cell [{error.exec_count}] raised {error.ename}: {error.evalue}\n\n{trace}"
