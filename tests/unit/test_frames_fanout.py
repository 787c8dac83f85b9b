"""One model at several places: every row is answered once, whichever of them are lost."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.fake_engine import HANG, echo
from support.frames import asked, chat_model, embedding_model, engine_of, last_text
from support.sidecar import until

from nbinfer.contract.errors import (
    BackendUnavailable,
    ConfigError,
    EngineClosed,
    EngineError,
    NotSupported,
    RequestError,
)
from nbinfer.engines.remote.wire import Unreachable
from nbinfer.frames import classify, complete, embed, last_run, submit
from nbinfer.frames import fanout as fanouts
from nbinfer.frames.fanout import FanOut, Place, open_endpoints

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
