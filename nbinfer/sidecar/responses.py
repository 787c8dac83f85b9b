"""Responses that the service and its runners have in common."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, StreamingResponse

from nbinfer.contract.errors import ModelNotFound
from nbinfer.engines.remote.wire import error_to_json, shaped

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeVar

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from nbinfer.contract.errors import NbinferError

    T = TypeVar("T")


ENDING = "x-nbinfer-ending"
"""Header of a runner's answer that says that its engine is gone, and so will it be."""


class MisdirectedError(ModelNotFound):
    """The request is for a model that is not served here (HTTP 421)."""

    code = "model_not_found"


class SafeJSONResponse(JSONResponse):
    """JSON in ASCII: text from a request may hold half characters, which no encoding can write."""

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        import json

        return json.dumps(content, separators=(",", ":")).encode("ascii")


class ClosingStream(StreamingResponse):
    """A stream that tidies up however it ends: also when the client left before the first byte.

    What ``on_close`` awaits is outside the scope that a client's leaving cancels.
    """

    def __init__(self, content: Any, *, on_close: Callable[[], Awaitable[None]], **options: Any) -> None:
        super().__init__(content, **options)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._on_close()


def error_response(error: NbinferError, path: str = "") -> Response:
    """Return the response that reports an error of a request for ``path``."""
    status, body = error_to_json(error)
    if isinstance(error, MisdirectedError):
        status = 421
    body = shaped(path, status, body)
    # Nothing here gets better by asking again at once, which OpenAI's clients do on 5xx.
    return SafeJSONResponse(body, status, headers={"x-should-retry": "false"})


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return the outcome of ``work``; cancel it when the client goes away.

    Raises
    ------
    ClientDisconnect
        The client went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
