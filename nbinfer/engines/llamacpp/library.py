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
from functools import cache
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import BackendUnavailable, NotSupported
from nbinfer.processor import amx

if TYPE_CHECKING:
    from types import ModuleType

INSTALL = "pip install 'nbinfer[llamacpp]'"

_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR; 3 is a warning
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


def _shared() -> ctypes.CDLL:
    bound = library()._lib  # noqa: SLF001 - the one handle that is sure to be the library in use
    return ctypes.CDLL(bound._name, handle=bound._handle)  # noqa: SLF001


@cache
def may_rearrange_weights() -> bool:
    """Whether weights may be rearranged for fast CPU kernels; see :mod:`nbinfer.processor.amx`."""
    return amx.may_rearrange(_shared())


@cache
def uses_amx() -> bool:
    """Whether quantised weights in main memory are put in AMX's tiles."""
    return amx.uses(_shared())


@cache
def untiled_weights() -> dict[str, int]:
    """Return where weights go that must not be rearranged as the others: buffer types by pattern of names."""
    if library().llama_supports_gpu_offload() or not uses_amx():
        return {}
    return {amx.BATCHED: amx.plain_layout(_shared())}


def main_memory() -> int:
    """Return the address of ggml's buffer type for main memory.

    Raises
    ------
    NotSupported
        This build does not tell it.
    """
    try:
        function = _shared()["ggml_backend_cpu_buffer_type"]
    except AttributeError:
        raise NotSupported(
            "experts_on_cpu: this build of llama.cpp does not tell where main memory is; use gpu_layers."
        ) from None
    function.restype = ctypes.c_void_p
    return int(function())


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
