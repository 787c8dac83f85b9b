"""One model at several places: every row is answered once, whichever of them are lost."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from support.fake_engine import HANG, echo
from support.frames import asked, chat_model, embedding_model, engine_of, last_text
from support.sidecar import until

from nbinfer.contract.errors import (
    BackendUnavailable,
    ConfigError,
    DoesNotFit,
    EngineClosed,
    EngineError,
    ModelLoadError,
    NotSupported,
    RequestError,
)
from nbinfer.contract.results import Finished, Result
from nbinfer.engines.remote.wire import Busy, Unreachable
from nbinfer.engines.stream import Stream
from nbinfer.frames import classify, complete, embed, join, last_run, similar, submit
from nbinfer.frames import fanout as fanouts
from nbinfer.frames.fanout import FanOut, Place, open_endpoints
from nbinfer.frames.switchboard import Job

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbinfer.contract.requests import CompletionRequest

pytestmark = pytest.mark.usefixtures("results_folder")

ROWS = [f"row {i}" for i in range(40)]


def places(*models: Any, limit: int = 4, **options: Any) -> FanOut:
    return FanOut([Place(m, f"place {i}", limit) for i, m in enumerate(models)], **options)


def failing_after(count: int, error: Exception) -> Any:
    """Script: the first ``count`` rows are echoed, every further one fails with ``error``."""
    seen = []
    lock = threading.Lock()

    def script(request: CompletionRequest) -> Iterable[Any]:
        with lock:
            seen.append(request)
            over = len(seen) > count
        return [error] if over else echo(request)

    return script


def test_rows_are_spread_and_come_back_in_their_order() -> None:
    def slowly(request: CompletionRequest) -> Iterable[Any]:
        return [0.005, *echo(request)]

    one, two = chat_model(slowly), chat_model(slowly)
    out = complete(ROWS, endpoints=[one, two], progress=False)
    assert list(out["completion"]) == ROWS
    assert sorted(asked(one) + asked(two)) == sorted(ROWS)
    assert min(len(asked(one)), len(asked(two))) >= 8


def test_no_place_has_more_at_once_than_it_was_given() -> None:
    one, two = chat_model(parallel=8), chat_model(parallel=8)
    complete(
        ROWS, endpoints=[{"model": one, "concurrency": 2}, {"model": two, "concurrency": 5}], progress=False
    )
    assert engine_of(one).most_running <= 2
    assert engine_of(two).most_running <= 5


def test_what_was_computed_elsewhere_is_kept_under_the_same_keys_as_here() -> None:
    complete(ROWS, endpoints=[chat_model(), chat_model()], progress=False)
    here = chat_model()
    assert set(complete(ROWS, model=here, progress=False)["source"]) == {"cache"}
    assert asked(here) == []


@pytest.mark.parametrize("error", [Unreachable("gone"), EngineClosed("unloaded"), BackendUnavailable("x")])
def test_a_place_that_is_lost_in_the_middle_loses_no_row(error: Exception) -> None:
    dying, well = chat_model(failing_after(5, error)), chat_model()
    out = complete(ROWS, endpoints=[dying, well], progress=False)
    assert list(out["completion"]) == ROWS
    assert out["error"].isna().all()
    (note,) = last_run().progress.notes
    # Answers that were on their way when it was lost still count, later.
    assert re.search(r"was lost after [0-5] answers", note)


def test_a_place_that_comes_back_gets_rows_again() -> None:
    seen: list[str] = []

    def flapping(request: CompletionRequest) -> Iterable[Any]:
        seen.append(last_text(request))
        return [Unreachable("restarting")] if 3 <= len(seen) <= 4 else [0.02, *echo(request)]

    one = chat_model(flapping, parallel=1)
    two = chat_model(lambda request: [0.1, *echo(request)], parallel=1)
    rows = [f"r {i}" for i in range(24)]
    model = places(one, two, limit=1)
    assert list(complete(rows, model=model, progress=False)["completion"]) == rows
    assert len(seen) > 6


def test_a_row_that_one_place_fails_on_is_asked_at_another_before_it_is_to_blame() -> None:
    broken = chat_model(lambda request: [EngineError("out of memory")])
    well = chat_model()
    out = complete(ROWS, endpoints=[broken, well], progress=False)
    assert list(out["completion"]) == ROWS
    # It is left alone before it has had them all.
    assert len(asked(broken)) < 15


def test_a_row_that_fails_everywhere_is_an_error_row() -> None:
    def script(request: CompletionRequest) -> Iterable[Any]:
        return [EngineError("no")] if last_text(request) == "row 7" else echo(request)

    one, two = chat_model(script), chat_model(script)
    out = complete(ROWS, endpoints=[one, two], progress=False)
    assert out["error"].notna().tolist() == [row == "row 7" for row in ROWS]
    assert asked(one).count("row 7") + asked(two).count("row 7") == 2


def test_a_row_that_ends_every_server_it_reaches_is_one_error_row() -> None:
    """Three well servers are lost while they have it: it goes no further."""

    def script(request: CompletionRequest) -> Iterable[Any]:
        return [Unreachable("killed")] if "poison" in last_text(request) else echo(request)

    out = complete(
        ["a", "poison", "b"], model=places(*(chat_model(script) for _ in range(4))), progress=False
    )
    assert out["completion"].tolist()[::2] == ["a", "b"]
    assert out["error"][1].startswith("EngineError: 3 servers were lost while they had this row")


def test_a_prompt_that_no_place_can_take_is_asked_once() -> None:
    one, two = chat_model(context_size=5), chat_model(context_size=5)
    out = complete(["a b c d e f g h", "x"], endpoints=[one, two], progress=False)
    assert out["error"][0].startswith("ContextOverflow")
    assert out["completion"][1] == "x"


def test_without_any_place_the_run_ends_and_keeps_its_rows() -> None:
    gone = Unreachable("gone")
    model = places(chat_model(failing_after(6, gone)), chat_model(failing_after(6, gone)), patience=0.2)
    with pytest.raises(EngineClosed, match="none of the servers has answered"):
        complete(ROWS, model=model, progress=False)
    kept = int(last_run().frame()["completion"].notna().sum())
    assert kept == 12
    here = chat_model()
    complete(ROWS, model=here, progress=False)
    assert len(asked(here)) == len(ROWS) - kept


def test_a_place_that_holds_the_connection_and_says_nothing_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fanouts, "QUIET", 0.1)
    silent, well = chat_model(lambda request: [HANG]), chat_model()

    def check() -> None:
        raise BackendUnavailable("no server answers")

    model = FanOut([Place(silent, "silent", 4, check), Place(well, "well", 4, lambda: None)])
    out = complete(ROWS, model=model, progress=False)
    assert list(out["completion"]) == ROWS
    until(lambda: engine_of(silent).load().running == 0)


def test_a_place_that_is_only_slow_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanouts, "QUIET", 0.05)
    gate, checked = threading.Event(), threading.Event()
    slow = chat_model(lambda request: [gate, *echo(request)])
    run = submit(["a"], model=FanOut([Place(slow, "slow", 4, checked.set)]))
    assert checked.wait(20)
    gate.set()
    assert list(run.wait(20)["completion"]) == ["a"]
    assert asked(slow) == ["a"]


def test_a_cancelled_run_leaves_nothing_running() -> None:
    one, two = chat_model(lambda request: [HANG]), chat_model(lambda request: [HANG])
    run = submit(ROWS, endpoints=[one, two])
    until(lambda: engine_of(one).load().running and engine_of(two).load().running)
    run.cancel()
    out = run.wait(20)
    assert set(out["finish_reason"]) == {"cancelled"}
    for model in (one, two):
        assert engine_of(model).load().running == engine_of(model).load().waiting == 0


def test_labels_and_vectors_are_spread_too() -> None:
    out = classify(["the lamp", "a soup"], ["lamp", "soup"], "{text}", endpoints=[chat_model(), chat_model()])
    assert list(out["label"]) == ["lamp", "soup"]
    vectors = embed(ROWS, endpoints=[embedding_model(), embedding_model()])
    assert vectors["embedding"].notna().all()


def test_texts_of_a_search_and_of_a_join_are_embedded_at_the_places() -> None:
    corpus = pd.DataFrame({"t": [*ROWS, None]}, index=[f"i{n % 7}" for n in range(41)])
    asked_for = pd.DataFrame({"t": ["row 3", None, "row 17"]}, index=["a", "a", "b"])
    ends: dict[str, Any] = {"left_on": "t", "right_on": "t", "how": "left", "progress": False}
    here = similar(asked_for, corpus, on="t", k=3, model=embedding_model())
    joined = join(asked_for, corpus, k=2, model=embedding_model(), **ends)
    calls: list[tuple[Any, Any]] = [(similar, here), (join, joined)]
    for call, expected in calls:
        one, two = (embedding_model(model=call.__name__) for _ in range(2))
        options: dict[str, Any] = {"on": "t", "k": 3} if call is similar else {"k": 2, **ends}
        there = call(asked_for, corpus, endpoints=[one, two], **options)
        pd.testing.assert_frame_equal(there, expected)
        requests: list[Any] = [*engine_of(one).requests, *engine_of(two).requests]
        texts = [text for request in requests for text in request.texts]
        # What is asked for stands in the corpus too: it is known by then.
        assert sorted(texts) == sorted(ROWS)
        assert engine_of(one).requests
        assert engine_of(two).requests


def test_vectors_are_compared_without_asking_anybody() -> None:
    vectors = np.eye(3, dtype=np.float32)
    found = similar(vectors, vectors, k=1, endpoints=["http://nowhere.invalid/v1"])
    assert found["match"].tolist() == [0, 1, 2]


def test_a_query_for_a_server_of_unknown_weights_is_told_how_to_name_them() -> None:
    corpus = embed(ROWS, model=embedding_model(), progress=False)
    unknown = embedding_model()
    engine_of(unknown)._info = replace(engine_of(unknown).info, digest="")
    with pytest.raises(RequestError, match='"weights": "sha256:') as caught:
        similar("row 3", corpus, on="embedding", endpoints=[unknown])
    assert str(caught.value).count("\n") < 5
    with pytest.raises(RequestError, match="two places"):
        similar("row 3", corpus, on="embedding", endpoints=[unknown], client=object())


@pytest.mark.parametrize(
    ("endpoints", "kind", "words"),
    [
        ([], ConfigError, "empty"),
        ([{"url": "http://x"}], ConfigError, "no 'url'"),
        ([{"model": None}], ConfigError, "neither base_url nor model"),
        (["ftp://x"], ConfigError, "begins with http"),
        ([{"model": chat_model(), "concurrency": 0}], ConfigError, "concurrency=0"),
        ([chat_model(model="a"), chat_model(model="b")], ConfigError, "different weights"),
        ([embedding_model()], NotSupported, "needs completion"),
        (["http://127.0.0.1:9/v1"], BackendUnavailable, "no server answers"),
        (["no-such-model"], LookupError, "no model called"),
    ],
)
def test_a_wrong_list_of_endpoints_is_refused(endpoints: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        complete(["a"], endpoints=endpoints)


def test_models_that_are_loaded_in_different_ways_are_refused() -> None:
    one, two = chat_model(), chat_model()
    two.config = {"kv_type": "q8_0"}
    with pytest.raises(ConfigError, match="differ in kv_type"):
        complete(["a"], endpoints=[one, two])


def test_one_that_does_not_answer_at_first_is_left_out_and_said_so() -> None:
    out = complete(["a"], endpoints=[chat_model(), "http://127.0.0.1:9/v1"], progress=False)
    assert list(out["completion"]) == ["a"]
    (note,) = last_run().progress.notes
    assert note.startswith("http://127.0.0.1:9/v1 was left out: no server answers")


def test_a_name_is_only_for_addresses() -> None:
    with pytest.raises(ConfigError, match="model is a name"):
        open_endpoints(["http://127.0.0.1:9/v1"], chat_model(), chat_model().mode)
    with pytest.raises(RequestError, match="two places"):
        complete(["a"], endpoints=[chat_model()], client=object())


def test_the_thread_goes_when_nothing_is_asked() -> None:
    model = places(chat_model())
    complete(["a", "b"], model=model, progress=False)
    until(lambda: model._thread is None)
    assert list(complete(["c"], model=model, progress=False)["completion"]) == ["c"]


class Board:
    """A fan-out whose thread's work a test does by hand, at a time of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str, limit: int = 4, **options: Any) -> None:
        self.now = 1000.0
        monkeypatch.setattr(fanouts, "time", SimpleNamespace(monotonic=lambda: self.now))
        models = [chat_model(lambda request: [HANG]) for _ in names]
        self.places = [Place(m, name, limit) for m, name in zip(models, names, strict=True)]
        self.fan = FanOut(self.places, **options)
        for place in self.places:
            monkeypatch.setattr(place.model, "submit", lambda request: Stream())

    def add(self, *names: str) -> list[Job]:
        jobs = [Job(name, lambda job: None) for name in names]
        self.fan._open.update(jobs)
        self.fan.waiting.extend(jobs)
        self.assign()
        return jobs

    def assign(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.fan.assign(quiet=False)

    def answer(self, place: Place, job: Job, how: Exception | Result) -> None:
        """End a request at a place, and do what follows from that."""
        if isinstance(how, Exception):
            place.running[job].fail(how)
        else:
            place.running[job].put(Finished(how))
        while not self.fan._actions.empty():
            self.fan._actions.get()()
            self.assign()


OK = Result(text="ok", finish_reason="stop", model="fake")


def test_an_outage_counts_once_however_many_rows_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(monkeypatch, "one")
    (one,) = board.places
    jobs = board.add("a", "b", "c", "d")
    for job in jobs:
        board.answer(one, job, Unreachable("gone"))
    assert one.failures == 1
    assert one.again_at == board.now + 0.5
    board.assign(0.5)
    (probe,) = one.running
    board.answer(one, probe, Unreachable("gone"))
    assert one.failures == 2
    assert one.again_at == board.now + 1.0


def test_a_server_that_is_tried_again_may_take_longer_than_the_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = Board(monkeypatch, "one", patience=5)
    (one,) = board.places
    jobs = board.add("a", "b")
    for job in jobs:
        board.answer(one, job, Unreachable("gone"))
    board.assign(1)
    (probe,) = one.running
    board.assign(100)
    assert not any(job.stream.done for job in jobs)
    board.answer(one, probe, OK)
    assert len(one.running) == 1
    # Between tries the time counts, also when the last row is with the server at each.
    (last,) = one.running
    for _ in range(20):
        if one.running:
            board.answer(one, last, Unreachable("gone"))
            # It is not the row that is to blame here.
            last.losses = 0
        board.assign(1)
    with pytest.raises(EngineClosed, match="none of the servers has answered"):
        last.stream.result(timeout=0)


def test_a_bad_row_does_not_take_the_only_server_down(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(monkeypatch, "one", "two", limit=1)
    one, two = board.places
    two.failures, two.again_at = 1, board.now + 1000
    (bad,) = board.add("bad")
    for _ in range(3):
        assert one.running
        board.answer(one, bad, EngineError("500"))
        assert one.well
    with pytest.raises(EngineError, match="500"):
        bad.stream.result(timeout=0)
    # Three different rows do.
    for job in board.add("a", "b"):
        board.answer(one, job, EngineError("500"))
    assert not one.well


def test_a_busy_server_gets_its_row_again_later_and_fewer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(monkeypatch, "one")
    (one,) = board.places
    jobs = board.add("a", "b", "c", "d")
    for _ in range(4):
        asked_to_wait = Busy("429")
        asked_to_wait.retry_after = 7.0
        for job in list(one.running):
            board.answer(one, job, asked_to_wait)
        assert one.well
        assert not one.running
        board.assign(6)
        assert not one.running
        board.assign(1)
    # Refused more often than a row may be lost, and none is an error.
    assert [job.losses for job in jobs] == [0] * 4
    assert (len(one.running), one.losses, board.fan.notes) == (1, 0, [])
    while one.running:
        board.answer(one, next(iter(one.running)), OK)
    assert all(job.stream.result(timeout=0) is OK for job in jobs)
    assert one.allowed == 4


def test_servers_that_are_always_busy_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(monkeypatch, "one", patience=5)
    (one,) = board.places
    (job,) = board.add("a")
    for _ in range(30):
        if one.running:
            board.answer(one, job, Busy("503"))
        board.assign(1)
    with pytest.raises(EngineClosed, match="none of the servers has answered"):
        job.stream.result(timeout=0)


@pytest.mark.parametrize(
    ("error", "gone"),
    [(ZeroDivisionError("a bug"), True), (BackendUnavailable("no"), True), (Busy("503"), False)],
)
def test_a_silent_server_is_found_out_while_another_answers(
    monkeypatch: pytest.MonkeyPatch, error: Exception, gone: bool
) -> None:
    board = Board(monkeypatch, "silent", "well", limit=2)
    silent, well = board.places
    started: list[Any] = []

    def thread(**options: Any) -> Any:
        started.append(options)
        return SimpleNamespace(start=lambda: None)

    monkeypatch.setattr(fanouts, "threading", SimpleNamespace(Thread=thread))

    def check() -> None:
        raise error

    silent.check = check
    board.add(*"abcdefgh")
    for _ in range(4):
        board.now += fanouts.QUIET / 2
        board.answer(well, next(iter(well.running)), OK)
    (given,) = started
    given["target"](*given["args"])
    board.fan._actions.get()()
    assert not silent.checking
    assert silent.well is not gone
    assert bool(silent.running) is not gone


@pytest.mark.parametrize(
    "error", [DoesNotFit("too large"), ModelLoadError("broken"), BackendUnavailable("no")]
)
def test_only_a_server_that_does_not_answer_is_left_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model, place = chat_model(), fanouts._place

    def opened(given: Any, mode: Any) -> Place:
        if given["model"] is model:
            return place(given, mode)
        raise error

    monkeypatch.setattr(fanouts, "_place", opened)
    with pytest.raises(type(error)):
        open_endpoints([model, chat_model()], None, model.mode)
    error = Unreachable("502")
    assert open_endpoints([model, chat_model()], None, model.mode).places == 1
