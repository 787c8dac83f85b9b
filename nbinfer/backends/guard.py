"""Stands between a runner and a server that starts processes of its own, and outlives both to clean up.

Run as a program, with the standard library only: ``python -I -S guard.py FOLDER COMMAND…``. The command runs
in the guard's session. When it ends, or the guard's standard input does (whoever started the guard is gone,
however that went), every process of the session is killed and FOLDER is removed. Without ``/proc``, as on
macOS, nobody tells who is in a session: the command has a process group of its own there, and that is killed.

Its last line of output is :data:`MARK` and the command's exit code, negative for a signal; ``none`` when the
command was still running.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time

MARK = "NBINFER-GUARD "
_PROC = "/proc"
_KILL_SECONDS = 5.0
_TRACKER_SECONDS = 1.5
# Python's own process that removes what others shared, once all of these are gone, however they went.
_TRACKER = b"multiprocessing.resource_tracker"


def main() -> None:
    """Guard a command."""
    folder, command = sys.argv[1], sys.argv[2:]
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    group = None if _sees_sessions() else 0
    started = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=group)  # noqa: S603 - whoever runs this says what
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if 0 in ready and not os.read(0, 4096):
            break
        if woken in ready:
            numbers = os.read(woken, 4096)
            if started.poll() is not None or any(number != signal.SIGCHLD for number in numbers):
                break
    code = started.poll()
    try:
        end_session(os.getsid(0) if group is None else started.pid)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # nobody may be left to read it
            os.write(1, f"\n{MARK}{'none' if code is None else code}\n".encode())


def _sees_sessions() -> bool:
    return os.path.exists(f"{_PROC}/self/stat")  # noqa: PTH110 - pathlib takes a while to import


def end_session(number: int) -> None:
    """Kill all processes of a session but this one; those that clean up have a moment for it.

    Without ``/proc`` it is the process group of this number that is killed.
    """
    if not _sees_sessions():
        with contextlib.suppress(OSError):  # gone already
            os.killpg(number, signal.SIGKILL)
        return
    began = time.monotonic()
    while (others := session(number)) and time.monotonic() < began + _KILL_SECONDS:
        patient = time.monotonic() < began + _TRACKER_SECONDS
        for pid in others:
            if not (patient and _is_tracker(pid)):
                with contextlib.suppress(OSError):  # gone meanwhile
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _is_tracker(pid: int) -> bool:
    try:
        with open(f"{_PROC}/{pid}/cmdline", "rb") as file:  # noqa: PTH123 - pathlib takes a while to import
            return _TRACKER in file.read()
    except OSError:
        return False


def session(number: int) -> list[int]:
    """Return the living processes of a session, without this one."""
    found = []
    for name in os.listdir(_PROC):  # noqa: PTH208 - as above
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"{_PROC}/{name}/stat", "rb") as file:  # noqa: PTH123 - as above
                # The name in parentheses may hold anything; what follows is state, parent, group, session.
                state, _, _, sid = file.read().rpartition(b")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(sid) == number and state not in (b"Z", b"X"):
            found.append(int(name))
    return found


if __name__ == "__main__":
    main()
