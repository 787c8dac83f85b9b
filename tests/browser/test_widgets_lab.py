"""The panel in JupyterLab and in Notebook 7, with a kernel that may be idle, busy, restarted or not there."""

from __future__ import annotations

import copy
import re
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import nbconvert
import nbformat
import pytest
from support.axe import violations
from support.kernel import WITH_FAKE
from support.lab import SHOTS
from support.sidecar import check_gone, make_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.lab import Lab, Tab

pytestmark = pytest.mark.browser
exporters: Any = nbconvert  # not typed

# A machine with a GPU that nobody has, a request that never ends, and a runner that has crashed.
PANEL = f"""{WITH_FAKE}
from support.planner import FakePlanner
from nbinfer.widgets import show
from nbinfer.widgets.controller import Controller
engine.script = lambda request: ["one ", HANG]
stream = session.find("fake").stream("Tell me a story that never ends")
controller = Controller(FakePlanner())
controller.look()
controller.look_around()
controller.say("other: the model's process ended: killed by SIGKILL.", kind="error", log="last words\\n" * 40)
panel = show("panel", controller)
panel
"""
BUSY = "import time\ntime.sleep(6)"
# What is left of a closed panel: its threads, and its comms on the kernel's side.
LEFT = """
import comm, threading
before = len(comm.get_comm_manager().comms)
panel.close()
ours = ("nbinfer-panel", "nbinfer-widget", "nbinfer-monitor")
threads = [thread for thread in threading.enumerate() if thread.name.startswith(ours)]
for thread in threads:
    thread.join(20)
print("left:", len(comm.get_comm_manager().comms) - before, [t.name for t in threads if t.is_alive()])
"""
AWAIT = 'r = await session.find("fake").ainfer("And another")\nprint("awaited:", r.finish_reason)'
VIEWS = "print('views:', len(controller._views))"
_SECONDS_LEFT = r"""() => Number(
  document.querySelector('.nbinfer-w').innerText.match(/unloads in 4 min (\d+) s/)?.[1] ?? 60)"""
_WORDS = "() => document.querySelector('.jp-Notebook').innerText"
_RESTART = """async () => {
  const session = window.jupyterapp.shell.currentWidget.sessionContext.session;
  await session.kernel.restart();
}"""


@contextmanager
def _panel(lab: Lab, name: str, *, app: str = "lab") -> Iterator[Tab]:
    """Open a notebook whose first cell has shown a panel."""
    lab.write(name, PANEL, BUSY, LEFT, VIEWS, "panel", AWAIT)
    with lab.tab(name, app=app, width=1100, height=1700) as tab:
        tab.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
        tab.run(0)
        tab.page.get_by_role("region", name="nbinfer panel").wait_for()
        yield tab


@pytest.fixture(scope="module", params=["lab", "notebook"])
def shared(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """One panel in each application, for the tests that leave it as it was."""
    with _panel(lab, f"shared-{request.param}.ipynb", app=request.param) as tab:
        yield tab


@pytest.fixture
def own(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """A panel for one test."""
    with _panel(lab, f"{request.node.name}.ipynb") as tab:
        yield tab


def _plan_too_much(page: Any) -> Any:
    """Plan the demo model with more context than there is room for; return the slider."""
    page.get_by_role("button", name="Plan demo", exact=True).press("Enter")
    page.locator("output").get_by_text("4,096 tokens").wait_for()
    slider = page.get_by_role("slider", name="Context")
    slider.press("End")
    page.locator(".nbinfer-w-verdict").get_by_text("does not fit", exact=True).wait_for()
    page.get_by_text("exact: llama.cpp's own plan", exact=True).wait_for()
    return slider


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_asked_of_others_nothing_fails_and_a_screen_reader_finds_all(
    shared: Tab, theme: str
) -> None:
    page = shared.page
    panel = page.get_by_role("region", name="nbinfer panel")
    _plan_too_much(page)
    for summary in panel.locator("details:not([open]) > summary").all():
        if summary.is_visible():
            summary.press("Enter")
    shared.theme(theme)
    page.locator("#jupyterlab-splash").wait_for(state="detached")
    shared.shot(f"panel-{shared.app}-{theme}")
    for words in ("3 GiB of 16 GiB used", "Tell me a story that never ends", "last words"):
        assert panel.get_by_text(words).first.is_visible()
    assert violations(page, ".nbinfer-w") == []
    assert (shared.strays, shared.errors) == ([], [])


def test_a_slider_is_answered_by_the_formula_and_then_exactly(shared: Tab) -> None:
    page = shared.page
    slider = _plan_too_much(page)
    page.get_by_role("button", name="context 16,384").press("Enter")
    page.locator(".nbinfer-w-verdict").get_by_text("fits", exact=True).wait_for()
    assert slider.get_attribute("aria-valuetext") == "16,384 tokens"
    # The keys of the notebook's command mode do not reach it: no cell is removed, added, cut or left.
    for key in "ddbax":
        slider.press(key)
        page.get_by_role("button", name="Plan demo", exact=True).press(key)
    page.get_by_label("KV cache type").press("ArrowDown")
    assert page.get_by_label("KV cache type").input_value() == "q8_0"
    assert page.locator(".jp-CodeCell").count() == 6


def test_the_demo_model_is_loaded_and_unloaded_with_the_keyboard_alone(shared: Tab) -> None:
    page = shared.page
    page.get_by_role("button", name="Plan demo", exact=True).press("Enter")
    load = page.get_by_role("button", name="Load", exact=True)
    load.wait_for()
    page.get_by_role("slider", name="Context").press("Home")
    keep = page.get_by_label("and keep it")
    keep.press("ArrowDown")
    assert keep.input_value() == "5m"
    load.press("Enter")
    unload = page.get_by_role("button", name="Unload demo", exact=True)
    unload.wait_for()
    page.get_by_text("demo is loaded").wait_for()
    # Idle from now on: the time that is left is counted down.
    page.get_by_text(re.compile(r"unloads in 4 min 5\d s")).wait_for()
    left = page.evaluate(_SECONDS_LEFT)
    page.wait_for_function(f"before => ({_SECONDS_LEFT})() < before", arg=left)
    unload.press("Enter")
    unload.wait_for(state="detached")
    page.get_by_role("button", name="Dismiss this message").last.press("Enter")
    page.get_by_text("demo is loaded").wait_for(state="detached")


def test_a_request_is_stopped_from_the_panel(own: Tab) -> None:
    stop = own.page.get_by_role("button", name="Stop: Tell me a story that never ends")
    stop.press("Enter")
    own.page.get_by_text("No request is running.").wait_for()
    # A cell that awaits its answer leaves the kernel free: it is stopped too, and ends.
    own.start(5)
    own.page.get_by_role("button", name="Stop: And another").press("Enter")
    own.page.get_by_text("awaited: interrupted", exact=True).wait_for()


def test_a_busy_kernel_is_said_and_stop_does_not_pretend(shared: Tab) -> None:
    page = shared.page
    stop = page.get_by_role("button", name="Stop: Tell me a story that never ends")
    shared.start(1)
    page.get_by_text("A cell is running. Buttons act when it ends").wait_for()
    assert stop.is_disabled()
    shared.shot(f"panel-{shared.app}-busy")
    page.get_by_text("A cell is running. Buttons act when it ends").wait_for(state="hidden")
    assert stop.is_enabled()


def test_a_restarted_kernel_leaves_a_panel_that_says_so(own: Tab) -> None:
    own.page.evaluate(_RESTART)
    own.page.get_by_text("Not connected to a kernel: run the cell again.").wait_for()
    own.run(0)
    own.page.get_by_role("button", name="Stop: Tell me a story that never ends").wait_for()


def test_a_closed_panel_leaves_no_thread_and_no_comm(own: Tab) -> None:
    own.page.get_by_text("3 GiB of 16 GiB used").wait_for()
    own.run(2)
    own.page.get_by_text("left: -2 []").wait_for()  # the view's and its layout's
    assert own.page.get_by_role("region", name="nbinfer panel").count() == 0


def test_a_panel_that_was_shut_and_opened_again_lives_and_is_not_counted_twice(own: Tab) -> None:
    page = own.page
    own.save()
    own.open()
    page.get_by_text("3 GiB of 16 GiB used").wait_for()
    assert page.get_by_role("button", name="Stop: Tell me a story that never ends").is_enabled()
    own.run(3)
    page.get_by_text("views: 1", exact=True).wait_for()
    own.shot("panel-lab-opened-again")
    assert own.errors == []


def test_a_closed_panel_that_is_shown_again_is_a_picture_that_says_so(own: Tab) -> None:
    own.run(2)
    own.page.get_by_text("left: -2 []").wait_for()
    own.run(4)
    own.page.get_by_text("This widget is closed").wait_for()
    own.shot("panel-lab-closed")
    assert own.errors == []


@pytest.fixture(scope="module")
def saved(lab: Lab) -> Any:
    """A notebook with a panel, as JupyterLab has saved it."""
    with _panel(lab, "saved.ipynb") as tab:
        tab.page.get_by_text("3 GiB of 16 GiB used").wait_for()
        tab.save()
        return nbformat.read(lab.folder / tab.name, as_version=4)  # type: ignore[no-untyped-call]


IN_THE_PICTURE = (
    "This machine",
    "Tell me a story that never ends",
    "3 GiB of 16 GiB used",
    "killed by SIGKILL",
)


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_an_untrusted_notebook_shows_the_still_picture(saved: Any, lab: Lab, app: str) -> None:
    changed = copy.deepcopy(saved)
    changed.metadata.pop("widgets", None)
    # Changed by somebody else: its signature is no longer ours.
    changed.cells[0].source = f"'from somebody else, for {app}'"
    name = f"untrusted-{app}.ipynb"
    nbformat.write(changed, lab.folder / name)  # type: ignore[no-untyped-call]
    with lab.tab(name, app=app) as other:
        other.page.get_by_text("This machine").wait_for()
        words = other.page.evaluate(_WORDS)
        assert all(each in words for each in IN_THE_PICTURE)
        assert other.page.get_by_role("button", name="Unload fake").count() == 0
        other.shot(f"panel-{app}-untrusted")
        assert (other.strays, other.errors) == ([], [])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_an_export_to_html_shows_the_still_picture(saved: Any, lab: Lab, theme: str) -> None:
    body, _ = exporters.HTMLExporter(theme=theme).from_notebook_node(saved)
    path = lab.folder / f"export-{theme}.html"
    path.write_text(body)
    page = lab.browser.new_page(viewport={"width": 1100, "height": 1500})
    try:
        page.goto(path.as_uri(), wait_until="domcontentloaded")
        words = page.evaluate("() => document.body.innerText")
        assert all(each in words for each in IN_THE_PICTURE)
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"panel-export-{theme}.png")
    finally:
        page.close()


def test_an_export_to_markdown_has_the_words_of_the_panel(saved: Any) -> None:
    body, _ = exporters.MarkdownExporter().from_notebook_node(saved)
    assert all(each in body for each in IN_THE_PICTURE)
    assert "object at 0x" not in body


# The panel itself, with a sidecar of its own.
REAL = """
import os, signal
os.environ["NBINFER_RUNTIME_DIR"] = {folder!r}
import nbinfer as nb
from nbinfer.session import session
panel = nb.panel()
panel
"""
COMPARE = """
planned = {each["kind"]: each["bytes"] for each in panel.watched.state["plan"]["segments"]}
held = session.find("demo").measured_memory()["CPU"]
weights = planned.get("weights", 0) + planned.get("file_backed", 0)
same = (weights, planned["cache"], planned["compute"]) == (held["weights"], held["context"], held["compute"])
print("planned and held:", same, session.find("demo").info.context_size)
"""
KILL = 'os.kill(session.find("demo").engine.hold.pid, signal.SIGKILL)'
AGAIN = 'print("again:", nb.infer("What is the capital of France?"))'
END = """
from nbinfer.sidecar import discovery
nb.unload()
print("stopped:", discovery.stop())
"""
# Sixty moves a second for a second, as a hand makes them: to the end and back, ending at the second stop.
_DRAG = """async () => {
  const slider = document.querySelector('.nbinfer-w input[type=range]'), most = Number(slider.max);
  const began = performance.now();
  for (let i = 0; i <= 60; i++) {
    const way = i / 60 * 2 * most, at = i === 60 ? 1 : Math.round(way <= most ? way : 2 * most - way);
    slider.value = at;
    slider.dispatchEvent(new Event('input', { bubbles: true }));
    await new Promise(done => setTimeout(done, Math.max(0, began + i * 1000 / 60 - performance.now())));
  }
}"""


@pytest.fixture(scope="module")
def real(lab: Lab) -> Iterator[Tab]:
    """The panel of this machine."""
    folder = make_folder()
    lab.write("real.ipynb", REAL.format(folder=str(folder)), COMPARE, KILL, AGAIN, END)
    with lab.tab("real.ipynb", width=1100, height=1700) as tab:
        tab.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
        tab.run(0)
        tab.page.get_by_role("region", name="nbinfer panel").wait_for()
        yield tab
        tab.run(4)
        tab.page.get_by_text("stopped: True").wait_for()
    check_gone(folder)
    shutil.rmtree(folder)


def test_after_sixty_moves_a_second_the_panel_has_the_bytes_that_the_load_then_takes(real: Tab) -> None:
    page = real.page
    page.get_by_role("button", name="Plan demo", exact=True).press("Enter")
    page.get_by_text("exact: llama.cpp's own plan", exact=True).wait_for()
    page.evaluate(_DRAG)
    page.locator("output").get_by_text("768 tokens").wait_for()
    page.get_by_text("exact: llama.cpp's own plan", exact=True).wait_for()
    page.get_by_role("button", name="Load", exact=True).press("Enter")
    page.get_by_text("demo is loaded").wait_for()
    facts = page.locator(".nbinfer-w-facts").filter(has_text="measured").inner_text()
    measured, estimated = re.findall(r"([\d.]+ [KMG]iB) (?:measured|estimated)", facts)
    assert measured == estimated
    real.run(1)
    page.get_by_text("planned and held: True 768").wait_for()
    real.shot("panel-lab-real")
    page.get_by_role("button", name="Unload demo", exact=True).press("Enter")
    page.get_by_text("Nothing is loaded.").wait_for()
    page.get_by_role("button", name="Dismiss this message").press("Enter")
    assert (real.strays, real.errors) == ([], [])


def test_a_crashed_runner_is_said_with_the_end_of_its_log_and_the_next_cell_works(real: Tab) -> None:
    page = real.page
    page.get_by_role("button", name="Plan demo", exact=True).press("Enter")
    into = page.get_by_label("into")
    into.press("ArrowDown")
    assert into.input_value() == "sidecar"
    page.get_by_role("button", name="Load", exact=True).press("Enter")
    page.get_by_text("demo is loaded").wait_for(timeout=60_000)
    page.get_by_text("llamacpp, in the sidecar").wait_for()
    real.run(2)
    page.get_by_text("A model's process in the sidecar crashed").wait_for()
    message = page.get_by_role("listitem").filter(has_text="A model's process in the sidecar crashed")
    message.locator("summary").press("Enter")
    assert "demo" in message.locator("pre").inner_text()
    real.shot("panel-lab-crashed")
    real.run(3)
    page.get_by_text("again: The capital of France is Paris.").wait_for()
    assert (real.strays, real.errors) == ([], [])
