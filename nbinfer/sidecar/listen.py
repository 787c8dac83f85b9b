"""Sockets that the service and its runners listen on."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ConfigError
from nbinfer.sidecar.guard import peer_uid

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    import uvicorn
    from starlette.types import ASGIApp

MAX_SOCKET_PATH = 103
"""Bytes that a Unix socket's path may have on every system (macOS: 103, Linux: 107)."""


def private_folder(path: Path) -> Path:
    """Make a folder that only this user can enter, and check that it is so.

    Raises
    ------
    ConfigError
        It belongs to another user, or is a link.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise ConfigError(f"{path} is not a folder of this user: remove it, or set NBINFER_RUNTIME_DIR.")
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path


def unix_socket(path: str | Path) -> socket.socket:
    """Bind and listen on a Unix socket that only this user can open; a stale one is replaced.

    Raises
    ------
    ConfigError
        The path is too long for a socket.
    """
    text = os.fspath(path)
    if len(os.fsencode(text)) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"the socket's path has {len(os.fsencode(text))} bytes, {MAX_SOCKET_PATH} are possible: "
            "set NBINFER_RUNTIME_DIR to a shorter folder."
        )
    Path(text).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mask holds for the whole process; the folder is private already, so nobody else gets here.
    before = os.umask(0o177)
    try:
        listener.bind(text)
    finally:
        os.umask(before)
    listener.listen(1024)
    return listener


def tcp_socket(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Bind and listen on TCP; port 0 takes a free one.

    Raises
    ------
    ConfigError
        The address is not of this machine only.
    """
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(f"host={host!r:.60} is refused: the service listens on this machine only.")
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(1024)
    return listener


def server(app: ASGIApp) -> uvicorn.Server:
    """Return a uvicorn server for an app; run it with ``await server.serve(sockets=[…])``.

    It leaves signals alone, writes no access log, and refuses connections of other users.
    """
    import contextlib

    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class SameUserProtocol(H11Protocol):
        """Closes a Unix connection from another user before a byte of it is read."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            connection = transport.get_extra_info("socket")
            if connection is not None and connection.family == socket.AF_UNIX:
                uid = peer_uid(connection)
                if uid is not None and uid != os.getuid():
                    transport.abort()
                    # uvicorn's own bookkeeping goes on with the dead transport, and ends with it.
            super().connection_made(transport)

    class QuietServer(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    options: dict[str, Any] = {
        "http": SameUserProtocol,
        "ws": "none",
        "loop": "asyncio",
        "lifespan": "off",
        "log_level": "error",
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "timeout_keep_alive": 75,
        "timeout_graceful_shutdown": 2,
        "backlog": 1024,
        "h11_max_incomplete_event_size": 65_536,
    }
    return QuietServer(uvicorn.Config(app, **options))
