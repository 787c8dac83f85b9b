"""llama-server itself, in the kernel and behind the sidecar, held against our own engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from support.sidecar import check_gone, make_folder, until

from nbinfer import session
from nbinfer.backends import llama_server
from nbinfer.contract.errors import ContextOverflow, EngineClosed, EngineError, NotSupported
from nbinfer.contract.results import Delta
from nbinfer.sidecar import discovery

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.session import Model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        llama_server.find() is None,
        reason=f"llama-server is not on the PATH, and {llama_server.VARIABLE} names none",
    ),
]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def kernel() -> Iterator[Model]:
    model = session.load("demo", name="reference", threads=1, context_size=1024)
    yield model
    model.unload()


@pytest.fixture(scope="module", params=["kernel", "sidecar"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    folder = make_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBINFER_RUNTIME_DIR", str(folder))
        made = session.load(
            "demo",
            backend="llama-server",
            where=request.param,
            name="theirs",
            threads=1,
            context_size=1024,
            keep_alive="0" if request.param == "sidecar" else None,
        )
        yield made
        made.unload()
        discovery.stop()
        check_gone(folder)
        folder.joinpath("sidecar.lock").unlink(missing_ok=True)


def servers() -> list[psutil.Process]:
    binary = llama_server.find()
    return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0] == binary]


def test_a_result_is_as_whole_as_our_own_engines(model: Model, kernel: Model) -> None:
    found, expected = model.infer(QUESTION, logprobs=1), kernel.infer(QUESTION, logprobs=1)
    assert found.text == expected.text == "The capital of France is Paris."
    assert found.prompt == expected.prompt
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    assert found.timings.tokens_per_second is not None
    assert found.timings.first_token_seconds is not None
    assert found.params["temperature"] == 0
    assert found.logprobs is not None
    assert expected.logprobs is not None
    assert found.logprobs[0].logprob == pytest.approx(expected.logprobs[0].logprob, abs=0.05)


def test_choices_schemas_streams_and_raw_prompts_work(model: Model) -> None:
    assert model.infer("Colour?", choices=["red", "blue"]).parsed in ("red", "blue")
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 9}},
        "required": ["city"],
    }
    assert set(model.infer("Describe Paris.", schema=schema, max_tokens=60).parsed) == {"city"}
    stream = model.stream(QUESTION)
    assert "".join(stream) == stream.result().text
    assert model.infer("The capital of", raw=True, max_tokens=4).text
    drawn = model.infer("Tell me a story.", temperature=1.0, max_tokens=10)
    assert model.infer(
        "Tell me a story.", temperature=1.0, max_tokens=10, seed=drawn.params["seed"]
    ).text == (drawn.text)


def test_the_prompt_is_rendered_and_counted_as_by_our_own_engine(model: Model, kernel: Model) -> None:
    request = model.request(QUESTION, system="Be kind.")
    assert model.engine.render(request) == kernel.engine.render(request)


def test_what_does_not_fit_or_is_not_offered_is_said(model: Model) -> None:
    with pytest.raises(ContextOverflow) as caught:
        model.infer("word " * 3000)
    assert caught.value.prompt_tokens > caught.value.context_size == 1024
    with pytest.raises(NotSupported):
        model.infer("x", regex="[0-9]+")


def test_vectors_are_our_own_engines() -> None:
    theirs = session.load("demo-embed", mode="embedding", backend="llama-server", name="a", threads=1)
    ours = session.load("demo-embed", mode="embedding", name="b", threads=1)
    try:
        cases: tuple[dict[str, Any], ...] = ({}, {"normalize": False}, {"dims": 64})
        for options in cases:
            texts = ["a cat", "a dog on a mat", "quantum chromodynamics " * 20]
            np.testing.assert_allclose(
                theirs.embed(texts, **options), ours.embed(texts, **options), atol=1e-3, rtol=0.01
            )
    finally:
        theirs.unload()
        ours.unload()


def test_a_killed_server_is_reported_and_in_the_sidecar_replaced(model: Model) -> None:
    # A story without an end: the server must be at work when it is killed.
    request = model.request("Tell me a story.", logit_bias=dict.fromkeys(range(3), -100.0), max_tokens=900)
    stream = model.submit(request)
    victims = servers()
    assert len(victims) == 1

    def read() -> None:
        for event in stream:
            if isinstance(event, Delta) and victims[0].is_running():
                victims[0].kill()

    with pytest.raises(EngineError, match="SIGKILL"):
        read()
    if model.where == "kernel":
        with pytest.raises(EngineClosed, match="Load it again"):
            model.infer(QUESTION)
    else:
        assert model.infer(QUESTION).text == "The capital of France is Paris."
    until(lambda: not victims[0].is_running())
