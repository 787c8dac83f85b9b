"""What a context that is loaded in this process really holds, in llama.cpp's own words."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from nbinfer.contract.errors import NbinferError
from nbinfer.memory.probe import abi
from nbinfer.memory.probe.client import library_folder, shared_probe


def breakdown(context: Any) -> dict[str, dict[str, int]] | None:
    """Return the bytes that a live llama.cpp context holds on each device.

    Parameters
    ----------
    context
        A ``llama_context`` pointer of the llama_cpp module of this process: an integer or ``c_void_p``.

    Returns
    -------
    dict or None
        ``{device: {"weights": bytes, "context": bytes, "compute": bytes}}``; ``"CPU"`` is everything in host
        memory, pinned buffers included. The output buffer is not part of it. None where this build of
        llama.cpp is not one whose answer can be read: that is tried out in another process first.
    """
    pointer = getattr(context, "value", context)
    reader = _reader()
    if reader is None or not pointer:
        return None
    library, function = reader
    try:
        rows = abi.read_breakdown(library, function, int(pointer))
    except ValueError:
        return None
    devices: dict[str, dict[str, int]] = {}
    for row in rows:
        held = devices.setdefault("CPU" if row["host"] else row["device"], {})
        for name, key in (("weights", "model"), ("context", "context"), ("compute", "compute")):
            held[name] = held.get(name, 0) + row[key]
    return devices


@functools.cache
def _reader() -> tuple[Any, Any] | None:
    try:
        from llama_cpp import llama_cpp

        # A handle of its own on the same library: signatures set here must not change llama_cpp's.
        path = Path(llama_cpp._lib._name)  # noqa: SLF001 - the only way to the same instance
        if path.resolve().parent != library_folder().resolve():
            return None
        library = ctypes.CDLL(str(path))
        # The child has read the same structures of the same library, and would have died in our place.
        if not shared_probe().works():
            return None
        bound = abi.bind(library)
        function = abi.breakdown_function(bound)
    except (ImportError, AttributeError, OSError, NbinferError):
        return None
    return None if function is None else (bound, function)
