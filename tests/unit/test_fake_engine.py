"""The fake engine keeps the promises that tests above the engine rely on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.fake_engine import HANG, FakeEngine, Step

from nbinfer.contract.errors import ContextOverflow, EngineClosed, EngineError, NotSupported, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import (
    CompletionRequest,
    Constraint,
    EmbeddingRequest,
    RerankRequest,
    Sampling,
    ScoreRequest,
)
from nbinfer.contract.results import Delta, Finished, PromptProgress

if TYPE_CHECKING:
    from nbinfer.engines.protocol import Engine


def ask(text: str = "say it", **options: Any) -> CompletionRequest:
    return CompletionRequest(prompt=text, **options)


def test_it_is_an_engine() -> None:
    engine: Engine = FakeEngine()
    assert engine.info.mode is Mode.COMPLETION


def test_scripted_tokens_arrive_as_progress_text_and_a_result() -> None:
    events = list(FakeEngine(["Hel", "lo"]).submit(ask()))
    assert events[0] == PromptProgress(2, 2)
    assert "".join(e.text for e in events if isinstance(e, Delta)) == "Hello"
    assert isinstance(events[-1], Finished)
    result = FakeEngine(["Hel", "lo"]).submit(ask(sampling=Sampling(seed=3))).result(5)
    assert (result.text, result.finish_reason, result.usage.completion_tokens) == ("Hello", "stop", 2)
    assert result.params["seed"] == 3


def test_the_default_script_echoes_the_last_message() -> None:
    request = CompletionRequest(
        messages=({"role": "system", "content": "x"}, {"role": "user", "content": "a b"})
    )
    result = FakeEngine().submit(request).result(5)
    assert result.text == "a b"
    assert result.prompt == "system: x\nuser: a b\nassistant: "
    assert (
        FakeEngine()
        .submit(ask("is it red?", constraint=Constraint("choices", ("blue", "red"))))
        .result(5)
        .text
        == "red"
    )


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"max_tokens": 2}, "ab", "length"),
        ({"max_tokens": 4}, "abcd", "stop"),
        ({"stop": ("bc",)}, "a", "stop"),
        ({"stop": ("zz",)}, "abcd", "stop"),
        ({"stop": ("dx",)}, "abcd", "stop"),
    ],
)
def test_limits_and_stop_strings_end_the_text(options: dict[str, Any], text: str, reason: str) -> None:
    stream = FakeEngine(["a", "b", "c", "d"]).submit(ask(**options))
    pieces = "".join(e.text for e in stream if isinstance(e, Delta))
    result = stream.result(5)
    assert (pieces, result.text, result.finish_reason) == (text, text, reason)


def test_reasoning_is_kept_apart_from_the_answer() -> None:
    result = FakeEngine(lambda _: [Delta("hm", reasoning=True), "yes"]).submit(ask()).result(5)
    assert (result.text, result.reasoning) == ("yes", "hm")


def test_logprobs_have_the_alternatives_that_were_asked_for() -> None:
    result = FakeEngine(["a", "b"]).submit(ask(logprobs=2)).result(5)
    assert [len(token.top) for token in result.logprobs] == [2, 2]


@pytest.mark.parametrize("raising", [False, True], ids=["given", "raised"])
def test_a_scripted_error_reaches_the_reader(raising: bool) -> None:
    def script(_: CompletionRequest) -> list[Step]:
        if raising:
            raise EngineError("boom")
        return ["a", EngineError("boom"), "b"]

    with pytest.raises(EngineError, match="boom"):
        FakeEngine(script).submit(ask()).result(5)


def test_a_hang_ends_with_the_partial_text_when_cancelled() -> None:
    engine = FakeEngine(lambda _: ["part", HANG, "never"])
    stream = engine.submit(ask())
    for event in stream:
        if isinstance(event, Delta):
            stream.cancel()
    result = stream.result(5)
    assert (result.text, result.finish_reason, engine.cancelled) == ("part", "interrupted", 1)


def test_a_waiting_request_can_be_cancelled_before_it_runs() -> None:
    gate = threading.Event()
    engine = FakeEngine(lambda _: [gate, "x"], parallel=1)
    first, second = engine.submit(ask()), engine.submit(ask())
    second.cancel()
    assert second.result(5).finish_reason == "interrupted"
    gate.set()
    assert first.result(5).text == "x"
    assert engine.load().running == 0


def test_interactive_requests_go_before_batch_ones_and_no_more_than_parallel_run() -> None:
    gate = threading.Event()
    order: list[str] = []

    def script(request: CompletionRequest) -> list[Step]:
        order.append(str(request.prompt))
        return [gate]

    engine = FakeEngine(script, parallel=1)
    started = engine.submit(ask("first"))
    while engine.load().running == 0:
        pass
    streams = [engine.submit(ask("batch", priority="batch")), engine.submit(ask("now"))]
    gate.set()
    for stream in (started, *streams):
        stream.result(5)
    assert order == ["first", "now", "batch"]
    assert engine.most_running == 1


def test_closing_fails_running_and_waiting_requests_and_refuses_new_ones() -> None:
    engine = FakeEngine(lambda _: [HANG], parallel=1)
    streams = [engine.submit(ask()), engine.submit(ask())]
    engine.close()
    engine.close()
    for stream in streams:
        with pytest.raises(EngineClosed):
            stream.result(5)
    with pytest.raises(EngineClosed):
        engine.submit(ask())


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers() -> None:
    engine = FakeEngine(context_size=3)
    assert engine.submit(ask("one two")).result(5).finish_reason == "length"
    with pytest.raises(ContextOverflow) as caught:
        engine.submit(ask("one two three"))
    assert isinstance(caught.value, RequestError)
    assert (caught.value.prompt_tokens, caught.value.context_size) == (3, 3)
    assert engine.requests == [ask("one two")]


def test_embeddings_are_deterministic_normalised_and_near_for_shared_words() -> None:
    request = EmbeddingRequest(texts=("red car", "red cart car", "blue sky"))
    one, two = (FakeEngine(dimensions=64).submit(request).result(5) for _ in range(2))
    assert one.vectors.dtype == np.float32
    assert one.vectors.shape == (3, 64)
    np.testing.assert_array_equal(one.vectors, two.vectors)
    np.testing.assert_allclose(np.linalg.norm(one.vectors, axis=1), 1, rtol=1e-6)
    assert one.vectors[0] @ one.vectors[1] > one.vectors[0] @ one.vectors[2]
    assert FakeEngine().submit(EmbeddingRequest(texts=("a",), dims=4)).result(5).vectors.shape == (1, 4)


def test_reranking_scores_shared_words_higher() -> None:
    result = (
        FakeEngine().submit(RerankRequest(query="red car", documents=("blue sky", "a red car"))).result(5)
    )
    assert result.scores.dtype == np.float32
    assert result.scores[1] > result.scores[0]


def test_a_mode_refuses_the_other_requests() -> None:
    with pytest.raises(NotSupported, match="loaded for embedding"):
        FakeEngine(mode=Mode.EMBEDDING).submit(ask())


def test_answers_that_the_prompt_names_score_higher_and_every_answer_differs() -> None:
    result = (
        FakeEngine().submit(ScoreRequest(prompt="is it red?", answers=("blue", "red", "green"))).result(5)
    )
    assert result.logprobs.argmax() == 1
    assert len(set(result.logprobs)) == 3
    with pytest.raises(ContextOverflow):
        FakeEngine(context_size=3).submit(ScoreRequest(prompt="is it red?", answers=("blue",)))
