"""Servers that already run, each with its own idea of OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from support.sidecar import make_folder

from nbinfer import session
from nbinfer.contract.errors import (
    BackendUnavailable,
    ConfigError,
    ContextOverflow,
    EngineError,
    ModelNotFound,
    NbinferError,
    NotSupported,
    SchemaError,
)
from nbinfer.contract.requests import EmbeddingRequest, RerankRequest
from nbinfer.sidecar.listen import server, unix_socket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from starlette.requests import Request

MODELS = {"data": [{"id": "their-model", "object": "model", "meta": {"n_ctx_train": 4096, "n_ctx": 2048}}]}


class Server:
    """A server that answers with what a test wrote."""

    def __init__(self) -> None:
        self.models: Any = MODELS
        self.answer: Callable[[dict[str, Any]], Response] = lambda _: PlainTextResponse("nothing", 500)
        self.asked: list[dict[str, Any]] = []
        self.folder = make_folder()
        self.socket = str(self.folder / "s")
        routes = [
            Route("/v1/models", self._models),
            Route("/{path:path}", self._any, methods=["POST"]),
        ]
        self._serving = server(Starlette(routes=routes))
        listener = unix_socket(self.socket)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serving.serve(sockets=[listener])))
        self._thread.start()

    async def _models(self, request: Request) -> Response:
        return JSONResponse(self.models)

    async def _any(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append({"path": request.url.path, **body})
        return self.answer(body)

    def load(self, **options: Any) -> session.Model:
        return session.load("their-model", backend="openai", socket=self.socket, **options)

    def stop(self) -> None:
        self._serving.should_exit = True
        self._thread.join(20)
        (self.folder / "s").unlink()
        self.folder.rmdir()


@pytest.fixture
def their() -> Iterator[Server]:
    made = Server()
    yield made
    for model in session.loaded():
        model.unload()
    made.stop()


def chunks(*events: dict[str, Any] | str, done: bool = True) -> Callable[[Any], Response]:
    async def body() -> AsyncIterator[str]:
        for event in events:
            yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
        if done:
            yield "data: [DONE]\n\n"

    return lambda _: StreamingResponse(body(), media_type="text/event-stream")


def piece(text: str | None = None, *, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    given = {**delta, **({} if text is None else {"content": text})}
    return {"id": "x", "choices": [{"index": 0, "delta": given, "finish_reason": finish}]}


def test_the_least_that_a_server_may_say_is_enough(their: Server) -> None:
    their.answer = chunks(piece("Hel"), piece("lo"), piece(finish="stop"))
    model = their.load()
    result = model.infer("Hi", seed=4, max_tokens=9)
    assert result.text == "Hello"
    assert result.finish_reason == "stop"
    assert result.usage.completion_tokens == 2, "no usage was given: the pieces are counted"
    assert result.timings.first_token_seconds is not None
    asked = their.asked[0]
    assert asked["path"] == "/v1/chat/completions"
    assert asked["model"] == "their-model"
    assert (asked["seed"], asked["max_tokens"], asked["temperature"]) == (4, 9, 0.0)
    # Nothing that only nbinfer knows is sent to others.
    assert not {"nbinfer", "constraint", "priority", "top_k", "min_p", "think"} & set(asked)


def test_reasoning_tools_and_usage_are_read_however_they_are_called(their: Server) -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"a"'}}
    rest = {"index": 0, "function": {"arguments": ": 1}"}}
    their.answer = chunks(
        piece(reasoning="hm"),
        piece(reasoning_content="m"),
        piece(tool_calls=[call]),
        piece(tool_calls=[rest], finish="tool_calls"),
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 7,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 3},
            },
        },
    )
    result = their.load().infer("Hi")
    assert result.reasoning == "hmm"
    assert result.tool_calls[0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.cached_tokens) == (
        7,
        5,
        3,
    )


def test_choices_are_asked_for_in_a_shape_that_all_servers_take(their: Server) -> None:
    their.answer = chunks(piece('{"choice": "red"}'), piece(finish="stop"))
    assert their.load().infer("Colour?", choices=["red", "blue"]).parsed == "red"
    schema = their.asked[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["choice"]["enum"] == ["red", "blue"]


@pytest.mark.parametrize("text", ['{"choice": "green"}', "red", "{}"])
def test_a_server_that_ignores_the_choices_is_found_out(their: Server, text: str) -> None:
    their.answer = chunks(piece(text), piece(finish="stop"))
    with pytest.raises(SchemaError):
        their.load().infer("Colour?", choices=["red", "blue"])


@pytest.mark.parametrize(
    "options",
    [{"regex": "x"}, {"grammar": "x"}, {"reasoning_budget": 5}, {"raw": True, "json": True}],
    ids=str,
)
def test_what_others_cannot_do_is_said_before_it_is_sent(their: Server, options: dict[str, Any]) -> None:
    with pytest.raises(NotSupported):
        their.load().infer("x", **options)
    assert their.asked == []


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (chunks(piece("Hel"), done=False), EngineError, "does not answer"),
        (chunks(piece("x"), {"error": {"message": "out of VRAM", "code": 500}}), EngineError, "out of VRAM"),
        (
            lambda _: JSONResponse({"error": {"message": "no such model"}}, 404),
            ModelNotFound,
            "no such model",
        ),
        (
            lambda _: JSONResponse({"error": {"message": "exceed_context_size_error"}}, 400),
            ContextOverflow,
            "exceed",
        ),
        (lambda _: JSONResponse({"error": "just text"}, 500), EngineError, "just text"),
        (lambda _: PlainTextResponse("<html>busy</html>", 502), EngineError, "busy"),
        (lambda _: JSONResponse({"detail": "what?"}, 422), NbinferError, "what?"),
    ],
    ids=range(7),
)
def test_their_errors_are_told_in_their_words(
    their: Server, answer: Any, error: type[NbinferError], words: str
) -> None:
    their.answer = answer
    with pytest.raises(error, match=words):
        their.load().infer("Hi")


def test_what_the_server_says_of_its_model_is_shown_and_nothing_is_made_up(their: Server) -> None:
    model = their.load()
    assert (model.info.context_size, model.info.trained_context_size) == (2048, 4096)
    assert model.where == "server"
    assert model.memory is None
    their.models = {"data": []}
    assert their.load(name="other").info.context_size == 0


def test_a_model_that_the_server_has_not_is_refused_with_those_it_has(their: Server) -> None:
    with pytest.raises(ModelNotFound, match="it has their-model"):
        session.load("mine", backend="openai", socket=their.socket)
    session.load("mine", backend="openai", socket=their.socket, check=False)


def test_naming_it_anew_in_vain_leaves_the_one_that_was_there(their: Server) -> None:
    their.answer = chunks(piece("Hello"), piece(finish="stop"))
    model = their.load()
    with pytest.raises(ConfigError, match="no_such_option"):
        their.load(no_such_option=1)
    assert session.loaded() == [model]
    assert model.infer("Hi").text
    other = their.load()
    assert session.loaded() == [other]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ConfigError, "base_url="),
        ({"base_url": "localhost:80"}, ConfigError, "http://"),
        ({"base_url": "http://127.0.0.1:9/v1"}, BackendUnavailable, "no server answers"),
        ({"base_url": "http://127.0.0.1:9/v1", "gpu_layers": 3}, ConfigError, "gpu_layers"),
        ({"base_url": "http://127.0.0.1:9/v1", "keep_alive": "5m"}, ConfigError, "keep_alive"),
    ],
)
def test_a_load_that_cannot_work_says_what_is_missing(
    options: dict[str, Any], error: type[NbinferError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(error, match=words):
        session.load("their-model", backend="openai", **options)


def test_vectors_without_counts_and_out_of_order_are_read(their: Server) -> None:
    their.answer = lambda body: JSONResponse(
        {"data": [{"index": 1, "embedding": [0, 2]}, {"index": 0, "embedding": [3, 4]}]}
    )
    model = their.load(mode="embedding")
    assert model.embed(["a", "b"]).ravel().tolist() == pytest.approx([0.6, 0.8, 0.0, 1.0])


@pytest.mark.parametrize(
    ("mode", "asked"),
    [
        ("embedding", EmbeddingRequest(texts=("a", "b"), dims=4)),
        ("reranking", RerankRequest(query="a", documents=("b", "c"))),
    ],
    ids=["embedding", "reranking"],
)
def test_a_cancelled_request_for_numbers_is_interrupted(
    their: Server, mode: Any, asked: EmbeddingRequest | RerankRequest, request: pytest.FixtureRequest
) -> None:
    began, goes_on = threading.Event(), threading.Event()
    request.addfinalizer(goes_on.set)

    async def body() -> AsyncIterator[str]:
        began.set()
        yield " "
        await asyncio.to_thread(goes_on.wait)

    their.answer = lambda _: StreamingResponse(body(), media_type="application/json")
    stream = their.load(mode=mode).submit(asked)
    assert began.wait(20)
    stream.cancel()
    result = stream.result(20)
    assert (result.finish_reason, result.n_tokens, result.model) == ("interrupted", (), "their-model")
    assert (result.vectors.shape if mode == "embedding" else result.scores.shape)[0] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_that_closes_an_engine_ends_nothing_of_its_parents(
    their: Server, request: pytest.FixtureRequest
) -> None:
    goes_on = threading.Event()
    request.addfinalizer(goes_on.set)

    async def body() -> AsyncIterator[str]:
        yield f"data: {json.dumps(piece('Hel'))}\n\n"
        await asyncio.to_thread(goes_on.wait)
        yield f"data: {json.dumps(piece('lo', finish='stop'))}\n\ndata: [DONE]\n\n"

    their.answer = lambda _: StreamingResponse(body(), media_type="text/event-stream")
    model = their.load()
    engine: Any = model.engine
    read, write = os.pipe()
    engine._on_close = lambda: os.write(write, b"unloaded")
    stream = model.stream("Hi", priority="batch")
    pieces = iter(stream)
    assert next(pieces) == "Hel"
    if (child := os.fork()) == 0:
        try:
            running = engine.load().running
            stream.cancel()
            engine.close()
            os.write(write, f"{running} {engine._batch} {engine._closed}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"0 None True"
    assert engine.load().running == 1
    goes_on.set()
    assert stream.result().text == "Hello"
    model.unload()
    assert os.read(read, 100) == b"unloaded"
    os.close(read)
    os.close(write)
