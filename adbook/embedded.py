"""Widgets that live without a kernel: what they show lies in their state, which a page carries with it."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from pathlib import Path
from string import Template
from typing import Any

import anywidget

from adbook.files import write_whole

WEB = Path(__file__).parent / "web"  # scripts and styles
_IMPORT, _EXPORT = re.compile(r'^import .* from "\./\w+\.js";\n', re.M), re.compile(r"^export (?!default)", re.M)


def script(*modules: str) -> str:
    """Join modules of ``web/`` to one, which is all that an anywidget can have: each after those that it imports."""
    texts = ((WEB / f"{name}.js").read_text() for name in modules)
    return "\n".join(_EXPORT.sub("", _IMPORT.sub("", text)) for text in texts)


class Embedded(anywidget.AnyWidget):
    """An anywidget that can also be written as a page of its own."""

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one file that shows the widget in any browser, from the disk and without a network.

        Args:
            path: File to write; missing folders are made, an existing file is replaced in one step.

        Returns:
            The path written.
        """
        state = self._embedded()
        names = [name for name, value in state.items() if isinstance(value, bytes)]
        state |= {name: base64.b64encode(state[name]).decode() for name in names}
        page = Template((WEB / "page.html").read_text()).substitute(
            title=html.escape(repr(self)),
            css=self._css,
            esm=self._esm,
            state=_script(state),
            bytes=_script(names),
        )
        return write_whole(path, lambda file: file.write_text(page))

    def _embedded(self) -> dict[str, Any]:
        """The state that a page without a kernel needs."""
        others = set(anywidget.AnyWidget.class_trait_names(sync=True))  # of every widget
        names = [name for name in self.trait_names(sync=True) if name not in others and not name.startswith("_")]
        return {name: getattr(self, name) for name in names}


def _script(value: object) -> str:
    """As a literal inside a script element, which it must not close."""
    return json.dumps(value).replace("<", "\\u003c")
