"""Whether llama.cpp may use AMX in a process, and how it is kept from it.

Processors with AMX multiply quantised weights two to four times as fast with it, but some builds of llama.cpp
end the process with a general protection fault at the first product: GCC drops most of the stores to the
tile configuration. A build is tried once, in a process of its own. Where it fails, AMX is kept out; the other
rearranged layouts can be used all the same. The engine and the exact probe both ask here, so that they plan
alike.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nbinfer.processor import amx_check

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECONDS = 20.0
# Models may be loaded in several threads: stderr, turned away twice, would not come back.
_one_at_a_time = threading.Lock()
FLAGS = "-fno-dse -fno-tree-dse"
"""With these, GCC builds a llama.cpp that computes with AMX."""
BATCHED = r"\.attn_(?:[kv]_b|output_a)\.weight|altup_(?:unembd_)?proj\.weight"
"""Matrices of several slices that llama.cpp would put in AMX's layout, which has room for one slice only."""


def may_rearrange(library: ctypes.CDLL) -> bool:
    """Whether llama.cpp may store quantised weights in the order its fast CPU kernels want.

    Call it before the first model is loaded from ``library`` (libllama): where this build computes wrongly
    with AMX, this is what keeps it out; where that fails, weights must stay as they are in the file.
    """
    if not has_amx(library) or uses(library):
        return True
    try:
        with _one_at_a_time, _without_amx():
            return "AMX" not in amx_check.weight_layouts(amx_check.bind(library))
    except (AttributeError, OSError, TypeError):
        # A build whose CPU backend is found in another way, or a system without signal stacks: Windows.
        return False


def uses(library: ctypes.CDLL) -> bool:
    """Whether llama.cpp puts quantised weights in AMX's layout here, once it may rearrange them."""
    return has_amx(library) and computes(library._name)  # noqa: SLF001 - its path, which has no other name


def has_amx(library: ctypes.CDLL) -> bool:
    """Whether llama.cpp is built for AMX."""
    info = library["llama_print_system_info"]
    info.restype = ctypes.c_char_p
    return b"AMX_INT8 = 1" in info()


def computes(library: str) -> bool:
    """Whether the llama library at a path computes with AMX, and rightly."""
    return _tried(library) == 0


def is_broken(library: str) -> bool:
    """Whether the llama library at a path is built for AMX and does not compute rightly with it."""
    return _tried(library) not in (0, amx_check.ABSENT)


def _tried(library: str) -> int:
    """Return how :mod:`.amx_check` ended for a library, in a process of its own: its exit status."""
    try:
        found = Path(library).stat()
    except OSError:
        return amx_check.ABSENT
    return _ended(library, found.st_mtime_ns, found.st_size) if sys.executable else amx_check.ABSENT


@cache
def _ended(library: str, mtime: int, size: int) -> int:
    del mtime, size  # another build under the same name is tried again
    try:
        tried = subprocess.run(  # noqa: S603 - our own interpreter and our own code
            [sys.executable, "-I", "-S", str(Path(amx_check.__file__)), library],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Or ggml starts a debugger at an abort, which takes seconds.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            # An interrupt of the kernel reaches its whole group, and is not this build's failure.
            start_new_session=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 1
    return tried.returncode


def plain_layout(library: ctypes.CDLL) -> int:
    """Return the address of a buffer type in main memory, of which llama.cpp makes no faster one.

    It is that of mapped files. What is placed in main memory by name goes to the fast layouts all the same.
    """
    ggml = amx_check.bind(library)
    room = ctypes.create_string_buffer(128)
    aligned = -(-ctypes.addressof(room) // 64) * 64
    buffer = ggml["ggml_backend_cpu_buffer_from_ptr"](aligned, 64)
    kind = ggml["ggml_backend_buffer_get_type"](buffer)
    ggml["ggml_backend_buffer_free"](buffer)
    return int(kind)


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
