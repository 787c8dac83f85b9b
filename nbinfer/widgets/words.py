"""How numbers and states are said, in the page and in the snapshot alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer.contract.units import human_bytes

if TYPE_CHECKING:
    from nbinfer.contract.status import StatusWord

_MINUTE, _HOUR = 60, 3600
_TENTHS_BELOW = 10
_ELLIPSIS_AT = 80

KINDS = {"Running": "ok", "Installing": "busy", "Error": "error", "Not Installed": "off"}
"""The colour of a backend's status word; the word itself is always shown beside it."""


def kind_of(word: StatusWord | str) -> str:
    """Return the colour of a status word."""
    return KINDS.get(str(word), "off")


def tokens(count: int) -> str:
    """Return ``4,096 tokens``."""
    return f"{count:,} token{'s' if count != 1 else ''}"


def part_of(used: int, total: int) -> str:
    """Return ``6 of 24 GiB``: the unit once when it is the same."""
    first, whole = human_bytes(used), human_bytes(total)
    number, _, unit = first.partition(" ")
    return f"{number if whole.endswith(f' {unit}') else first} of {whole}"


def duration(seconds: float) -> str:
    """Return seconds as a person says them: ``4 min 12 s``."""
    left = max(0, round(seconds))
    if left < _MINUTE:
        return f"{left} s"
    if left < _HOUR:
        return f"{left // _MINUTE} min {left % _MINUTE} s" if left % _MINUTE else f"{left // _MINUTE} min"
    return f"{left // _HOUR} h {left % _HOUR // _MINUTE} min"


def took(seconds: float) -> str:
    """Return how long something took: ``0.42 s``, ``3.1 s``, ``1 min 5 s``."""
    return f"{seconds:.2g} s" if seconds < _TENTHS_BELOW else duration(seconds)


def count(number: int, one: str, many: str | None = None) -> str:
    """Return ``1 model`` or ``3 models``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def short(text: str) -> str:
    """Return a text in one line, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= _ELLIPSIS_AT else line[: _ELLIPSIS_AT - 1] + "…"
