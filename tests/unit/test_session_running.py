"""Requests that run can be seen, and stopped, by others than whoever asked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from support.fake_engine import HANG, FakeEngine
from support.sidecar import until

from nbinfer.contract.errors import EngineError
from nbinfer.session import Model, Running, session

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model(engine=FakeEngine(lambda _request: ["one ", HANG]), name="listed")
    session.add(model)
    yield model
    model.unload()


def _listed() -> list[Running]:
    return [each for each in session.running() if each.model == "listed"]


def test_a_request_is_listed_until_it_is_stopped_by_another(model: Model) -> None:
    stream = model.stream("go on")
    (running,) = _listed()
    states = [running.cancelled]
    running.cancel()
    assert [*states, running.cancelled] == [False, True]
    assert stream.result().finish_reason == "interrupted"
    assert _listed() == []


def test_a_request_made_by_hand_is_listed_too(model: Model) -> None:
    stream = model.submit(model.request("go on"))
    assert [each.request for each in _listed()] == [model.request("go on")]
    stream.cancel()


def test_a_request_that_has_ended_is_not_listed() -> None:
    model = Model(engine=FakeEngine(), name="listed")
    stream = model.stream("hello")
    stream.result()
    assert _listed() == []


@pytest.mark.parametrize("ask", ["embed", "rerank"])
def test_vectors_and_scores_that_another_stops_are_an_error_and_no_empty_array(ask: str) -> None:
    model = Model(engine=FakeEngine(lambda _request: ["one ", HANG], parallel=1), name="listed")
    first = model.stream("go on")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: model.embed(["a"]) if ask == "embed" else model.rerank("a", ["b"]))
        until(lambda: len(_listed()) == 2)
        _listed()[1].cancel()
        with pytest.raises(EngineError, match="stopped"):
            asked.result(20)
    first.cancel()
