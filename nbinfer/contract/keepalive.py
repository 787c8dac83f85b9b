"""How long an idle model stays loaded, in the duration notation of the Go language."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

from nbinfer.contract.errors import ConfigError

# Nanoseconds per unit; both signs for micro, U+00B5 and U+03BC, are in use.
_UNITS = {
    "ns": 1,
    "us": 10**3,
    "\u00b5s": 10**3,
    "\u03bcs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_TERM = r"(?:([0-9]+)(?:\.([0-9]*))?|\.([0-9]+))(ns|us|\u00b5s|\u03bcs|ms|s|m|h)"
_TERMS = re.compile(_TERM)
_TEXT = re.compile(rf"([-+]?)((?:{_TERM})+)")
_LONGEST = 2**63 - 1  # nanoseconds in a signed 64-bit integer, about 292 years

_RULE = (
    'it is a duration such as "5m", "30s", "1h30m" or "1.5h", "0" (unload when idle) or "-1" (never unload).'
)


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """How long an idle model stays loaded, counted from the release of its last use.

    Every negative duration means never, and is kept as -1; ``KeepAlive(0)`` unloads as soon as the model is
    idle.

    Parameters
    ----------
    nanoseconds
        The duration.
    """

    nanoseconds: int

    DEFAULT: ClassVar[KeepAlive]
    NEVER: ClassVar[KeepAlive]
    IMMEDIATE: ClassVar[KeepAlive]

    def __post_init__(self) -> None:
        if isinstance(self.nanoseconds, bool) or not isinstance(self.nanoseconds, int):
            raise ConfigError(
                f"a keep-alive of {self.nanoseconds!r} ns is refused: it must be a whole number."
            )
        if self.nanoseconds > _LONGEST:
            raise ConfigError(f"a keep-alive of {self.nanoseconds} ns is too long; -1 means never unload.")
        if self.nanoseconds < 0:
            object.__setattr__(self, "nanoseconds", -1)

    @classmethod
    def parse(cls, value: KeepAlive | str | float | timedelta) -> KeepAlive:
        """Read a duration.

        Parameters
        ----------
        value
            Text (``"5m"``, ``"1h30m"``, ``"0"``, ``"-1"``), a number of seconds, or a ``timedelta``.

        Raises
        ------
        ConfigError
            The value is none of these; the message names it.
        """
        if isinstance(value, KeepAlive):
            return value
        if isinstance(value, str):
            return cls(_parse_text(value))
        if isinstance(value, timedelta):
            return cls(value // timedelta(microseconds=1) * 1000)
        return cls(_from_seconds(value))

    @classmethod
    def from_json(cls, value: object) -> KeepAlive:
        """Read a decoded JSON value, which is always a string.

        Raises
        ------
        ConfigError
            It is not a string, or not a duration.
        """
        if not isinstance(value, str):
            raise ConfigError(
                f'keep_alive={value!r:.60} is refused: in JSON it is a string, such as "5m0s" or "-1".'
            )
        return cls.parse(value)

    def to_json(self) -> str:
        """Return the wire form: ``"5m0s"``, ``"0s"``, ``"-1"``."""
        return str(self)

    @property
    def never(self) -> bool:
        """Whether the model is unloaded only when asked for by name: not when idle, and not to make room."""
        return self.nanoseconds < 0

    @property
    def seconds(self) -> float:
        """The duration in seconds; infinity for never."""
        return math.inf if self.never else self.nanoseconds / 10**9

    def deadline(self, idle_since: float) -> float:
        """Return when a model idle since ``idle_since`` goes, on the same clock; infinity for never."""
        return idle_since + self.seconds

    def __str__(self) -> str:
        return "-1" if self.never else _format(self.nanoseconds)


KeepAlive.DEFAULT = KeepAlive(300 * 10**9)
KeepAlive.NEVER = KeepAlive(-1)
KeepAlive.IMMEDIATE = KeepAlive(0)


def _from_seconds(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value * 10**9  # exact, whatever its size
    if isinstance(value, float) and math.isfinite(value):
        return round(value * 10**9)
    raise ConfigError(f"keep_alive={value!r:.60} is refused: {_RULE}")


def _parse_text(text: str) -> int:
    if text == "-1":
        return -1
    if text in ("0", "+0", "-0"):
        return 0
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ConfigError(f"keep_alive={text!r:.60} is refused: {_RULE}")
    total = 0
    for whole, fraction, bare_fraction, unit in _TERMS.findall(found.group(2)):
        digits = fraction or bare_fraction
        scale = _UNITS[unit]
        total += int(whole or "0") * scale
        # What is finer than a nanosecond is dropped.
        total += int(digits or "0") * scale // 10 ** len(digits)
    if total > _LONGEST:
        raise ConfigError(f"keep_alive={text!r:.60} is too long (over 292 years); -1 means never unload.")
    return -total if found.group(1) == "-" else total


def _format(nanoseconds: int) -> str:
    """Write as Go does: the largest unit first, none left out below it, and one unit below a second."""
    if nanoseconds == 0:
        return "0s"
    if nanoseconds < 10**9:
        for unit in ("ms", "\u00b5s", "ns"):
            if nanoseconds >= _UNITS[unit]:
                return _decimal(nanoseconds, _UNITS[unit]) + unit
    minutes, rest = divmod(nanoseconds, _UNITS["m"])
    hours, minutes = divmod(minutes, 60)
    text = _decimal(rest, _UNITS["s"]) + "s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


def _decimal(amount: int, unit: int) -> str:
    whole, rest = divmod(amount, unit)
    digits = str(rest).rjust(len(str(unit)) - 1, "0").rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)
