"""The API over a scripted engine: shapes, streams, and clients that leave."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.fake_engine import HANG, FakeEngine
from support.sidecar import make_folder, until

from nbinfer.contract.errors import EngineError, SchemaError
from nbinfer.contract.results import Delta
from nbinfer.engines.remote.control import ControlError, EventStream, UnixConnection, call_status
from nbinfer.sidecar.app import Served, make_app
from nbinfer.sidecar.guard import Guard
from nbinfer.sidecar.listen import server, unix_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nbinfer.contract.requests import CompletionRequest
    from nbinfer.engines.protocol import Engine

CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "one two three"}]}


class Api:
    """A served engine, and ways to ask it."""

    def __init__(self, path: str, served: Served) -> None:
        self.path = path
        self.served = served

    @property
    def engine(self) -> FakeEngine:
        engine = self.served.engine
        assert isinstance(engine, FakeEngine)
        return engine

    def post(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return call_status(self.path, "POST", url, body, timeout=20)

    def get(self, url: str) -> tuple[int, dict[str, Any]]:
        return call_status(self.path, "GET", url, timeout=20)

    def chat(self, **more: Any) -> dict[str, Any]:
        status, found = self.post("/v1/chat/completions", {**CHAT, **more})
        assert status == 200, found
        return found

    def stream(self, url: str = "/v1/chat/completions", **more: Any) -> list[dict[str, Any]]:
        connection = UnixConnection(self.path, timeout=20)
        connection.request(
            "POST", url, json.dumps({**CHAT, **more, "stream": True}), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")]
        connection.close()
        if lines[-1] == "[DONE]":
            lines.pop()
        return [json.loads(line) for line in lines]


@pytest.fixture
def serve() -> Iterator[Callable[..., Api]]:
    """Serve an engine on a real Unix socket."""
    stops: list[Callable[[], None]] = []

    def start(engine: Engine | None) -> Api:
        folder = make_folder()
        path = str(folder / "s")
        served = Served(("fake", "alias"), engine)
        serving = server(Guard(make_app(served), max_body=100_000))
        listener = unix_socket(path)
        thread = threading.Thread(target=lambda: asyncio.run(serving.serve(sockets=[listener])))
        thread.start()

        def stop() -> None:
            serving.should_exit = True
            thread.join(20)
            if served.engine is not None:
                served.engine.close()
            (folder / "s").unlink()
            folder.rmdir()

        stops.append(stop)
        return Api(path, served)

    yield start
    for stop in stops:
        stop()


def texts(chunks: list[dict[str, Any]], key: str = "content", index: int = 0) -> str:
    return "".join(
        choice["delta"].get(key) or ""
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def test_an_answer_has_openais_shape(serve: Callable[..., Api]) -> None:
    found = serve(FakeEngine()).chat()
    assert found["object"] == "chat.completion"
    assert found["model"] == "fake"
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "one two three", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 3


def test_a_stream_says_role_pieces_reason_and_usage_in_order(serve: Callable[..., Api]) -> None:
    chunks = serve(FakeEngine()).stream(stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert texts(chunks) == "one two three"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_n_answers_are_told_apart_and_counted_together(serve: Callable[..., Api]) -> None:
    api = serve(FakeEngine())
    found = api.chat(n=3, seed=2**32 - 1)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["usage"]["completion_tokens"] == 9
    assert [request.sampling.seed for request in api.engine.requests] == [2**32 - 1, 0, 1]  # type: ignore[union-attr]
    chunks = api.stream(n=2)
    assert [texts(chunks, index=i) for i in (0, 1)] == ["one two three"] * 2


def test_reasoning_is_apart_from_the_answer(serve: Callable[..., Api]) -> None:
    api = serve(FakeEngine(lambda _: [Delta("hmm ", reasoning=True), "yes"]))
    message = api.chat()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("yes", "hmm ")
    chunks = api.stream()
    assert (texts(chunks), texts(chunks, "reasoning_content")) == ("yes", "hmm ")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["a < b ", "and <tool", "box>"], "a < b and <toolbox>"),
        (["{", '"a": 1}'], '{"a": 1}'),
        (["plain"], "plain"),
    ],
)
def test_text_that_only_looks_like_a_tool_call_is_all_sent(
    serve: Callable[..., Api], tokens: list[str], text: str
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert texts(serve(FakeEngine(tokens)).stream(tools=[tool])) == text


def test_a_client_that_leaves_stops_the_engine(serve: Callable[..., Api]) -> None:
    api = serve(FakeEngine(lambda _: ["one ", HANG]))
    stream = EventStream(api.path, "/v1/chat/completions", {**CHAT, "stream": True})
    pieces = iter(stream)
    while not next(pieces)["choices"][0]["delta"].get("content"):
        pass
    stream.close()
    stream.detach()
    until(lambda: api.engine.cancelled == 1, 5)
    # And one that waits for a whole answer.
    with pytest.raises(ControlError):
        call_status(api.path, "POST", "/v1/chat/completions", CHAT, timeout=0.3)
    until(lambda: api.engine.cancelled == 2, 5)
    until(lambda: api.engine.load().running == 0, 5)


def test_a_client_that_leaves_stops_all_of_its_n_answers(serve: Callable[..., Api]) -> None:
    api = serve(FakeEngine(lambda _: [HANG]))
    with pytest.raises(ControlError):
        call_status(api.path, "POST", "/v1/chat/completions", {**CHAT, "n": 3}, timeout=0.3)
    until(lambda: api.engine.cancelled == 3, 5)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(serve: Callable[..., Api]) -> None:
    def script(request: CompletionRequest) -> list[Any]:
        return ["one ", 0.05, EngineError("the GPU fell off")]

    chunks = serve(FakeEngine(script)).stream()
    assert chunks[-1]["error"]["message"] == "the GPU fell off"
    assert texts(chunks[:-1]) == "one "


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_ended_by_itself_is_reported_to_whoever_can_replace_it(
    serve: Callable[..., Api], stream: bool
) -> None:
    def script(request: CompletionRequest) -> list[Any]:
        if "three" in str(request.messages):
            api.engine.closed = True  # from here on it refuses everything
        return ["one ", EngineError("the engine stopped")]

    api = serve(FakeEngine(script))
    reported = threading.Event()
    api.served.on_dead = lambda error: reported.set()
    api.post("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "one"}]})
    assert not reported.is_set(), "an error of one request is not the engine's end"
    if stream:
        assert api.stream()[-1]["error"]["message"] == "the engine stopped"
    else:
        assert api.post("/v1/chat/completions", CHAT)[0] == 500
    assert reported.wait(5)


def test_an_answer_cut_before_it_fits_its_schema_ends_with_length(serve: Callable[..., Api]) -> None:
    def script(request: CompletionRequest) -> list[Any]:
        return ['{"a', SchemaError("cut after 1 token", raw='{"a')]

    api = serve(FakeEngine(script))
    choice = api.chat(response_format={"type": "json_object"})["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == '{"a'


@pytest.mark.parametrize("name", ["other", "", "Fake"])
def test_a_request_for_another_model_is_421(serve: Callable[..., Api], name: str) -> None:
    api = serve(FakeEngine())
    status, found = api.post("/v1/chat/completions", {**CHAT, "model": name})
    assert status == (421 if name else 400)
    assert found["error"]["message"]
    assert api.post("/v1/chat/completions", {**CHAT, "model": "alias"})[0] == 200


def test_while_it_loads_it_says_how_far_it_is(serve: Callable[..., Api]) -> None:
    api = serve(None)
    api.served.stage, api.served.fraction = "reading weights", 0.25
    assert api.get("/health") == (503, {"status": "loading", "stage": "reading weights", "progress": 0.25})
    status, found = api.post("/v1/chat/completions", CHAT)
    assert status == 503
    assert "25%" in found["error"]["message"]
    api.served.engine = FakeEngine()
    assert api.get("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {}, 400),
        ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, 400),
        ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, 400),
        ("/v1/chat/completions", {**CHAT, "n": 0}, 400),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "w " * 600}]}, 400),
        ("/v1/completions", {"model": "fake", "prompt": "x", "echo": True}, 400),
        ("/v1/completions", {"model": "fake", "prompt": []}, 400),
        ("/v1/embeddings", {"model": "fake", "input": []}, 400),
        ("/v1/embeddings", {"model": "fake", "input": [[1, 2]]}, 400),
        ("/v1/images/generations", {"model": "fake", "prompt": "x"}, 400),
        ("/v1/nonsense", {}, 404),
        ("/v1/chat/completions", {**CHAT, "user": "x" * 100_001}, 413),
    ],
)
def test_what_cannot_be_done_is_said_in_openais_shape(
    serve: Callable[..., Api], path: str, body: dict[str, Any], status: int
) -> None:
    found = serve(FakeEngine()).post(path, body)
    assert found[0] == status
    assert set(found[1]["error"]) >= {"message", "type", "param", "code"}


def test_vectors_come_as_numbers_or_base64_and_are_the_same(serve: Callable[..., Api]) -> None:
    from nbinfer.engines.remote.wire import vectors_from_wire

    api = serve(FakeEngine())
    made = [
        [each["embedding"] for each in api.post("/v1/embeddings", body)[1]["data"]]
        for body in (
            {"model": "fake", "input": ["a", "b"]},
            {"model": "fake", "input": ["a", "b"], "encoding_format": "base64"},
        )
    ]
    assert isinstance(made[1][0], str)
    assert (vectors_from_wire(made[0]) == vectors_from_wire(made[1])).all()


def test_documents_are_ranked_and_cut_to_the_best(serve: Callable[..., Api]) -> None:
    api = serve(FakeEngine())
    body = {"model": "fake", "query": "red car", "documents": ["a boat", "a red car", {"text": "red"}]}
    for path in ("/rerank", "/v1/rerank"):
        results = api.post(path, {**body, "top_n": 2, "return_documents": True})[1]["results"]
        assert [each["index"] for each in results] == [1, 2]
        assert results[0]["document"] == {"text": "a red car"}
    scores = api.post("/score", {"model": "fake", "text_1": "red car", "text_2": ["a boat", "a red car"]})[1]
    assert scores["data"][0]["score"] < scores["data"][1]["score"]


def test_metrics_count_what_happened(serve: Callable[..., Api]) -> None:
    api = serve(FakeEngine())
    api.chat()
    api.stream()
    api.post("/v1/chat/completions", {**CHAT, "model": "other"})
    connection = UnixConnection(api.path, timeout=20)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    assert 'nbinfer_requests_total{outcome="ok",path="/v1/chat/completions"} 2.0' in page
    assert 'nbinfer_generated_tokens_total{model="fake"} 6.0' in page
    assert "nbinfer_first_token_seconds_count 2.0" in page


def test_absent_sampling_fields_have_openais_defaults(serve: Callable[..., Api]) -> None:
    api = serve(FakeEngine())
    api.chat()
    api.chat(temperature=0, top_p=0.5, seed=-1, max_completion_tokens=2)
    first, second = (request for request in api.engine.requests)
    assert (first.sampling.temperature, first.sampling.top_p) == (1.0, 1.0)  # type: ignore[union-attr]
    assert (second.sampling.temperature, second.sampling.top_p) == (0, 0.5)  # type: ignore[union-attr]
    assert second.sampling.seed is None  # type: ignore[union-attr]
    assert second.max_tokens == 2  # type: ignore[union-attr]


def test_the_description_of_the_api_is_served(serve: Callable[..., Api]) -> None:
    status, found = serve(FakeEngine()).get("/openapi.json")
    assert status == 200
    assert "/v1/chat/completions" in found["paths"]


def test_one_connection_serves_request_after_request(serve: Callable[..., Api]) -> None:
    connection = UnixConnection(serve(FakeEngine()).path, timeout=20)
    for _ in range(3):
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(CHAT), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        assert response.status == http.client.OK
        response.read()
    connection.close()
