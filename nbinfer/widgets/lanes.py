"""Where the work of a widget's buttons is done.

A front end's message may arrive on any thread, also on one that a cell has blocked, so nothing is done there:
a message becomes a job in a lane.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)
_LINGER_SECONDS = 1.0


class Lane:
    """Runs jobs one after another on a thread that is there only while there is something to do.

    Parameters
    ----------
    name
        Of the thread.
    on_error
        Called, on that thread, with what a job raised.
    """

    def __init__(self, name: str, on_error: Callable[[Exception], None] | None = None) -> None:
        self._name = name
        self._on_error = on_error
        self._jobs: OrderedDict[object, Callable[[], None]] = OrderedDict()
        self._change = threading.Condition()
        self._numbers = count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, job: Callable[[], None], *, key: str | None = None) -> None:
        """Add a job; it takes the place of one with the same ``key`` that still waits. Returns at once."""
        with self._change:
            if self._closed:
                return
            if key is not None:
                self._jobs.pop(key, None)
            self._jobs[next(self._numbers) if key is None else key] = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            else:
                self._change.notify()

    def close(self) -> None:
        """Drop what waits; the job that runs is the last."""
        with self._change:
            self._closed = True
            self._jobs.clear()
            self._change.notify()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - shown, or logged
                if self._on_error is None:
                    _log.exception("a widget's job failed")
                else:
                    self._on_error(error)
            del job  # or the thread holds on to what it used while it waits

    def _next(self) -> Callable[[], None] | None:
        with self._change:
            if not self._jobs and not self._closed:
                # Sliders send many jobs: a thread for each would be a waste.
                self._change.wait_for(lambda: bool(self._jobs) or self._closed, _LINGER_SECONDS)
            if self._jobs:
                return self._jobs.popitem(last=False)[1]
            self._thread = None
            return None
