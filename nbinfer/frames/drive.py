"""The working side of a run: a bounded window of requests with the model, and their results as they finish.

It works in a thread of its own: an interrupt reaches the waiting thread only, so no row is ever half stored.
Requests are ordered so that neighbours share their beginning.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import deque
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import (
    ConfigError,
    ContextOverflow,
    EngineClosed,
    NbinferError,
    NotSupported,
    SchemaError,
)
from nbinfer.frames import outcomes as oc
from nbinfer.frames.journal import JournalError
from nbinfer.frames.plan import describe

if TYPE_CHECKING:
    from nbinfer.engines.stream import Stream
    from nbinfer.frames.outcomes import Record
    from nbinfer.frames.plan import OnError, Plan
    from nbinfer.frames.progress import Progress

GRACE_SECONDS = 10.0
"""How long what was cancelled may take to end."""

_SAME_REFUSALS = 3
# What no row can be blamed for: it would meet every row, so it ends the run.
_FATAL = (EngineClosed, NotSupported, ConfigError, JournalError)


class Drive:
    """Asks a plan's open jobs, and stores what comes back in its outcomes and in the journal.

    Attributes
    ----------
    lock
        Held while the outcomes change; whoever copies them holds it too.
    """

    def __init__(self, plan: Plan, progress: Progress, on_error: OnError) -> None:
        self.lock = threading.Lock()
        self._plan = plan
        self._progress = progress
        self._on_error = on_error
        self._ready: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._refusals: list[str] = []
        self._accepted = False

    @property
    def stopped(self) -> bool:
        """Whether it was told to stop."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Stop, from any thread: running rows end at their next token."""
        self._stop.set()
        self._ready.put(-1)

    def work(self) -> None:
        """Ask until all is answered, or it is told to stop; rows that were not reached are then cancelled.

        Raises
        ------
        Exception
            What ends the run: no row can be blamed for it, or ``on_error`` is "raise".
        """
        try:
            if self._plan.failure is not None:
                self._react(*self._plan.failure)
            self._ask_all()
        finally:
            with self.lock:
                self._plan.outcomes.cancel_pending()

    def _ask_all(self) -> None:
        model = self._plan.model
        tasks = self._tasks()
        running: dict[int, tuple[Stream, list[int]]] = {}
        numbers = count()
        try:
            while (tasks or running) and not self._stop.is_set():
                while tasks and len(running) < self._window() and not self._stop.is_set():
                    jobs = tasks.popleft()
                    try:
                        stream = model.submit(self._request(jobs))
                    except Exception as error:
                        if not isinstance(error, NbinferError):
                            raise
                        self._refused(jobs, error, tasks)
                        continue
                    self._accepted = True
                    number = next(numbers)
                    running[number] = (stream, jobs)
                    stream.add_done_callback(partial(self._ready.put, number))
                if running:
                    self._take(running, tasks, self._ready.get())
        finally:
            self._wind_up(running)

    def _window(self) -> int:
        """Return how many requests to keep with the model: so many for each place that it is at."""
        model = self._plan.model
        return self._plan.work.window(model.info) * int(getattr(model, "places", 1))

    def _tasks(self) -> deque[list[int]]:
        """Order the jobs by their beginnings, and cut requests."""
        plan, work = self._plan, self._plan.work
        pending = [job for job, finish in enumerate(plan.outcomes.finish) if finish == oc.PENDING]
        pending.sort(key=lambda job: work.order(plan.contents[job]))
        tasks: deque[list[int]] = deque()
        for job in pending:
            last = tasks[-1] if tasks else None
            if (
                last is None
                or len(last) == work.batch
                or not _together(plan.contents[last[0]], plan.contents[job])
            ):
                tasks.append([job])
            else:
                last.append(job)
        return tasks

    def _request(self, jobs: list[int]) -> Any:
        plan = self._plan
        seeds = [row_seed(plan.seed, plan.keys[job]) for job in jobs]
        return plan.work.request([plan.contents[job] for job in jobs], seeds)

    def _refused(self, jobs: list[int], error: NbinferError, tasks: deque[list[int]]) -> None:
        if isinstance(error, _FATAL):
            raise error
        if len(jobs) == 1 and not self._accepted and not isinstance(error, ContextOverflow):
            # Different rows refused in the same words, and none accepted: it is the options, not the rows.
            self._refusals.append(str(error))
            if len(self._refusals) >= _SAME_REFUSALS and len(set(self._refusals)) == 1:
                raise error
        self._blame(jobs, error, tasks)

    def _blame(self, jobs: list[int], error: Exception, tasks: deque[list[int]]) -> None:
        """Find the row behind a failed request: halve it until it holds one."""
        if len(jobs) == 1:
            self._failed(jobs[0], error)
            return
        middle = len(jobs) // 2
        tasks.appendleft(jobs[middle:])
        tasks.appendleft(jobs[:middle])

    def _take(
        self, running: dict[int, tuple[Stream, list[int]]], tasks: deque[list[int]], number: int
    ) -> None:
        """Store one finished request's results."""
        if number not in running:
            return
        stream, jobs = running.pop(number)
        work = self._plan.work
        try:
            result = _whole_or_cut(stream)
            if getattr(result, "finish_reason", None) == "interrupted":
                raise EngineClosed("the engine stopped before the row was finished.")  # noqa: TRY301
            records = work.records(result, [self._plan.contents[job] for job in jobs])
        except Exception as error:
            if stream.cancelled:
                return
            if isinstance(error, _FATAL):
                raise
            self._blame(jobs, error, tasks)
            return
        for job, record in zip(jobs, records, strict=True):
            self._store(job, record)

    def _store(self, job: int, record: Record) -> None:
        plan, work = self._plan, self._plan.work
        parsed, error = work.accept(record)
        with self.lock:
            plan.outcomes.set(job, record, oc.RUN, parsed, None if error is None else describe(error))
            if error is None:
                del plan.contents[job]
            key = plan.keys[job] if error is not None else plan.keys.pop(job)
        tokens = record.completion_tokens if record.completion_tokens is not None else record.prompt_tokens
        # First kept, then counted: a row that the bar shows as done survives a kill.
        if plan.journal is not None and work.lasting(record):
            plan.journal.put(key, record, work, op=work.op, model=plan.model.info.model)
        self._progress.add(
            int(plan.rows_of[job]),
            tokens=tokens or 0,
            error=None if error is None else type(error).__name__,
        )
        if error is not None:
            self._react(job, error)

    def _failed(self, job: int, error: Exception) -> None:
        with self.lock:
            tokens, raw = getattr(error, "prompt_tokens", None), getattr(error, "raw", None)
            self._plan.outcomes.fail(job, describe(error), prompt_tokens=tokens or None, raw=raw or None)
        self._progress.add(int(self._plan.rows_of[job]), error=type(error).__name__)
        self._react(job, error)

    def _react(self, job: int, error: Exception) -> None:
        if self._on_error == "raise":
            error.add_note(
                f"{self._plan.table.label(self._plan.first_row(job))} of nbinfer.{self._plan.work.op}; "
                "the rows before it are in nb.last_run().frame().",
            )
            raise error
        if self._on_error == "stop":
            self._stop.set()

    def _wind_up(self, running: dict[int, tuple[Stream, list[int]]]) -> None:
        """Cancel what runs, and keep what finished in the meantime."""
        for stream, _ in list(running.values()):
            stream.cancel()
        deadline = time.monotonic() + GRACE_SECONDS
        on_error, self._on_error = self._on_error, "null"
        try:
            while running and (left := deadline - time.monotonic()) > 0:
                try:
                    number = self._ready.get(timeout=left)
                except queue.Empty:
                    break
                try:
                    # Rows blamed here are asked again by the next run: they are only cancelled.
                    self._take(running, deque(), number)
                except Exception:  # noqa: BLE001, S112 - what ended the run is already on its way
                    continue
        finally:
            self._on_error = on_error


def _whole_or_cut(stream: Stream) -> Any:
    """Return a finished result; of an answer that was cut before it kept to its rule, what there is."""
    try:
        return stream.result(timeout=0)
    except SchemaError as error:
        if error.result is None:
            raise
        return error.result


def _together(first: Any, second: Any) -> bool:
    """Whether two contents may share a request: (query, document) pairs only with the same query."""
    return not isinstance(first, tuple) or first[0] == second[0]


def row_seed(seed: int | None, key: bytes) -> int | None:
    """Return the seed of one answer: of the run's seed and the question, not of order or batch size."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(b"%d" % seed + key).digest()[:4], "big")
