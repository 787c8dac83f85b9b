"""JupyterLab in a real browser: a server of the tests' own, and tabs that note everything they should not do.

How a server is started and when a notebook is ready is the business of ``tools/screenshots.py``, which makes
the pictures in the same way.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

SHOTS = Path(__file__).parents[2] / "build" / "browser"
"""Pictures of a test run, to be looked at."""

# What Notebook 7.6 itself complains about while it starts, also with an empty notebook.
_OWN_ERRORS = {
    "notebook": (
        "Cannot read properties of undefined (reading 'schema')",
        "Command 'filebrowser:open-path' not registered.",
    )
}
_SETTINGS = "config/lab/user-settings/@jupyterlab"
# All outputs are in the page at once, not only those near the part that is on screen.
_ALL_CELLS = '{"windowingMode": "none", "maxNumberOutputs": 10000, "autoStartDefaultKernel": true}'

_RUN_CELL = """async i => { const w = window.jupyterapp.shell.currentWidget; w.content.activeCellIndex = i;
  await window.jupyterapp.commands.execute('notebook:run-cell'); }"""
_TO_TOP = """() => { const notebook = window.jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = 0; return notebook.scrollToItem(0, 'start'); }"""
_SAVE = "async () => { await window.jupyterapp.commands.execute('docmanager:save'); }"


def chromium() -> str:
    """Return the path of a browser; skips the test when there is none."""
    pytest.importorskip("playwright", reason="no browser test: the dependency group `browser` is missing")
    pytest.importorskip("jupyterlab", reason="no browser test: the dependency group `browser` is missing")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser test: there is no Chromium; on Debian: apt-get install chromium")
    return found


@dataclass
class Tab:
    """One notebook in one tab.

    Attributes
    ----------
    app
        ``lab``, or ``notebook`` for Notebook 7.
    errors
        Errors of the console, and exceptions that nobody caught.
    strays
        Addresses beyond this machine that the page asked for, and windows or dialogs that it opened.
    blocked
        Addresses that the browser refused to ask for, because the page's own policy forbids it.
    """

    page: Any
    address: str
    name: str
    app: str = "lab"
    errors: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        page = self.page
        page.on("console", lambda m: self._complained(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self._complained(str(error)))
        page.on("request", lambda request: self._asked(request.url))
        page.on("requestfailed", self._failed)
        page.on("websocket", lambda socket: self._asked(socket.url))
        page.on("popup", lambda popup: self.strays.append(f"window {popup.url}"))
        page.on("dialog", self._dialog)

    def _complained(self, text: str) -> None:
        if text not in _OWN_ERRORS.get(self.app, ()):
            self.errors.append(text)

    def _asked(self, url: str) -> None:
        own = self.address.removeprefix("http")
        if not url.startswith((f"http{own}/", f"ws{own}/", "data:", "blob:", "about:")):
            self.strays.append(url)

    def _failed(self, request: Any) -> None:
        # The browser itself refused, by the policy or the origin of the page: nothing was sent.
        if request.failure in ("csp", "origin") and request.url in self.strays:
            self.strays.remove(request.url)
            self.blocked.append(request.url)

    def _dialog(self, dialog: Any) -> None:
        self.strays.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def open(self) -> Tab:
        """Open the notebook, or open it again, and wait for its kernel."""
        from screenshots import open_notebook

        open_notebook(self.page, self.address, self.name, app=self.app)
        return self

    def run_all(self, *, seconds: float = 60) -> None:
        """Run every cell to its end; a cell that fails fails the test."""
        from screenshots import RUN_ALL, wait_until_run

        self.page.evaluate(RUN_ALL)
        wait_until_run(self.page, seconds)

    def run(self, cell: int) -> None:
        """Run one cell and return when the kernel has answered."""
        self.page.evaluate(_RUN_CELL, cell)

    def start(self, cell: int) -> None:
        """Run one cell and return at once."""
        self.page.evaluate(f"i => {{ ({_RUN_CELL})(i); }}", cell)

    def save(self) -> None:
        """Save the notebook."""
        self.page.evaluate(_SAVE)

    def theme(self, name: str) -> None:
        """Change the theme: ``light`` or ``dark``."""
        from screenshots import THEME, THEMES

        self.page.evaluate(THEME, THEMES[name])
        self.page.wait_for_function(
            "dark => document.body.dataset.jpThemeLight === (dark ? 'false' : 'true')", arg=name == "dark"
        )

    def shot(self, name: str) -> Path:
        """Keep a picture of the page."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}.png"
        self.page.evaluate(_TO_TOP)
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=path)
        return path


@dataclass(frozen=True)
class Lab:
    """A JupyterLab over an empty folder, and a browser."""

    address: str
    folder: Path
    browser: Any

    def write(self, name: str, *cells: str) -> Path:
        """Write a notebook of these code cells."""
        v4: Any = nbformat.v4  # not typed
        spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        code = [v4.new_code_cell(cell) for cell in cells]
        path = self.folder / name
        nbformat.write(v4.new_notebook(cells=code, metadata={"kernelspec": spec}), path)  # type: ignore[no-untyped-call]
        return path

    @contextmanager
    def tab(self, name: str, *, app: str = "lab", width: int = 1000, height: int = 1400) -> Iterator[Tab]:
        """Open a notebook of the folder in a tab of its own: of JupyterLab, or of Notebook 7."""
        page = self.browser.new_page(viewport={"width": width, "height": height})
        try:
            yield Tab(page, self.address, name, app).open()
        finally:
            page.close()


@contextmanager
def open_lab(home: Path) -> Iterator[Lab]:
    """Start a server and a browser; skips the test when there is no browser.

    For one module at a time: while its browser is there, no other test of this process could run an event
    loop.
    """
    executable = chromium()
    from playwright.sync_api import sync_playwright
    from screenshots import FLAGS, jupyter_lab

    folder = home / "work"
    settings = home / _SETTINGS / "notebook-extension"
    for each in (folder, settings):
        each.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(_ALL_CELLS)
    with jupyter_lab(folder, home) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        try:
            yield Lab(address, folder, browser)
        finally:
            browser.close()
