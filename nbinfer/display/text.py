"""Text from outside, made fit for a terminal and for HTML."""

from __future__ import annotations

import html
import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


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


def escape(text: object) -> str:
    """Return ``text`` as HTML text or attribute value."""
    return html.escape(printable(str(text)))
