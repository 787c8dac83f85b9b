"""The channel between an engine's thread and whoever waits for its answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

from nbinfer.contract.results import (
    Delta,
    EmbeddingResult,
    Finished,
    ImageResult,
    RerankResult,
    Result,
    ScoreResult,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from nbinfer.contract.results import Event

_log = logging.getLogger(__name__)

AnyResult: TypeAlias = Result | ScoreResult | EmbeddingResult | RerankResult | ImageResult


class Stream:
    """Events of one request: iterate them, wait for the result, or cancel.

    The engine calls :meth:`put` and :meth:`fail`; everybody else reads. One reader at a time. A reader that
    stops reading loses nothing: events wait, and neighbouring text events are merged as they are read.

    Parameters
    ----------
    on_cancel
        Called once, from the cancelling thread, when the reader no longer wants the answer.
    """

    def __init__(self, on_cancel: Callable[[], None] | None = None) -> None:
        self._events: deque[Event] = deque()
        # Re-entrant: a stream may be cancelled by the garbage collector, in whatever thread it runs.
        self._ready = threading.Condition(threading.RLock())
        self._on_cancel = on_cancel
        self._error: BaseException | None = None
        self._result: AnyResult | None = None
        self._done = False
        self._cancelled = False
        self._listeners: list[Callable[[], None]] = []
        self._done_callbacks: list[Callable[[], None]] = []

    # -- the engine's side ------------------------------------------------------------------------------

    def put(self, event: Event) -> None:
        """Append an event; ``Finished`` ends the stream."""
        with self._ready:
            if self._done:
                return
            self._events.append(event)
            if isinstance(event, Finished):
                self._result = event.result
                self._done = True
            self._wake()
        self._call_done()

    def fail(self, error: BaseException) -> None:
        """End the stream with an error, which the reader will see raised."""
        with self._ready:
            if self._done:
                return
            self._error = error
            self._done = True
            self._wake()
        self._call_done()

    def _call_done(self) -> None:
        if self._done and self._done_callbacks:
            with self._ready:
                callbacks, self._done_callbacks = self._done_callbacks, []
            for callback in callbacks:
                # This is the engine's thread: a careless callback must not end it, and every request with it.
                try:
                    callback()
                except Exception:  # noqa: BLE001 - whatever it raises
                    _log.exception("a callback of a finished stream failed")

    def _wake(self) -> None:
        self._ready.notify_all()
        for listener in self._listeners:
            listener()

    # -- the reader's side ------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the result, or the error, is there."""
        return self._done

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call ``callback()`` once when the result, or the error, is there; at once when it already is.

        It is called from the engine's thread, which it must not hold up: put a mark in a queue and return.
        """
        with self._ready:
            if not self._done:
                self._done_callbacks.append(callback)
                return
        callback()

    def cancel(self) -> None:
        """Ask the engine to stop; it answers with a ``Finished`` whose result is ``interrupted``.

        A scoring ends with ``EngineError`` instead: its result has no place to say so.
        """
        with self._ready:
            if self._done or self._cancelled:
                return
            self._cancelled = True
        if self._on_cancel is not None:
            self._on_cancel()

    def next_event(self, timeout: float | None = None) -> Event | None:
        """Return the next event, or None when ``timeout`` seconds pass or the stream is over.

        Waiting text events come back as one.
        """
        with self._ready:
            if not self._events and not self._done:
                self._ready.wait(timeout)
            if not self._events:
                if self._error is not None:
                    raise self._error
                return None
            event = self._events.popleft()
            if isinstance(event, Delta):
                event = self._merge(event)
            return event

    def _merge(self, first: Delta) -> Delta:
        pieces, n_tokens = [first.text], first.n_tokens
        while self._events:
            event = self._events[0]
            if not isinstance(event, Delta) or (event.index, event.reasoning) != (
                first.index,
                first.reasoning,
            ):
                break
            pieces.append(event.text)
            n_tokens += event.n_tokens
            self._events.popleft()
        return Delta("".join(pieces), n_tokens, first.reasoning, first.index)

    def __iter__(self) -> Iterator[Event]:
        while True:
            # Waiting in slices keeps Ctrl-C prompt on every platform.
            event = self.next_event(timeout=0.2)
            if event is not None:
                yield event
                if isinstance(event, Finished):
                    return
            elif self._done and not self._events and self._error is None:
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        wake = asyncio.Event()

        def listener() -> None:
            # A loop that was closed under its reader has nobody to wake; the engine's thread goes on.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(wake.set)

        with self._ready:
            self._listeners.append(listener)
        try:
            while True:
                wake.clear()
                event = self.next_event(timeout=0)
                if event is not None:
                    yield event
                    if isinstance(event, Finished):
                        return
                elif self._done and not self._events and self._error is None:
                    return
                else:
                    await wake.wait()
        finally:
            with self._ready:
                self._listeners.remove(listener)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result; raises the request's error, or ``TimeoutError``."""
        with self._ready:
            if timeout is None:
                while not self._done:
                    self._ready.wait(0.2)
            elif not self._ready.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"no result after {timeout:g} s; the request is still running.")
            if self._error is not None:
                raise self._error
            return self._result
