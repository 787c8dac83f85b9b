"""An engine somewhere else: a client of OpenAI's API, made to look like a model in this process.

One thread runs an event loop for all requests of all remote engines; requests are tasks on it, and a
cancelled request closes its connection, at which the server stops generating.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import (
    EngineClosed,
    EngineError,
    NbinferError,
    NotSupported,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import (
    CompletionRequest,
    EmbeddingRequest,
    ImageRequest,
    RerankRequest,
    ScoreRequest,
)
from nbinfer.contract.results import (
    EmbeddingResult,
    Finished,
    ImageDone,
    ImageResult,
    RerankResult,
    Result,
    ScoreResult,
)
from nbinfer.engines.protocol import EngineLoad
from nbinfer.engines.remote import images
from nbinfer.engines.remote.answers import Job
from nbinfer.engines.remote.clients import (
    Client,
    ConnectionLostError,
    Endpoint,
    OpenAIClient,
    OwnClient,
)
from nbinfer.engines.remote.loop import LOOP, inherited
from nbinfer.engines.remote.wire import (
    RunnerLost,
    Unreachable,
    completion_body,
    vectors_from_wire,
)
from nbinfer.engines.stream import Stream
from nbinfer.engines.vectors import nothing, unit_length

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from nbinfer.contract.requests import Request
    from nbinfer.engines.protocol import EngineInfo

_MODES: dict[type, Mode] = {
    CompletionRequest: Mode.COMPLETION,
    ScoreRequest: Mode.COMPLETION,
    EmbeddingRequest: Mode.EMBEDDING,
    RerankRequest: Mode.RERANKING,
    ImageRequest: Mode.IMAGE_GENERATION,
}
BATCH_IN_FLIGHT = 32
"""Batch requests sent at once; further ones wait here, and a cell's request need not queue behind them."""


_engines: weakref.WeakSet[RemoteEngine] = weakref.WeakSet()


def _forget_in_child() -> None:
    """Have a forked child begin anew with every engine: closing one there ends nothing of its parent's."""
    for engine in list(_engines):
        engine._forget()  # noqa: SLF001 - this module's own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


class RemoteEngine:
    """A model behind an OpenAI-style server. See :class:`nbinfer.engines.protocol.Engine`.

    Parameters
    ----------
    endpoint
        Where it is.
    info
        What it is, as far as that is known.
    own
        The server is nbinfer's: it takes every option and gives back the whole result. Otherwise requests
        hold only what OpenAI-style servers have in common.
    renew
        Returns where the model is after the connection was lost; None: nowhere else.
    on_close
        Called once when the engine is closed.
    name
        What results and messages call the model.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        info: EngineInfo,
        *,
        own: bool = False,
        renew: Callable[[], Endpoint] | None = None,
        on_close: Callable[[], None] | None = None,
        name: str = "",
    ) -> None:
        self.info = info if not name else replace(info, model=name)
        self.hold: Any = None
        self._endpoint = endpoint
        self._own = own
        self._renew = renew
        self._on_close = on_close
        self._name = self.info.model
        # Re-entrant: the garbage collector may cancel a stream in whatever thread it runs.
        self._lock = threading.RLock()
        self._tasks: dict[Stream, asyncio.Task[None]] = {}
        self._closed = False
        self._waiting = 0
        self._generated = 0
        self._prompt_tokens = 0
        # Made on the loop's thread, which owns them.
        self._made: Client | None = None
        self._batch: asyncio.Semaphore | None = None
        _engines.add(self)

    # -- callers' side ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Start a request. What the server refuses is raised by the stream, not here."""
        self._check(request)
        if not self._own and isinstance(request, CompletionRequest):
            request = _with_seed(request)
        job = Job(request, time.perf_counter())
        stream = job.stream = Stream(on_cancel=lambda: self._cancel(stream))
        with self._lock:
            if self._closed:
                raise EngineClosed(f"{self._name} was unloaded; load it again with nb.load.")
            self._waiting += 1
        loop = LOOP.get()
        loop.call_soon_threadsafe(self._begin, loop, job)
        return stream

    def _check(self, request: Request) -> None:
        needed = _MODES[type(request)]
        if self.info.mode != needed:
            raise NotSupported(
                f"{self._name} is loaded for {self.info.mode}: load it with another mode for that."
            )
        if isinstance(request, CompletionRequest):
            if request.n != 1:
                raise NotSupported(
                    "one request gives one answer here: submit it n times with different seeds."
                )
            completion_body(request, own=self._own)
        if isinstance(request, ImageRequest):
            images.image_body(request, self._endpoint.model, own=self._own)
        if isinstance(request, ScoreRequest) and not self._own:
            raise NotSupported("an external server does not score answers; use choices= instead.")

    def render(self, request: CompletionRequest) -> tuple[str, int]:
        """Return the exact prompt and its length in tokens; runs nothing.

        Raises
        ------
        NotSupported
            The server cannot say.
        """
        if not self._own:
            raise NotSupported("an external server does not show the prompt that it makes.")
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "tools": [dict(t) for t in request.tools] or None,
        }
        if request.messages is not None:
            body["messages"] = [dict(message) for message in request.messages]
        else:
            prompt = request.prompt
            body["prompt"] = list(prompt) if isinstance(prompt, tuple) else prompt
        body["think"] = request.think
        found = self._call("/apply-template", body)
        return str(found["prompt"]), int(found["count"])

    def tokenize(self, text: str, *, add_special: bool = True, special: bool = True) -> list[int]:
        """Return the token ids of a text."""
        body = {"model": self._endpoint.model, "content": text, "add_special": add_special}
        return [int(t) for t in self._call("/tokenize", {**body, "parse_special": special})["tokens"]]

    def detokenize(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        body = {"model": self._endpoint.model, "tokens": [int(token) for token in tokens]}
        return str(self._call("/detokenize", body)["content"])

    def _call(self, path: str, body: Mapping[str, Any]) -> Any:
        """Make a small request and wait for it."""

        async def run() -> Any:
            return await self._with_retry(lambda: self._post(path, body), lambda: True)

        if self._closed:
            raise EngineClosed(f"{self._name} was unloaded; load it again with nb.load.")
        return asyncio.run_coroutine_threadsafe(run(), LOOP.get()).result()

    def load(self) -> EngineLoad:
        """Return what this process has running there now."""
        with self._lock:
            return EngineLoad(
                running=len(self._tasks),
                waiting=self._waiting,
                tokens_generated=self._generated,
                prompt_tokens=self._prompt_tokens,
            )

    def close(self) -> None:
        """End this process' requests with ``EngineClosed`` and let the model go; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            tasks = dict(self._tasks)
        error = EngineClosed(f"{self._name} was unloaded while the request ran.")
        for stream in tasks:
            stream.fail(error)

        async def finish() -> None:
            for task in tasks.values():
                task.cancel()
            if tasks:
                await asyncio.wait(tasks.values(), timeout=2)
            if self._made is not None:
                await self._made.close()
                self._made = None

        if tasks or self._made is not None:
            future = asyncio.run_coroutine_threadsafe(finish(), LOOP.get())
            if threading.current_thread().name != "nbinfer-remote":
                with contextlib.suppress(Exception):
                    future.result(5)
        if self._on_close is not None:
            self._on_close()

    def _forget(self) -> None:
        """In a forked child, leave to the parent what is the parent's: requests, connections and model."""
        inherited.append((self._tasks, self._made, self._batch, self._on_close))
        # Another thread of the parent may have held the lock.
        self._lock = threading.RLock()
        self._tasks, self._waiting = {}, 0
        self._made = self._batch = self._on_close = None

    # -- the loop's side --------------------------------------------------------------------------------

    def _begin(self, loop: asyncio.AbstractEventLoop, job: Job) -> None:
        with self._lock:
            self._waiting -= 1
            if self._closed:
                job.stream.fail(EngineClosed(f"{self._name} was unloaded; load it again with nb.load."))
                return
            task = loop.create_task(self._run(job))
            self._tasks[job.stream] = task
        if job.stream.cancelled:
            task.cancel()
        task.add_done_callback(lambda _: self._end(job))

    def _end(self, job: Job) -> None:
        with self._lock:
            self._tasks.pop(job.stream, None)
        # A task that was cancelled before its first step never got to say so.
        if not job.stream.done:
            self._interrupt(job)

    def _interrupt(self, job: Job) -> None:
        """End a cancelled request with what it has so far."""
        found = job.interrupted(self.info)
        if found is None:
            job.stream.fail(EngineError("the scoring was interrupted."))
        else:
            job.stream.put(Finished(found))

    def _cancel(self, stream: Stream) -> None:
        with self._lock:
            task = self._tasks.get(stream)
        if task is not None:
            LOOP.get().call_soon_threadsafe(task.cancel)

    async def _run(self, job: Job) -> None:
        try:
            if job.request.priority == "batch":
                if self._batch is None:
                    self._batch = asyncio.Semaphore(BATCH_IN_FLIGHT)
                async with self._batch:
                    result = await self._with_retry(lambda: self._serve(job), lambda: not job.began)
            else:
                result = await self._with_retry(lambda: self._serve(job), lambda: not job.began)
        except asyncio.CancelledError:
            self._interrupt(job)
            return
        except NbinferError as error:
            job.stream.fail(error)
            return
        except Exception as error:  # noqa: BLE001 - nobody may be left waiting
            job.stream.fail(EngineError(f"{self._name}: {type(error).__name__}: {error!s:.300}"))
            return
        with self._lock:
            self._generated += job.tokens
            if isinstance(result, Result):
                self._prompt_tokens += result.usage.prompt_tokens
        job.stream.put(Finished(result))

    async def _with_retry(
        self, work: Callable[[], Coroutine[Any, Any, Any]], unseen: Callable[[], bool]
    ) -> Any:
        """Do ``work``; once more when the server was lost before anybody saw a piece of the answer."""
        try:
            return await work()
        except (RunnerLost, ConnectionLostError) as error:
            if not unseen() or self._renew is None or self._closed:
                raise _plain(error, self._name) from None
        try:
            found = await asyncio.to_thread(self._renew)
            if found != self._endpoint:
                self._endpoint = found
                lost, self._made = self._made, None
                if lost is not None:
                    await lost.close()
            return await work()
        except ConnectionLostError as error:
            raise _plain(error, self._name) from None

    def _client(self) -> Client:
        if self._made is None:
            endpoint = self._endpoint
            own = self._own and endpoint.socket is not None
            self._made = OwnClient(endpoint.socket or "") if own else OpenAIClient(endpoint)
        return self._made

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        given = {key: value for key, value in body.items() if value is not None}
        return await self._client().post(path, given)

    async def _serve(self, job: Job) -> Any:
        request = job.request
        if isinstance(request, EmbeddingRequest):
            return await self._embed(job, request) if request.texts else nothing(request, self.info, "stop")
        if isinstance(request, RerankRequest):
            return (
                await self._rerank(job, request) if request.documents else nothing(request, self.info, "stop")
            )
        if isinstance(request, ScoreRequest):
            return await self._score(request)
        if isinstance(request, ImageRequest):
            return await self._images(job, request)
        return await self._complete(job, request)

    async def _embed(self, job: Job, request: EmbeddingRequest) -> EmbeddingResult:
        asked: dict[str, Any] = {
            "model": self._endpoint.model,
            "input": list(request.texts),
            "encoding_format": "base64",
            "dimensions": request.dims,
        }
        if self._own:
            asked |= {"normalize": request.normalize, "priority": request.priority}
        body = await self._post("/v1/embeddings", asked)
        data = sorted(body["data"], key=lambda each: each["index"])
        per_token = self.info.effective.get("pooling") == "none"
        dims = (request.dims or self.info.dimensions) if per_token else None
        vectors = vectors_from_wire((each["embedding"] for each in data), dims)
        details = body.get("nbinfer") or {}
        if not self._own and request.normalize:
            vectors = unit_length(vectors)
        counts = details.get("n_tokens") or _spread((body.get("usage") or {}).get("prompt_tokens"), len(data))
        return EmbeddingResult(
            vectors=vectors,
            n_tokens=tuple(counts),
            model=self._name,
            seconds=float(details.get("seconds", time.perf_counter() - job.submitted)),
        )

    async def _rerank(self, job: Job, request: RerankRequest) -> RerankResult:
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "query": request.query,
            "documents": list(request.documents),
        }
        if self._own:
            body["priority"] = request.priority
        found = await self._post("/v1/rerank", body)
        scores = np.zeros(len(request.documents), np.float32)
        for each in found["results"]:
            scores[each["index"]] = each["relevance_score"]
        details = found.get("nbinfer") or {}
        counts = details.get("n_tokens") or _spread(
            (found.get("usage") or {}).get("prompt_tokens"), len(scores)
        )
        return RerankResult(
            scores=scores,
            n_tokens=tuple(counts),
            model=self._name,
            seconds=float(details.get("seconds", time.perf_counter() - job.submitted)),
        )

    async def _score(self, request: ScoreRequest) -> ScoreResult:
        prompt = request.prompt
        found = await self._post(
            "/answers/score",
            {
                "model": self._endpoint.model,
                "answers": list(request.answers),
                "messages": None if request.messages is None else [dict(each) for each in request.messages],
                "prompt": list(prompt) if isinstance(prompt, tuple) else prompt,
                "think": request.think,
                "priority": request.priority,
            },
        )
        usage = found["usage"]
        return ScoreResult(
            logprobs=np.array(found["logprobs"], np.float64),
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            model=self._name,
            seconds=float(found["nbinfer"]["seconds"]),
        )

    async def _images(self, job: Job, request: ImageRequest) -> ImageResult:
        job.restart()
        body = images.image_body(request, self._endpoint.model, own=self._own)
        if not self._own:
            found = await self._client().post(images.PATH, body)
            seconds = time.perf_counter() - job.submitted
            return images.result_from_json(found, request, model=self._name, seconds=seconds)
        async with contextlib.aclosing(self._client().stream(images.PATH, body)) as chunks:
            async for chunk in chunks:
                event = images.event_from_json(chunk)
                if isinstance(event, ImageDone):
                    job.began = True
                    job.images.append(event.image)
                if event is not None:
                    job.stream.put(event)
                elif chunk.get("type") == images.FINISHED:
                    job.details = images.details_from_json(chunk["nbinfer"])
        if job.details is None:
            raise ConnectionLostError("the answer ended in the middle")
        return ImageResult(images=tuple(job.images), prompt=request.prompt, model=self._name, **job.details)

    # -- completions ------------------------------------------------------------------------------------

    async def _complete(self, job: Job, request: CompletionRequest) -> Result:
        body = completion_body(request, own=self._own)
        if self._own:
            body |= {"nbinfer": True} | ({"return_progress": True} if request.messages is not None else {})
        body["model"] = self._endpoint.model
        path = "/v1/completions" if request.messages is None else "/v1/chat/completions"
        job.restart()
        if self._own and request.priority == "batch":
            # Nobody watches it grow: in one piece it costs half of the messages, and of their handling.
            whole = await self._post(path, {**body, "return_progress": None})
            job.details = whole["nbinfer"]["results"][0]
            job.tokens = job.details["usage"]["completion_tokens"]
            return job.result(request, model=self._name, own=self._own)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with contextlib.aclosing(self._client().stream(path, body)) as chunks:
            async for chunk in chunks:
                job.take(chunk)
        if job.finish is None and job.details is None:
            raise ConnectionLostError("the answer ended in the middle")
        return job.result(request, model=self._name, own=self._own)


def _plain(error: Exception, name: str) -> NbinferError:
    if isinstance(error, NbinferError):
        return error
    return Unreachable(f"{name}: the server does not answer ({error!s:.200}).")


def _with_seed(request: CompletionRequest) -> CompletionRequest:
    """Draw the seed here where there is none: a server that draws its own does not say which."""
    sampling = request.sampling
    if sampling.seed is not None or sampling.temperature == 0:
        return request
    # Some servers read it as a signed number of 32 bits.
    return replace(request, sampling=replace(sampling, seed=secrets.randbelow(2**31)))


def _spread(total: int | None, n: int) -> tuple[int, ...]:
    """Divide a total among n texts; servers count them together."""
    if not total or not n:
        return (0,) * n
    each, rest = divmod(int(total), n)
    return tuple(each + (i < rest) for i in range(n))


__all__ = ["Endpoint", "RemoteEngine"]
