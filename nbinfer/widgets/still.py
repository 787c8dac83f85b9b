"""What stands in for a widget where anywidget is not installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer.widgets.snapshot import HINT, snapshot

if TYPE_CHECKING:
    from nbinfer.widgets.watched import Watched


class Still:
    """A widget that does not move: its state at the moment it is shown."""

    def __init__(self, kind: str, watched: Watched) -> None:
        self.kind = kind
        self.watched = watched

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        del include, exclude
        self.watched.look()
        return snapshot(self.kind, self.watched.state.parts(), hint=HINT)

    def __repr__(self) -> str:
        data, _ = self._repr_mimebundle_()
        return str(data["text/plain"])

    def close(self) -> None:
        """Stop what is under way; idempotent."""
        self.watched.close()
