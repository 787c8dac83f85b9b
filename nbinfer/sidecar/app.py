"""The OpenAI API over one engine."""

# ruff: noqa: TC001 - FastAPI reads the annotations of routes when they are added

from __future__ import annotations

import asyncio
import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from nbinfer.contract.errors import (
    EngineClosed,
    EngineError,
    ModelNotFound,
    NbinferError,
    NotSupported,
    SchemaError,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest, EmbeddingRequest, ImageRequest, RerankRequest
from nbinfer.contract.results import Delta, Finished, PromptProgress, Result, Usage
from nbinfer.engines.remote.wire import (
    details_to_json,
    error_body,
    error_to_json,
    info_to_json,
    shaped,
    vector_to_base64,
)
from nbinfer.sidecar import images, messages
from nbinfer.sidecar.answers import (
    DONE,
    CallSplitter,
    chat_logprobs,
    chat_message,
    envelope,
    finish_reason,
    sse,
    text_logprobs,
    usage_body,
)
from nbinfer.sidecar.bodies import (
    AnswersBody,
    ChatBody,
    DetokenizeBody,
    EmbeddingBody,
    ImageBody,
    RerankBody,
    ScoreBody,
    TemplateBody,
    TextBody,
    TokenizeBody,
)
from nbinfer.sidecar.metrics import Metrics
from nbinfer.sidecar.responses import (
    ENDING,
    ClosingStream,
    MisdirectedError,
    SafeJSONResponse,
    error_response,
    while_connected,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
    from typing import TypeVar

    from nbinfer.contract.results import EmbeddingResult, Event, ImageResult, RerankResult, ScoreResult
    from nbinfer.engines.protocol import Engine
    from nbinfer.engines.stream import Stream

    T = TypeVar("T")


SMALL_BYTES = 4096
"""A body up to this size is rendered and tokenized in half a millisecond."""


@dataclass
class Served:
    """The one model behind the API: none yet while it loads.

    Attributes
    ----------
    names
        What the model may be called; the first is what answers call it.
    engine
        None until it is loaded.
    stage, fraction
        How far the load is: a word, and 0 to 1.
    on_dead
        Called with the error when the engine turns out to have ended by itself; a process that only answers
        that would never be replaced.
    """

    names: tuple[str, ...]
    engine: Engine | None = None
    stage: str = "starting"
    fraction: float = 0.0
    created: int = field(default_factory=lambda: int(time.time()))
    on_dead: Callable[[BaseException], None] | None = None

    def suspect(self, error: BaseException) -> None:
        """Find out whether the engine survived an error of its own."""
        if self.engine is None or self.on_dead is None:
            return
        if isinstance(error, EngineClosed):
            self.on_dead(error)
        if not isinstance(error, EngineError):
            return
        probe: EmbeddingRequest | RerankRequest | ImageRequest | CompletionRequest
        if self.engine.info.mode == Mode.EMBEDDING:
            probe = EmbeddingRequest(texts=["?"])
        elif self.engine.info.mode == Mode.RERANKING:
            probe = RerankRequest(query="?", documents=["?"])
        elif self.engine.info.mode == Mode.IMAGE_GENERATION:
            probe = ImageRequest(prompt="?", steps=1)
        else:
            probe = CompletionRequest(prompt="?", max_tokens=1)
        try:
            self.engine.submit(probe).cancel()
        except EngineClosed:
            self.on_dead(error)
        except NbinferError:
            return

    def get(self, name: str | None) -> Engine:
        """Return the engine, when ``name`` is this model's.

        Raises
        ------
        MisdirectedError
            The request is for another model.
        EngineClosed
            The model is not loaded yet.
        """
        if name is not None and name not in self.names:
            raise MisdirectedError(f"this runner serves {self.names[0]!r}, not {name!r:.80}.")
        if self.engine is None:
            raise EngineClosed(f"{self.names[0]} is being loaded ({self.stage}, {self.fraction:.0%}).")
        return self.engine


def make_app(served: Served, *, metrics: Metrics | None = None) -> FastAPI:
    """Return the ASGI app that serves one model.

    Parameters
    ----------
    served
        The model.
    metrics
        Where to count; None makes new counters.
    """
    api = FastAPI(
        title="nbinfer",
        description="One model, in the shapes of OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        default_response_class=SafeJSONResponse,
    )
    counters = metrics or Metrics(lambda: served.engine)
    _add_error_handlers(api, served)
    _add_plain_routes(api, served, counters)
    _add_completion_routes(api, served, counters)
    _add_message_routes(api, served, counters)
    _add_pooled_routes(api, served, counters)
    _add_image_routes(api, served, counters)
    return api


def _add_error_handlers(api: FastAPI, served: Served) -> None:
    @api.exception_handler(NbinferError)
    async def known(request: Request, error: NbinferError) -> Response:
        await asyncio.to_thread(served.suspect, error)
        response = error_response(error, request.url.path)
        if served.engine is not None and isinstance(error, EngineClosed):
            # The request was never begun: the service may have it served by the next process.
            response.headers[ENDING] = "yes"
        return response

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        body = error_body(message[:500], param=where[:200] or None)
        return SafeJSONResponse(shaped(request.url.path, 400, body), 400)

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{request.method} {request.url.path[:200]} is not part of this API."
        return SafeJSONResponse(error_body(message), error.status_code, headers=error.headers)


# -- routes ---------------------------------------------------------------------------------------------


def _add_plain_routes(api: FastAPI, served: Served, counters: Metrics) -> None:  # noqa: C901 - a list of routes
    @api.get("/health")
    async def health() -> Response:
        if served.engine is None:
            body = {"status": "loading", "stage": served.stage, "progress": round(served.fraction, 4)}
            return SafeJSONResponse(body, 503)
        return SafeJSONResponse({"status": "ok"})

    @api.get("/metrics")
    async def metrics() -> Response:
        text, kind = counters.text()
        return Response(text, media_type=kind)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served)]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in served.names:
            raise ModelNotFound(f"there is no model {name!r:.80} here; {served.names[0]!r} is served.")
        return _model(served)

    @api.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        engine = served.get(body.model)
        text = body.content if body.content is not None else body.prompt
        if text is None:
            from nbinfer.contract.errors import RequestError

            raise RequestError("content is missing: the text to turn into tokens.")
        method = _offered(engine, "tokenize")
        tokens = await asyncio.to_thread(
            method, text, add_special=body.add_special, special=body.parse_special
        )
        return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.info.context_size}

    @api.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        text = await asyncio.to_thread(_offered(served.get(body.model), "detokenize"), body.tokens)
        return {"content": text, "prompt": text}

    @api.post("/apply-template")
    async def apply_template(body: TemplateBody) -> dict[str, Any]:
        prompt, count = await asyncio.to_thread(served.get(body.model).render, body.request())
        return {"prompt": prompt, "count": count}


def _offered(engine: Engine, name: str) -> Callable[..., Any]:
    method = getattr(engine, name, None)
    if method is None:
        raise NotSupported(f"the engine of {engine.info.model} does not offer this.")
    found: Callable[..., Any] = method
    return found


def _model(served: Served) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": served.names[0],
        "object": "model",
        "created": served.created,
        "owned_by": "nbinfer",
        "aliases": list(served.names[1:]),
    }
    if served.engine is not None:
        info = served.engine.info
        out["max_model_len"] = info.context_size
        out["nbinfer"] = info_to_json(info)
    return out


def _add_completion_routes(api: FastAPI, served: Served, counters: Metrics) -> None:
    @api.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        engine = served.get(body.model)
        asked = body.request()
        answer = _Chat(served.names[0], body)
        streams = await _submit(request, engine, _fan_out(asked, body.answers()))
        return await _respond(request, served, body, answer, streams, counters)

    @api.post("/v1/completions")
    async def text(body: TextBody, request: Request) -> Response:
        engine = served.get(body.model)
        asked = [each for one in body.requests() for each in _fan_out(one, body.answers())]
        answer = _Text(served.names[0], body)
        streams = await _submit(request, engine, asked)
        return await _respond(request, served, body, answer, streams, counters)


def _add_pooled_routes(api: FastAPI, served: Served, counters: Metrics) -> None:
    @api.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        streams = await _submit(request, served.get(body.model), [body.request()])
        results = await _wait(request, streams, counters)
        if results is None:
            return Response(status_code=499)
        result: EmbeddingResult = results[0]
        base64 = body.encoding_format == "base64"
        pooled = served.get(body.model).info.effective.get("pooling") != "none"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": vector_to_base64(vector) if base64 else vector.tolist(),
            }
            for i, vector in enumerate(result.vectors if pooled else result.by_text())
        ]
        return SafeJSONResponse(
            {"object": "list", "data": data, "model": served.names[0], **_pooled_usage(result)}
        )

    async def scores(asked: RerankBody | ScoreBody, request: Request) -> RerankResult | None:
        streams = await _submit(request, served.get(asked.model), [asked.request()])
        results = await _wait(request, streams, counters)
        return None if results is None else results[0]

    @api.post("/v1/rerank")
    @api.post("/rerank")
    async def rerank(body: RerankBody, request: Request) -> Response:
        result = await scores(body, request)
        if result is None:
            return Response(status_code=499)
        order = sorted(range(len(result.scores)), key=lambda i: -float(result.scores[i]))[: body.top_n]
        texts = body.texts()
        found = [
            {"index": i, "relevance_score": float(result.scores[i])}
            | ({"document": {"text": texts[i]}} if body.return_documents else {})
            for i in order
        ]
        return SafeJSONResponse({"model": served.names[0], "results": found, **_pooled_usage(result)})

    @api.post("/score")
    async def score(body: ScoreBody, request: Request) -> Response:
        result = await scores(body, request)
        if result is None:
            return Response(status_code=499)
        data = [
            {"index": i, "object": "score", "score": float(number)} for i, number in enumerate(result.scores)
        ]
        return SafeJSONResponse(
            {"object": "list", "data": data, "model": served.names[0], **_pooled_usage(result)}
        )

    @api.post("/answers/score")
    async def score_answers(body: AnswersBody, request: Request) -> Response:
        streams = await _submit(request, served.get(body.model), [body.request()])
        results = await _wait(request, streams, counters)
        if results is None:
            return Response(status_code=499)
        result: ScoreResult = results[0]
        usage = {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
        return SafeJSONResponse(
            {
                "object": "list",
                "model": served.names[0],
                "logprobs": [float(number) for number in result.logprobs],
                "usage": usage | {"prompt_tokens_details": {"cached_tokens": result.cached_tokens}},
                "nbinfer": {"seconds": result.seconds},
            }
        )


def _add_message_routes(api: FastAPI, served: Served, counters: Metrics) -> None:
    @api.post(messages.PATH)
    async def message(body: messages.MessagesBody, request: Request) -> Response:
        engine, path = served.get(body.model), request.url.path
        asked = body.whole()
        streams = await _submit(request, engine, [asked.request()])
        answer = messages.Message(served.names[0], asked)
        if not body.stream:
            results = await _wait(request, streams, counters)
            if results is None:
                return Response(status_code=499)
            return SafeJSONResponse(answer.whole(results[0]))

        async def done() -> None:
            streams[0].cancel()

        return ClosingStream(
            _message_events(path, served, answer, streams, counters),
            on_close=done,
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    @api.post(messages.COUNT_PATH)
    async def count(body: messages.CountBody) -> dict[str, Any]:
        engine = served.get(body.model)
        _, tokens = await asyncio.to_thread(engine.render, body.chat().request())
        return {"input_tokens": tokens}


async def _message_events(
    path: str, served: Served, answer: messages.Message, streams: list[Stream], counters: Metrics
) -> AsyncIterator[bytes]:
    """Yield the events of an answer in Anthropic's shape, what there is at one time in one piece."""
    began, ended = time.perf_counter(), False
    batches = _merged(streams)
    try:
        async for events in batches:
            out: list[bytes] = []
            for _, found in events:
                if isinstance(found, Exception) and not isinstance(found, SchemaError):
                    ended = True
                    counters.note_failed(path)
                    yield b"".join([*out, messages.error_event(found)])
                    await asyncio.to_thread(served.suspect, found)
                    return
                if isinstance(found, Finished | SchemaError):
                    ended = True
                    result: Any = _cut_short(found) if isinstance(found, SchemaError) else found.result
                    counters.note(path, result, time.perf_counter() - began)
                    out += answer.close(result)
                else:
                    out += answer.take(found)
            if out:
                yield b"".join(out)
    finally:
        if not ended:
            counters.note_cancelled(path)
        await batches.aclose()


def _add_image_routes(api: FastAPI, served: Served, counters: Metrics) -> None:
    @api.post("/v1/images/generations")
    async def generations(body: ImageBody, request: Request) -> Response:
        engine, asked = served.get(body.model), body.request()
        if engine.info.mode != Mode.IMAGE_GENERATION:
            raise NotSupported(f"{served.names[0]} does not generate images.")
        streams = await _submit(request, engine, [asked])
        if not body.stream:
            results = await _wait(request, streams, counters)
            if results is None:
                return Response(status_code=499)
            return SafeJSONResponse(images.whole(results[0], details=body.nbinfer))
        path, began = request.url.path, time.perf_counter()
        size = engine.info.effective.get("size") if asked.size is None else "{}x{}".format(*asked.size)

        def on_end(ended: ImageResult | BaseException | None) -> None:
            if ended is None:
                counters.note_cancelled(path)
            elif isinstance(ended, BaseException):
                counters.note_failed(path)
                served.suspect(ended)
            else:
                counters.note(path, ended, time.perf_counter() - began)

        async def done() -> None:
            streams[0].cancel()

        return ClosingStream(
            images.events(streams[0], size=str(size), details=body.nbinfer, on_end=on_end),
            on_close=done,
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )


def _pooled_usage(result: EmbeddingResult | RerankResult) -> dict[str, Any]:
    tokens = sum(result.n_tokens)
    return {
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "nbinfer": {"n_tokens": list(result.n_tokens), "seconds": result.seconds},
    }


# -- running --------------------------------------------------------------------------------------------


def _fan_out(request: CompletionRequest, n: int) -> list[CompletionRequest]:
    """Return n requests for one answer each, with seeds that follow each other."""
    if n == 1:
        return [request]
    seed = request.sampling.seed
    return [
        dataclasses.replace(
            request,
            sampling=dataclasses.replace(request.sampling, seed=None if seed is None else (seed + i) % 2**32),
        )
        for i in range(n)
    ]


async def _submit(request: Request, engine: Engine, requests: Sequence[Any]) -> list[Stream]:
    """Start requests; off the event loop where rendering and tokenizing takes longer than the way there."""
    streams: list[Stream] = []

    def start() -> None:
        try:
            streams.extend(engine.submit(request) for request in requests)
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise

    size = request.headers.get("content-length", "")
    if size.isdigit() and int(size) <= SMALL_BYTES:
        start()
    else:
        await asyncio.to_thread(start)
    return streams


async def _merged(streams: Sequence[Stream]) -> AsyncGenerator[list[tuple[int, Event | Exception]], None]:
    """Yield the events of several streams, all that are there at once; leaving early cancels all streams."""
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

    async def pump(i: int, stream: Stream) -> None:
        try:
            async for event in stream:
                queue.put_nowait((i, event))
        except Exception as error:  # noqa: BLE001 - whatever ended the request is its last event
            queue.put_nowait((i, error))

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    left = len(streams)
    try:
        while left:
            events = [await queue.get()]
            while not queue.empty():
                events.append(queue.get_nowait())
            left -= sum(isinstance(event, Finished | Exception) for _, event in events)
            yield events
    finally:
        for stream in streams:
            stream.cancel()
        for task in tasks:
            task.cancel()


async def _gathered(streams: Sequence[Stream]) -> list[Any]:
    """Return the results of several streams."""
    results: list[Any] = [None] * len(streams)
    async for events in _merged(streams):
        for i, event in events:
            if isinstance(event, SchemaError):
                results[i] = _cut_short(event)
            elif isinstance(event, Exception):
                raise event
            elif isinstance(event, Finished):
                results[i] = event.result
    return results


async def _wait(request: Request, streams: Sequence[Stream], counters: Metrics) -> list[Any] | None:
    """Return the results in order; None when the client went away, which stops the engine."""
    began = time.perf_counter()

    path = request.url.path
    try:
        results = await while_connected(request, _gathered(streams))
    except ClientDisconnect:
        counters.note_cancelled(path)
        return None
    except Exception:
        counters.note_failed(path)
        raise
    finally:
        for stream in streams:
            stream.cancel()
    for result in results:
        counters.note(path, result, time.perf_counter() - began)
    return results


def _cut_short(error: SchemaError) -> Result:
    """Return the cut answer, as OpenAI reports it: by its finish reason, not by an error."""
    return error.result or Result(text=error.raw, finish_reason="length", usage=Usage(), error=str(error))


async def _respond(
    request: Request,
    served: Served,
    body: ChatBody | TextBody,
    answer: _Chat | _Text,
    streams: list[Stream],
    counters: Metrics,
) -> Response:
    if body.stream:
        events = _stream_body(request.url.path, served, body, answer, streams, counters)

        async def done() -> None:
            for stream in streams:
                stream.cancel()

        return ClosingStream(
            events,
            on_close=done,
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
    results = await _wait(request, streams, counters)
    if results is None:
        return Response(status_code=499)
    out = answer.whole(results)
    if body.nbinfer:
        out["nbinfer"] = _details(results)
    return SafeJSONResponse(out)


def _details(results: Sequence[Result]) -> dict[str, Any]:
    return {"results": [{**details_to_json(result), "error": result.error} for result in results]}


async def _stream_body(  # noqa: C901 - one branch per kind of event
    path: str,
    served: Served,
    body: ChatBody | TextBody,
    answer: _Chat | _Text,
    streams: list[Stream],
    counters: Metrics,
) -> AsyncIterator[bytes]:
    """Yield an answer's server-sent events.

    What there is to say at one time goes in one piece: each piece is a message to the service, from there to
    the client, and wakes both.
    """
    began = time.perf_counter()
    results: list[Result | None] = [None] * len(streams)
    usage = body.stream_options is not None and body.stream_options.include_usage
    batches = _merged(streams)
    out = [chunk for i in range(len(streams)) for chunk in answer.opening(i)]
    try:
        async for events in batches:
            for i, event in events:
                if isinstance(event, Exception) and not isinstance(event, SchemaError):
                    counters.note_failed(path)
                    yield b"".join(map(sse, [*out, error_to_json(event)[1]]))
                    await asyncio.to_thread(served.suspect, event)
                    return
                if isinstance(event, PromptProgress):
                    if getattr(body, "return_progress", False):
                        out.append(answer.progress(i, event))
                elif isinstance(event, Delta):
                    out += answer.delta(i, event)
                elif isinstance(event, Finished | SchemaError):
                    result: Any = _cut_short(event) if isinstance(event, SchemaError) else event.result
                    results[i] = result
                    counters.note(path, result, time.perf_counter() - began)
                    out += answer.closing(i, result)
            if out and not all(results):
                yield b"".join(map(sse, out))
                out = []
        done = [result for result in results if result is not None]
        if usage or body.nbinfer:
            last = answer.last(usage_body(done))
            if body.nbinfer:
                last["nbinfer"] = _details(done)
            out.append(last)
        yield b"".join([*map(sse, out), DONE])
    finally:
        if not all(results):
            counters.note_cancelled(path)
        await batches.aclose()


class _Chat:
    """Writes the answer of a chat completion."""

    def __init__(self, model: str, body: ChatBody) -> None:
        self._tools = bool(body.tool_names)
        self._forced = body.tool_choice not in (None, "none", "auto")
        self._splitters: dict[int, CallSplitter] = {}
        self._chunk = envelope("chat.completion.chunk", "chatcmpl", model)

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": chat_message(result),
                "logprobs": chat_logprobs(result.logprobs),
                "finish_reason": finish_reason(result),
            }
            for i, result in enumerate(results)
        ]
        return {
            **self._chunk,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_body(results),
        }

    def _choice(self, i: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**self._chunk, "choices": [choice]}

    def opening(self, i: int) -> list[dict[str, Any]]:
        self._splitters[i] = CallSplitter(tools=self._tools, forced=self._forced)
        return [self._choice(i, {"role": "assistant", "content": ""})]

    def progress(self, i: int, event: PromptProgress) -> dict[str, Any]:
        return self._choice(i, {}) | {
            "prompt_progress": {"total": event.total, "cache": event.cached, "processed": event.done}
        }

    def delta(self, i: int, event: Delta) -> list[dict[str, Any]]:
        if event.reasoning:
            return [self._choice(i, {"reasoning_content": event.text})]
        text = self._splitters[i].push(event.text)
        return [self._choice(i, {"content": text})] if text else []

    def closing(self, i: int, result: Result) -> list[dict[str, Any]]:
        out = []
        rest = self._splitters[i].rest(result)
        if rest:
            out.append(self._choice(i, {"content": rest}))
        if result.tool_calls:
            calls = chat_message(result)["tool_calls"]
            listed = [{"index": k, **call} for k, call in enumerate(calls)]
            out.append(self._choice(i, {"tool_calls": listed}))
        if result.logprobs is not None:
            # The engine gives them with the result.
            out.append(self._choice(i, {"content": ""}, logprobs=chat_logprobs(result.logprobs)))
        return [*out, self._choice(i, {}, finish_reason=finish_reason(result))]

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._chunk, "choices": [], "usage": usage}


class _Text:
    """Writes the answer of a text completion."""

    def __init__(self, model: str, body: TextBody) -> None:
        del body
        self._chunk = envelope("text_completion", "cmpl", model)

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "text": result.text,
                "logprobs": text_logprobs(result.logprobs),
                "finish_reason": finish_reason(result),
            }
            for i, result in enumerate(results)
        ]
        return {**self._chunk, "choices": choices, "usage": usage_body(results)}

    def _choice(self, i: int, text: str, **more: Any) -> dict[str, Any]:
        choice = {"index": i, "text": text, "logprobs": None, "finish_reason": None, **more}
        return {**self._chunk, "choices": [choice]}

    def opening(self, i: int) -> list[dict[str, Any]]:
        del i
        return []

    def progress(self, i: int, event: PromptProgress) -> dict[str, Any]:
        return self._choice(i, "") | {
            "prompt_progress": {"total": event.total, "cache": event.cached, "processed": event.done}
        }

    def delta(self, i: int, event: Delta) -> list[dict[str, Any]]:
        return [self._choice(i, event.text)]

    def closing(self, i: int, result: Result) -> list[dict[str, Any]]:
        logprobs = text_logprobs(result.logprobs)
        return [self._choice(i, "", logprobs=logprobs, finish_reason=finish_reason(result))]

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._chunk, "choices": [], "usage": usage}
