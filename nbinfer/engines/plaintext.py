"""What a person writes stays text: control tokens spelled out in a message must not end its turn.

A private-use character, the seam, goes into whatever reads like a control token. The rendered prompt is cut
there before it is tokenised, so that no tokenizer finds the token, and shown without it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbinfer.contract.requests import Message

SEAM = "\ue0f7"
"""A private-use character that no text means anything by: where a prompt is cut before it is tokenised."""


def control_pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    """What matches control tokens written out; None when there are none.

    Parameters
    ----------
    texts
        The control tokens' texts; those of one character are ordinary text to everybody.
    """
    found = sorted((re.escape(text) for text in set(texts) if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(found)) if found else None


def defused(text: str, pattern: re.Pattern[str] | None) -> str:
    """``text`` with a seam in everything that reads like a control token."""
    if pattern is None or ("<" not in text and "[" not in text):  # what all known control tokens begin with
        return text
    return pattern.sub(lambda found: found.group()[0] + SEAM + found.group()[1:], text)


def defused_message(message: Message, pattern: re.Pattern[str] | None) -> dict[str, Any]:
    """A message with its text, or the text of its parts, defused."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": defused(content, pattern)}
    if isinstance(content, list | tuple):
        parts = [
            {**part, "text": defused(part["text"], pattern)} if isinstance(part.get("text"), str) else part
            for part in content
        ]
        return {**message, "content": parts}
    return dict(message)
