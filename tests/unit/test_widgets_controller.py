"""What the panel's buttons and sliders do, without a page."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.fake_engine import HANG, FakeEngine
from support.planner import FakePlanner

import nbinfer as nb
from nbinfer.contract.errors import EngineError, ModelNotFound
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import ImageRequest
from nbinfer.display.frame import frame_bundle
from nbinfer.engines.protocol import EngineLoad
from nbinfer.session import Model, session
from nbinfer.widgets import looks
from nbinfer.widgets.badge import watch
from nbinfer.widgets.controller import Controller
from nbinfer.widgets.ticks import Monitor
from nbinfer.widgets.watched import Pulse, Watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_PATIENCE = 20


@pytest.fixture
def planner() -> FakePlanner:
    return FakePlanner()


@pytest.fixture
def panel(planner: FakePlanner) -> Iterator[Controller]:
    controller = Controller(planner, monitor=Monitor(0.01), pulse=Pulse(None), settle_seconds=0)
    yield controller
    planner.go.set()
    controller.close()


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model(engine=FakeEngine(lambda _request: ["one ", HANG]), name="busy-one", backend="fake")
    session.add(model)
    yield model
    model.unload()


def _until(panel: Any, holds: Callable[[Any], bool]) -> None:
    """Wait until the state is so; how long that takes decides nothing."""
    happened = threading.Event()
    end = panel.state.observe(lambda _changed: happened.set() if holds(panel.state) else None)
    try:
        assert holds(panel.state) or happened.wait(_PATIENCE), panel.state.parts()
    finally:
        end()


def _until_true(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _looked(panel: Controller) -> Controller:
    panel.look()
    return panel


def _rows(panel: Controller, part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = panel.state[part]["rows"]
    return rows


def test_a_moved_slider_gets_the_formulas_answer_and_then_the_exact_one(
    panel: Controller, planner: FakePlanner
) -> None:
    planner.go.clear()
    seen: list[tuple[bool, str]] = []
    panel.state.observe(
        lambda changed: seen.extend(
            (p["settling"], p["source"]) for part, p in changed.items() if part == "plan"
        )
    )
    panel.do({"do": "plan", "ref": "demo", "settings": {"context_size": 8192}, "seq": 7})
    _until(panel, lambda state: bool(state["plan"]))
    planner.go.set()
    _until(panel, lambda state: not state["plan"]["settling"])
    assert seen == [(True, "by formula"), (False, "exact: llama.cpp's own plan")]
    assert panel.state["plan"]["seq"] == 7
    assert panel.state["plan"]["settings"]["context_size"] == 8192


def test_only_the_last_of_many_moves_is_asked_for_exactly(panel: Controller, planner: FakePlanner) -> None:
    planner.go.clear()
    for n in range(60):
        panel.do({"do": "plan", "ref": "demo", "settings": {"context_size": 512 + n}, "seq": n})
    _until(panel, lambda state: state["plan"].get("seq") == 59)
    planner.go.set()
    _until(panel, lambda state: not state["plan"]["settling"])
    assert panel.state["plan"]["settings"]["context_size"] == 571
    exact = [settings["context_size"] for kind, settings in planner.asked if kind == "exact"]
    # One may have been on its way when the first move came; none in between was waited for.
    assert exact[-1] == 571
    assert len(exact) <= 2


def test_where_there_is_no_exact_answer_the_formulas_stand_and_the_reason_is_said(
    panel: Controller, planner: FakePlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(ref: str, settings: Any) -> Any:
        raise EngineError("the exact probe is switched off: no library.")

    monkeypatch.setattr(planner, "exact", off)
    panel.do({"do": "plan", "ref": "demo", "seq": 1})
    _until(panel, lambda state: state["plan"].get("settling") is False)
    assert panel.state["plan"]["source"] == "by formula. the exact probe is switched off: no library."
    assert panel.state["plan"]["verdict"]["word"] == "fits"


def test_a_model_that_cannot_be_planned_is_said_in_its_place(panel: Controller) -> None:
    panel.do({"do": "plan", "ref": "nowhere", "seq": 1})
    _until(panel, lambda state: bool(state["plan"]))
    assert panel.state["plan"]["error"] == "there is no model 'nowhere'."


def test_running_requests_are_listed_and_stopped(panel: Controller, model: Model) -> None:
    stream = model.stream("Tell me\nabout lighthouses")
    panel.look()
    (row,) = _rows(panel, "requests")
    assert (row["what"], row["model"], row["stopping"]) == ("Tell me about lighthouses", "busy-one", False)
    panel.do({"do": "stop", "id": row["id"]})
    assert stream.result().finish_reason == "interrupted"
    panel.look()
    assert _rows(panel, "requests") == []


def test_a_row_keeps_its_id_while_its_request_runs(panel: Controller, model: Model) -> None:
    streams = [model.stream(f"question {n}") for n in range(3)]
    panel.look()
    before = {row["what"]: row["id"] for row in _rows(panel, "requests")}
    streams[0].cancel()
    streams[0].result()
    panel.look()
    after = {row["what"]: row["id"] for row in _rows(panel, "requests")}
    assert after == {what: before[what] for what in ("question 1", "question 2")}
    for stream in streams:
        stream.cancel()


def test_loaded_models_are_shown_with_what_they_do(panel: Controller, model: Model) -> None:
    panel.look()
    (row,) = _rows(panel, "loaded")
    assert row["queue"] == "idle"
    assert row["where"] == "fake, in this kernel"
    assert row["context"] == "0 of 512 tokens"
    assert row["keep"] == "stays loaded"
    model.unload_at = time.time() + 252.2
    panel.look()
    assert _rows(panel, "loaded")[0]["keep"] in ("unloads in 4 min 12 s", "unloads in 4 min 11 s")


def test_an_image_model_is_shown_by_what_it_has_made(panel: Controller) -> None:
    engine = FakeEngine(context_size=0)
    engine.load = lambda: EngineLoad(running=1, images_generated=3)  # type: ignore[method-assign]
    painter = Model(engine=engine, name="painter", backend="diffusers", mode=Mode.IMAGE_GENERATION)
    session.add(painter)
    try:
        (row,) = _rows(_looked(panel), "loaded")
        said = (row["mode"], row["context"], row["rate"], row["queue"])
        assert said == ("image-generation", "", "3 images", "1 running, 0 waiting")
        assert frame_bundle(nb.ps())[0]["text/plain"].split()[-5:] == ["1", "running,", "0", "waiting", "0"]
    finally:
        painter.unload()
    assert looks._what(ImageRequest(prompt="a cat")) == "draw a cat"


@pytest.mark.parametrize("ref", ["demo", "demo-hf"])
def test_the_estimate_of_a_loaded_model_is_shown_whatever_engine_it_is_of(
    panel: Controller, ref: str
) -> None:
    made = nb.estimate(ref)
    loaded = Model(engine=FakeEngine(), name=ref, estimated=lambda: made)
    session.add(loaded)
    try:
        (row,) = _rows(_looked(panel), "loaded")
    finally:
        loaded.unload()
    assert re.fullmatch(r"memory [\d.]+ [KM]iB estimated", row["memory"])


def test_unload_of_what_is_not_there_is_a_message_not_a_crash(panel: Controller, model: Model) -> None:
    panel.do({"do": "unload", "name": "busy-one"})
    _until(panel, lambda state: state["kernel"]["beat"] > 0)
    assert _rows(panel, "loaded") == []
    panel.do({"do": "unload", "name": "busy-one"})
    _until(panel, lambda state: bool(state["messages"]["rows"]))
    (message,) = _rows(panel, "messages")
    assert "no model called 'busy-one' is loaded" in message["text"]
    panel.do({"do": "dismiss", "id": message["id"]})
    _until(panel, lambda state: not state["messages"]["rows"])


def test_an_error_brings_the_log_it_carries(panel: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: Any, **options: Any) -> Any:
        error = EngineError("the model's process ended: killed by signal 9.")
        error.log = "the last line"  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr("nbinfer.session.load", crash)
    panel.do({"do": "load", "ref": "demo", "settings": {}})
    _until(panel, lambda state: bool(state["messages"]["rows"]))
    (message,) = _rows(panel, "messages")
    assert (message["kind"], message["log"]) == ("error", "the last line")
    assert panel.state["loading"] == {}


def test_load_passes_the_plan_on_and_shows_how_far_it_is(
    panel: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    texts: list[str] = []

    def load(ref: str, *, progress: Any, **options: Any) -> Model:
        asked.append((ref, options))
        progress(0.5)
        return Model(engine=FakeEngine(), name="loaded-one", load_seconds=2.0)

    monkeypatch.setattr("nbinfer.session.load", load)
    panel.state.observe(lambda changed: texts.append(changed.get("loading", {}).get("text", "")))
    settings = {"context_size": 2048, "kv_type": "f16"}
    panel.do({"do": "load", "ref": "demo", "settings": settings, "keep_alive": "5m", "force": True})
    _until(panel, lambda state: bool(state["messages"]["rows"]))
    assert asked == [("demo", {"where": "kernel", "keep_alive": "5m", "force": True, "context_size": 2048})]
    assert [text for text in texts if text] == ["loading demo: 0%", "loading demo: 50%"]
    assert _rows(panel, "messages")[0]["text"] == "loaded-one is loaded; it took 2 s."


def test_a_crash_in_the_sidecar_is_told_once_with_the_end_of_its_log(
    panel: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbinfer.sidecar import discovery

    monkeypatch.setattr(discovery, "runtime_folder", lambda: tmp_path)
    old = tmp_path / "crash-20200101-000000-1-1.log"
    old.write_text("long ago")
    os.utime(old, (1, 1))
    panel.look()
    assert _rows(panel, "messages") == []
    (tmp_path / "crash-20990101-000000-1-2.log").write_text("line one\nout of memory\n\n")
    panel.look()
    panel.look()
    (message,) = _rows(panel, "messages")
    said, last = message["text"].splitlines()
    assert said == "A model's process in the sidecar crashed; the next request loads it again."
    assert last == "out of memory"
    assert message["log"].startswith("line one")


def test_a_run_over_rows_is_one_row_and_is_stopped_as_one(
    panel: Controller, model: Model, results_folder: Path
) -> None:
    run = nb.submit([f"question {n}" for n in range(50)], model=model)
    _until_true(lambda: bool(session.running()))
    panel.look()
    (row,) = _rows(panel, "requests")
    assert row["what"].startswith("complete 0/50 rows")
    panel.do({"do": "stop", "id": row["id"]})
    _until_true(lambda: run.done)
    panel.look()
    assert _rows(panel, "requests") == []


def test_it_looks_only_while_a_view_is_open(panel: Controller) -> None:
    monitor = panel._monitor
    for view in "aba":  # each says again that it is there
        panel.do({"do": "open", "view": view})
    _until(panel, lambda state: state["kernel"]["beat"] > 2)
    panel.do({"do": "close", "view": "a"})
    assert monitor._watchers
    panel.do({"do": "close", "view": "b"})
    assert not monitor._watchers
    panel.do({"do": "close", "view": "b"})  # one too many, of a page that was reloaded
    panel.do({"do": "open", "view": "c"})
    assert monitor._watchers
    panel.close()
    assert not monitor._watchers
    panel.do({"do": "open", "view": "c"})
    assert not monitor._watchers


def test_a_view_that_vanished_is_forgotten_but_not_while_a_cell_keeps_the_kernel_deaf() -> None:
    # A notebook that is shut in JupyterLab can send nothing any more.
    loop = asyncio.new_event_loop()
    pulse = Pulse(loop)
    watched = Watched({}, dict, monitor=Monitor(60), pulse=pulse, quiet_seconds=0)
    monitor = watched._monitor
    watched.do({"do": "open", "view": "a"})
    pulse._asked = -1e9  # the loop owes an answer for long
    watched.look()
    assert monitor._watchers
    loop.run_until_complete(asyncio.sleep(0))
    pulse._answered()
    watched.look()
    assert not monitor._watchers
    watched.do({"do": "open", "view": "a"})  # it was only asleep
    assert monitor._watchers
    watched.close()
    loop.close()


def test_a_closed_panel_leaves_no_thread(panel: Controller, planner: FakePlanner) -> None:
    panel.do({"do": "open"})
    panel.do({"do": "plan", "ref": "demo", "seq": 1, "n": 1})
    _until(panel, lambda state: state["plan"].get("settling") is False)
    panel.close()
    names = ("nbinfer-monitor", "nbinfer-panel", "nbinfer-widget")
    mine = [thread for thread in threading.enumerate() if thread.name.startswith(names)]
    for thread in mine:
        thread.join(_PATIENCE)
    assert not any(thread.is_alive() for thread in mine)


def test_each_press_is_acknowledged(panel: Controller) -> None:
    panel.do({"do": "of a newer page", "n": 3})
    _until(panel, lambda state: state["kernel"]["ack"] == 3)


def test_a_cell_that_holds_the_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbinfer.widgets.watched._BLOCKED_AFTER", 0)
    loop = asyncio.new_event_loop()
    pulse = Pulse(loop)
    # The loop is not running: no turn, so no answer.
    assert [pulse.blocked(), pulse.blocked()] == [False, True]
    loop.run_until_complete(asyncio.sleep(0))
    assert pulse.blocked() is False
    loop.close()
    monkeypatch.setattr(pulse, "_asked", None)
    assert pulse.blocked() is False


def test_the_rate_is_what_came_between_two_looks() -> None:
    now = [100.0]
    rates, model = looks.Rates(lambda: now[0]), Model(engine=FakeEngine(), name="rated")
    assert rates.of(model, 500) == 0
    now[0] += 2
    assert rates.of(model, 570) == 35
    now[0] += 1
    assert rates.of(model, 570) == 0


def test_backends_and_files_are_found(panel: Controller, tmp_path: Any) -> None:
    panel.look_around()
    assert {"llamacpp", "vllm"} <= {row["name"] for row in _rows(panel, "backends")}
    demo = next(row for row in _rows(panel, "models") if row["ref"] == "demo")
    assert (demo["verdict"], demo["problem"], demo["source"]) == ("fits", "", "demo")
    assert "parameters" in demo["about"]
    assert panel.state["models"]["busy"] is False


def test_observers_hear_only_of_what_changed(panel: Controller) -> None:
    heard: list[set[str]] = []
    end = panel.state.observe(lambda changed: heard.append(set(changed)))
    panel.state.set(loading={}, messages={"rows": [1]})
    panel.state.set(messages={"rows": [1]})
    end()
    panel.state.set(messages={"rows": []})
    assert heard == [{"messages"}]


def test_a_badge_follows_a_model(model: Model) -> None:
    badge = watch(model)
    words = [badge.state["badge"]["word"]]
    stream = model.stream("go on")
    badge.look()
    words.append(badge.state["badge"]["word"])
    stream.cancel()
    stream.result()
    model.unload()
    badge.look()
    words.append(badge.state["badge"]["word"])
    assert words == ["ready", "working", "not loaded"]


def test_a_badge_shows_a_backend_or_says_what_there_is(model: Model) -> None:
    assert watch("vllm").state["badge"]["name"] == "vllm"
    with pytest.raises(ModelNotFound, match=r"busy-one, .*llamacpp"):
        watch("nobody")
