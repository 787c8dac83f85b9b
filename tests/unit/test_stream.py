"""The stream between an engine's thread and its reader: order, ends, cancelling, threads, async."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import TYPE_CHECKING

import pytest

from nbinfer.contract.errors import EngineError
from nbinfer.contract.results import Delta, Event, Finished, PromptProgress, Result
from nbinfer.engines.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DONE = Finished(Result(text="ab"))


def filled(*events: Event) -> Stream:
    stream = Stream()
    for event in events:
        stream.put(event)
    return stream


@contextlib.contextmanager
def engine(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("events", "read"),
    [
        ([], []),
        ([Delta("a"), Delta("b")], [Delta("ab", 2)]),
        ([Delta("a", 2), Delta("", 0), Delta("b", 3)], [Delta("ab", 5)]),
        (
            [PromptProgress(1, 2), PromptProgress(2, 2), Delta("a")],
            [PromptProgress(1, 2), PromptProgress(2, 2), Delta("a")],
        ),
        ([Delta("a"), PromptProgress(1, 2), Delta("b")], [Delta("a"), PromptProgress(1, 2), Delta("b")]),
        (
            [Delta("h", reasoning=True), Delta("m", reasoning=True), Delta("a")],
            [Delta("hm", 2, reasoning=True), Delta("a")],
        ),
        (
            [Delta("a", index=0), Delta("b", index=1), Delta("c", index=0)],
            [Delta("a"), Delta("b", index=1), Delta("c")],
        ),
    ],
)
def test_waiting_text_is_merged_and_nothing_else_is(events: list[Event], read: list[Event]) -> None:
    stream = filled(*events, DONE)
    assert list(stream) == [*read, DONE]
    assert stream.result() is DONE.result


def test_a_reader_that_keeps_up_sees_every_event() -> None:
    stream = Stream()
    seen = []
    for text in "abc":
        stream.put(Delta(text))
        seen.append(stream.next_event())
    assert seen == [Delta("a"), Delta("b"), Delta("c")]


def test_the_end_is_the_end() -> None:
    stream = filled(DONE)
    stream.put(Delta("late"))
    stream.fail(EngineError("late"))
    stream.put(Finished(Result(text="second")))
    assert list(stream) == [DONE]
    assert list(stream) == []
    assert stream.next_event() is None
    assert stream.result().text == "ab"


def test_events_before_an_error_are_read_first_and_the_error_every_time_after() -> None:
    stream = filled(Delta("a"))
    stream.fail(EngineError("boom"))
    stream.put(DONE)
    read: list[Event] = []
    with pytest.raises(EngineError, match="boom"):
        read.extend(stream)
    assert read == [Delta("a")]
    for attempt in (stream.result, stream.next_event, lambda: list(stream)):
        with pytest.raises(EngineError, match="boom"):
            attempt()


def test_a_timeout_passes_without_an_event() -> None:
    stream = Stream()
    assert stream.next_event(timeout=0) is None
    with pytest.raises(TimeoutError, match=r"no result after 0.01 s; the request is still running"):
        stream.result(timeout=0.01)
    states = [stream.done]
    stream.put(DONE)
    assert [*states, stream.done] == [False, True]
    assert stream.result(timeout=0).text == "ab"


def test_the_result_is_there_without_reading_and_reading_still_works() -> None:
    stream = filled(Delta("a"), DONE)
    assert stream.result().text == "ab"
    assert list(stream) == [Delta("a"), DONE]


def test_cancelling_calls_the_engine_once_and_only_while_it_runs() -> None:
    calls: list[int] = []
    stream = Stream(on_cancel=lambda: calls.append(1))
    states = [stream.cancelled]
    stream.cancel()
    stream.cancel()
    assert [*states, stream.cancelled] == [False, True]
    assert calls == [1]
    finished = Stream(on_cancel=lambda: calls.append(2))
    finished.put(DONE)
    finished.cancel()
    assert not finished.cancelled
    assert calls == [1]
    Stream().cancel()


def test_the_engine_may_answer_from_within_cancel() -> None:
    stream = Stream(on_cancel=lambda: stream.put(Finished(Result(text="", finish_reason="interrupted"))))
    stream.cancel()
    assert stream.result(1).finish_reason == "interrupted"


def test_nothing_is_lost_or_doubled_between_threads() -> None:
    stream = Stream()
    pieces = [f"{i} " for i in range(5_000)]

    def work() -> None:
        for piece in pieces:
            stream.put(Delta(piece))
        stream.put(DONE)

    with engine(work):
        read = [event for event in stream if isinstance(event, Delta)]
    assert "".join(event.text for event in read) == "".join(pieces)
    assert sum(event.n_tokens for event in read) == len(pieces)


@pytest.mark.parametrize("fails", [False, True], ids=["finish", "error"])
def test_a_waiting_reader_is_woken_by_the_end(fails: bool) -> None:
    stream = Stream()
    waiting = threading.Event()

    def work() -> None:
        waiting.wait(10)
        if fails:
            stream.fail(EngineError("boom"))
        else:
            stream.put(DONE)

    with engine(work):
        waiting.set()
        if fails:
            with pytest.raises(EngineError):
                stream.result()
        else:
            assert stream.result() is DONE.result


def test_several_threads_may_wait_for_one_result() -> None:
    stream = Stream()
    got: list[object] = []
    threads = [threading.Thread(target=lambda: got.append(stream.result(10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    stream.put(DONE)
    for thread in threads:
        thread.join(timeout=10)
    assert got == [DONE.result] * 4


def test_callbacks_run_once_at_the_end_or_at_once_after_it() -> None:
    calls: list[str] = []
    stream = Stream()
    stream.add_done_callback(lambda: calls.append("first"))
    stream.put(Delta("a"))
    assert calls == []
    stream.put(DONE)
    stream.put(DONE)
    stream.fail(EngineError("late"))
    assert calls == ["first"]
    stream.add_done_callback(lambda: calls.append("after"))
    assert calls == ["first", "after"]
    failed = Stream()
    failed.add_done_callback(lambda: calls.append("failed"))
    failed.fail(EngineError("boom"))
    assert calls[-1] == "failed"


def test_a_callback_that_fails_neither_reaches_the_engine_nor_stops_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[str] = []
    stream = Stream()
    stream.add_done_callback(lambda: 1 / 0)  # type: ignore[arg-type]
    stream.add_done_callback(lambda: calls.append("second"))
    with caplog.at_level(logging.ERROR):
        stream.put(DONE)
    assert calls == ["second"]
    assert "ZeroDivisionError" in caplog.text


def test_async_reading_gives_the_same_events() -> None:
    stream = Stream()
    first_read = threading.Event()

    def work() -> None:
        stream.put(PromptProgress(1, 1))
        stream.put(Delta("a"))
        first_read.wait(10)
        stream.put(Delta("b"))
        stream.put(DONE)

    async def read() -> list[Event]:
        events: list[Event] = []
        async for event in stream:
            events.append(event)
            if event == Delta("a"):
                first_read.set()
        return events

    with engine(work):
        events = asyncio.run(read())
    assert events == [PromptProgress(1, 1), Delta("a"), Delta("b"), DONE]
    assert stream._listeners == []


def test_async_reading_leaves_the_loop_free() -> None:
    stream = Stream()

    async def main() -> list[Event]:
        async def read() -> list[Event]:
            return [event async for event in stream]

        reader = asyncio.create_task(read())
        await asyncio.sleep(0)  # the reader waits; the loop goes on, and it is the loop that ends the stream
        threading.Timer(0, stream.put, [DONE]).start()
        return await asyncio.wait_for(reader, 10)

    assert asyncio.run(main()) == [DONE]


def test_async_reading_raises_the_error_after_the_events() -> None:
    stream = filled(Delta("a"))
    stream.fail(EngineError("boom"))
    events: list[Event] = []

    async def read() -> None:
        async for event in stream:
            events.append(event)  # noqa: PERF401 - what was read before the error counts

    with pytest.raises(EngineError, match="boom"):
        asyncio.run(read())
    assert events == [Delta("a")]


def test_async_reading_of_a_stream_that_was_read_already_ends() -> None:
    stream = filled(DONE)
    assert list(stream) == [DONE]

    async def read() -> list[Event]:
        return [event async for event in stream]

    assert asyncio.run(read()) == []


def test_a_cancelled_async_reader_stops_listening() -> None:
    stream = Stream()

    async def main() -> None:
        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        assert len(stream._listeners) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert stream._listeners == []


def test_a_loop_closed_under_its_reader_does_not_reach_the_engine() -> None:
    stream = Stream()
    listeners: list[Callable[[], None]] = []

    async def main() -> None:
        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        listeners.extend(stream._listeners)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert len(listeners) == 1
    # As if the loop had gone without its reader being closed, as a kernel that restarts its loop does.
    stream._listeners.extend(listeners)
    stream.put(DONE)
    assert stream.result().text == "ab"
