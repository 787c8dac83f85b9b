"""What all models share that are several engines elsewhere: requests in, streams out, one thread between.

To a run they are models like any other (:class:`nbinfer.frames.work.FrameModel`), so that the plan, the
journal, interrupts and progress are the same wherever the rows are computed.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import EngineClosed, EngineError, NbinferError
from nbinfer.engines.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_IDLE_SECONDS = 1.0


class Job:
    """A request, and the stream on which whoever asked waits for its answer."""

    def __init__(self, request: Any, cancel: Callable[[Job], None]) -> None:
        self.request = request
        self.stream = Stream(on_cancel=lambda: cancel(self))
        # What it has been through; each switchboard counts in its own way.
        self.losses = 0
        self.errors = 0
        self.tried: set[Any] = set()


class Switchboard:
    """Takes requests, and hands them on from a thread that lives only while there are any.

    Everything below runs on that thread alone; other threads :meth:`post` what is to be done there.

    Attributes
    ----------
    waiting
        Jobs that nobody works on, in the order in which to hand them on.
    notes
        What a person should know at the end of the run: what was lost, what was left out.
    """

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        self.notes: list[str] = []
        self._actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Job] = set()
        self._thread: threading.Thread | None = None

    def submit(self, request: Any) -> Stream:
        """Start a request; what refuses it is raised by the stream."""
        job = Job(request, lambda job: self.post(partial(self._cancelled, job)))
        with self._lock:
            self._open.add(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="nbinfer-switchboard", daemon=True)
                self._thread.start()
        self.post(partial(self.waiting.append, job))
        # Last: a listener may be told at once.
        job.stream.add_done_callback(partial(self._over, job))
        return job.stream

    def post(self, action: Callable[[], None]) -> None:
        """Have something done on the thread."""
        self._actions.put(action)

    @property
    def open(self) -> int:
        """How many requests have no answer yet."""
        return len(self._open)

    def _over(self, job: Job) -> None:
        with self._lock:
            self._open.discard(job)
        self.post(_nothing)

    def _main(self) -> None:
        while True:
            quiet = False
            try:
                action = self._actions.get(timeout=self.pause())
            except queue.Empty:
                action, quiet = _nothing, True
            try:
                action()
                self.assign(quiet=quiet)
            except Exception as error:  # noqa: BLE001 - nobody may be left waiting
                self.fail(self._open.copy(), _fatal(error))
            with self._lock:
                if not self._open and self._actions.empty():
                    self._thread = None
                    return

    def _cancelled(self, job: Job) -> None:
        if job in self.waiting:
            self.waiting.remove(job)
            job.stream.fail(EngineError("the request was interrupted."))
        else:
            self.cancel(job)

    def fail(self, jobs: Iterable[Job], error: NbinferError) -> None:
        """End requests with an error."""
        for job in list(jobs):
            if job in self.waiting:
                self.waiting.remove(job)
            job.stream.fail(error)

    # -- what each kind does in its own way --------------------------------------------------------------

    def assign(self, *, quiet: bool) -> None:
        """Hand on what can be; ``quiet``: nothing has happened for as long as :meth:`pause` said."""
        raise NotImplementedError

    def cancel(self, job: Job) -> None:
        """Stop a request that was handed on."""
        raise NotImplementedError

    def pause(self) -> float:
        """Return how many seconds to wait for something to happen."""
        return _IDLE_SECONDS


def _nothing() -> None:
    return


def _fatal(error: Exception) -> NbinferError:
    """Return what ends the run: no row can be blamed for what failed here."""
    if isinstance(error, NbinferError):
        return error
    return EngineClosed(
        f"the rows cannot be handed on: {type(error).__name__}: {error!s:.300}\n"
        "Finished rows are kept; running the cell again goes on from them."
    )
