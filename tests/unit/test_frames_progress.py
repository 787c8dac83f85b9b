"""Progress is live where somebody looks, and silent where nobody does."""

from __future__ import annotations

import io
import sys
import threading
import time
from typing import Any

import pandas as pd
import pytest
from support.fake_engine import echo
from support.frames import chat_model, failing_on, last_text

from nbinfer.contract.errors import EngineError, RequestError
from nbinfer.frames import complete, last_run
from nbinfer.frames import progress as shown
from nbinfer.frames.progress import JupyterSink, Progress, QuietSink, TerminalSink, clock, make_sink

pytestmark = pytest.mark.usefixtures("results_folder")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (0.84, "0.8 s"), (42.4, "42 s"), (187, "3:07"), (3729, "1:02:09"), (59.7, "1:00")],
)
def test_durations_read_as_a_person_would_say_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_counts_say_where_every_row_went() -> None:
    frame = pd.DataFrame({"t": ["a", "a", "bad", None, "old", "old", "c"]})
    complete(["old"], model=chat_model())
    complete(frame, on="t", model=chat_model(failing_on("bad", EngineError("x"))))
    progress = last_run().progress
    assert (progress.total, progress.done) == (7, 7)
    assert (progress.computed, progress.cached, progress.duplicates, progress.skipped) == (2, 1, 2, 1)
    assert progress.failures == {"EngineError": 1}
    line = progress.line()
    for part in (
        "complete 7/7 rows done",
        "1 cached",
        "2 duplicate",
        "1 skipped",
        "1 of 7 rows failed: EngineError 1",
    ):
        assert part in line
    info = last_run().info
    assert (info["failures"], info["cached"], info["skipped"], info["state"]) == (
        {"EngineError": 1},
        1,
        1,
        "done",
    )


def test_rate_and_time_left_ignore_rows_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress("complete", 100)
    progress.add(40, cached=True)
    progress.start()
    assert [progress.rate, progress.eta] == [None, None]
    now += 10
    for _ in range(20):
        progress.add(1, tokens=5)
    assert [progress.rate, progress.eta] == [2, 20]
    assert (
        progress.line() == "complete 60/100 rows · 2 rows/s · 10 tok/s · ETA 20 s · 1 cached · 39 duplicate"
    )
    progress.end("cancelled")
    assert [progress.eta] == [None]
    assert "60/100 rows cancelled in 10 s" in progress.line()


def test_a_script_is_quiet_and_progress_false_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    complete(["a"], model=chat_model())
    complete(["bad"], model=chat_model(failing_on("bad", EngineError("x"))), progress=False)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(TerminalSink, "interval", 0.01)
    gate = threading.Event()

    class Opening(TerminalSink):
        def update(self, progress: Progress) -> None:
            super().update(progress)
            if progress.done:
                gate.set()

    model = chat_model(lambda r: [gate, *echo(r)] if "slow" in last_text(r) else echo(r), parallel=2)
    complete(["a", "slow"], model=model, progress=Opening())
    text = screen.getvalue()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "complete 1/2 rows" in text
    assert "complete 2/2 rows done" in text.split("\x1b[K")[-1]


class Display:
    """Stands where IPython.display.display is, and keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool, dict[str, str]]] = []

    def __call__(self, bundle: dict[str, str], *, raw: bool, display_id: str, update: bool = False) -> None:
        assert raw
        self.calls.append((display_id, update, bundle))


def test_a_notebook_has_one_display_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    display = Display()
    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(JupyterSink, "interval", 0.01)
    complete(
        [f"row {i}" for i in range(20)], model=chat_model(lambda r: [0.01, *echo(r)]), progress=JupyterSink()
    )
    assert len(display.calls) > 1
    assert len({identity for identity, _, _ in display.calls}) == 1
    assert [update for _, update, _ in display.calls] == [False] + [True] * (len(display.calls) - 1)
    last = display.calls[-1][2]
    assert "20/20 rows done" in last["text/plain"]
    assert 'value="20"' in last["text/html"]


def test_progress_html_holds_no_text_of_rows_or_models() -> None:
    progress = Progress("complete", 3)
    progress.add(1, error="<script>alert(1)</script>")
    progress.notes.append("<img src=x onerror=alert(1)>")
    page = JupyterSink.html(progress)
    assert "<script" not in page
    assert "<img" not in page


def test_where_progress_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_sink(None), QuietSink)
    assert isinstance(make_sink(True), TerminalSink)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(make_sink(None), TerminalSink)
    monkeypatch.setattr(shown, "_in_notebook", lambda: True)
    assert isinstance(make_sink(None), JupyterSink)
    assert isinstance(make_sink(False), QuietSink)
    own: Any = QuietSink()
    assert make_sink(own) is own
    with pytest.raises(RequestError, match="progress="):
        make_sink("bar")  # type: ignore[arg-type]


def test_a_template_that_keeps_rows_from_sharing_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = pd.DataFrame({"t": [f"r{i}" for i in range(40)]})
    complete(rows, "{t}" + " and the rules are these." * 20, model=chat_model())
    assert "with the fixed text first" in capsys.readouterr().err
    complete(rows, "The rules are these." * 20 + "{t}", model=chat_model())
    assert capsys.readouterr().err == ""
