"""The seam between values and how they look.

Values live at the bottom of the house and rendering near the top, so the top room registers itself here
(in ``nbinfer/__init__.py``) and the values only ask. :func:`printable` is here because even an error's
message may hold text from outside.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

Bundle: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
"""IPython's mimebundle: (data by MIME type, metadata)."""

_renderer: Callable[[Any], Bundle] | None = None

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def register(renderer: Callable[[Any], Bundle]) -> None:
    """Make ``renderer(value)`` the one that turns values into a mimebundle."""
    global _renderer  # noqa: PLW0603 - the one wire between the rooms
    _renderer = renderer


def mimebundle(value: Any) -> Bundle:
    """Render ``value``; plain text alone when no renderer is registered."""
    if _renderer is None:
        return {"text/plain": str(value)}, {}
    return _renderer(value)


def printable(text: str) -> str:
    r"""Return ``text`` with control characters made visible; ``\n`` and ``\t`` stay.

    A model can write escape sequences, which a terminal would obey: move the cursor, retitle the window, fill
    the clipboard.
    """
    return _CONTROLS.sub(_picture, text.replace("\r\n", "\n"))


def _picture(match: re.Match[str]) -> str:
    character = match.group()
    if character < " ":
        return chr(0x2400 + ord(character))  # Unicode's control pictures
    return "\u2421" if character == "\x7f" else "\ufffd"
