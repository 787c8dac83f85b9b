"""A state that is kept up to date while somebody looks at it."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

from nbinfer.widgets.lanes import Lane
from nbinfer.widgets.state import EMPTY, State
from nbinfer.widgets.ticks import MONITOR

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbinfer.widgets.state import Parts
    from nbinfer.widgets.ticks import Monitor

_BLOCKED_AFTER = 1.5
"""Seconds without a turn of the kernel's event loop after which a cell is said to hold it."""
_QUIET_SECONDS = 150.0
"""After which a view that has not spoken is gone; a page speaks twice a minute, once when it is hidden."""
_BLOCKED = "A cell is running. Buttons act when it ends; to stop it now, interrupt the kernel (■)."


class Pulse:
    """Whether the event loop of this kernel gets a turn: while a cell blocks it, no button is heard."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop
        self._asked: float | None = None

    @classmethod
    def here(cls) -> Pulse:
        """Watch the loop that this code runs on, if it runs on one."""
        try:
            return cls(asyncio.get_running_loop())
        except RuntimeError:
            return cls(None)

    def blocked(self) -> bool:
        """Return whether the loop owes an answer; asks for the next one. Callable from any thread."""
        if self._loop is None:
            return False
        if self._asked is not None:
            return time.monotonic() - self._asked > _BLOCKED_AFTER
        self._asked = time.monotonic()
        try:
            self._loop.call_soon_threadsafe(self._answered)
        except RuntimeError:  # the loop is closed: so is the kernel
            self._loop = None
        return False

    def _answered(self) -> None:
        self._asked = None


class Watched:
    """A state, looked after once a second while at least one view of it is open.

    Parameters
    ----------
    parts
        What the state starts with, besides the part ``kernel``.
    look
        Returns the parts that change by themselves, as they are now; called on the monitor's thread.
    monitor
        Says when to look.
    pulse
        Whether the kernel hears its buttons.
    quiet_seconds
        How long a view may be silent before it is taken for closed: a page that is shut, or a connection that
        breaks, says nothing.
    """

    def __init__(
        self,
        parts: Parts,
        look: Callable[[], Parts],
        *,
        monitor: Monitor = MONITOR,
        pulse: Pulse | None = None,
        quiet_seconds: float = _QUIET_SECONDS,
    ) -> None:
        self.state = State({"kernel": EMPTY["kernel"], **parts})
        self._look = look
        self._monitor = monitor
        self._pulse = pulse or Pulse.here()
        self._quick = Lane("nbinfer-widget")
        self._lock = threading.Lock()
        self._quiet_seconds = quiet_seconds
        self._views: dict[str, float] = {}
        self._deaf_at = 0.0
        self._end_watch: Callable[[], None] | None = None
        self.closed = False

    def do(self, command: Mapping[str, Any]) -> None:
        """Take a command of the page.

        ``{"do": "open", "view": …}`` says that a view is there, and from time to time that it still is;
        ``"close"`` that it is not. Returns at once, on whatever thread it is called. A number ``n`` comes
        back as ``kernel.ack``.
        """
        number = command.get("n")
        if isinstance(number, int):
            self._quick.put(lambda: self.state.change("kernel", ack=number))
        view = str(command.get("view", ""))
        if command.get("do") == "open":
            with self._lock:
                self._views[view] = time.monotonic()
            self._watch_while_seen()
        elif command.get("do") == "close":
            with self._lock:
                self._views.pop(view, None)
            self._watch_while_seen()

    def look(self) -> None:
        """Look once."""
        if self.closed:
            return
        blocked = self._pulse.blocked()
        self._forget_silent(blocked=blocked)
        # Each look is a beat: a page that hears none knows that the kernel is gone.
        beat = self.state["kernel"]["beat"] + 1
        self.state.change("kernel", beat=beat, blocked=blocked, text=_BLOCKED if blocked else "")
        self.state.set(**self._look())

    def close(self) -> None:
        """Stop looking; commands are ignored from now on. Idempotent."""
        with self._lock:
            self.closed = True
            end, self._end_watch = self._end_watch, None
        if end is not None:
            end()
        self._quick.close()

    def _forget_silent(self, *, blocked: bool) -> None:
        now = time.monotonic()
        if blocked:  # what the views say now is heard when the cell ends
            self._deaf_at = now
        with self._lock:
            silent = [
                view
                for view, heard in self._views.items()
                if now - max(heard, self._deaf_at) > self._quiet_seconds
            ]
            for view in silent:
                del self._views[view]
        if silent:
            self._watch_while_seen()

    def _watch_while_seen(self) -> None:
        end = None
        with self._lock:
            if not self._views or self.closed:
                end, self._end_watch = self._end_watch, None
            elif self._end_watch is None:
                self._end_watch = self._monitor.watch(self.look)
        if end is not None:
            end()
