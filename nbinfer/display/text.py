"""Text from outside, made fit for a terminal and for HTML."""

from __future__ import annotations

import html

from nbinfer.contract.rendering import printable

__all__ = ["escape", "printable"]


def escape(text: object) -> str:
    """Return ``text`` as HTML text or attribute value."""
    return html.escape(printable(str(text)))
