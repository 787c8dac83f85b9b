"""Where a growing answer goes: a notebook's output, a terminal, or nowhere."""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from nbinfer.contract.results import Delta, Finished, PromptProgress, Result, Timings, Usage
from nbinfer.display.result import View, result_bundle, state_words, summary
from nbinfer.display.style import page
from nbinfer.display.text import escape, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from nbinfer.contract.rendering import Bundle
    from nbinfer.contract.results import Event

UPDATES_PER_SECOND = 12
"""More than this no reader sees, and a browser falls seconds behind."""

_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"


class Sink(Protocol):
    """Takes the events of one answer, then its result."""

    def event(self, event: Event) -> None:
        """Show what is new; may take a while, in which further text is merged by the stream."""
        ...

    def finish(self, result: Result) -> None:
        """Show the final state: complete, interrupted or failed."""
        ...


def follow(events: Iterable[Event], sink: Sink) -> None:
    """Hand all events of a stream to ``sink``; the result is the caller's to fetch and to show."""
    for event in events:
        if not isinstance(event, Finished):
            sink.event(event)


class NullSink:
    """Shows nothing."""

    def event(self, event: Event) -> None:
        """Ignore it."""

    def finish(self, result: Result) -> None:
        """Ignore it."""


class JupyterSink:
    """One output that is updated in place.

    The first token is shown at once, then at most twelve updates a second, and exactly one at the end: the
    sink holds the reader up, and the stream merges what arrives meanwhile, so nothing is ever shown late.

    Parameters
    ----------
    model
        Name for the footer of the growing answer.
    live
        False shows only the end.
    publish
        ``publish(data, metadata, update)``; default: this cell's output through IPython's display machinery.
    clock, sleep
        Seconds, and how to wait for some; for tests.
    """

    def __init__(
        self,
        *,
        model: str = "",
        view: View = "rich",
        footer: bool = True,
        live: bool = True,
        publish: Callable[[dict[str, Any], dict[str, Any], bool], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._model, self._view, self._footer, self._live = model, view, footer, live
        self._publish = publish or display_publisher()
        self._clock, self._sleep = clock, sleep
        self._text = self._reasoning = ""
        self._tokens = 0
        self._began: float | None = None
        self._shown = False
        self._next_update = 0.0
        if live:
            # The first rendering imports its libraries; while the engine reads the prompt, that is free.
            result_bundle(Result(text=""), view=view)

    def event(self, event: Event) -> None:
        """Show the text so far, or how much of the prompt has been read."""
        if isinstance(event, PromptProgress):
            # Worth a line only for a long prompt, and never worth a wait.
            if self._live and event.done < event.total and self._clock() >= self._next_update:
                self._show(lambda: _progress_bundle(event))
        elif isinstance(event, Delta) and event.index == 0:
            self._add(event)

    def _add(self, delta: Delta) -> None:
        if delta.reasoning:
            self._reasoning += delta.text
        else:
            self._text += delta.text
        self._tokens += delta.n_tokens
        first = self._began is None
        if self._began is None:
            self._began = self._clock()
        if not self._live:
            return
        wait = self._next_update - self._clock()
        if wait > 0 and not first:
            self._sleep(wait)
        self._show(self._bundle)

    def _bundle(self) -> Bundle:
        elapsed = self._clock() - (self._began or 0.0)
        so_far = Result(
            text=self._text,
            reasoning=self._reasoning or None,
            usage=Usage(completion_tokens=self._tokens),
            timings=Timings(generation_seconds=elapsed, generated_tokens=self._tokens),
            model=self._model,
        )
        return result_bundle(so_far, view=self._view, footer=self._footer, running=True)

    def _show(self, make: Callable[[], Bundle]) -> None:
        began = self._clock()
        bundle = make()
        with interrupt_later():  # sent and not remembered would leave two outputs
            self._publish(*bundle, self._shown)
            self._shown = True
        # A very long answer takes long to render: leave most of the time to the engine.
        now = self._clock()
        self._next_update = now + max(1 / UPDATES_PER_SECOND, 3 * (now - began))

    def finish(self, result: Result) -> None:
        """Replace the output by the final one; it is all that a saved notebook keeps."""
        self._show(lambda: result_bundle(result, view=self._view, footer=self._footer))


@contextmanager
def interrupt_later() -> Iterator[None]:
    """Hold an interrupt back until the block is done, as it must be where half of it is worse than none."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(*held[0])


def _progress_bundle(progress: PromptProgress) -> Bundle:
    words = f"reading the prompt: {progress.done} of {progress.total} tokens"
    return {"text/plain": words, "text/html": page(f'<div class="nbinfer-foot">{escape(words)}</div>')}, {}


def display_publisher() -> Callable[[dict[str, Any], dict[str, Any], bool], None]:
    """Return what shows (data, metadata, update) in one output of this cell."""
    import uuid

    from IPython.display import display

    display_id = f"nbinfer-{uuid.uuid4().hex}"

    def publish(data: dict[str, Any], metadata: dict[str, Any], update: bool) -> None:  # noqa: FBT001
        display(  # type: ignore[no-untyped-call]
            data, metadata=metadata, raw=True, display_id=display_id, update=update
        )

    return publish


class TerminalSink:
    """Tokens to standard output as they come; reasoning, dimmed, and how it ended to standard error.

    Parameters
    ----------
    view
        ``code`` waits for the end and prints the first fenced block; every other view is the raw text.
    live
        False prints only at the end.
    """

    def __init__(
        self,
        *,
        view: View = "text",
        live: bool = True,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self._view: View = view
        self._live = live and view != "code"
        # Looked up late: a notebook or a test may have replaced them since.
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._reasoning = False
        self._last = "\n"

    def event(self, event: Event) -> None:
        """Print new text."""
        if not (self._live and isinstance(event, Delta) and event.index == 0 and event.text):
            return
        # A carriage return would overwrite the line, and may be half of a line end.
        text = printable(event.text.replace("\r", ""))
        if event.reasoning:
            self._reasoning = True
            self._to_err(text)
        else:
            self._end_reasoning()
            self._out.write(text)
            self._out.flush()
        self._last = text[-1:] or self._last

    def _to_err(self, text: str) -> None:
        dim = self._err.isatty()
        self._err.write(f"{_DIM}{text}{_NORMAL}" if dim else text)
        self._err.flush()

    def _end_reasoning(self) -> None:
        if self._reasoning:
            self._to_err("\n\n")
            self._reasoning = False
            self._last = "\n"

    def finish(self, result: Result) -> None:
        """End the line, and say so when the answer is not complete."""
        self._end_reasoning()
        if not self._live:
            text = (result.code or result.text) if self._view == "code" else result.text
            self._out.write(printable(text))
            self._last = text[-1:] or "\n"
        if self._last != "\n":
            self._out.write("\n")
        self._out.flush()
        words = state_words(result)
        if words:
            self._to_err(f"[{words}]\n")


class ShownResult(Result):
    """A result that is on screen already, so that returning it from a cell does not show it twice.

    It is a :class:`~nbinfer.contract.results.Result` in every other way, and shows itself as it was first
    shown: with the same view and footer.
    """

    __slots__ = ("_fresh", "_look")  # not fields: they are of the screen, not of the answer
    _fresh: bool
    _look: tuple[View, bool, bool]

    @classmethod
    def of(
        cls,
        result: Result,
        *,
        view: View = "rich",
        footer: bool = True,
        in_terminal: bool = False,
        fresh: bool = True,
    ) -> ShownResult:
        """Return ``result`` as one that was just shown (``fresh``) with this look."""
        shown = cls(**{name: getattr(result, name) for name in result.__dataclass_fields__})
        shown._fresh = fresh
        shown._look = (view, footer, in_terminal)
        return shown

    def settle(self) -> None:
        """Mark the cell that showed it as ended: from now on, displaying it shows it."""
        self._fresh = False

    def _ipython_display_(self) -> None:
        if not getattr(self, "_fresh", False):
            # IPython's word for "use the other formatters": the mimebundle below, as an ordinary output.
            raise NotImplementedError
        self._fresh = False
        if self._look[2]:  # in a terminal the "Out[3]: " prompt is already there
            sys.stdout.write(summary(self) + "\n")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Bundle:
        del include, exclude
        default: tuple[View, bool, bool] = ("rich", True, False)  # a copy with changes has no look of its own
        view, footer, _ = getattr(self, "_look", default)
        return result_bundle(self, view=view, footer=footer)
