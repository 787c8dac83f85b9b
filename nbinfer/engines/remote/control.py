"""Talk to a server on a Unix socket with nothing but the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from typing import TYPE_CHECKING, Any

from nbinfer.engines.remote.wire import error_from_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class ControlError(Exception):
    """Nobody answers at the socket, or not in HTTP."""


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float | None = None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise


def call(
    path: str, method: str, url: str, body: Mapping[str, Any] | None = None, *, timeout: float | None = None
) -> dict[str, Any]:
    """Make one request and return the JSON object that it answers with.

    Raises
    ------
    ControlError
        Nobody answers.
    NbinferError
        The server reports an error.
    """
    status, found = call_status(path, method, url, body, timeout=timeout)
    if status >= 400:  # noqa: PLR2004 - HTTP's errors
        raise error_from_json(found, status)
    return found


def call_status(
    path: str, method: str, url: str, body: Mapping[str, Any] | None = None, *, timeout: float | None = None
) -> tuple[int, dict[str, Any]]:
    """Make one request and return its status and JSON object.

    Raises
    ------
    ControlError
        Nobody answers.
    """
    connection = UnixConnection(path, timeout)
    try:
        connection.request(method, url, *_encoded(body))
        response = connection.getresponse()
        found = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ControlError(f"no answer at {path}: {error!r}") from error
    finally:
        connection.close()
    if not isinstance(found, dict):
        raise ControlError(f"{path} answers, but is not a sidecar.")
    return response.status, found


def _encoded(body: Mapping[str, Any] | None) -> tuple[bytes | None, dict[str, str]]:
    if body is None:
        return None, {}
    return json.dumps(body).encode(), {"Content-Type": "application/json"}


class EventStream:
    """A stream of server-sent events that stays open until it is closed, from any thread.

    Raises
    ------
    ControlError
        Nobody answers.
    NbinferError
        The server reports an error.
    """

    def __init__(self, path: str, url: str, body: Mapping[str, Any]) -> None:
        self._connection = UnixConnection(path)
        try:
            self._connection.request("POST", url, *_encoded(body))
            # Kept here: http.client lets go of the socket once the answer has begun.
            self._socket = self._connection.sock
            self._response = self._connection.getresponse()
            refused = self._response.status >= 400  # noqa: PLR2004 - HTTP's errors
            answer = json.loads(self._response.read()) if refused else None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            raise ControlError(f"no answer at {path}: {error!r}") from error
        if refused:
            self._connection.close()
            raise error_from_json(answer, self._response.status)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield events until the server, or :meth:`close`, ends the stream."""
        try:
            for line in self._response:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        except (OSError, http.client.HTTPException, ValueError):
            return

    def close(self) -> None:
        """End the stream; whoever iterates it sees its end."""
        # Wakes the thread that reads, which closing alone does not.
        with contextlib.suppress(OSError, AttributeError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Close this process' copy of the connection, in a child that was forked."""
        # Not close(): the answer's file object would keep the descriptor open.
        os.close(self._socket.detach())

    def detach(self) -> None:
        """Free what is left after the end."""
        self._response.close()
        self._connection.close()
        if self._socket is not None:
            self._socket.close()
