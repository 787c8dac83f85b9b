"""What a widget shows, as plain JSON: the same data is drawn by the page and written into the snapshot.

A state is a dict of parts. Each part is replaced as a whole, never changed in place, so that a reader on
another thread always sees one that is consistent.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

Row: TypeAlias = dict[str, Any]
Parts: TypeAlias = dict[str, Any]
Observer: TypeAlias = "Callable[[Parts], None]"

EMPTY: Parts = {
    "kernel": {"beat": 0, "ack": 0, "blocked": False, "text": ""},
    "machine": {"rows": [], "text": ""},
    "loaded": {"rows": []},
    "models": {"rows": [], "text": "", "busy": False},
    "plan": {},
    "curve": {"of": {}, "rows": []},
    "loading": {},
    "backends": {"rows": []},
    "requests": {"rows": []},
    "messages": {"rows": []},
}
"""The parts of the panel, as they are before anything was looked at."""


class State:
    """Parts, and those who want to know when one changes."""

    def __init__(self, parts: Parts | None = None) -> None:
        self._parts: Parts = dict(EMPTY if parts is None else parts)
        self._observers: list[Observer] = []
        # Held while observers are told: they hear of changes in the order in which these were made.
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def parts(self) -> Parts:
        """Return all parts."""
        with self._lock:
            return dict(self._parts)

    def set(self, **parts: Any) -> None:
        """Replace parts; observers are called with those that differ from before."""
        with self._lock:
            changed = {name: value for name, value in parts.items() if self._parts.get(name) != value}
            if changed:
                self._parts.update(changed)
                for observer in list(self._observers):
                    observer(changed)

    def change(self, part: str, **fields: Any) -> None:
        """Replace some fields of a part."""
        with self._lock:
            self.set(**{part: {**self._parts[part], **fields}})

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Call ``observer(changed parts)`` from now on; return what ends that."""
        with self._lock:
            self._observers.append(observer)

        def end() -> None:
            with self._lock:
                if observer in self._observers:
                    self._observers.remove(observer)

        return end
