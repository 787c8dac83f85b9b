"""The queue of an engine that serves one request after the other, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from nbinfer.contract.errors import EngineClosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.contract.errors import NbinferError
    from nbinfer.contract.requests import Request
    from nbinfer.engines.stream import Stream


class Job(Protocol):
    """A request on its way, with whatever its engine keeps beside it."""

    @property
    def request(self) -> Request:
        """What was asked."""
        ...

    @property
    def stream(self) -> Stream:
        """Where the answer goes."""
        ...


J = TypeVar("J", bound=Job)


class Jobs(Generic[J]):
    """Requests that wait for an engine's thread: a cell's before rows of a batch, else as they came.

    Parameters
    ----------
    name
        The model's name, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.PriorityQueue[tuple[int, int, J | None]] = queue.PriorityQueue()
        self._lock = threading.Lock()
        self._count = 0
        self._closing = False
        self._current: J | None = None

    @property
    def waiting(self) -> int:
        """Requests that nobody has begun."""
        return self._queue.qsize()

    @property
    def running(self) -> int:
        """1 while a request is served, else 0."""
        return int(self._current is not None)

    @property
    def closing(self) -> bool:
        """Whether no more requests are taken: what runs should end soon."""
        return self._closing

    def put(self, job: J) -> None:
        """Add a request; callable from any thread.

        Raises
        ------
        EngineClosed
            The queue was closed.
        """
        with self._lock:
            if self._closing:
                raise EngineClosed(f"{self._name} was unloaded; load it again with nb.load.")
            self._count += 1
            rank = 0 if job.request.priority == "interactive" else 1
            self._queue.put((rank, self._count, job))

    def serve(self, work: Callable[[J], None], failure: Callable[[BaseException, J], NbinferError]) -> None:
        """Serve requests until the queue is closed.

        Parameters
        ----------
        work
            Answers one request.
        failure
            Returns the error that ends a request whose ``work`` raised. What it raises itself ends the
            serving, and leaves the request to :meth:`fail`.
        """
        while True:
            _, _, job = self._queue.get()
            if job is None:
                return
            self._current = job
            try:
                work(job)
            except BaseException as error:  # noqa: BLE001 - nobody may be left waiting
                job.stream.fail(failure(error, job))
            self._current = None
            # Its answer may be large: it is its reader's from here on.
            del job

    def close(self) -> None:
        """Take no more requests, and end the serving after the present one; idempotent, from any thread."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._queue.put((-1, 0, None))

    def fail(self, error: NbinferError | None = None) -> None:
        """End what waits, and what was being served, with an error; None: the model was unloaded.

        For the thread that served, when it serves no more.
        """
        self.close()
        error = error or self.unloaded()
        current, self._current = self._current, None
        if current is not None:
            current.stream.fail(error)
        while not self._queue.empty():
            _, _, job = self._queue.get_nowait()
            if job is not None:
                job.stream.fail(error)

    def unloaded(self) -> EngineClosed:
        """Return the error of a request that the model's end has met."""
        return EngineClosed(f"{self._name} was unloaded while the request ran.")
