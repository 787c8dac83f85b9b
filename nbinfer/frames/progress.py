"""How far a batch is: counters that a run updates, and the places that show them.

In a notebook it is one display that updates itself, in a terminal one line on standard error; scripts and
pipes stay quiet but for one line when rows failed.
"""

from __future__ import annotations

import html
import shutil
import sys
import threading
import time
from collections import Counter
from typing import Any, Protocol

from nbinfer.contract.errors import RequestError


class Progress:
    """Counters of one run, safe to read from any thread.

    Attributes
    ----------
    total
        Rows of the frame (answers, where a row asks for several).
    done
        Rows with a result, an error, or nothing to ask.
    cached, duplicates, skipped
        How many of the done rows were not computed, and why. A duplicate repeats a row above it.
    failures
        Failed rows by the class of their error.
    tokens
        Tokens generated (or, for embeddings, read) in this run.
    computed
        Jobs that the engine answered in this run.
    """

    def __init__(self, op: str, total: int) -> None:
        self.op = op
        self.total = total
        self.done = self.cached = self.duplicates = self.skipped = self.computed = self.tokens = 0
        self.failures: Counter[str] = Counter()
        self.state = "running"
        self.notes: list[str] = []
        self._at_start = 0
        self._began = time.monotonic()
        self._ended: float | None = None
        self._lock = threading.Lock()

    def add(
        self,
        rows: int,
        *,
        tokens: int = 0,
        cached: int = 0,
        skipped: bool = False,
        error: str | None = None,
    ) -> None:
        """Count rows that are done.

        Parameters
        ----------
        rows
            Rows of one result; or, from the cache, of ``cached`` results.
        """
        with self._lock:
            self.done += rows
            if error is not None:
                self.failures[error] += rows
            if skipped:
                self.skipped += rows
                return
            self.cached += cached
            self.duplicates += rows - (cached or min(rows, 1))
            self.computed += bool(rows) and not cached and (error is None or tokens > 0)
            self.tokens += tokens

    def end(self, state: str) -> None:
        """Stop the clock; ``state`` is ``done``, ``cancelled`` or ``failed``."""
        with self._lock:
            self.state = state
            self._ended = time.monotonic()

    @property
    def failed(self) -> int:
        """Rows that failed."""
        return sum(self.failures.values())

    @property
    def seconds(self) -> float:
        """Seconds since the start, or that the run took."""
        return (self._ended or time.monotonic()) - self._began

    @property
    def rate(self) -> float | None:
        """Computed jobs per second; None before the first."""
        return self.computed / self.seconds if self.computed and self.seconds > 0 else None

    @property
    def eta(self) -> float | None:
        """Seconds left at the present rate; None when unknown."""
        # Rows from the cache were counted before the first one ran, so they say nothing about the rest.
        live = self.done - self._at_start
        if self._ended is not None or live <= 0 or self.seconds <= 0:
            return None
        return (self.total - self.done) / (live / self.seconds)

    def start(self) -> None:
        """Start the clock: what was counted until now needed no computing."""
        with self._lock:
            self._at_start = self.done
            self._began = time.monotonic()

    def summary(self) -> str | None:
        """Return the line about failed rows: how many, of what kind; None when there are none."""
        if not self.failures:
            return None
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.failures.most_common())
        return f"{self.failed} of {self.total} rows failed: {kinds}"

    def line(self) -> str:
        """Return everything worth knowing in one line of text."""
        parts = [f"{self.op} {self.done}/{self.total} rows"]
        if self.state != "running":
            parts[0] += f" {self.state} in {clock(self.seconds)}"
        if self.rate is not None:
            parts.append(f"{_short(self.rate)} rows/s")
            if self.tokens:
                parts.append(f"{_short(self.tokens / self.seconds)} tok/s")
        if self.eta is not None:
            parts.append(f"ETA {clock(self.eta)}")
        parts += [
            f"{count} {word}"
            for word, count in (
                ("cached", self.cached),
                ("duplicate", self.duplicates),
                ("skipped", self.skipped),
            )
            if count
        ]
        if self.failures:
            parts.append(str(self.summary()))
        return " · ".join(parts)


def clock(seconds: float) -> str:
    """Write a duration as a person would: ``0.8 s``, ``42 s``, ``3:07``, ``1:02:09``."""
    if seconds < 10:  # noqa: PLR2004 - below ten seconds a tenth matters
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Sink(Protocol):
    """A place that shows a run's progress; called by one thread at a time."""

    interval: float
    """Seconds between updates."""

    def update(self, progress: Progress) -> None:
        """Show the present state."""
        ...

    def close(self, progress: Progress) -> None:
        """Show the final state."""
        ...


class QuietSink:
    """Scripts: nothing while it runs, one line on standard error when rows failed."""

    interval = 0.5

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent

    def update(self, progress: Progress) -> None:
        """Show nothing."""

    def close(self, progress: Progress) -> None:
        """Say how many rows failed."""
        if self._silent:
            return
        for line in filter(None, [progress.summary(), *progress.notes]):
            sys.stderr.write(f"nbinfer.{progress.op}: {line}\n")


class TerminalSink:
    """A terminal: one line on standard error, rewritten in place."""

    interval = 0.2

    def update(self, progress: Progress) -> None:
        """Rewrite the line."""
        width = max(20, shutil.get_terminal_size().columns - 1)
        sys.stderr.write("\r\x1b[K" + progress.line()[:width])
        sys.stderr.flush()

    def close(self, progress: Progress) -> None:
        """Leave the final line, whole."""
        sys.stderr.write("\r\x1b[K" + "\n".join([progress.line(), *progress.notes]) + "\n")
        sys.stderr.flush()


class JupyterSink:
    """A notebook: one display, updated in place, that needs no widget and stays as it ended."""

    # A front end redraws; five times a second looks alive and costs nothing.
    interval = 0.2

    def __init__(self) -> None:
        self._display_id: str | None = None

    def update(self, progress: Progress) -> None:
        """Create the display, or update it."""
        from IPython import display

        show: Any = display.display
        bundle = {
            "text/html": self.html(progress),
            "text/plain": "\n".join([progress.line(), *progress.notes]),
        }
        if self._display_id is None:
            self._display_id = f"nbinfer-{id(progress):x}-{time.monotonic_ns():x}"
            show(bundle, raw=True, display_id=self._display_id)
        else:
            show(bundle, raw=True, display_id=self._display_id, update=True)

    def close(self, progress: Progress) -> None:
        """Leave the final state in the display."""
        self.update(progress)

    @staticmethod
    def html(progress: Progress) -> str:
        """Return the bar and its line; every text in it is escaped."""
        line = html.escape(progress.line())
        notes = "".join(f"<div><small>{html.escape(note)}</small></div>" for note in progress.notes)
        return (
            f'<div class="nbinfer-progress" role="group" aria-label="{html.escape(progress.op)}">'
            f'<progress max="{max(progress.total, 1)}" value="{progress.done}" style="width: 12em">'
            "</progress> "
            f'<span style="font-variant-numeric: tabular-nums">{line}</span>{notes}</div>'
        )


def _in_notebook() -> bool:
    if sys.modules.get("IPython") is None:
        return False
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def announce(text: str) -> None:
    """Say one line before long work: in the cell's output of a notebook, else on standard error."""
    if not _in_notebook():
        sys.stderr.write(f"{text}\n")
        return
    from IPython import display

    show: Any = display.display
    show({"text/html": f"<div><small>{html.escape(text)}</small></div>", "text/plain": text}, raw=True)


def make_sink(progress: bool | Sink | None) -> Sink:  # noqa: FBT001 - the public option is a three-way switch
    """Return the place to show progress: None chooses, True insists, False is silent.

    Raises
    ------
    RequestError
        ``progress`` is something else.
    """
    if progress is False:
        return QuietSink(silent=True)
    if progress is None or progress is True:
        if _in_notebook():
            return JupyterSink()
        return TerminalSink() if progress or sys.stderr.isatty() else QuietSink()
    if not (hasattr(progress, "update") and hasattr(progress, "close")):
        raise RequestError(
            f"progress={progress!r}: it is True, False, None (choose), or an object with update and close."
        )
    return progress


def _short(rate: float) -> str:
    """Three digits while they mean something, then whole numbers with commas: 0.52, 24.1, 2,410."""
    return f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}"  # noqa: PLR2004 - four digits
