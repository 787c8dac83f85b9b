"""One batch from rows to results: plan, run in the background, keep what is done.

The plan renders every row, masks missing values, looks the journal up, and keeps one job per different
question.
The run keeps a bounded window of requests with the engine, ordered so that neighbours share their beginning,
and takes results as they finish. It works in a thread of its own: an interrupt reaches the waiting thread
only, so no row is ever half stored.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from array import array
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from nbinfer._version import __version__
from nbinfer.contract.errors import (
    ConfigError,
    ContextOverflow,
    EngineClosed,
    NbinferError,
    NotSupported,
    RequestError,
    SchemaError,
    short_interrupt,
)
from nbinfer.frames import outcomes as oc
from nbinfer.frames.journal import KEY_VERSION, Journal, JournalError, Keys, open_journal
from nbinfer.frames.outcomes import Columns, Outcomes
from nbinfer.frames.progress import JupyterSink, Progress, QuietSink, Sink
from nbinfer.frames.prompts import NullField, Trimmed
from nbinfer.frames.work import plain, weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from nbinfer.engines.stream import Stream
    from nbinfer.frames.outcomes import Record
    from nbinfer.frames.prompts import Prompt
    from nbinfer.frames.tables import Table
    from nbinfer.frames.work import FrameModel, Work

CacheMode: TypeAlias = bool | Literal["refresh"]
OnError: TypeAlias = Literal["null", "raise", "stop"]
Nulls: TypeAlias = Literal["skip", "empty", "error"]
TooLong: TypeAlias = Literal["error", "head", "tail", "middle"]

Expand: TypeAlias = "Callable[[Any], list[tuple[Any, int]]]"
"""From what a row's prompt rendered to the row's questions, each with the number of its sample."""

_CHUNK = 4096
_GRACE_SECONDS = 10.0
_SAME_REFUSALS = 3
# What no row can be blamed for: it would meet every row, so it ends the run.
_FATAL = (EngineClosed, NotSupported, ConfigError, JournalError)


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse an option that is not one of ``allowed``.

    Raises
    ------
    RequestError
        It is not.
    """
    if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
        raise RequestError(f"{name}={value!r}: it is one of {', '.join(map(repr, allowed))}.")


@dataclass
class Plan:
    """What is to be done: rows, the jobs behind them, and what is known of each job.

    ``contents`` and ``keys`` are there for jobs that still have to run (and, afterwards, for failed ones).
    """

    table: Table
    work: Work
    model: FrameModel
    source: str
    row_job: NDArray[np.int64]
    outcomes: Outcomes
    contents: dict[int, Any]
    keys: dict[int, bytes]
    per_row: int = 1
    seed: int | None = 0
    journal: Journal | None = None
    truncated: NDArray[np.bool_] | None = None
    """Which input rows were cut to fit; None when none may be."""
    failure: tuple[int, Exception] | None = None
    """The first job that the plan found failed (no prompt can be made, or a kept answer is not valid)."""
    rows_of: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.rows_of = np.bincount(self.row_job, minlength=len(self.outcomes))

    def first_row(self, job: int) -> int:
        """Return the first input row that asks this job."""
        return int(np.argmax(self.row_job == job)) // self.per_row


def describe(error: BaseException) -> str:
    """Return an error as ``Class: message``, in one line, as the ``error`` column holds it."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def kind(error: str) -> str:
    """Return the class out of an ``error`` column's text."""
    return error.partition(":")[0]


def once(content: Any) -> list[tuple[Any, int]]:
    """Ask what the row says, once."""
    return [(content, 0)]


def make_plan(
    table: Table,
    prompt: Prompt,
    work: Work,
    model: FrameModel,
    *,
    expand: Expand = once,
    per_row: int = 1,
    seed: int | None = 0,
    draws: bool = False,
    nulls: Nulls = "skip",
    cache: CacheMode = True,
    too_long: TooLong = "error",
) -> Plan:
    """Render every row and find out which jobs have to run.

    Parameters
    ----------
    expand
        Turns what the prompt rendered into the row's questions; raises for a row that has none.
    per_row
        How many questions that are.
    seed
        None: nothing is repeatable, so that neither journal nor duplicates are used.
    draws
        Whether answers are drawn at random, so that rows that ask the same get an answer each: the second
        row's first sample is the question's sample number ``per_row``, and so on.
    too_long
        "error", or what stays of the longest value of a row that does not fit.

    Raises
    ------
    NotSupported
        Rows are to be cut, and the engine cannot count tokens.
    """
    if too_long != "error":
        engine = model.engine
        prompt = Trimmed(
            prompt, lambda content: all(work.fits(engine, c) for c, _ in expand(content)), too_long
        )
    choice("nulls", nulls, ("skip", "empty", "error"))
    choice("cache", cache, (True, False, "refresh"))
    planner = _Planner(
        prompt,
        work,
        Keys({**work.constants(model), "run_seed": seed}),
        expand,
        per_row,
        seed,
        nulls,
        draws=draws,
    )
    journal = open_journal() if cache is not False and seed is not None and weights(model) else None
    for start in range(0, table.rows, _CHUNK):
        stop = min(start + _CHUNK, table.rows)
        columns = table.values(prompt.columns, start, stop)
        rows = zip(*columns, strict=True) if columns else iter([()] * (stop - start))
        fresh = planner.add_rows(start, rows)
        if journal is not None and cache is True:
            planner.look_up(journal, fresh)
    return Plan(
        table,
        work,
        model,
        prompt.source,
        np.array(planner.row_job, np.int64),
        planner.outcomes,
        planner.contents,
        planner.keys,
        per_row=per_row,
        seed=seed,
        journal=journal,
        truncated=None if too_long == "error" else planner.truncated(table.rows),
        failure=planner.failure,
    )


class _Planner:
    """Turns rows into jobs, one per different question."""

    def __init__(
        self,
        prompt: Prompt,
        work: Work,
        keys_of: Keys,
        expand: Expand,
        per_row: int,
        seed: int | None,
        nulls: Nulls,
        *,
        draws: bool,
    ) -> None:
        self._draws = draws
        self.outcomes = Outcomes()
        self.row_job: array[int] = array("q")
        self.contents: dict[int, Any] = {}
        self.keys: dict[int, bytes] = {}
        self._prompt = prompt
        self._work = work
        self._keys_of = keys_of
        self._expand = expand
        self._per_row = per_row
        self._seed = seed
        self._nulls = nulls
        self._seen: dict[bytes, int] = {}
        self._skipped: int | None = None
        self._cut: list[int] = []
        self._times: dict[bytes, int] = {}
        self.failure: tuple[int, Exception] | None = None

    def truncated(self, rows: int) -> NDArray[np.bool_]:
        """Return which of the rows were cut to fit."""
        out = np.zeros(rows, bool)
        out[self._cut] = True
        return out

    def add_rows(self, start: int, rows: Iterator[Sequence[Any]]) -> dict[bytes, int]:
        """Add rows; return the keys that were not there before, with their jobs."""
        fresh: dict[bytes, int] = {}
        failed: dict[int, str] = {}
        before = following = len(self.outcomes)
        for row, values in enumerate(rows, start=start):
            try:
                questions = self._questions(row, values)
            except NotSupported:
                raise
            except Exception as error:  # noqa: BLE001 - a row that cannot be rendered is that row's error
                failed[following] = describe(error)
                self._note_failure(following, error)
                self.row_job.extend([following] * self._per_row)
                following += 1
                continue
            if not questions:
                if self._skipped is None:
                    self._skipped = following
                    following += 1
                self.row_job.extend([self._skipped] * self._per_row)
            for key, question in questions:
                job = self._seen.get(key)
                if job is None:
                    job = self._seen[key] = fresh[key] = following
                    following += 1
                    self.contents[job] = question
                    self.keys[job] = key
                self.row_job.append(job)
        self.outcomes.grow(following - before)
        for job, error_text in failed.items():
            self.outcomes.fail(job, error_text, source=oc.NONE)
        if self._skipped is not None:
            self.outcomes.finish[self._skipped] = oc.SKIPPED
        return fresh

    def _note_failure(self, job: int, error: Exception) -> None:
        if self.failure is None or job < self.failure[0]:
            self.failure = (job, error)

    def _questions(self, row: int, values: Sequence[Any]) -> list[tuple[bytes, Any]]:
        """Return the row's questions and their keys; none when the row is skipped."""
        content = _content(self._prompt, values, self._nulls)
        if content is None:
            return []
        if isinstance(self._prompt, Trimmed) and self._prompt.cut:
            self._cut.append(row)
        key = self._keys_of.key
        if self._seed is None:
            # Without a seed no two answers are the same question: the row becomes part of it.
            return [(key([row, asked], sample), asked) for asked, sample in self._expand(content)]
        if not self._draws:
            return [(key(asked, sample), asked) for asked, sample in self._expand(content)]
        questions = []
        for asked, sample in self._expand(content):
            first = key(asked, sample)
            times = self._times[first] = self._times.get(first, -1) + 1
            questions.append((key(asked, sample + times * self._per_row) if times else first, asked))
        return questions

    def look_up(self, journal: Journal, fresh: Mapping[bytes, int]) -> None:
        """Take over what the journal has."""
        for key, record in journal.get_many(list(fresh), self._work).items():
            job = fresh[key]
            parsed, error = self._work.accept(record)
            self.outcomes.set(job, record, oc.CACHE, parsed, None if error is None else describe(error))
            if error is not None:
                self._note_failure(job, error)
            else:
                # Not needed again; a million cached rows must not keep a million prompts.
                del self.contents[job], self.keys[job]


def _content(prompt: Prompt, values: Sequence[Any], nulls: Nulls) -> Any:
    if not prompt.takes_null:
        missing = [name for name, value in zip(prompt.columns, values, strict=True) if value is None]
        if missing:
            if nulls == "skip":
                return None
            if nulls == "error":
                raise NullField(f"column {', '.join(map(repr, missing))} is null in this row.")
            values = ["" if v is None else v for v in values]
    return prompt.render(values)


class Run:
    """A batch that runs, or ran: look at it at any time.

    Attributes
    ----------
    progress
        Counters: rows done, failed, cached…
    """

    def __init__(
        self,
        plan: Plan,
        build: Callable[[Run, Columns], Any],
        *,
        params: Mapping[str, Any],
        on_error: OnError = "null",
        advice: str | None = None,
    ) -> None:
        choice("on_error", on_error, ("null", "raise", "stop"))
        self._plan = plan
        self._build = build
        self._params = plain(params)
        self._on_error = on_error
        self._lock = threading.Lock()
        self._ready: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._started = datetime.now(UTC)
        self._began = time.monotonic()
        self._refusals: list[str] = []
        self._accepted = False
        self.progress = Progress(plan.work.op, len(plan.row_job))
        if advice is not None:
            self.progress.notes.append(advice)
        if plan.journal is None and plan.seed is not None and not weights(plan.model):
            self.progress.notes.append("results are not kept: the engine does not say which weights it runs.")
        cut = 0 if plan.truncated is None else int(plan.truncated.sum())
        if cut:
            self.progress.notes.append(f"{cut} of {plan.table.rows} rows were cut to fit the model.")
        self._count_known()

    def _count_known(self) -> None:
        """Count the rows that the plan found done: missing, failed to render, or in the journal."""
        outcomes, rows = self._plan.outcomes, self._plan.rows_of
        for job, error in outcomes.errors.items():
            self.progress.add(int(rows[job]), cached=outcomes.source[job] == oc.CACHE, error=kind(error))
        finish, source = np.array(outcomes.finish, np.int8), np.array(outcomes.source, np.int8)
        whole = np.ones(len(outcomes), bool)
        whole[list(outcomes.errors)] = False
        taken = whole & (source == oc.CACHE)
        self.progress.add(int(rows[taken].sum()), cached=int(taken.sum()))
        self.progress.add(int(rows[finish == oc.SKIPPED].sum()), skipped=True)

    # -- for whoever waits --------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether nothing runs any more."""
        return self._finished.is_set()

    def start(self) -> Run:
        """Start working in the background; returns at once."""
        self.progress.start()
        self._thread = threading.Thread(target=self._main, name=f"nbinfer-{self._plan.work.op}", daemon=True)
        self._thread.start()
        return self

    def wait(self, timeout: float | None = None, *, sink: Sink | None = None) -> Any:
        """Wait for the end and return the frame.

        An interrupt stops this wait, not the run.

        Raises
        ------
        NbinferError
            What ended the run early: a configuration error, or with ``on_error="raise"`` the first failed
            row's.
        TimeoutError
            ``timeout`` seconds passed; the run goes on.
        """
        sink = sink or QuietSink(silent=True)
        deadline = None if timeout is None else time.monotonic() + timeout
        shown = False
        while not self._finished.is_set():
            left = sink.interval if deadline is None else min(sink.interval, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError(f"{self.progress.line()}; the run goes on.")
            # A run that ends at once shows its end only.
            if shown:
                sink.update(self.progress)
            self._finished.wait(left)
            shown = True
        sink.close(self.progress)
        if self._error is not None:
            raise self._error
        return self.frame()

    @short_interrupt(
        "the run was stopped; finished rows are kept: in nb.last_run().frame(), and for the next run."
    )
    def run(self, sink: Sink) -> Any:
        """Run in the foreground: start, show progress, return the frame.

        Raises
        ------
        KeyboardInterrupt
            As it came; what is done is committed and in :meth:`frame`.
        """
        try:
            self.start()
            return self.wait(sink=sink)
        except KeyboardInterrupt:
            self.cancel()
            self._finished.wait(_GRACE_SECONDS)
            sink.close(self.progress)
            raise

    def cancel(self) -> None:
        """Stop: running rows end at their next token, finished ones stay."""
        self._stop.set()
        self._ready.put(-1)

    def frame(self) -> Any:
        """Return all rows with the results there are so far; rows not reached yet are null."""
        return self._build(self, self.columns())

    @property
    def truncated(self) -> NDArray[np.bool_] | None:
        """Which input rows were cut to fit; None when none may be."""
        return self._plan.truncated

    def columns(self) -> Columns:
        """Return what there is so far as Arrow columns, the raw material of :meth:`frame`."""
        with self._lock:
            snapshot = self._plan.outcomes.copy()
        return Columns(snapshot, self._plan.row_job)

    def retry_failed(self) -> Run:
        """Ask again for the rows that failed or were cancelled, in the background; keep the others.

        Raises
        ------
        RequestError
            The run is not over yet.
        """
        if not self.done:
            raise RequestError("the run is not over: wait() for it, or cancel() it, before retry_failed().")
        old = self._plan
        outcomes = old.outcomes.copy()
        for job in old.contents:
            outcomes.reset(job)
        plan = Plan(
            old.table,
            old.work,
            old.model,
            old.source,
            old.row_job,
            outcomes,
            dict(old.contents),
            dict(old.keys),
            per_row=old.per_row,
            seed=old.seed,
            journal=old.journal,
            truncated=old.truncated,
        )
        again = Run(plan, self._build, params=self._params, on_error=self._on_error)
        remember(again)
        return again.start()

    def __iter__(self) -> Iterator[Any]:
        """Yield small frames of rows as they finish, in the order of finishing."""
        plan = self._plan
        seen = np.zeros(plan.table.rows, bool)
        while True:
            over = self.done
            began = time.monotonic()
            with self._lock:
                finish = np.array(plan.outcomes.finish, np.int8)
                ended = (finish != oc.PENDING)[plan.row_job].reshape(-1, plan.per_row).all(axis=1)
                new = ended & ~seen
                snapshot = plan.outcomes.copy() if new.any() else None
            looked = time.monotonic() - began
            if snapshot is not None:
                seen |= new
                rows = np.flatnonzero(np.repeat(new, plan.per_row))
                yield self._build(self, Columns(snapshot, plan.row_job, rows))
            if over:
                return
            # Looking costs by the rows there are in all: it may take a tenth of the time, not more.
            self._finished.wait(max(0.1, 10 * looked))

    @property
    def info(self) -> dict[str, Any]:
        """Provenance and counts of this run, as plain JSON."""
        plan, progress, engine = self._plan, self.progress, self._plan.model.info
        with self._lock:
            outcomes = plan.outcomes
            prompt = sum(
                n for n, s in zip(outcomes.prompt, outcomes.source, strict=True) if s == oc.RUN and n > 0
            )
        return {
            "op": plan.work.op,
            "model": engine.model,
            "digest": weights(plan.model),
            "backend": engine.backend,
            "backend_version": engine.version,
            "nbinfer_version": __version__,
            "template": plan.source,
            "params": self._params,
            "seed": plan.seed,
            "rows": plan.table.rows,
            "done": progress.done,
            "failed": progress.failed,
            "failures": dict(progress.failures),
            "skipped": progress.skipped,
            "cached": progress.cached,
            "duplicates": progress.duplicates,
            "prompt_tokens": prompt,
            "completion_tokens": progress.tokens,
            "seconds": round(progress.seconds, 3),
            "started": self._started.isoformat(timespec="seconds"),
            "state": progress.state,
            "key_version": KEY_VERSION,
        }

    def __repr__(self) -> str:
        return f"<nbinfer run: {self.progress.line()}>"

    def _repr_html_(self) -> str:
        return JupyterSink.html(self.progress)

    # -- the working thread -------------------------------------------------------------------------------

    def _main(self) -> None:
        state = "done"
        try:
            if self._plan.failure is not None:
                self._react(*self._plan.failure)
            self._drive()
            if self._stop.is_set():
                state = "cancelled"
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self._error = error
            state = "failed"
        with self._lock:
            finish = self._plan.outcomes.finish
            for job, value in enumerate(finish):
                if value == oc.PENDING:
                    finish[job] = oc.CANCELLED
        # What a model that is at several places has to say of them.
        self.progress.notes.extend(getattr(self._plan.model, "notes", ()))
        self.progress.end(state)
        self._finished.set()

    def _drive(self) -> None:
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
        with self._lock:
            plan.outcomes.set(job, record, oc.RUN, parsed, None if error is None else describe(error))
            if error is None:
                del plan.contents[job]
            key = plan.keys[job] if error is not None else plan.keys.pop(job)
        tokens = record.completion_tokens if record.completion_tokens is not None else record.prompt_tokens
        # First kept, then counted: a row that the bar shows as done survives a kill.
        if plan.journal is not None and work.lasting(record):
            plan.journal.put(key, record, work, op=work.op, model=plan.model.info.model)
        self.progress.add(
            int(plan.rows_of[job]),
            tokens=tokens or 0,
            error=None if error is None else type(error).__name__,
        )
        if error is not None:
            self._react(job, error)

    def _failed(self, job: int, error: Exception) -> None:
        with self._lock:
            tokens, raw = getattr(error, "prompt_tokens", None), getattr(error, "raw", None)
            self._plan.outcomes.fail(job, describe(error), prompt_tokens=tokens or None, raw=raw or None)
        self.progress.add(int(self._plan.rows_of[job]), error=type(error).__name__)
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
        deadline = time.monotonic() + _GRACE_SECONDS
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


_last: Run | None = None


def remember(run: Run) -> Run:
    """Make ``run`` what :func:`last_run` returns."""
    global _last  # noqa: PLW0603 - the one place that knows the latest run
    _last = run
    return run


def last_run() -> Run:
    """Return the latest run of this process, finished, interrupted or failed.

    Raises
    ------
    RequestError
        Nothing has run yet.
    """
    if _last is None:
        raise RequestError(
            "nothing has run yet in this kernel: last_run() follows complete(), embed() and so on."
        )
    return _last
