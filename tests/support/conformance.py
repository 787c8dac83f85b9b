"""One suite for every engine, wherever it is: this process, the sidecar, a server known by its address.

The model, the prompts and the seeds are the same, and so must the answers be. A test file takes the suite
over with ``from support.conformance import *`` and brings two fixtures: ``model``, the chat demo in one place
after the other with a context of 1,024 tokens, and ``kernel``, the same in this process, to compare with.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nbinfer import session
from nbinfer.contract.errors import ContextOverflow, NotSupported, RequestError, SchemaError
from nbinfer.contract.requests import CompletionRequest, RerankRequest, Sampling, ScoreRequest
from nbinfer.contract.results import Delta, Finished, PromptProgress

if TYPE_CHECKING:
    from pathlib import Path

    from nbinfer.session import Model

QUESTION = "What is the capital of France?"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def end_tokens(kernel: Model) -> list[int]:
    """Tokens that end an answer: without them it is as long as allowed."""
    return sorted(kernel.engine.end_tokens)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"system": "You are terse."},
        {"max_tokens": 3},
        {"stop": "capital"},
        {"stop": [" is", "Paris"]},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.3, "seed": 2**32 - 1, "top_k": 0, "min_p": 0.0, "top_p": 1.0},
        {"temperature": 0.8, "seed": 3, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.8, "seed": 3, "repeat_penalty": 1.4, "top_k": 5},
        {"logit_bias": {100: -100}},
    ],
    ids=str,
)
def test_the_same_request_gives_the_same_text(model: Model, kernel: Model, options: dict[str, Any]) -> None:
    expected, found = kernel.infer(QUESTION, **options), model.infer(QUESTION, **options)
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    assert found.usage.completion_tokens == expected.usage.completion_tokens


def test_a_result_is_whole(model: Model, kernel: Model) -> None:
    expected, found = kernel.infer(QUESTION, seed=5), model.infer(QUESTION, seed=5)
    assert found.model == model.name
    assert found.messages == expected.messages
    assert found.params == expected.params
    assert found.timings.first_token_seconds is not None
    assert found.timings.generated_tokens == expected.timings.generated_tokens
    if model.where != "server":
        assert found.prompt == expected.prompt
    again = found.reply("And of Italy?", max_tokens=8)
    assert again.messages is not None
    assert len(again.messages) == 3


def test_the_pieces_of_a_stream_are_the_text(model: Model, kernel: Model) -> None:
    bias = dict.fromkeys(end_tokens(kernel), -100.0)
    stream = model.stream("Tell me a story.", max_tokens=400, logit_bias=bias)
    events: list[Any] = []
    for event in stream.events():
        if isinstance(event, Delta) and not any(isinstance(before, Delta) for before in events):
            assert not stream._stream.done, "the first piece is there before the last one"
        events.append(event)
    assert isinstance(events[-1], Finished)
    pieces = [event.text for event in events if isinstance(event, Delta)]
    assert "".join(pieces) == stream.result().text
    if model.where != "server":
        assert any(isinstance(event, PromptProgress) for event in events)


def test_a_raw_prompt_and_token_ids_reach_the_model_as_they_are(model: Model, kernel: Model) -> None:
    expected = kernel.infer("The capital of", raw=True, max_tokens=8)
    assert model.infer("The capital of", raw=True, max_tokens=8).text == expected.text
    tokens = tuple(kernel.engine.tokenize("The capital of"))  # type: ignore[attr-defined]
    request = CompletionRequest(prompt=tokens, max_tokens=8)
    assert model.submit(request).result().text == expected.text


def test_log_probabilities_are_the_same_numbers(model: Model, kernel: Model) -> None:
    expected = kernel.infer(QUESTION, logprobs=3, max_tokens=6).logprobs
    found = model.infer(QUESTION, logprobs=3, max_tokens=6).logprobs
    assert expected is not None
    assert found is not None
    assert [each.token for each in found] == [each.token for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_choices_schemas_and_json_are_kept_to(model: Model, kernel: Model) -> None:
    assert model.infer("Which colour is the sky?", choices=["red", "blue"]).parsed in ("red", "blue")
    found = model.infer("Describe Paris.", schema=CITY, max_tokens=60)
    assert set(found.parsed) == {"city", "large"}
    assert found.text == kernel.infer("Describe Paris.", schema=CITY, max_tokens=60).text
    with pytest.raises(SchemaError, match="cut after"):
        model.infer("Describe Paris.", schema=CITY, max_tokens=2)


def test_a_regular_expression_is_kept_to_or_refused(model: Model, kernel: Model) -> None:
    if model.where == "server":
        with pytest.raises(NotSupported, match="regex"):
            model.infer("A year?", regex="[0-9]{4}")
    else:
        found = model.infer("A year?", regex="[0-9]{4}").text
        assert found == kernel.infer("A year?", regex="[0-9]{4}").text
        assert len(found) == 4


def test_a_prompt_that_is_too_long_is_refused_with_numbers(model: Model) -> None:
    with pytest.raises(ContextOverflow, match=r"1,024") as caught:
        model.infer("word " * 3000)
    assert caught.value.prompt_tokens > 1024
    assert caught.value.context_size == 1024


def test_a_cancelled_answer_keeps_what_it_had(model: Model, kernel: Model) -> None:
    request = CompletionRequest(
        messages=({"role": "user", "content": "Tell me a story."},),
        sampling=Sampling(logit_bias=dict.fromkeys(end_tokens(kernel), -100.0)),
        max_tokens=900,
    )
    stream = model.submit(request)
    for event in stream:
        if isinstance(event, Delta):
            stream.cancel()
            break
    result = stream.result(30)
    assert result.finish_reason == "interrupted"
    assert result.text
    # The model goes on.
    assert model.infer(QUESTION, max_tokens=2).text


def test_many_at_once_each_get_their_own_answer(model: Model, kernel: Model) -> None:
    prompts = [f"Count to {n}." for n in range(12)]
    expected = [kernel.infer(prompt, max_tokens=10).text for prompt in prompts]
    streams = [model.stream(prompt, max_tokens=10, priority="batch") for prompt in prompts]
    assert [stream.result().text for stream in streams] == expected


def test_a_frame_is_filled_alike(model: Model, kernel: Model) -> None:
    import nbinfer as nb

    rows = [f"What comes after {n}?" for n in range(5)]
    found, expected = (nb.complete(rows, model=each, max_tokens=8, cache=False) for each in (model, kernel))
    assert list(found["completion"]) == list(expected["completion"])
    assert found["error"].isna().all()
    assert list(found["prompt_tokens"]) == list(expected["prompt_tokens"])


def test_answers_can_be_awaited_side_by_side(model: Model, kernel: Model) -> None:
    async def both() -> list[str]:
        found = await asyncio.gather(*(model.ainfer(QUESTION, max_tokens=n) for n in (3, 6)))
        return [result.text for result in found]

    assert asyncio.run(both()) == [kernel.infer(QUESTION, max_tokens=n).text for n in (3, 6)]


def test_one_request_gives_one_answer(model: Model) -> None:
    with pytest.raises(NotSupported):
        model.submit(CompletionRequest(prompt="x", n=2))


def test_a_request_of_another_mode_says_how_the_model_is_loaded(model: Model) -> None:
    with pytest.raises(NotSupported, match="loaded for completion"):
        model.submit(RerankRequest(query="a", documents=["b"])).result()


def test_answers_are_scored_alike_or_refused(model: Model, kernel: Model) -> None:
    request = ScoreRequest(prompt="The capital of France is", answers=(" Paris", " Rome"))
    if model.where == "server":
        with pytest.raises(NotSupported, match="choices"):
            model.submit(request)
        return
    np.testing.assert_allclose(
        model.submit(request).result().logprobs, kernel.submit(request).result().logprobs, atol=1e-4
    )


def test_the_rendered_prompt_is_shown_where_it_is_known(model: Model, kernel: Model) -> None:
    request = model.request(QUESTION, system="Be kind.")
    if model.where == "server":
        with pytest.raises(NotSupported):
            model.engine.render(request)
    else:
        assert model.engine.render(request) == kernel.engine.render(request)


def test_the_description_says_what_the_engine_really_uses(model: Model, kernel: Model) -> None:
    assert model.info.context_size == 1024
    assert model.info.mode == "completion"
    if model.where == "sidecar":
        assert model.info.version == kernel.info.version


def test_tool_calls_come_back_as_calls(model: Model) -> None:
    request = CompletionRequest(
        messages=({"role": "user", "content": "How is the weather in Paris?"},),
        tools=(TOOL,),
        max_tokens=60,
    )
    # Whether the demo model calls is its own affair; that a result has either is ours.
    result = model.submit(request).result()
    for call in result.tool_calls:
        assert json.loads(call["function"]["arguments"])
    assert result.text or result.tool_calls


def test_what_is_not_allowed_is_refused_before_it_is_sent(model: Model) -> None:
    with pytest.raises(RequestError, match="temperature"):
        model.infer("x", temperature=9)


def test_a_recorded_request_asked_again_gives_the_same_text(
    model: Model, kernel: Model, tmp_path: Path
) -> None:
    log = session.history(record=True, path=tmp_path / "history.sqlite")
    try:
        first = model.infer("Tell me a story.", temperature=1.2, max_tokens=12)
        assert log.replay().text == first.text
    finally:
        session.history(record=False)
    entry = log[1]
    assert entry.params["seed"] == first.params["seed"]
    assert entry.where == model.where
    if model.where != "server":
        assert entry.prompt == first.prompt
        assert "<|im_start|>user\nTell me a story." in entry.prompt
        assert entry.digest == kernel.digest
