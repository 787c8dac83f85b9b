"""A batch that runs, or ran: what a person holds of it."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer._version import __version__
from nbinfer.contract.errors import RequestError, short_interrupt
from nbinfer.frames import outcomes as oc
from nbinfer.frames.drive import GRACE_SECONDS, Drive
from nbinfer.frames.journal import KEY_VERSION
from nbinfer.frames.outcomes import Columns
from nbinfer.frames.plan import kind
from nbinfer.frames.progress import JupyterSink, Progress, QuietSink, Sink
from nbinfer.frames.work import weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from nbinfer.frames.plan import OnError, Plan

# A picture's bytes have no place in a frame's provenance.
_SHOWN_CHARS = 200


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
        self._plan = plan
        self._build = build
        self._params = _plain(params)
        self._on_error = on_error
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._started = datetime.now(UTC)
        self.progress = Progress(plan.work.op, len(plan.row_job))
        self._drive = Drive(plan, self.progress, on_error)
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
            self._finished.wait(GRACE_SECONDS)
            sink.close(self.progress)
            raise

    def cancel(self) -> None:
        """Stop: running rows end at their next token, finished ones stay."""
        self._drive.stop()

    def frame(self) -> Any:
        """Return all rows with the results there are so far; rows not reached yet are null."""
        return self._build(self, self.columns())

    @property
    def truncated(self) -> NDArray[np.bool_] | None:
        """Which input rows were cut to fit; None when none may be."""
        return self._plan.truncated

    def columns(self) -> Columns:
        """Return what there is so far as Arrow columns, the raw material of :meth:`frame`."""
        with self._drive.lock:
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
        plan = replace(old, outcomes=outcomes, contents=dict(old.contents), keys=dict(old.keys), failure=None)
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
            with self._drive.lock:
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
        with self._drive.lock:
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

    def _main(self) -> None:
        """Work, in the thread: whoever waits is told how it ended."""
        state = "done"
        try:
            self._drive.work()
            if self._drive.stopped:
                state = "cancelled"
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self._error = error
            state = "failed"
        # What a model that is at several places has to say of them.
        self.progress.notes.extend(getattr(self._plan.model, "notes", ()))
        self.progress.end(state)
        self._finished.set()


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON-able values, leaving out those that are off."""
    out = {}
    for name, value in params.items():
        if value is None:
            continue
        try:
            # NumPy's numbers say theirs by item().
            out[name] = json.loads(json.dumps(value, default=lambda number: number.item()))
        except (TypeError, ValueError, AttributeError):
            out[name] = getattr(value, "__name__", repr(value)[:_SHOWN_CHARS])
    return out


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
