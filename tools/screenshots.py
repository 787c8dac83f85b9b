"""Take pictures of a notebook as JupyterLab shows it, in a real browser.

    python tools/screenshots.py notebooks/01-quickstart.ipynb docs/images
    python tools/screenshots.py tools/pictures/panel.py docs/images --element .jp-OutputArea-output

Runs every cell in a JupyterLab of its own, then writes ``<name>-light.png`` and ``<name>-dark.png``. Needs
the dependency group ``browser`` and a Chromium (``--chromium``, default: the one on PATH). Exits with 1 when
a cell fails, when the page asks anything of another machine, or when the console shows an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

TOKEN = "screenshots"  # noqa: S105 - of a server that listens on loopback for a minute
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    # A process per frame is more than a test's machine has.
    "--disable-features=IsolateSandboxedIframes",
    # Whatever a page asks of another machine is noted, and goes nowhere.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
READY = """async () => {
  const app = window.jupyterapp; await app.restored; const w = app.shell.currentWidget;
  await w.context.ready; await w.sessionContext.ready;
  const k = w.sessionContext.session.kernel; await k.info;
  if (k.connectionStatus !== 'connected') throw new Error(k.connectionStatus);
}"""
RUN_ALL = """async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells'); }"""
STATE = """() => { const cells = window.jupyterapp.shell.currentWidget.content.model.cells; const out = [];
  for (let i = 0; i < cells.length; i++) { const c = cells.get(i); if (c.type === 'code') {
    const outputs = c.outputs.toJSON();
    const error = outputs.find(o => o.output_type === 'error');
    out.push([c.executionCount, error ? `${error.ename}: ${error.evalue}` : '']); } } return out; }"""
THEME = """async theme => { await window.jupyterapp.commands.execute('apputils:change-theme', {theme}); }"""


@contextmanager
def jupyter_lab(folder: Path, home: Path) -> Iterator[str]:
    """Run a JupyterLab over ``folder`` with a home of its own; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = home / "config" / "labconfig"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "page_config.json").write_text(
        '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}',
    )
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
    ]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"]
    command += [f"--ServerApp.root_dir={folder}"]
    command += [f"--{app}.expose_app_in_browser=True" for app in ("LabApp", "JupyterNotebookApp")]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=null"]
    log = (home / "server.log").open("wb")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # noqa: S603 - our own words
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=1).close()  # noqa: S310 - loopback
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            raise SystemExit((home / "server.log").read_text()[-2000:])
        yield address
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def wait_until_run(page: Page, seconds: float) -> None:
    """Wait for every code cell; exits when one failed or time ran out."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        states = page.evaluate(STATE)
        failed = [error for _, error in states if error]
        if failed:
            raise SystemExit(f"a cell failed: {failed[0]}")
        if all(count for count, _ in states):
            return
        page.wait_for_timeout(300)
    raise SystemExit(f"the notebook did not finish in {seconds:g} s.")


def open_notebook(page: Page, address: str, name: str, *, app: str = "lab") -> None:
    """Open a notebook in ``lab`` (a workspace of its own) or ``notebook`` (7) and wait for its kernel."""
    at = f"lab/workspaces/{uuid.uuid4().hex}/tree" if app == "lab" else "notebooks"
    page.goto(f"{address}/{at}/{name}?token={TOKEN}")
    for _ in range(60):
        try:
            page.evaluate(READY)
        except Exception:  # noqa: BLE001 - not ready yet, whatever the reason
            page.wait_for_timeout(500)
        else:
            return
    raise SystemExit("JupyterLab's kernel did not start.")


def as_notebook(source: Path, folder: Path) -> str:
    """Put a notebook, or a script whose cells begin with ``# %%``, into ``folder``; return its name there."""
    if source.suffix == ".ipynb":
        shutil.copy(source, folder / source.name)
        return source.name
    v4: Any = nbformat.v4  # not typed
    cells = [part.partition("\n")[2].strip() for part in ("\n" + source.read_text()).split("\n# %%")[1:]]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = v4.new_notebook(cells=[v4.new_code_cell(c) for c in cells], metadata={"kernelspec": spec})
    name = f"{source.stem}.ipynb"
    nbformat.write(notebook, folder / name)  # type: ignore[no-untyped-call]
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description="Take pictures of a notebook as JupyterLab shows it.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--height", type=int, default=1500)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--element", help="of the page, the last element that this CSS selector finds")
    parser.add_argument("--seconds", type=float, default=180)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        home = Path(scratch)
        folder = home / "work"
        folder.mkdir()
        name = as_notebook(options.notebook, folder)
        with jupyter_lab(folder, home) as address:
            browser = playwright.chromium.launch(executable_path=options.chromium, headless=True, args=FLAGS)
            page = browser.new_page(viewport={"width": options.width, "height": options.height})
            page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
            page.on(
                "request",
                lambda r: None
                if r.url.startswith((address, "data:", "blob:", "ws://127"))
                else problems.append(r.url),
            )
            open_notebook(page, address, name)
            page.evaluate(RUN_ALL)
            wait_until_run(page, options.seconds)
            page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
            for theme, label in THEMES.items():
                page.evaluate(THEME, label)
                page.wait_for_timeout(1500)
                page.evaluate("() => document.querySelector('.jp-WindowedPanel-outer')?.scrollTo(0, 0)")
                page.wait_for_timeout(700)
                shown = page.locator(options.element).last if options.element else page
                shown.screenshot(path=options.out / f"{options.notebook.stem}-{theme}.png")
            browser.close()
    for problem in problems:
        print("problem:", problem)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
