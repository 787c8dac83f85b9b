"""The thread that talks to servers: one event loop for all remote engines, alive in forked children too."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any


def _ignore_late_wakeups(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle what an event loop reports: not a socket that became ready as its reader was cancelled.

    anyio, which the HTTP client stands on, then sets a future that is over; nothing is lost, and nobody
    should see it in a notebook.
    """
    if not isinstance(context.get("exception"), asyncio.InvalidStateError):
        loop.default_exception_handler(context)


inherited: list[Any] = []
"""In a forked child, what the parent still uses: to close it would take its sockets out of the epoll that
both processes share, and the parent would wait for ever."""


class Loop:
    """An event loop on a thread of its own, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the loop; it runs."""
        with self._lock:
            # A forked child has the object, but not the thread.
            if self._loop is None or self._pid != os.getpid():
                if self._loop is not None:
                    inherited.append(self._loop)
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                self._loop.set_exception_handler(_ignore_late_wakeups)
                threading.Thread(target=self._loop.run_forever, name="nbinfer-remote", daemon=True).start()
            return self._loop


LOOP = Loop()
"""The one of this process."""
