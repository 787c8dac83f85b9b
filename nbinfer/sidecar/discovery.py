"""How kernels find the one sidecar of this user, or start it.

Beside Jupyter's own connection files lies one that says where the sidecar listens. It is written by whoever
starts it, under a lock that is held until the sidecar answers: two kernels that race start one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer._version import __version__
from nbinfer.contract.errors import BackendUnavailable, EngineError
from nbinfer.engines.remote.control import ControlError, call
from nbinfer.sidecar.listen import MAX_SOCKET_PATH, private_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

START_SECONDS = 60.0
"""How long a sidecar may take to listen; it loads nothing before that."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A sidecar, as its file describes it.

    Attributes
    ----------
    socket
        Its Unix socket.
    pid, created
        Its process, and when that began: together they name a process for good.
    version
        Of nbinfer.
    address, token
        Where it also listens on TCP, and what it asks for there; None when it does not.
    """

    socket: str
    pid: int
    created: float
    version: str
    address: str | None = None
    token: str | None = None

    def alive(self) -> bool:
        """Whether the process is there and answers."""
        import psutil

        try:
            same = abs(psutil.Process(self.pid).create_time() - self.created) < 2  # noqa: PLR2004 - clocks round
        except psutil.Error:
            return False
        if not same:
            return False
        try:
            return bool(call(self.socket, "GET", "/nbinfer/health", timeout=10)["ok"])
        except (ControlError, KeyError):
            return False


def runtime_folder() -> Path:
    """Return the private folder of sockets and files; made when it is not there."""
    given = os.environ.get("NBINFER_RUNTIME_DIR")
    if given:
        return private_folder(Path(given))
    try:
        from jupyter_core.paths import jupyter_runtime_dir

        base = Path(jupyter_runtime_dir()) / "nbinfer"
    except ImportError:
        from platformdirs import user_runtime_path

        base = user_runtime_path("nbinfer", appauthor=False)
    return private_folder(base)


def socket_folder() -> Path:
    """Return where sockets go: the runtime folder, or a short one where its path is too long for them."""
    folder = runtime_folder()
    if len(os.fsencode(folder)) + len("/runner-0000.sock") <= MAX_SOCKET_PATH:
        return folder
    # The same name for everybody who means the same folder; private_folder checks whose it is.
    name = hashlib.blake2b(os.fsencode(folder), digest_size=6).hexdigest()
    return private_folder(Path(tempfile.gettempdir()) / f"nbinfer-{os.getuid()}-{name}")


def service_file() -> Path:
    """Return the path of the file that describes the sidecar."""
    return runtime_folder() / "sidecar.json"


def read() -> Service | None:
    """Return what the file says, whether or not that sidecar still runs; None when there is none."""
    try:
        given = json.loads(service_file().read_text())
        return Service(**given)
    except (OSError, ValueError, TypeError):
        return None


def write(service: Service) -> None:
    """Write the file, in one step, for this user only."""
    path = service_file()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".sidecar-")
    with os.fdopen(descriptor, "w") as file:  # mkstemp makes it 0600
        json.dump(asdict(service), file)
    Path(name).replace(path)


def remove(pid: int) -> None:
    """Remove the file when it still describes the process ``pid``."""
    found = read()
    if found is not None and found.pid == pid:
        with contextlib.suppress(OSError):
            service_file().unlink()


def find() -> Service | None:
    """Return the running sidecar; None when there is none."""
    found = read()
    return found if found is not None and found.alive() else None


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the lock under which a sidecar is started.

    Raises
    ------
    BackendUnavailable
        Somebody has held it for longer than a start may take.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(runtime_folder() / "sidecar.lock", mode=0o600)
    try:
        lock.acquire(timeout=START_SECONDS + 10)
    except Timeout:
        raise BackendUnavailable(
            f"another program has been starting the sidecar for {START_SECONDS:g} s; see {lock.lock_file}."
        ) from None
    try:
        yield
    finally:
        lock.release()


def ensure() -> Service:
    """Return the running sidecar; start one when there is none.

    Raises
    ------
    BackendUnavailable
        Its packages are not installed, it does not start, or the one that runs is of another version.
    """
    found = find()
    if found is None:
        check_packages()
        with locked():
            # Another kernel may have started it while this one waited.
            found = find() or _start()
    if found.version != __version__:
        raise BackendUnavailable(
            f"the sidecar that runs is nbinfer {found.version}, this kernel has {__version__}.\n"
            "Run `nbinfer stop`; the next load starts a new one."
        )
    return found


def check_packages() -> None:
    """Check that the sidecar can run here.

    Raises
    ------
    BackendUnavailable
        A package is missing, with the install line; or the system has no Unix sockets.
    """
    import socket
    from importlib.util import find_spec

    if not hasattr(socket, "AF_UNIX"):
        raise BackendUnavailable(
            "the sidecar needs Unix sockets, which Python has not got on this system: use where='kernel'."
        )
    missing = [name for name in ("fastapi", "uvicorn", "h11") if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(
            f"where='sidecar' needs {', '.join(missing)}: pip install 'nbinfer[sidecar]'"
        )


def _start() -> Service:
    stale = read()
    if stale is not None:
        service_file().unlink(missing_ok=True)
    log = runtime_folder() / "sidecar.log"
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
        # A session of its own: neither an interrupted cell nor a kernel that dies takes it along.
        process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-P", "-m", "nbinfer.sidecar.service"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=runtime_folder(),
        )
    # When it ends before this process does, nothing of it stays in the process table.
    threading.Thread(target=process.wait, name="nbinfer-reap", daemon=True).start()
    deadline = time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < deadline:
            found = read()
            if found is not None and found.pid == process.pid and found.alive():
                return found
            if process.returncode is not None:
                break
            time.sleep(0.02)
    except BaseException:
        process.kill()
        raise
    process.kill()
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-3:])
    raise BackendUnavailable(f"the sidecar did not start; the end of {log}:\n{tail}")


def stop(*, timeout: float = 20.0) -> bool:
    """Stop the sidecar and everything it runs; returns whether there was one.

    Raises
    ------
    EngineError
        It does not end.
    """
    import psutil

    found = read()
    if found is None:
        return False
    try:
        process = psutil.Process(found.pid)
        if abs(process.create_time() - found.created) >= 2:  # noqa: PLR2004 - clocks round
            raise psutil.NoSuchProcess(found.pid)
    except psutil.Error:
        remove(found.pid)
        with contextlib.suppress(OSError):
            Path(found.socket).unlink()
        return False
    with contextlib.suppress(ControlError):
        call(found.socket, "POST", "/nbinfer/stop", timeout=5)
    deadline = time.monotonic() + timeout
    while not _ended(process):
        if time.monotonic() > deadline:
            raise EngineError(f"the sidecar (process {found.pid}) does not end; kill it by hand.")
        time.sleep(0.02)
    return True


def _ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or nothing but an entry that its parent has not read yet."""
    import psutil

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def stale_files() -> list[Path]:
    """Return files of sidecars that are gone: what ``doctor`` shows, and the next start replaces."""
    import psutil

    running = find()
    found = [] if running is not None else list(runtime_folder().glob("sidecar.json"))
    for path in socket_folder().glob("*.sock"):
        numbers = re.findall(r"\d+", path.name)
        if numbers and not psutil.pid_exists(int(numbers[0])):
            found.append(path)
    return sorted(found)


def remove_stale_sockets() -> None:
    """Remove the sockets of sidecars, and of their runners, that were killed."""
    import psutil

    for path in socket_folder().glob("*.sock"):
        numbers = re.findall(r"\d+", path.name)
        if numbers and not psutil.pid_exists(int(numbers[0])):
            with contextlib.suppress(OSError):
                path.unlink()


def describe() -> dict[str, Any] | None:
    """Return what the running sidecar says about itself and its models; None when there is none."""
    found = find()
    if found is None:
        return None
    try:
        return call(found.socket, "GET", "/nbinfer/ps", timeout=10)
    except ControlError:
        return None
