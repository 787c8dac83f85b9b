"""llama.cpp's own server as an engine: a child process on a private Unix socket, and the client of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import EngineClosed, EngineError
from nbinfer.engines.remote.clients import ConnectionLostError, Endpoint, OwnClient
from nbinfer.engines.remote.engine import RemoteEngine
from nbinfer.engines.vectors import as_asked

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from nbinfer.contract.errors import NbinferError
    from nbinfer.contract.requests import CompletionRequest, EmbeddingRequest, Request
    from nbinfer.contract.results import EmbeddingResult, Result, Timings
    from nbinfer.engines.protocol import EngineInfo
    from nbinfer.engines.remote.answers import Job
    from nbinfer.engines.stream import Stream


class LlamaServerEngine(RemoteEngine):
    """A model behind llama-server.

    Parameters
    ----------
    socket
        Where the server listens.
    info
        What it says about itself.
    why
        Waits a moment for the server's end, and returns what ended it; None when it runs.
    on_close
        Ends the server.
    """

    def __init__(
        self,
        socket: str,
        info: EngineInfo,
        *,
        why: Callable[[], NbinferError | None],
        on_close: Callable[[], None],
    ) -> None:
        endpoint = Endpoint(base_url="http://localhost/v1", model=info.model, socket=socket)
        super().__init__(endpoint, info, on_close=on_close)
        self._socket = socket
        self._why = why
        self._lost: NbinferError | None = None

    def submit(self, request: Request) -> Stream:
        """Start a request; see :class:`nbinfer.engines.protocol.Engine`."""
        if self._lost is not None:
            raise EngineClosed(f"{self._lost}\nLoad it again with nb.load.")
        return super().submit(request)

    def lose(self, error: NbinferError) -> None:
        """Fail what runs, and refuse what comes: the server has ended by itself."""
        with self._lock:
            self._closed = True
            self._lost = error
            streams = list(self._tasks)
        for stream in streams:
            stream.fail(error)

    def render(self, request: CompletionRequest) -> tuple[str, int]:
        """Return the exact prompt and its length in tokens; runs nothing."""
        if isinstance(request.prompt, str):
            text = request.prompt
        else:
            path, body, member = _rendering(request)
            text = str(self._call(path, body)[member])
        return text, len(self.tokenize(text))

    # -- the loop's side --------------------------------------------------------------------------------

    def _client(self) -> OwnClient:
        if self._made is None:
            self._made = OwnClient(self._socket)
        assert isinstance(self._made, OwnClient)  # noqa: S101 - made above
        return self._made

    async def _with_retry(
        self, work: Callable[[], Coroutine[Any, Any, Any]], unseen: Callable[[], bool]
    ) -> Any:
        """Do ``work``; when the server was lost, raise its crash report."""
        del unseen
        try:
            return await work()
        except ConnectionLostError as error:
            lost = await asyncio.to_thread(self._why)
            if lost is None:
                lost = EngineError(f"{self.info.model}: the server broke the connection ({error!s:.200}).")
            raise lost from None

    async def _complete(self, job: Job, request: CompletionRequest) -> Result:
        result = await super()._complete(job, request)
        if job.measured is not None:
            result = result.with_changes(timings=_timings(result.timings, job.measured))
        if not request.images and not isinstance(request.prompt, str):
            # Pictures have no place in a prompt's text.
            path, body, member = _rendering(request)
            result = result.with_changes(prompt=str((await self._post(path, body))[member]))
        return result

    async def _embed(self, job: Job, request: EmbeddingRequest) -> EmbeddingResult:
        if request.dims is None:
            return await super()._embed(job, request)
        # The server has no such option: cut here, as our engine does, before lengths are made 1.
        found = await super()._embed(job, replace(request, dims=None, normalize=False))
        return replace(found, vectors=as_asked(found.vectors, request))


def _rendering(request: CompletionRequest) -> tuple[str, dict[str, Any], str]:
    """Return where to ask for a request's exact prompt, with what, and the member of the answer it is in."""
    if request.messages is None:
        return "/detokenize", {"tokens": list(request.prompt or ())}, "content"
    body: dict[str, Any] = {"messages": [dict(message) for message in request.messages]}
    if request.tools:
        body["tools"] = [dict(tool) for tool in request.tools]
    if request.think is not None:
        body["chat_template_kwargs"] = {"enable_thinking": request.think}
    return "/apply-template", body, "prompt"


def _timings(seen: Timings, measured: dict[str, Any]) -> Timings:
    """Return the server's own times; those of waiting are as this side saw them."""
    prompt, generated = measured.get("prompt_ms"), measured.get("predicted_ms")
    if not isinstance(prompt, int | float) or not isinstance(generated, int | float):
        return seen
    return replace(
        seen,
        prompt_seconds=prompt / 1000,
        generation_seconds=generated / 1000,
        prompt_tokens=int(measured.get("prompt_n") or 0),
        generated_tokens=int(measured.get("predicted_n") or seen.generated_tokens),
    )
