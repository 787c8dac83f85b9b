"""AMX kept out of a process that runs llama.cpp.

Builds of llama.cpp for processors with AMX end the process with a general protection fault at the first batch
on quantised weights: GCC 12 drops most of the stores to the tile configuration. Without AMX the other
rearranged layouts can be used all the same; they are one and a half times as fast as plain ones on 4-bit
weights. The engine and the exact probe both ask here, so that they plan alike.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def may_rearrange(library: ctypes.CDLL) -> bool:
    """Whether llama.cpp may store quantised weights in the order its fast CPU kernels want.

    Call it before the first model is loaded from ``library`` (libllama): where the processor has AMX, this is
    what keeps it out; where that fails, weights must stay as they are in the file.
    """
    info = library["llama_print_system_info"]
    info.restype = ctypes.c_char_p
    if b"AMX_INT8 = 1" not in info():
        return True
    with _without_amx():
        try:
            return "AMX" not in _weight_layouts(library)
        except AttributeError:  # a build whose CPU backend is found in another way
            return False


class _SignalStack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _without_amx() -> Iterator[None]:
    """While this lasts, Linux refuses AMX to the process: a signal stack is too small for its registers.

    llama.cpp asks once, when it first lists its weight layouts, and says on stderr that it was refused.
    """
    libc = ctypes.CDLL(None)
    room = ctypes.create_string_buffer(4096)  # AMX needs more than 8 KiB
    small, before = _SignalStack(ctypes.addressof(room), 0, len(room)), _SignalStack()
    if libc.sigaltstack(ctypes.byref(small), ctypes.byref(before)) != 0:
        yield
        return
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
        libc.sigaltstack(ctypes.byref(before), None)


def _weight_layouts(library: ctypes.CDLL) -> list[str]:
    """Names of the weight layouts of llama.cpp's CPU backend, beside the file's own."""

    def call(name: str, result: Any, *arguments: Any) -> Any:
        function = library[name]
        function.restype = result
        return function(*arguments)

    registry = ctypes.c_void_p(call("ggml_backend_cpu_reg", ctypes.c_void_p))
    device = ctypes.c_void_p(call("ggml_backend_reg_dev_get", ctypes.c_void_p, registry, ctypes.c_size_t(0)))
    address = call(
        "ggml_backend_reg_get_proc_address", ctypes.c_void_p, registry, b"ggml_backend_dev_get_extra_bufts"
    )
    if not address:
        return []
    layouts = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
    names: list[str] = []
    while layouts[len(names)]:
        layout = ctypes.c_void_p(layouts[len(names)])
        names.append(call("ggml_backend_buft_name", ctypes.c_char_p, layout).decode())
    return names
