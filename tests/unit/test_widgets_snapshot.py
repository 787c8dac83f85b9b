"""What is seen of a widget where widgets cannot run."""

from __future__ import annotations

import html
import re
import sys
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
from support.hostile import CORPUS, problems
from support.planner import FakePlanner

from nbinfer import widgets
from nbinfer.display.style import STYLE
from nbinfer.widgets.controller import Controller
from nbinfer.widgets.snapshot import HINT, snapshot
from nbinfer.widgets.ticks import Monitor
from nbinfer.widgets.watched import Pulse

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def panel() -> Iterator[Controller]:
    controller = Controller(FakePlanner(), monitor=Monitor(60), pulse=Pulse(None))
    controller.look()
    controller.look_around()
    yield controller
    controller.close()


def _plan(panel: Controller, context_size: int = 65536) -> None:
    panel.state.set(
        plan={**FakePlanner().quick("demo", {"context_size": context_size}), "ref": "demo", "error": ""}
    )


def test_the_words_of_the_panel_are_all_in_its_text(panel: Controller) -> None:
    _plan(panel)
    panel.say("demo is loaded; it took 2 s.")
    text = snapshot("panel", panel.state.parts())[0]["text/plain"]
    for words in (
        "demo is loaded; it took 2 s.",
        "3 GiB of 16 GiB used",
        "Nothing is loaded.",
        "demo-embed",
        "9.25 GiB of 8 GiB",
        "does not fit",
        "context 16,384",
        "cache 4 GiB",
        "llamacpp",
    ):
        assert words in text


def test_the_html_says_the_same_as_the_text(panel: Controller) -> None:
    _plan(panel)
    data = snapshot("panel", panel.state.parts())[0]
    shown = html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", data["text/html"])).split()
    bars = re.sub("[█░]", "", data["text/plain"]).split()
    assert shown == bars


def test_a_bar_in_text_is_as_long_as_its_part(panel: Controller) -> None:
    text = snapshot("monitor", panel.state.parts())[0]["text/plain"]
    lines = [line for line in text.splitlines() if "GiB" in line]
    assert [line.count("█") for line in lines] == [round(20 * 3 / 16), round(20 / 8)]


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS.keys())
def test_hostile_names_are_inert_in_a_snapshot(panel: Controller, text: str) -> None:
    row = {**panel.state["models"]["rows"][0], "name": text, "about": text, "source": text, "kind": text}
    plan = {**FakePlanner().quick("demo", {}), "ref": text, "name": text, "source": text, "error": ""}
    panel.state.set(models={"rows": [row], "text": text, "busy": False}, plan=plan)
    panel.say(text, kind=text, log=text)
    html = snapshot("panel", panel.state.parts())[0]["text/html"]
    assert problems(re.sub(r'<meter min="0" max="\d+" value="\d+"></meter>', "", html), style=STYLE) == []


def test_a_model_that_cannot_be_planned_says_so_in_the_snapshot(panel: Controller) -> None:
    panel.state.set(plan={"ref": "nowhere", "error": "there is no model 'nowhere'."})
    assert "there is no model" in snapshot("bar", panel.state.parts())[0]["text/plain"]


def test_without_anywidget_there_is_a_still_picture_and_how_to_get_more(
    panel: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "nbinfer.widgets.view", raising=False)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    shown = widgets.show("panel", panel)
    data, _ = shown._repr_mimebundle_()
    assert set(data) == {"text/html", "text/plain"}
    assert HINT in repr(shown)
    shown.close()


def test_a_widget_brings_its_snapshot_and_no_text_of_objects(panel: Controller) -> None:
    shown = widgets.show("panel", panel)
    try:
        data, _ = shown._repr_mimebundle_()
        assert set(data) == {"text/html", "text/plain", "application/vnd.jupyter.widget-view+json"}
        assert repr(shown) == data["text/plain"]
        assert "object at 0x" not in data["text/plain"]
    finally:
        shown.close()
    # Shown again after its end it is a picture that says so.
    data, _ = shown._repr_mimebundle_()
    assert set(data) == {"text/html", "text/plain"}
    assert "This widget is closed" in data["text/html"]


@pytest.mark.parametrize("kind", ["html", "markdown"])
def test_an_exported_notebook_shows_the_snapshot(panel: Controller, kind: str) -> None:
    exporters = pytest.importorskip("nbconvert", reason="nbconvert is not installed")
    shown = widgets.show("panel", panel)
    try:
        data, _ = shown._repr_mimebundle_()
    finally:
        shown.close()
    v4: Any = nbformat.v4
    cell = v4.new_code_cell("nb.panel()", outputs=[v4.new_output("display_data", data=data)])
    exporter = exporters.HTMLExporter() if kind == "html" else exporters.MarkdownExporter()
    body, _ = exporter.from_notebook_node(v4.new_notebook(cells=[cell]))
    assert "3 GiB of 16 GiB used" in body
    assert "demo-embed" in body
    assert "VBox" not in body


def test_what_the_kernel_says_reaches_the_widget_and_back(panel: Controller) -> None:
    shown = widgets.show("panel", panel)
    try:
        panel.say("a message")
        assert shown.messages["rows"][0]["text"] == "a message"
        shown._handle_custom_msg({"do": "dismiss", "id": shown.messages["rows"][0]["id"]}, [])
        panel.look()
        assert shown.kernel["beat"] == panel.state["kernel"]["beat"]
    finally:
        shown.close()
    panel.say("after the end")
    assert all(row["text"] != "after the end" for row in shown.messages["rows"])
