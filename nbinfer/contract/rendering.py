"""The seam between values and how they look.

Values live at the bottom of the house and rendering near the top, so the top room registers itself here
(in ``nbinfer/__init__.py``) and the values only ask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

Bundle: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
"""IPython's mimebundle: (data by MIME type, metadata)."""

_renderer: Callable[[Any], Bundle] | None = None


def register(renderer: Callable[[Any], Bundle]) -> None:
    """Make ``renderer(value)`` the one that turns values into a mimebundle."""
    global _renderer  # noqa: PLW0603 - the one wire between the rooms
    _renderer = renderer


def mimebundle(value: Any) -> Bundle:
    """Render ``value``; plain text alone when no renderer is registered."""
    if _renderer is None:
        return {"text/plain": str(value)}, {}
    return _renderer(value)
