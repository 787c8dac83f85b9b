"""llama.cpp's library, loaded once, quietly.

Only this module imports ``llama_cpp``. Its log goes to a ring buffer instead of the notebook, and OpenMP is
told to sleep, not spin, at its barriers: with another process on the same cores, spinning threads cost a
fifty-fold slowdown.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

INSTALL = "pip install 'nbinfer[llamacpp]'"

_ERROR_LEVEL = 3
_CONTINUATION = 5


class LogBuffer:
    """The last lines of llama.cpp's log, with their levels. Written from any thread."""

    def __init__(self, max_lines: int = 4000) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=max_lines)
        self._lock = threading.Lock()
        self._total = 0

    def append(self, level: int, text: str) -> None:
        """Add text; a continuation joins the line before it."""
        with self._lock:
            if level == _CONTINUATION and self._lines:
                last_level, last = self._lines.pop()
                self._lines.append((last_level, last + text))
            else:
                self._lines.append((level, text))
                self._total += 1

    def mark(self) -> int:
        """Return a position to read from later."""
        with self._lock:
            return self._total

    def lines(self, since: int = 0, level: int | None = None) -> list[str]:
        """Lines written after ``since``, oldest first; with ``level``, only those of that level."""
        with self._lock:
            kept = len(self._lines)
            first = max(0, kept - (self._total - since))
            chosen = list(self._lines)[first:]
        return [text.rstrip("\n") for lv, text in chosen if level is None or lv == level]

    def errors(self, since: int = 0) -> list[str]:
        """Error lines written after ``since``."""
        return self.lines(since, _ERROR_LEVEL)


LOG = LogBuffer()


@cache
def log_callback(lib: ModuleType) -> Any:
    """The C function that writes to :data:`LOG`; cached, so that it outlives every library that calls it."""

    @lib.llama_log_callback  # type: ignore[misc]
    def on_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        LOG.append(level, text.decode("utf-8", "replace"))

    return on_log


@cache
def library() -> ModuleType:
    """Import and initialise llama.cpp's bindings; the same module on every call.

    Raises
    ------
    BackendUnavailable
        llama-cpp-python is missing or its library does not load.
    """
    # The OpenMP runtime reads its environment once, when it is loaded; the user's own setting wins.
    absent = "OMP_WAIT_POLICY" not in os.environ
    if absent:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        from llama_cpp import llama_cpp
    except ImportError as e:
        raise BackendUnavailable(f"llama.cpp is not installed here ({e}).\nInstall it with: {INSTALL}") from e
    except (OSError, RuntimeError) as e:
        raise BackendUnavailable(
            f"llama.cpp is installed but its library does not load: {e}\n"
            f"Reinstall it for this machine: {INSTALL} --force-reinstall --no-cache-dir",
        ) from e
    finally:
        if absent:
            os.environ.pop("OMP_WAIT_POLICY", None)

    llama_cpp.llama_log_set(log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    module: ModuleType = llama_cpp
    return module


@cache
def may_rearrange_weights() -> bool:
    """Whether llama.cpp may store quantised weights in the order its fast CPU kernels want.

    Builds for processors with AMX end the process with a general protection fault at the first batch: GCC 12
    drops most of the stores to the tile configuration. There AMX is kept out of this process, so that the
    other kernels (one and a half times the speed of plain ones on 4-bit weights) can be used all the same;
    where that fails, weights stay as they are in the file.
    """
    lib = library()
    if b"AMX_INT8 = 1" not in lib.llama_print_system_info():
        return True
    with _without_amx():
        try:
            return "AMX" not in _weight_layouts(lib)
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


def _weight_layouts(lib: ModuleType) -> list[str]:
    """Names of the weight layouts of llama.cpp's CPU backend, beside the file's own."""
    bound = lib._lib  # noqa: SLF001 - the one handle that is sure to be the library in use
    ggml = ctypes.CDLL(bound._name, handle=bound._handle)  # noqa: SLF001

    def call(name: str, result: Any, *arguments: Any) -> Any:
        function = ggml[name]
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


@cache
def abort_function() -> Any:
    """Return an abort callback that needs no Python: libc's ``strlen`` on a two-byte flag.

    ggml asks it at every graph node; a Python callback there would take the interpreter lock hundreds of
    times a token. ``strlen`` reads the flag's first byte: 0 goes on, 1 stops.
    """
    lib = library()
    libc = ctypes.CDLL(None) if os.name != "nt" else ctypes.cdll.msvcrt
    return ctypes.cast(libc.strlen, lib.ggml_abort_callback)


def default_threads() -> int:
    """Threads for this machine: the cores this process may use, less one for the notebook itself."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, cores - 1)
