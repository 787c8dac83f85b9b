"""An engine somewhere else: a client of OpenAI's API, made to look like a model in this process.

One thread runs an event loop for all requests of all remote engines; requests are tasks on it, and a
cancelled request closes its connection, at which the server stops generating.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import threading
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import (
    BackendUnavailable,
    EngineClosed,
    EngineError,
    NbinferError,
    NotSupported,
    SchemaError,
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
    Delta,
    EmbeddingResult,
    Finished,
    GeneratedImage,
    ImageDone,
    ImageResult,
    PromptProgress,
    RerankResult,
    Result,
    ScoreResult,
    Timings,
    TokenLogprob,
    Usage,
)
from nbinfer.engines.asked import result_params
from nbinfer.engines.protocol import EngineLoad
from nbinfer.engines.remote import images
from nbinfer.engines.remote.clients import (
    Client,
    ConnectionLostError,
    Endpoint,
    OpenAIClient,
    OwnClient,
)
from nbinfer.engines.remote.wire import (
    DENIED,
    NO_ANSWER,
    RunnerLost,
    Unreachable,
    completion_body,
    details_from_json,
    vectors_from_wire,
)
from nbinfer.engines.stream import Stream
from nbinfer.engines.vectors import nothing, unit_length
from nbinfer.engines.writing import cut_short

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


# -- the thread that talks ------------------------------------------------------------------------------


def ignore_late_wakeups(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle what an event loop reports: not a socket that became ready as its reader was cancelled.

    anyio, which the HTTP client stands on, then sets a future that is over; nothing is lost, and nobody
    should see it in a notebook.
    """
    if not isinstance(context.get("exception"), asyncio.InvalidStateError):
        loop.default_exception_handler(context)


_inherited: list[Any] = []
"""In a forked child, what the parent still uses: to close it would take its sockets out of the epoll that
both processes share, and the parent would wait for ever."""


class _Loop:
    """An event loop on a thread of its own, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            # A forked child has the object, but not the thread.
            if self._loop is None or self._pid != os.getpid():
                if self._loop is not None:
                    _inherited.append(self._loop)
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                self._loop.set_exception_handler(ignore_late_wakeups)
                threading.Thread(target=self._loop.run_forever, name="nbinfer-remote", daemon=True).start()
            return self._loop


_loop = _Loop()


def list_models(endpoint: Endpoint, *, timeout: float) -> list[dict[str, Any]]:
    """Return the models that a server lists, as it describes them.

    Raises
    ------
    BackendUnavailable
        It does not answer, not in ``timeout`` seconds, or wants another key.
    NbinferError
        What it answers instead.
    """
    found = fetch_json(endpoint, "/v1/models", timeout=timeout)
    data = found.get("data") if isinstance(found, dict) else None
    return [each for each in data or () if isinstance(each, dict)]


def fetch_json(
    endpoint: Endpoint, path: str, body: Mapping[str, Any] | None = None, *, timeout: float
) -> Any:
    """Return what a server answers to a small request: GET, or with a body POST.

    Raises
    ------
    BackendUnavailable
        It does not answer, or not in ``timeout`` seconds: its code is ``NO_ANSWER``. Or it wants another
        key.
    NbinferError
        What it answers instead.
    """

    async def ask() -> Any:
        client = OpenAIClient(endpoint)
        try:
            async with asyncio.timeout(timeout):
                return await (client.get(path) if body is None else client.post(path, body))
        finally:
            await client.close()

    try:
        return asyncio.run_coroutine_threadsafe(ask(), _loop.get()).result()
    except NbinferError as error:
        if getattr(error, "code", None) != DENIED:
            error.add_note(f"({endpoint.base_url} answered {path} with this.)")
            raise
        raise BackendUnavailable(
            f"{endpoint.base_url} refuses to answer {path}: {error!s:.200}\n"
            "Check api_key, or pass check=False."
        ) from None
    except (ConnectionLostError, TimeoutError) as error:
        absent = BackendUnavailable(
            f"no server answers at {endpoint.base_url} ({str(error) or 'it took too long':.200}).\n"
            "Start it, or check base_url."
        )
        absent.code = NO_ANSWER  # type: ignore[attr-defined]
        raise absent from None


_engines: weakref.WeakSet[RemoteEngine] = weakref.WeakSet()


def _forget_in_child() -> None:
    """Have a forked child begin anew with every engine: closing one there ends nothing of its parent's."""
    for engine in list(_engines):
        engine._forget()  # noqa: SLF001 - this module's own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


# -- the engine -----------------------------------------------------------------------------------------


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
        self._lock = threading.Lock()
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
        job = _Job(request, time.perf_counter())
        stream = job.stream = Stream(on_cancel=lambda: self._cancel(stream))
        with self._lock:
            if self._closed:
                raise EngineClosed(f"{self._name} was unloaded; load it again with nb.load.")
            self._waiting += 1
        loop = _loop.get()
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
        return asyncio.run_coroutine_threadsafe(run(), _loop.get()).result()

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
            future = asyncio.run_coroutine_threadsafe(finish(), _loop.get())
            if threading.current_thread().name != "nbinfer-remote":
                with contextlib.suppress(Exception):
                    future.result(5)
        if self._on_close is not None:
            self._on_close()

    def _forget(self) -> None:
        """In a forked child, leave to the parent what is the parent's: requests, connections and model."""
        _inherited.append((self._tasks, self._made, self._batch, self._on_close))
        # Another thread of the parent may have held the lock.
        self._lock = threading.Lock()
        self._tasks, self._waiting = {}, 0
        self._made = self._batch = self._on_close = None

    # -- the loop's side --------------------------------------------------------------------------------

    def _begin(self, loop: asyncio.AbstractEventLoop, job: _Job) -> None:
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

    def _end(self, job: _Job) -> None:
        with self._lock:
            self._tasks.pop(job.stream, None)
        # A task that was cancelled before its first step never got to say so.
        if not job.stream.done:
            self._put_interrupted(job)

    def _cancel(self, stream: Stream) -> None:
        with self._lock:
            task = self._tasks.get(stream)
        if task is not None:
            _loop.get().call_soon_threadsafe(task.cancel)

    async def _run(self, job: _Job) -> None:
        try:
            if job.request.priority == "batch":
                if self._batch is None:
                    self._batch = asyncio.Semaphore(BATCH_IN_FLIGHT)
                async with self._batch:
                    result = await self._with_retry(lambda: self._serve(job), lambda: not job.began)
            else:
                result = await self._with_retry(lambda: self._serve(job), lambda: not job.began)
        except asyncio.CancelledError:
            self._put_interrupted(job)
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

    async def _serve(self, job: _Job) -> Any:
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

    async def _embed(self, job: _Job, request: EmbeddingRequest) -> EmbeddingResult:
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

    async def _rerank(self, job: _Job, request: RerankRequest) -> RerankResult:
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

    async def _images(self, job: _Job, request: ImageRequest) -> ImageResult:
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

    async def _complete(self, job: _Job, request: CompletionRequest) -> Result:
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
            return self._result(job, request)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with contextlib.aclosing(self._client().stream(path, body)) as chunks:
            async for chunk in chunks:
                self._take(job, chunk)
        if job.finish is None and job.details is None:
            raise ConnectionLostError("the answer ended in the middle")
        return self._result(job, request)

    def _take(self, job: _Job, chunk: dict[str, Any]) -> None:
        if chunk.get("nbinfer"):
            job.details = chunk["nbinfer"]["results"][0]
        if chunk.get("usage"):
            job.usage = chunk["usage"]
        progress = chunk.get("prompt_progress")
        if isinstance(progress, dict):
            done, total = int(progress.get("processed", 0)), int(progress.get("total", 0))
            job.stream.put(PromptProgress(done, total, int(progress.get("cache", 0))))
        for choice in (chunk.get("choices") or ())[:1]:
            if choice.get("finish_reason"):
                job.finish = choice["finish_reason"]
            delta = choice.get("delta")
            if delta:
                job.add_extras(delta)
            text = choice.get("text") if delta is None else delta.get("content")
            if text:
                job.add(text)
            if choice.get("logprobs") and job.request_logprobs:
                job.add_logprobs(choice["logprobs"])

    def _result(self, job: _Job, request: CompletionRequest) -> Result:
        common: dict[str, Any] = {
            "model": self._name,
            "messages": request.messages,
        }
        if job.details is not None:
            fields = details_from_json(job.details)
            if request.constraint is not None and job.details.get("error"):
                error = str(job.details["error"])
                raise SchemaError(error, raw=fields["text"], result=Result(**fields, **common, error=error))
            return Result(**fields, **common)
        cut = request.constraint is not None and job.finish == "length"
        # What is cut is no whole object to take the choice from.
        text = job.text if self._own or cut else _chosen(job.text, request)
        usage = job.usage or {}
        result = Result(
            text=text,
            reasoning=job.reasoning.strip("\n") or None,
            finish_reason="length" if job.finish == "length" else "stop",
            usage=Usage(
                prompt_tokens=usage.get("prompt_tokens") or 0,
                completion_tokens=usage.get("completion_tokens") or job.tokens,
                cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            ),
            timings=job.timings(usage),
            logprobs=tuple(job.logprobs) if request.logprobs is not None else None,
            prompt=request.prompt if isinstance(request.prompt, str) else "",
            params=result_params(request, seed=request.sampling.seed, adapter=None),
            tool_calls=tuple(job.calls),
            **common,
        )
        if not cut:
            return result
        raise cut_short(result, f"{job.tokens} pieces")

    def _put_interrupted(self, job: _Job) -> None:
        """End a cancelled request with what it has so far."""
        request = job.request
        if isinstance(request, ImageRequest):
            seconds = time.perf_counter() - job.submitted
            params = {"n": request.n, "seed": request.seed}
            made = ImageResult(
                images=tuple(job.images),
                prompt=request.prompt,
                finish_reason="interrupted",
                params=params,
                model=self._name,
                seconds=seconds,
            )
            job.stream.put(Finished(made))
            return
        if isinstance(request, EmbeddingRequest | RerankRequest):
            job.stream.put(Finished(nothing(request, self.info, "interrupted")))
            return
        if isinstance(request, ScoreRequest):
            job.stream.fail(EngineError("the scoring was interrupted."))
            return
        result = Result(
            text=job.text,
            reasoning=job.reasoning or None,
            finish_reason="interrupted",
            usage=Usage(completion_tokens=job.tokens),
            timings=job.timings(None),
            model=self._name,
            params=result_params(request, seed=request.sampling.seed, adapter=None),
            messages=request.messages,
        )
        job.stream.put(Finished(result))


def _plain(error: Exception, name: str) -> NbinferError:
    if isinstance(error, NbinferError):
        return error
    return Unreachable(f"{name}: the server does not answer ({error!s:.200}).")


class _Job:
    """One request and its answer so far."""

    def __init__(self, request: Request, submitted: float) -> None:
        self.request = request
        self.submitted = submitted
        self.stream: Stream = Stream()
        self.began = False
        self.restart()

    def restart(self) -> None:
        """Forget what a lost server said; nobody saw any of it."""
        self.text = self.reasoning = ""
        self.tokens = 0
        self.first: float | None = None
        self.last: float | None = None
        self.finish: str | None = None
        self.details: Any = None
        self.usage: Any = None
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[TokenLogprob] = []
        self.images: list[GeneratedImage] = []

    @property
    def request_logprobs(self) -> bool:
        return isinstance(self.request, CompletionRequest) and self.request.logprobs is not None

    def add(self, text: str, *, reasoning: bool = False) -> None:
        self.last = time.perf_counter()
        if self.first is None:
            self.first = self.last
        self.began = True
        self.tokens += 1
        if reasoning:
            self.reasoning += text
        else:
            self.text += text
        self.stream.put(Delta(text, reasoning=reasoning))

    def add_extras(self, delta: dict[str, Any]) -> None:
        """Take what a chat's piece holds beside its text."""
        # The two names that servers use.
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if thought:
            self.add(str(thought), reasoning=True)
        for call in delta.get("tool_calls") or ():
            self.add_call(call)

    def add_call(self, call: dict[str, Any]) -> None:
        """Put the pieces of a tool call together."""
        index = int(call.get("index") or 0)
        while len(self.calls) <= index:
            self.calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        made, function = self.calls[index], call.get("function") or {}
        made["id"] += call.get("id") or ""
        for key in ("name", "arguments"):
            made["function"][key] += function.get(key) or ""

    def add_logprobs(self, found: dict[str, Any]) -> None:
        """Take log-probabilities, in the shape of chats or in that of text completions."""
        for each in found.get("content") or ():
            top = tuple((other["token"], other["logprob"]) for other in each.get("top_logprobs") or ())
            self.logprobs.append(TokenLogprob(each["token"], each["logprob"], top))
        others = found.get("top_logprobs") or ()
        for i, token in enumerate(found.get("tokens") or ()):
            top = tuple((others[i] or {}).items()) if i < len(others) else ()
            self.logprobs.append(TokenLogprob(token, found["token_logprobs"][i] or 0.0, top))

    def timings(self, usage: Any) -> Timings:
        """Return the times as this side saw them."""
        first = self.first
        if first is None:
            return Timings()
        return Timings(
            prompt_seconds=first - self.submitted,
            generation_seconds=(self.last or first) - first,
            first_token_seconds=first - self.submitted,
            prompt_tokens=(usage or {}).get("prompt_tokens") or 0,
            generated_tokens=(usage or {}).get("completion_tokens") or self.tokens,
        )


def _with_seed(request: CompletionRequest) -> CompletionRequest:
    """Draw the seed here where there is none: a server that draws its own does not say which."""
    sampling = request.sampling
    if sampling.seed is not None or sampling.temperature == 0:
        return request
    # Some servers read it as a signed number of 32 bits.
    return replace(request, sampling=replace(sampling, seed=secrets.randbelow(2**31)))


def _chosen(text: str, request: CompletionRequest) -> str:
    """Take the choice out of the object that an external server was asked to wrap it in."""
    if request.constraint is None or request.constraint.kind != "choices":
        return text
    try:
        choice = json.loads(text)["choice"]
    except (ValueError, KeyError, TypeError):
        raise SchemaError(
            "the server did not keep to the choices: it may not support them.", raw=text
        ) from None
    if choice not in request.constraint.value:
        raise SchemaError(f"the server chose {choice!r:.60}, which is not among the choices.", raw=text)
    return str(choice)


def _spread(total: int | None, n: int) -> tuple[int, ...]:
    """Divide a total among n texts; servers count them together."""
    if not total or not n:
        return (0,) * n
    each, rest = divmod(int(total), n)
    return tuple(each + (i < rest) for i in range(n))


__all__ = ["Endpoint", "RemoteEngine"]
