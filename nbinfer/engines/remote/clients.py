"""Two ways to the same API: nbinfer's own sidecar, and anybody else's server.

Other people's servers are asked through the `openai` package, which knows their habits. Our own is asked over
its Unix socket with :mod:`nbinfer.engines.remote.unix`: importing `openai` takes half a second or more, and a
kernel that comes to a loaded model would have nothing else to wait for.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nbinfer.engines.remote.unix import Answer, BrokenConnectionError, UnixClient
from nbinfer.engines.remote.wire import Busy, error_from_json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping

    from openai import AsyncOpenAI

CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model is served.

    Attributes
    ----------
    base_url
        With ``/v1`` at its end.
    model
        The model's name there.
    api_key
        What the server asks for; local ones usually ask for nothing.
    socket
        A Unix socket; then the host in ``base_url`` only fills a header.
    """

    base_url: str
    model: str
    api_key: str = "none"
    socket: str | None = None


class ConnectionLostError(Exception):
    """The server is not there, or went away."""


class Client(Protocol):
    """What an engine needs of a server. Every call raises ``ConnectionLostError`` or a ``NbinferError``."""

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON that a path (``/v1/…``, or one beside that) answers with."""
        ...

    def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the JSON objects of a stream of server-sent events, up to its end mark."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


# -- our own --------------------------------------------------------------------------------------------


class OwnClient:
    """The sidecar, at its socket."""

    def __init__(self, socket: str) -> None:
        self._http = UnixClient(socket)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the answer of a path."""
        with _broken_is_lost():
            answer = await self._ask(path, body)
            return json.loads(await answer.read())

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of an answer."""
        with _broken_is_lost():
            answer = await self._ask(path, body)
            try:
                rest = b""
                async for chunk in answer.chunks():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        if line == b"data: [DONE]":
                            # The end of the body comes with it, and lets the connection be used again.
                            await answer.read()
                            return
                        if line.startswith(b"data: "):
                            event = json.loads(line[6:])
                            if "error" in event:
                                raise error_from_json(event)
                            yield event
            finally:
                answer.close()

    async def _ask(self, path: str, body: Mapping[str, Any]) -> Answer:
        sent = json.dumps(body, separators=(",", ":")).encode()
        answer = await self._http.request("POST", path, sent)
        if answer.status < 400:  # noqa: PLR2004 - HTTP's errors
            return answer
        text = await answer.read()
        try:
            found = json.loads(text)
        except ValueError:
            found = {"message": text.decode("utf-8", "replace")[:500]}
        raise error_from_json(found, answer.status)

    async def close(self) -> None:
        """Close the connections."""
        self._http.close()


@contextlib.contextmanager
def _broken_is_lost() -> Iterator[None]:
    try:
        yield
    # Half an answer is no JSON.
    except (BrokenConnectionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConnectionLostError(str(error)) from None


# -- anybody's ------------------------------------------------------------------------------------------


def open_openai(endpoint: Endpoint) -> AsyncOpenAI:
    """Return an asynchronous `openai` client for an endpoint."""
    import openai

    # The client's HTTP library is httpx, under whatever name this version of `openai` imports it.
    base = next(c for c in openai.DefaultAsyncHttpxClient.__mro__ if not c.__module__.startswith("openai"))
    http = importlib.import_module(base.__module__.partition(".")[0])
    limits = http.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=30)
    options: dict[str, Any] = {"limits": limits, "trust_env": False}
    if endpoint.base_url.startswith("http://"):
        # Reading the certificates of the world takes 40 ms, and nobody asks for them here.
        options["verify"] = False
    if endpoint.socket is not None:
        options["transport"] = http.AsyncHTTPTransport(uds=endpoint.socket, limits=limits)
    return openai.AsyncOpenAI(
        base_url=endpoint.base_url,
        api_key=endpoint.api_key,
        max_retries=0,
        # A long prompt on a slow machine takes minutes before its first byte.
        timeout=http.Timeout(None, connect=CONNECT_SECONDS),
        http_client=http.AsyncClient(**options),
    )


class OpenAIClient:
    """A server of somebody else's."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._api = open_openai(endpoint)

    def _url(self, path: str) -> str:
        base = self._endpoint.base_url.removesuffix("/")
        # What is not under /v1 lies beside it.
        return base + path.removeprefix("/v1") if path.startswith("/v1/") else base.removesuffix("/v1") + path

    async def get(self, path: str) -> Any:
        """Return what a path shows."""
        with _openai_errors():
            return await self._api.get(self._url(path), cast_to=object)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the answer of a path."""
        with _openai_errors():
            return await self._api.post(self._url(path), cast_to=object, body=body)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of an answer.

        Not by ``chat.completions.create``: the body is checked already, and a piece of text is not worth a
        pydantic model, which together would double the time that the client takes.
        """
        import openai

        with _openai_errors():
            chunks = await self._api.post(
                self._url(path), cast_to=object, body=body, stream=True, stream_cls=openai.AsyncStream[object]
            )
            async with chunks:
                async for chunk in chunks:
                    if isinstance(chunk, dict):
                        yield chunk

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()


@contextlib.contextmanager
def _openai_errors() -> Iterator[None]:
    """Turn the package's errors into ours."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        found = error_from_json(_body(error.response, error.body), error.status_code)
        if isinstance(found, Busy):
            found.retry_after = _seconds(error.response.headers.get("retry-after"))
        raise found from None
    except openai.APIConnectionError as error:
        raise ConnectionLostError(str(error.__cause__ or error)) from None
    except openai.APIError as error:
        # An error in the middle of a stream.
        raise error_from_json({"error": error.body}) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore")):
            raise ConnectionLostError(str(error)) from None
        raise


def _seconds(header: str | None) -> float:
    """Return a ``Retry-After`` that is a number; 0: there is none, or it is a date."""
    return float(header) if header is not None and header.isdecimal() else 0.0


def _body(response: Any, body: Any) -> Any:
    """Return the whole error body; the client keeps only its ``error`` member."""
    if isinstance(body, dict):
        return {"error": body} if "error" not in body else body
    return {"message": str(getattr(response, "text", body))[:500]}
