"""Numbers as people read them, and back."""

from __future__ import annotations

import re
from numbers import Integral, Real
from typing import Any

from nbinfer.contract.errors import ConfigError

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def human_bytes(count: float) -> str:
    """Return a number of bytes in binary units: ``3.2 GiB``."""
    size, step = float(count), 1024.0
    if abs(size) < step:
        return f"{size:.0f} B"
    units = ["KiB", "MiB", "GiB", "TiB"]
    # 1023.9 would be written as 1.02e+03.
    while abs(size := size / step) >= 1000 and len(units) > 1:  # noqa: PLR2004 - four digits
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def parse_bytes(size: str | float) -> int:
    """Return the bytes of ``"24GiB"``, ``"24 GB"``, ``"800m"`` or a number.

    ``KiB`` and plain ``K`` count in 1,024s, as memory is sold and shown; ``KB`` in 1,000s.

    Raises
    ------
    ConfigError
        It is neither.
    """
    if isinstance(size, int | float) and not isinstance(size, bool) and size >= 0:
        return int(size)
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None or not isinstance(size, str):
        raise ConfigError(f"{size!r:.40} is no size: write it as 24GiB, or as a number of bytes.")
    number, unit, binary = found.groups()
    decimal = unit and not binary and size.strip()[-1] in "bB"
    return int(float(number) * (1000 if decimal else 1024) ** " kmgt".index(unit.lower() or " "))


def plain_number(value: Any) -> Any:
    """Return a number of another type (NumPy's, say) as an int or float; anything else as it is."""
    if isinstance(value, bool | int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
