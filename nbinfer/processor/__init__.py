"""What this machine's processor can do, and whether the installed llama.cpp does it rightly."""

from __future__ import annotations

import os
import platform
from functools import cache


def has_amx() -> bool:
    """Whether the processor multiplies tiles of bytes (AMX)."""
    return "amx_int8" in flags()


@cache
def flags() -> frozenset[str]:
    """Return the processor's features as Linux names them, such as ``avx512f``."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - a stream
            for line in file:
                if line.startswith(("flags", "Features")):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    # Elsewhere: every processor that these systems still run on has them.
    return frozenset(("avx2",)) if os.name == "nt" or platform.machine() == "x86_64" else frozenset()
