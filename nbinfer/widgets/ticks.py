"""One thread per process that looks once a second, while somebody watches."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)


class Monitor:
    """Calls its watchers at a steady pace, on one thread that runs only while there are any.

    Parameters
    ----------
    seconds
        Between two looks.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self._watchers: dict[object, Callable[[], None]] = {}
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether the thread is there."""
        return self._thread is not None

    def watch(self, look: Callable[[], None]) -> Callable[[], None]:
        """Call ``look()`` now and then once in a while; return what ends that. Both return at once."""
        key = object()
        with self._change:
            self._watchers[key] = look
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="nbinfer-monitor", daemon=True)
                self._thread.start()
            else:
                self._change.notify()

        def end() -> None:
            with self._change:
                self._watchers.pop(key, None)
                self._change.notify()

        return end

    def _work(self) -> None:
        while True:
            with self._change:
                if not self._watchers:
                    self._thread = None
                    return
                looks = list(self._watchers.values())
            for look in looks:
                try:
                    look()
                except Exception:  # noqa: BLE001 - one look must not end the others
                    _log.exception("a widget's look at the models failed")
            with self._change:
                self._change.wait_for(lambda: list(self._watchers.values()) != looks, self.seconds)  # noqa: B023 - used at once


MONITOR = Monitor()
"""The one of this process."""
