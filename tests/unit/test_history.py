"""The log of requests: written when asked for, for its user alone, and good enough to ask again."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from support.fake_engine import HANG, FakeEngine

import nbinfer as nb
from nbinfer import request_log
from nbinfer import session as sessions
from nbinfer.contract.errors import ConfigError, EngineError, ModelNotFound, RequestError
from nbinfer.request_log import History, HistoryWarning
from nbinfer.session.recording import entry as entry_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def log(tmp_path: Path) -> Iterator[History]:
    yield nb.history(record=True, path=tmp_path / "log" / "history.sqlite")
    nb.history(record=False)


@pytest.fixture
def ask() -> Iterator[Callable[..., nb.Model]]:
    """Make loaded models on fake engines; all are forgotten at the end."""

    def make(name: str = "fake", **options: Any) -> nb.Model:
        model = nb.Model(engine=FakeEngine(**options), name=name, ref=name, backend="fake")
        sessions.session.add(model)
        return model

    yield make
    nb.unload()


def test_nothing_is_stored_before_it_is_asked_for(tmp_path: Path, ask: Any) -> None:
    path = tmp_path / "history.sqlite"
    found = nb.history(path=path)
    ask().infer("a secret")
    assert len(found) == 0
    assert list(found) == []
    assert found.frame().empty
    assert not found.recording
    assert not path.exists()


def test_a_new_kernel_records_nothing_though_another_did(log: History, ask: Any) -> None:
    ask().infer("hello")
    code = f"import nbinfer as nb; h = nb.history(path={str(log.path)!r}); print(h.recording, len(h))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"]


def test_an_entry_says_what_was_asked_of_what(log: History, ask: Any) -> None:
    result = ask().infer("one two", system="Be brief.", max_tokens=3, temperature=0.5, seed=7)
    entry = nb.history()[-1]
    assert (entry.text, entry.finish_reason, entry.params["seed"]) == (result.text, result.finish_reason, 7)
    assert entry.prompt == result.prompt != ""
    assert (entry.model, entry.where, entry.engine.split()[0]) == ("fake", "kernel", "fake")
    assert entry.digest == sessions.get("fake").digest
    assert (
        entry.request
        == sessions.prepare("one two", system="Be brief.", max_tokens=3, temperature=0.5, seed=7).request
    )
    row = nb.history().frame().loc[entry.number]
    assert (row["prompt"], row["text"], row["seed"]) == (entry.prompt, entry.text, 7)


@pytest.mark.parametrize(
    "options",
    [
        {"stop": ["a", "b"], "think": False},
        {"choices": ["yes", "no"]},
        {"schema": {"type": "object", "properties": {"a": {"type": "integer"}}}, "logprobs": 2},
        {"regex": "[0-9]+"},
        {"images": [b"\x89PNG\x00\xff"]},
        {"logit_bias": {5: -1.5}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"raw": True},
        {"messages": [{"role": "user", "content": "é\n"}, {"role": "assistant", "content": "b"}]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_request_comes_back_as_it_was(log: History, ask: Any, options: dict[str, Any]) -> None:
    request = sessions.prepare(None if "messages" in options else "Hi", **options).request
    model = ask()
    result = nb.Result(text="x", model="fake")
    log.add(entry_of(model, request, result, None))
    assert log[-1].request == request


def test_every_way_to_ask_is_recorded_once(log: History, ask: Any) -> None:
    model = ask()
    model.infer("a")
    stream = model.stream("b")
    list(stream)
    stream.result()
    model.chat().send("c")
    asyncio.run(model.ainfer("d"))
    nb.infer("e", model="fake")
    assert [entry.request.messages[-1]["content"] for entry in log] == list("abcde")  # type: ignore[index]


def test_an_answer_that_was_stopped_is_recorded_with_what_there_was(log: History, ask: Any) -> None:
    model = ask(script=["one", HANG])
    stream = model.stream("x")
    for _ in stream:
        break
    del stream
    entry = log[-1]
    assert (entry.text, entry.finish_reason, entry.error) == ("one", "interrupted", None)
    assert entry.prompt, "the prompt is known although the answer never came"


def test_a_failure_is_recorded_with_its_error(log: History, ask: Any) -> None:
    with pytest.raises(EngineError):
        ask(script=[EngineError("it broke")]).infer("x")
    assert (log[-1].finish_reason, log[-1].error) == ("error", "it broke")


def test_replay_asks_the_same_again(log: History, ask: Any) -> None:
    model = ask()
    first = model.infer("x y z", temperature=1.0, max_tokens=2)
    found = nb.history().replay()
    assert found.text == first.text
    assert (found.params["seed"], found.messages) == (first.params["seed"], first.messages)
    assert model.engine.requests[-1].sampling.seed == first.params["seed"]
    assert len(log) == 2, "a replay is a request too"


def test_replay_of_a_schema_reads_the_typed_value(log: History, ask: Any) -> None:
    ask(script=['{"a": 1}']).infer("x", schema={"type": "object", "properties": {"a": {"type": "integer"}}})
    assert nb.history().replay(1).parsed == {"a": 1}


def test_replay_wants_the_model_that_answered_unless_another_is_named(log: History, ask: Any) -> None:
    model = ask()
    model.infer("x")
    model.unload()
    found = nb.history()
    with pytest.raises(ModelNotFound, match=r"nb\.load\('fake'\)"):
        found.replay(1)
    other = ask()
    other.__dict__["digest"] = "of other weights"
    with pytest.raises(RequestError, match="other weights"):
        nb.history().replay(1)
    assert nb.history().replay(1, model=other).text
    with pytest.raises(IndexError, match="no request 99"):
        nb.history().replay(99)


def test_only_its_user_can_read_it(log: History, ask: Any) -> None:
    ask().infer("x")
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700
    log.path.chmod(0o644)
    nb.infer("y")
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert [path.name for path in log.path.parent.iterdir()] == ["history.sqlite"]


def test_it_is_capped_in_number_and_bytes_and_numbers_stay(
    log: History, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ask()
    nb.history(record=True, limit=3)
    for i in range(5):
        model.infer(f"question {i}")
    assert [entry.number for entry in nb.history()] == [3, 4, 5]
    assert b"question 0" not in log.path.read_bytes(), "what is dropped is not left in the file"
    monkeypatch.setattr(request_log, "MAX_BYTES", 1)
    model.infer("the last")
    assert [entry.number for entry in nb.history()] == [6], "the newest stays however large it is"


def test_clear_forgets_everything_and_recording_goes_on(log: History, ask: Any) -> None:
    model = ask()
    model.infer("x")
    nb.history().clear()
    assert not log.path.exists()
    model.infer("y")
    assert len(nb.history()) == 1
    nb.history(record=False)
    model.infer("z")
    assert len(nb.history(path=log.path)) == 1


def test_an_answer_comes_although_the_log_cannot_be_written(tmp_path: Path, ask: Any) -> None:
    (tmp_path / "file").write_text("")
    nb.history(record=True, path=tmp_path / "file" / "history.sqlite")
    try:
        with pytest.warns(HistoryWarning, match="not recorded"):
            assert ask().infer("x").text
    finally:
        nb.history(record=False)


def test_an_answer_comes_and_is_recorded_although_its_weights_are_gone(
    log: History, ask: Any, tmp_path: Path
) -> None:
    model = ask()
    model.paths = (tmp_path / "deleted-since.gguf",)
    with pytest.raises(OSError, match="deleted-since"):
        _ = model.digest
    assert model.infer("one two").text == "one two"
    assert (log[-1].text, log[-1].digest) == ("one two", "")
    assert nb.history().replay(1).text == "one two"


def test_an_answer_comes_although_nothing_of_it_can_be_recorded(
    log: History, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no entry")

    monkeypatch.setattr("nbinfer.session.recording.entry", broken)
    model = ask()
    with pytest.warns(HistoryWarning, match=r"history\.sqlite: the request was not recorded: no entry"):
        assert model.infer("x").text == "x"
    with pytest.warns(HistoryWarning), pytest.raises(EngineError, match="it broke"):
        ask("broken", script=[EngineError("it broke")]).infer("x")
    assert model.infer("y").text == "y", "also where each warning is an error, as in these tests"
    assert len(log) == 0


def test_reading_the_log_leaves_the_locks_of_this_process_alone(log: History, ask: Any) -> None:
    ask().infer("x")
    with closing(sqlite3.connect(log.path)) as db:
        db.execute("BEGIN IMMEDIATE")
        assert len(log) == 1, "a reader is let in"
        write = f"import sqlite3; sqlite3.connect({str(log.path)!r}, timeout=0).execute('BEGIN IMMEDIATE')"
        done = subprocess.run([sys.executable, "-c", write], capture_output=True, text=True, check=False)
    assert "database is locked" in done.stderr


def test_an_answer_comes_although_json_has_no_word_for_what_was_asked(log: History, ask: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "extra": object()}}
    request = dataclasses.replace(sessions.prepare("x").request, tools=(tool,))
    with pytest.warns(HistoryWarning, match="not recorded"):
        log.add(entry_of(ask(), request, nb.Result(text="x", model="fake"), None))
    assert len(log) == 0


def _rewrite(log: History, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    with closing(sqlite3.connect(log.path)) as db, db:
        (text,) = db.execute("SELECT entry FROM requests WHERE number = ?", (number,)).fetchone()
        values = json.loads(text)
        text = change(values) or json.dumps(values)
        db.execute("UPDATE requests SET entry = ? WHERE number = ?", (text, number))


def test_entries_of_another_version_are_read_as_far_as_they_are_known(log: History, ask: Any) -> None:
    model = ask()
    first = model.infer("x", seed=3).text
    request = log[1].request

    def newer(values: dict[str, Any]) -> None:
        values["mood"] = values["request"]["mood"] = values["request"]["sampling"]["mood"] = "new"
        for name in ("timings", "tool_calls", "digest"):
            del values[name]
        del values["request"]["images"], values["request"]["sampling"]["logit_bias"]

    _rewrite(log, 1, newer)
    entry = log[1]
    assert (entry.request, entry.text, entry.params["seed"]) == (request, first, 3)
    assert (entry.timings, entry.tool_calls, entry.digest) == ({}, (), "")
    assert nb.history().replay(1).text == first


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "{",
        lambda _: "[]",
        lambda values: values.update(at="yesterday"),
        lambda values: values.update(params=[1]),
        lambda values: values["request"].update(messages=None),
        lambda values: values["request"]["sampling"].update(temperature=99),
    ],
    ids=["no json", "no object", "at", "params", "messages", "sampling"],
)
def test_an_entry_that_cannot_be_read_is_a_row_and_hides_no_other(
    log: History, ask: Any, change: Callable[[dict[str, Any]], object]
) -> None:
    model = ask()
    model.infer("x")
    model.infer("y")
    _rewrite(log, 1, change)
    frame = nb.history().frame()
    assert list(frame.index) == [1, 2]
    assert "cannot be read" in str(frame.loc[1, "error"])
    assert frame["error"].isna().loc[2]
    assert "2 requests" in repr(log)
    assert log._repr_mimebundle_()
    with pytest.raises(RequestError, match="cannot be read"):
        nb.history().replay(1, model=model)


@pytest.mark.parametrize("limit", [0, -1, True, "9"])
def test_a_limit_that_is_none_is_refused(tmp_path: Path, limit: Any) -> None:
    with pytest.raises(ConfigError, match="limit"):
        nb.history(path=tmp_path / "h", limit=limit)


def test_it_is_shown_as_a_table_and_never_as_markup(log: History, ask: Any) -> None:
    assert "text/html" not in nb.history()._repr_mimebundle_()
    assert "recording" in repr(nb.history())
    ask(script=["<script>x</script>"]).infer("<b>bold</b>")
    shown = nb.history()._repr_mimebundle_()
    data = shown[0] if isinstance(shown, tuple) else shown
    assert "<script>" not in data["text/html"]
    assert "&lt;script&gt;" in data["text/html"]
