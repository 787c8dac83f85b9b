"""Requests from a call's options, and the models that a kernel holds."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import pytest
from pydantic import BaseModel
from support.fake_engine import HANG, FakeEngine

import nbinfer as nb
from nbinfer import session as sessions
from nbinfer.contract.errors import (
    BackendUnavailable,
    ConfigError,
    EngineError,
    GGUFParseError,
    ModelNotFound,
    RequestError,
    SchemaError,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.results import Delta, Finished
from nbinfer.session.loading import confirm_download

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nbinfer.session import Model


@pytest.fixture
def make() -> Iterator[Callable[..., Model]]:
    """Make loaded models on fake engines; all are forgotten at the end."""

    def build(name: str = "fake", mode: Mode = Mode.COMPLETION, script: Any = None, **options: Any) -> Model:
        model = nb.Model(engine=FakeEngine(script, mode=mode, model=name, **options), name=name, mode=mode)
        sessions.session.add(model)
        return model

    before = nb.settings.model
    yield build
    nb.settings.model = before
    nb.unload()


class City(BaseModel):
    name: str
    people: int


@dataclass
class Point:
    x: int


class Row(TypedDict):
    a: int


class Tone(Enum):
    HAPPY = "happy"
    ANGRY = "angry"


# -- requests -------------------------------------------------------------------------------------------


def test_a_prompt_is_a_user_message_and_system_comes_first() -> None:
    request = sessions.prepare("Hi", system="Be kind.").request
    assert request.messages == ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})


def test_raw_prompts_have_no_messages() -> None:
    request = sessions.prepare("Once upon", raw=True).request
    assert (request.prompt, request.messages) == ("Once upon", None)


def test_options_reach_the_request() -> None:
    request = sessions.prepare(
        "Hi", temperature=0.5, top_k=3, seed=1, stop="END", max_tokens=9, params={"min_p": 0.2}, think=False
    ).request
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.min_p) == (0.5, 3, 0.2)
    assert (request.stop, request.max_tokens, request.think) == (("END",), 9, False)


def test_numpys_numbers_are_numbers() -> None:
    found = sessions.prepare(
        "Hi", temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(7), max_tokens=np.int16(9)
    ).request
    assert (found.sampling.temperature, found.sampling.top_k, found.sampling.seed, found.max_tokens) == (
        *(0.5, 3, 7, 9),
    )
    # Plain ones: what was asked travels and is stored as JSON.
    assert {type(v) for v in (found.sampling.temperature, found.sampling.seed)} == {float, int}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tempature": 1}, "Did you mean temperature"),
        ({"params": {"nonsense": 1}}, "nonsense"),
        ({"params": 3}, "params"),
        ({"temperature": 1, "params": {"temperature": 2}}, "temperature is given twice: 1 by name, 2"),
        ({"schema": City, "json": True}, "cannot be combined"),
        ({"choices": []}, "choices"),
        ({"choices": "abc"}, "choices"),
        ({"temperature": -1}, "temperature"),
        ({"raw": True, "system": "x"}, "raw=True"),
        ({"schema": object()}, "JSON Schema"),
        ({"messages": [{"role": "user", "content": "x"}]}, "not both"),
        ({"images": [3]}, "image"),
        ({"images": ["/no/such.png"]}, "/no/such.png"),
    ],
)
def test_wrong_options_are_refused_in_few_lines(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        sessions.prepare("Hi", **options)
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize("prompt", [None, 3, ["Hi"]])
def test_a_prompt_that_is_no_text_is_refused(prompt: Any) -> None:
    with pytest.raises(RequestError):
        sessions.prepare(prompt)


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        (City, '{"name": "Rome", "people": 3}', City(name="Rome", people=3)),
        (Point, '{"x": 1}', Point(1)),
        (Row, '{"a": 1}', {"a": 1}),
        (Tone, '"happy"', Tone.HAPPY),
        (Literal["a", "b"], '"b"', "b"),
        (list[int], "[1, 2]", [1, 2]),
        ({"type": "object"}, '{"k": null}', {"k": None}),
    ],
)
def test_schemas_become_constraints_and_typed_values(schema: Any, written: str, value: object) -> None:
    prepared = sessions.prepare("Hi", schema=schema)
    assert prepared.request.constraint is not None
    assert prepared.request.constraint.kind == "json_schema"
    assert prepared.read(nb.Result(text=written)).parsed == value


@pytest.mark.parametrize("written", ['{"name": "Rome"}', "{", '{"name": "Rome", "people": "many"}'])
def test_an_answer_that_does_not_fit_is_an_error_with_the_raw_text(written: str) -> None:
    with pytest.raises(SchemaError) as caught:
        sessions.prepare("Hi", schema=City).read(nb.Result(text=written))
    assert caught.value.raw == written


# -- models ---------------------------------------------------------------------------------------------


def test_infer_answers_and_can_be_continued(make: Callable[..., Model]) -> None:
    make()
    first = nb.infer("hello there")
    assert first.text == "hello there"
    second = first.reply("and again")
    assert second.text == "and again"
    assert [m["content"] for m in second.messages or ()] == ["hello there", "hello there", "and again"]


def test_stream_yields_text_and_ends_with_the_result(make: Callable[..., Model]) -> None:
    make(script=["one ", "two ", "three"])
    stream = nb.stream("count")
    assert "".join(stream) == "one two three"
    assert stream.result().text == "one two three"
    assert stream.result() is stream.result()


def test_leaving_the_loop_stops_the_engine(make: Callable[..., Model]) -> None:
    model = make(script=lambda _: ["one ", "two ", HANG])
    stream = model.stream("count")
    for _ in stream:
        break
    assert stream.result().finish_reason == "interrupted"
    assert stream.partial().text.startswith("one")


def test_partial_is_what_has_arrived(make: Callable[..., Model]) -> None:
    model = make(script=lambda _: [Delta("hm", reasoning=True), "one ", HANG])
    stream = model.stream("count")
    for event in stream.events():
        if isinstance(event, Delta) and not event.reasoning:
            partial = stream.partial()
            assert (partial.text, partial.reasoning, partial.finish_reason) == ("one ", "hm", "interrupted")
            break


def test_an_engine_error_reaches_the_caller(make: Callable[..., Model]) -> None:
    make(script=lambda _: ["one ", EngineError("broken")])
    with pytest.raises(EngineError, match="broken"):
        nb.infer("count")


def test_ainfer_gives_the_same_and_cancelling_the_task_stops_the_engine(make: Callable[..., Model]) -> None:
    make(script=["one ", "two"])
    assert asyncio.run(nb.ainfer("count")).text == "one two"
    slow = make("slow", script=lambda _: ["one ", HANG])

    async def give_up() -> None:
        task = asyncio.create_task(slow.ainfer("count"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert isinstance(slow.engine, FakeEngine)
    assert slow.engine.cancelled


def test_async_iteration_yields_text(make: Callable[..., Model]) -> None:
    model = make(script=["one ", "two"])

    async def collect() -> tuple[str, list[type]]:
        text = "".join([piece async for piece in model.stream("count")])
        kinds = [type(event) async for event in model.stream("count").aevents()]
        return text, kinds

    text, kinds = asyncio.run(collect())
    assert text == "one two"
    assert kinds[-1] is Finished


def test_a_chat_remembers_and_forgets(make: Callable[..., Model]) -> None:
    chat = make().chat(system="Be kind.")
    chat.send("first")
    chat.send("second")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    chat.clear()
    assert [m["role"] for m in chat.messages] == ["system"]


def test_a_failed_turn_is_not_kept(make: Callable[..., Model]) -> None:
    chat = make(script=lambda _: [EngineError("broken")]).chat()
    with pytest.raises(EngineError):
        chat.send("first")
    assert chat.messages == []


def test_get_picks_the_named_the_default_or_the_only_one(make: Callable[..., Model]) -> None:
    with pytest.raises(ModelNotFound, match="Nothing is loaded"):
        nb.get()
    one = make("one")
    embedder = make("vectors", Mode.EMBEDDING)
    assert nb.get() is one
    assert nb.get(one) is one
    assert nb.get(mode="embedding") is embedder
    two = make("two")
    with pytest.raises(ModelNotFound, match="one, two"):
        nb.get()
    nb.settings.model = "two"
    assert nb.get() is two
    assert nb.get(mode=Mode.EMBEDDING) is embedder
    with pytest.raises(ModelNotFound, match="no model called 'three'"):
        nb.get("three")
    with pytest.raises(ModelNotFound, match="no reranking model"):
        nb.get(mode="reranking")


def test_a_model_of_the_same_name_takes_the_place_of_the_old_one(make: Callable[..., Model]) -> None:
    old, new = make("same"), make("same")
    assert nb.loaded() == [new]
    with pytest.raises(EngineError):
        old.infer("x")


def test_unload_by_name_handle_and_all(make: Callable[..., Model]) -> None:
    make("one")
    two, three = make("two"), make("three")
    nb.unload("one")
    nb.unload(two)
    assert nb.loaded() == [three]
    with three:
        pass
    assert nb.loaded() == []
    with pytest.raises(ModelNotFound, match="'one'"):
        nb.unload("one")


def test_tables_have_their_columns_also_when_empty(make: Callable[..., Model]) -> None:
    assert nb.ps().empty
    make("one")
    assert nb.ps()["name"].tolist() == ["one"]
    assert {"backend", "status", "detail", "install"} <= set(nb.status().columns)
    assert "llamacpp" in nb.status()["backend"].tolist()


def test_embed_and_rerank_are_arrays(make: Callable[..., Model]) -> None:
    embedder = make("vectors", Mode.EMBEDDING)
    assert embedder.embed("one text").shape == (1, embedder.info.dimensions)
    assert embedder.embed(["a", "b", "c"]).dtype == "float32"
    ranker = make("ranks", Mode.RERANKING)
    assert ranker.rerank("q", ["a", "b"]).shape == (2,)


# -- loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"where": "cloud"}, ConfigError, "'kernel' or 'sidecar'"),
        ({"backend": "nonsense"}, ConfigError, "llamacpp"),
        ({"mode": "writing"}, ConfigError, "completion"),
        ({"keep_alive": "soon"}, ConfigError, "soon"),
        ({"context_size": 0}, ConfigError, "context_size"),
        ({"kv_type": "q9"}, ConfigError, "q8_0"),
        ({"thread": 2}, ConfigError, "threads"),
        ({"speculative": {"num_tokens": 0}}, ConfigError, "num"),
        ({"speculative": 3}, ConfigError, "speculative"),
    ],
)
def test_wrong_settings_are_refused_before_anything_loads(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        nb.load("demo", **options)
    assert len(str(caught.value).splitlines()) <= 5
    assert nb.loaded() == []


def test_a_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "qwen3-0.6b-q4_0.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"qwen3-0\.6b-q4_0\.gguf"):
        nb.load(tmp_path / "qwen3-0.6b-q4.gguf")


def test_a_corrupt_file_says_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    with pytest.raises(GGUFParseError) as caught:
        nb.load(bad)
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize(
    "forbidden",
    [
        "llama_cpp",
        "numpy",
        "pandas",
        "pyarrow",
        "polars",
        "pydantic",
        "IPython",
        "ipywidgets",
        "torch",
        "jinja2",
    ],
)
def test_importing_nbinfer_imports_nothing_heavy(forbidden: str) -> None:
    code = f"import sys, nbinfer; sys.exit({forbidden!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models_is_the_function_whatever_was_imported() -> None:
    importlib.import_module("nbinfer.models.resolve")
    importlib.import_module("nbinfer.bench")
    assert callable(nb.bench)
    found = nb.models().set_index("ref")
    assert found.loc["demo", "verdict"] == "fits"
    assert callable(nb.models)


def test_every_public_name_can_be_had() -> None:
    for name in nb.__all__:
        assert getattr(nb, name) is not None
    with pytest.raises(AttributeError):
        _ = nb.no_such_name


def test_without_the_engine_the_install_line_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbinfer.engines.llamacpp import library

    library.library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    try:
        with pytest.raises(BackendUnavailable, match="pip install"):
            library.library()
    finally:
        monkeypatch.undo()
        library.library.cache_clear()


# -- downloads ------------------------------------------------------------------------------------------


class Remote:
    """What the confirm hook sees of a model that is not here yet."""

    name, n_bytes = "big-model", 5 << 30

    def __init__(self) -> None:
        from nbinfer.gguf import read_header
        from nbinfer.models.demo import demo_path

        self.header = read_header(demo_path())


@pytest.mark.parametrize(
    ("answer", "allowed"), [("y", True), ("Yes", True), ("n", False), ("", False), (EOFError(), False)]
)
def test_a_download_that_will_not_fit_is_asked_about(
    monkeypatch: pytest.MonkeyPatch, answer: str | Exception, allowed: bool
) -> None:
    from nbinfer.memory.machine import Machine, Ram

    small = Machine(ram=Ram(total=1 << 20, available=1 << 20))
    monkeypatch.setattr(importlib.import_module("nbinfer.memory.estimate"), "machine", lambda: small)

    def reply(_prompt: str) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", reply)
    remote: Any = Remote()
    if allowed:
        confirm_download(remote)
        return
    with pytest.raises(MemoryError, match="does not fit") as caught:
        confirm_download(remote)
    assert len(str(caught.value).splitlines()) <= 5


def test_a_download_that_fits_says_its_size_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    remote: Any = Remote()
    confirm_download(remote)
    assert "5 GiB to download" in capsys.readouterr().out
