"""A sidecar of a test's own: a runtime folder, and the proof that nothing of it is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VARIABLE = "NBINFER_RUNTIME_DIR"


def until(condition: Callable[[], Any], seconds: float = 30.0, what: str = "this") -> None:
    """Wait until something is so; fails with ``what`` when it never is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not so after {seconds:g} s"
        time.sleep(0.02)


def processes(folder: Path) -> list[psutil.Process]:
    """Return the sidecar's processes (service and runners) that belong to a runtime folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            command = process.cmdline()
            ours = any(part.startswith("nbinfer.sidecar.") for part in command) or "serve" in command
            if ours and process.environ().get(VARIABLE) == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def names(folder: Path) -> list[str]:
    """Return what the folder holds beside the lock and the logs, which may stay."""
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".lock", ".log"))


@dataclass(frozen=True)
class Sidecar:
    """A running service."""

    folder: Path
    socket: str
    address: str
    token: str
    pid: int


def make_folder() -> Path:
    """Make a short folder: a socket's path has little room."""
    return Path(tempfile.mkdtemp(prefix="nbi-"))


def start(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `nbinfer serve`."""
    return subprocess.Popen(
        [sys.executable, "-c", "from nbinfer.cli import main; main()", "serve", *arguments],
        env={**os.environ, VARIABLE: str(folder), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ready(process: subprocess.Popen[str], folder: Path) -> Sidecar:
    """Wait for what `nbinfer serve --port` prints."""
    assert process.stdout is not None
    said: dict[str, str] = {}
    while "token" not in said:
        line = process.stdout.readline()
        assert line, f"the service ended: {said}"
        key, _, value = line.strip().partition(" ")
        said[key] = value.strip()
    return Sidecar(folder, said["socket"], said["address"], said["token"], process.pid)


def end(process: subprocess.Popen[str], folder: Path) -> None:
    """Stop it, and check that nothing is left."""
    process.terminate()
    try:
        process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
    check_gone(folder)
    shutil.rmtree(folder)


def check_gone(folder: Path, seconds: float = 5.0) -> None:
    """Fail when a process, socket or file of a sidecar is left; kill what is."""
    deadline = time.monotonic() + seconds
    while (processes(folder) or names(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = processes(folder)
    words = [f"{process.pid}: {' '.join(process.cmdline())}" for process in left]
    for process in left:
        process.kill()
    assert words == []
    assert names(folder) == []
