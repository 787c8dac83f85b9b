"""Server processes: started apart from this one, watched, stopped whole, and explained when they crash."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbinfer.backends.crash import CrashReport, exit_words, explain
from nbinfer.contract.errors import ModelLoadError, NbinferError
from nbinfer.engines.remote.wire import RunnerLost, error_from_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from nbinfer.contract.config import ModelConfig
    from nbinfer.contract.modes import Mode

LOG_BYTES = 256 * 1024
STOP_SECONDS = ((signal.SIGINT, 3.0), (signal.SIGTERM, 2.0))
"""Signals that ask a process to end, each with the time it has; then it is killed."""
STRAY_SECONDS = 3.0
"""How long processes outside a stopped process' group have to end by themselves."""
ERROR_MARK = "NBINFER-ERROR "
"""Begins the line with which a runner says, as JSON, what ended it."""
# What belongs to the kernel that happens to start the process, and not to the process.
# LLAMA_ARG_*: llama-server reads a model, a port or tools to offer from there.
_NOT_INHERITED = re.compile(
    "JPY_PARENT_PID|JPY_SESSION_NAME|JPY_INTERRUPT_EVENT|PYTHONSTARTUP|MPLBACKEND|LLAMA_ARG_.*|LLAMA_API_KEY"
    "|VLLM_API_KEY"
)


class LogTail:
    """The last bytes of a process' output; safe from several threads.

    Parameters
    ----------
    limit
        Bytes that are kept.
    """

    def __init__(self, limit: int = LOG_BYTES) -> None:
        self._limit = limit
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._lock = threading.Lock()

    def write(self, data: bytes) -> None:
        """Append; the oldest goes."""
        with self._lock:
            self._pieces.append(data)
            self._size += len(data)
            while self._size - len(self._pieces[0]) >= self._limit:
                self._size -= len(self._pieces.popleft())

    def text(self) -> str:
        """Return what is kept, as text."""
        with self._lock:
            return b"".join(self._pieces)[-self._limit :].decode("utf-8", "replace")


@dataclass(eq=False)
class RunControl:
    """The handle of one run of a backend: what it is given, and how it is stopped and read.

    Attributes
    ----------
    options
        The engine's own options, by name.
    names
        Further names that the model answers to.
    digest
        Identifies the weights, where that is known.
    log
        The end of the process' output.
    pid
        The process, once it runs.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    names: Sequence[str] = ()
    digest: str = ""
    log: LogTail = field(default_factory=LogTail)
    pid: int | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _cancelled: bool = False
    _ended: bool = False

    def cancel(self) -> None:
        """End the run: it stops its processes and returns without an error."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled

    def _note_end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait(self) -> None:
        with self._changed:
            while not (self._ended or self._cancelled):
                self._changed.wait()


def serve_engine(
    backend: str,
    socket: str,
    model: Path,
    model_ref: str,
    mode: Mode,
    config: ModelConfig,
    control: RunControl | None = None,
) -> None:
    """Run a backend's engine behind the OpenAI API in a process of its own; what a backend's ``run`` does.

    Returns only after :meth:`RunControl.cancel`, when every process has ended.

    Raises
    ------
    ModelLoadError, ConfigError, NotSupported, BackendUnavailable
        The model could not be loaded; as the backend's ``open`` raises them.
    RunnerLost
        The process ended by itself; the message is the crash report.
    """
    control = control or RunControl()
    spec = {
        "backend": backend,
        "socket": socket,
        "model": str(model),
        "names": [model_ref, *control.names],
        "mode": str(mode),
        "config": config.to_json(),
        "options": dict(control.options),
        "digest": control.digest,
    }
    command = [sys.executable, "-P", "-m", "nbinfer.sidecar.runner", model_ref[:64].replace("/", "_")]
    try:
        supervise(command, control, what=model_ref, first_line=json.dumps(spec).encode() + b"\n")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(socket)  # noqa: PTH108 - a str, as it came


def supervise(command: Sequence[str], control: RunControl, *, what: str, first_line: bytes = b"") -> None:
    """Run a process until it ends or ``control`` is cancelled, and leave nothing of it behind.

    The process has a session and a group of its own, so that an interrupt of a cell does not reach it. Its
    standard input stays open for as long as this process lives: at its end of file it must go.

    Raises
    ------
    RunnerLost
        It ended by itself; or the error that it reported as its last words.
    """
    environment = {key: value for key, value in os.environ.items() if not _NOT_INHERITED.fullmatch(key)}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(  # noqa: S603 - the command is a backend's own
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
    )
    control.pid = process.pid
    pump = threading.Thread(target=_pump, args=(process, control.log), name="nbinfer-log", daemon=True)
    watch = threading.Thread(target=_watch, args=(process, control), name="nbinfer-watch", daemon=True)
    pump.start()
    watch.start()
    try:
        assert process.stdin is not None  # noqa: S101 - asked for above
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(first_line)
            process.stdin.flush()
        control._wait()  # noqa: SLF001 - one module
    finally:
        _stop(process)
        watch.join()
        # Nobody is left to write: the pipe ends, unless a process escaped to a session of its own.
        pump.join(timeout=2)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
    if not control.cancelled:
        raise _ending(process.returncode, control.log.text(), what)


def _pump(process: subprocess.Popen[bytes], log: LogTail) -> None:
    """Read whatever comes, in lines or not: a full pipe would stop the process."""
    assert process.stdout is not None  # noqa: S101 - asked for
    descriptor = process.stdout.fileno()
    with contextlib.suppress(OSError, ValueError):
        while data := os.read(descriptor, 65_536):
            log.write(data)


def _watch(process: subprocess.Popen[bytes], control: RunControl) -> None:
    if hasattr(os, "waitid"):
        # Not reaped yet: its number, which is its group's too, cannot be given to another process.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    else:
        process.wait()
    control._note_end()  # noqa: SLF001 - one module


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: politely, then not."""
    strays = _descendants(process.pid)
    for number, seconds in STOP_SECONDS:
        if _has_ended(process):
            break
        _signal_group(process.pid, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not _has_ended(process):
            time.sleep(0.01)
    # Also when it ended by itself: its children may not have.
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    # What has a session of its own may be about to clean up: it saw the process go.
    deadline = time.monotonic() + STRAY_SECONDS
    while any(map(_is_alive, strays)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for stray in strays:
        with contextlib.suppress(Exception):  # it is gone, or not ours any more
            stray.kill()


def _is_alive(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _descendants(pid: int) -> Iterable[Any]:
    import psutil

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return ()


def _ending(code: int, log: str, what: str) -> NbinferError:
    """Return the error that ended a process: its own last words, else what its exit and log tell."""
    for line in reversed(log.splitlines()):
        if line.startswith(ERROR_MARK):
            with contextlib.suppress(ValueError):
                found = error_from_json(json.loads(line.removeprefix(ERROR_MARK)))
                if isinstance(found, RunnerLost):
                    found.report = CrashReport(str(found), exit_words(code), log, log)
                return found
    report = explain(code, log, what=what)
    error = RunnerLost(str(report))
    error.report = report
    return error


def as_load_error(error: NbinferError) -> NbinferError:
    """Return the error of a load that failed, when a process died during it."""
    return ModelLoadError(str(error)) if isinstance(error, RunnerLost) else error
