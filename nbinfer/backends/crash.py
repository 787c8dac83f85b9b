"""Why a server process ended, in a line that a person can act on."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_GPU_MEMORY = (
    "the GPU ran out of memory",
    "use a smaller context_size, kv_type='q8_0', fewer gpu_layers, or unload other models.",
)
_MISSING_LIBRARY = "install it, or reinstall the backend: `nbinfer doctor` shows the exact line."
_CUDA = (
    "the engine's build does not fit this machine's CUDA driver or GPU",
    "update the driver, or reinstall the backend for it: `nbinfer doctor` shows the exact line.",
)

# Text of the log, likely cause, fix. The first that is found counts; {0} is the pattern's first group.
_SIGNS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), cause, fix)
    for pattern, cause, fix in (
        (
            r"cudaMalloc failed: out of memory|CUDA error: out of memory|OutOfMemoryError"
            r"|CUDA out of memory|hipErrorOutOfMemory|ErrorOutOfDeviceMemory",
            *_GPU_MEMORY,
        ),
        (r"ggml_metal\w*:.*failed to allocate|failed to allocate (?:CUDA|Metal|Vulkan)", *_GPU_MEMORY),
        (
            r"std::bad_alloc|Cannot allocate memory|failed to allocate.*buffer|MemoryError",
            "the machine ran out of memory",
            "use a smaller context_size or a smaller quantisation, or unload other models.",
        ),
        (
            r"unknown model architecture: '?([\w.-]+)",
            "the architecture {0} is not known to this engine",
            "update the backend, or use a backend that knows it.",
        ),
        (
            r"error while loading shared libraries: (\S+?):"
            r"|(?:^|\s)(\S+\.so[\w.]*): cannot open shared object",
            "the library {0} is missing",
            _MISSING_LIBRARY,
        ),
        (r"Library not loaded: (\S+)", "the library {0} is missing", _MISSING_LIBRARY),
        (r"No module named '([\w.]+)'", "the Python package {0} is missing", _MISSING_LIBRARY),
        (
            r"driver version is insufficient|no kernel image is available|PTX was compiled|"
            r"forward compatibility was attempted|CUDA driver initialization failed",
            *_CUDA,
        ),
        (
            r"Failed to infer device type|No CUDA GPUs are available|no CUDA-capable device",
            "the engine found no GPU that it can use",
            "check the driver (nvidia-smi), or use a build for CPUs.",
        ),
        (
            r"tensor '([\w.]+)' .*(?:not within the file bounds|data is not within)|"
            r"model is corrupted or incomplete",
            "the model file is incomplete",
            "download it again.",
        ),
        (
            r"chat template.*(?:not valid|failed|error)|jinja2?\.exceptions\.(\w+)|TemplateSyntaxError",
            "the model's chat template is broken",
            "use raw=True, or another file of this model.",
        ),
        (
            r"trust_remote_code",
            "the model brings program code of its own, which is never run",
            "use a GGUF file of the model, or another model.",
        ),
        (r"Address already in use", "its address is taken", "stop the program that uses it."),
        (r"No space left on device", "the disk is full", "free some space, or move the cache."),
    )
)
_PYTHON_ERROR = re.compile(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception)): (.+)$", re.MULTILINE)
_SIGNALS = {
    "SIGKILL": (
        "the operating system killed it, most likely for want of memory",
        "use a smaller model or context_size.",
    ),
    "SIGSEGV": (
        "it crashed inside the engine (segmentation fault)",
        "update the backend, and report the log below.",
    ),
    "SIGABRT": ("the engine gave up", "the log below says why."),
    "SIGILL": (
        "the engine was built for another processor",
        "reinstall the backend so that it is built here.",
    ),
    "SIGBUS": (
        "the model's file changed or shrank while it was in use",
        "check the disk, and load the model again.",
    ),
}


@dataclass(frozen=True, slots=True)
class CrashReport:
    """How a process ended.

    Attributes
    ----------
    headline
        One line: the likely cause and the fix.
    ending
        The exit code or signal, in words.
    log
        The end of its output, 64 KiB or more of it where there was as much.
    evidence
        The part of it that tells why.
    """

    headline: str
    ending: str
    log: str
    evidence: str

    def __str__(self) -> str:
        last = [line.strip() for line in self.evidence.splitlines() if line.strip()][-2:]
        return "\n".join([f"{self.headline} ({self.ending})", *(f"  | {line[:200]}" for line in last)])


def exit_words(code: int) -> str:
    """Return an exit code, negative for a signal, in words."""
    if code >= 0:
        # A shell, or a container, reports a signal as 128 and its number.
        return f"exit code {code}" + (f": signal {code - 128}" if 128 < code < 160 else "")  # noqa: PLR2004
    try:
        return f"signal {-code}, {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def explain(
    code: int,
    log: str,
    *,
    what: str = "the model's process",
    evidence: str | None = None,
    known: Callable[[str], tuple[str, str] | None] = lambda _: None,
) -> CrashReport:
    """Return why a process ended, from its exit code and its output.

    Parameters
    ----------
    code
        As ``subprocess`` gives it: negative is a signal.
    log
        The end of its output.
    what
        How the report calls the process.
    evidence
        The part of the log that tells why; None: all of it.
    known
        Returns cause and fix for messages that only this process writes.
    """
    evidence = log if evidence is None else evidence

    def report(cause: str, fix: str = "") -> CrashReport:
        advice = f". Fix: {fix.removesuffix('.')}." if fix else ""
        return CrashReport(f"{what} ended{cause}{advice}", exit_words(code), log, evidence)

    found = known(evidence)
    if found is not None:
        return report(f": {found[0]}", found[1])
    for pattern, cause, fix in _SIGNS:
        match = pattern.search(evidence)
        if match is not None:
            name = next((group for group in match.groups() if group), "") if match.groups() else ""
            return report(f": {cause.format(name)}", fix)
    name = exit_words(code).rpartition(" ")[2] if code < 0 else ""
    if name in _SIGNALS:
        cause, fix = _SIGNALS[name]
        return report(f": {cause}", fix)
    errors = _PYTHON_ERROR.findall(evidence)
    if errors:
        return report(f": {errors[-1][0]}: {errors[-1][1][:300]}")
    return report(" unexpectedly")
