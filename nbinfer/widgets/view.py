"""The live widget: needs anywidget, and is therefore imported only when one is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from nbinfer.widgets.snapshot import snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.widgets.state import Parts
    from nbinfer.widgets.watched import Watched

_STATIC = Path(__file__).parent / "static"
_CLOSED = "This widget is closed: the cell that made it makes a new one"


class View(anywidget.AnyWidget):
    """A view of a state: each part is a trait that only Python sets; the page answers with commands.

    Parameters
    ----------
    kind
        ``panel``, ``bar``, ``badge`` or ``monitor``.
    watched
        Its state, and what its buttons do.
    """

    _esm = _STATIC / "widgets.js"
    _css = _STATIC / "widgets.css"
    kind = traitlets.Unicode().tag(sync=True)

    def __init__(self, kind: str, watched: Watched) -> None:
        self.watched = watched
        parts = watched.state.parts()
        self.add_traits(**{name: traitlets.Dict().tag(sync=True) for name in parts})
        super().__init__(kind=kind, **parts)
        self._end = watched.state.observe(self._changed)
        # What changed between the first line and the last.
        self._changed(watched.state.parts())
        self.on_msg(self._message)

    def _changed(self, parts: Parts) -> None:
        # From any thread; the state sees to it that there is one at a time.
        with self.hold_sync():
            for name, value in parts.items():
                setattr(self, name, value)

    def _message(self, _widget: Any, content: Mapping[str, Any], _buffers: Any) -> None:
        # On any thread, at any time: it only becomes a job.
        self.watched.do(content)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if self.comm is None:
            return snapshot(self.kind, self.watched.state.parts(), hint=_CLOSED)
        bundle = super()._repr_mimebundle_(**options)
        still, _ = snapshot(self.kind, self.watched.state.parts())
        data, metadata = bundle or ({}, {})
        # The still picture is for whoever cannot run the widget, now or later.
        return {**data, **still}, metadata

    def __repr__(self) -> str:
        data, _ = snapshot(self.kind, self.watched.state.parts())
        return str(data["text/plain"])

    def close(self) -> None:
        """Take the widget off the page and stop what it started; idempotent. Loaded models stay loaded."""
        if hasattr(self, "_end"):  # ipywidgets closes also what was never whole
            self._end()
            self.watched.close()
            # ipywidgets leaves it, and its channel, behind.
            self.layout.close()
        super().close()
        # ipywidgets takes the picture away too.
        self.__dict__.pop("_repr_mimebundle_", None)
