"""What stands before the API: who may connect, from where, and how much they may send."""

from __future__ import annotations

import hmac
import json
import socket
import struct
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nbinfer.engines.remote.wire import error_body, shaped

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 32 * 2**20
"""Bytes of a request's body: prompts of any context, and a few images."""
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def peer_uid(connection: Any) -> int | None:
    """Return the user id of the process at the other end of a Unix socket; None where that is not known."""
    try:
        if hasattr(socket, "SO_PEERCRED"):
            size = struct.calcsize("3i")
            return int(
                struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1]
            )
        # macOS and BSD: LOCAL_PEERCRED gives a struct xucred, whose uid is its second 32-bit word.
        return int(struct.unpack("2I", connection.getsockopt(0, 1, 8))[1])
    except (OSError, struct.error):
        return None


class Guard:
    """Refuses what a page in a browser, another user or a mistake could send.

    Parameters
    ----------
    app
        The API.
    token
        Asked for as ``Authorization: Bearer``, or as ``x-api-key``; None on a Unix socket, where the peer's
        user id was checked.
    hosts
        Names and addresses that the ``Host`` header may hold on TCP; a page that rebinds its name to this
        machine cannot send one of these. None on a Unix socket, where no page can connect.
    max_body
        Bytes.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None = None,
        hosts: Collection[str] | None = None,
        max_body: int = MAX_BODY,
    ) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._hosts = hosts
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a refusal."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name == b"host" and name in headers:
                await _refuse(send, 400, "two Host headers.")
                return
            headers[name] = value
        refusal = self._refusal(headers)
        if refusal is not None:
            await _refuse(send, *refusal, path=scope["path"])
            return
        await self._limited(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if self._hosts is not None and not _is_local(headers.get(b"host", b""), self._hosts):
            return 403, "this Host is not served here: use the address that the server printed."
        # A program sends no Origin; a page of any site does.
        if b"origin" in headers:
            return 403, "requests from web pages are not served."
        if self._token is not None:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Anthropic's clients send their key in a header of its own.
            found = given.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
            if not hmac.compare_digest(found, self._token):
                return 401, "the token is missing or wrong: send it as the API key."
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            return 413, f"the body is larger than {self._max_body:,} bytes."
        return None

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, counting what comes without a Content-Length."""
        received = 0
        started = False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body:
                    raise _TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLargeError:
            if not started:
                words = f"the body is larger than {self._max_body:,} bytes."
                await _refuse(send, 413, words, path=scope["path"])


class _TooLargeError(BaseException):
    """Passes through frameworks that turn an ``Exception`` into a response of their own."""


def _is_local(host: bytes, allowed: Collection[str]) -> bool:
    try:
        name = urlsplit(f"//{host.decode('ascii')}").hostname
    except ValueError:
        return False
    return name is not None and (name in allowed or name in _LOCAL_NAMES)


async def _refuse(send: Send, status: int, message: str, *, path: str = "") -> None:
    body = json.dumps(shaped(path, status, error_body(message, code="refused"))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:  # noqa: PLR2004 - Unauthorized
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:  # noqa: PLR2004 - the rest of the body is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
