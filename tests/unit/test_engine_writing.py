"""The result of an answer that was written: text, counts and times, wherever it stopped."""

from __future__ import annotations

from typing import Any

import pytest

from nbinfer.contract.requests import CompletionRequest, Sampling
from nbinfer.contract.results import TokenLogprob, Usage
from nbinfer.engines.asked import result_params
from nbinfer.engines.stream import Stream
from nbinfer.engines.text import TextAssembler
from nbinfer.engines.writing import Writing, cut_short, result_of

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def writing(asked: dict[str, Any] | None = None, **fields: Any) -> Writing:
    made = Writing(
        request=CompletionRequest(
            messages=({"role": "user", "content": "Hi"},), sampling=Sampling(temperature=0.0), **asked or {}
        ),
        stream=Stream(),
        prompt_text="user: Hi",
        assembler=TextAssembler(),
        seed=7,
        limit=10,
        submitted=100.0,
    )
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_a_result_holds_what_was_written_and_asked() -> None:
    found = result_of(
        writing(
            {"max_tokens": 9},
            answer=["Hel", "lo"],
            reasoning=["\nhm", "\n"],
            generated=[1, 2, 3],
            cached=4,
            adapter="style",
        ),
        "stop",
        model="m",
        prompt_tokens=6,
        drafted=5,
        accepted=2,
        speedup=1.5,
    )
    assert (found.text, found.reasoning, found.finish_reason, found.model) == ("Hello", "hm", "stop", "m")
    assert found.usage == Usage(
        prompt_tokens=6, completion_tokens=3, cached_tokens=4, drafted_tokens=5, accepted_tokens=2
    )
    assert (found.timings.prompt_tokens, found.timings.generated_tokens) == (2, 3)
    assert found.timings.speculative_speedup == 1.5
    assert found.params == {"temperature": 0.0, "seed": 7, "adapter": "style", "max_tokens": 9}
    assert found.prompt == "user: Hi"
    assert found.messages == ({"role": "user", "content": "Hi"},)
    assert found.logprobs is None


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # queue, prompt, generation, first token
        ({}, (0, 0, 0, None)),
        ({"started": 101.0}, (1, 0, 0, None)),
        ({"started": 101.0, "prompt_done": 103.0}, (1, 2, 0, 3)),
        ({"started": 101.0, "prompt_done": 103.0, "last_token": 107.0}, (1, 2, 4, 3)),
    ],
    ids=["waiting", "in the prompt", "before a token", "done"],
)
def test_times_are_those_of_the_stages_that_were_reached(
    times: dict[str, Any], expected: tuple[float | None, ...]
) -> None:
    found = result_of(writing(**times), "interrupted", model="m", prompt_tokens=1).timings
    assert (
        found.queue_seconds,
        found.prompt_seconds,
        found.generation_seconds,
        found.first_token_seconds,
    ) == expected


def test_log_probabilities_are_there_when_they_were_asked_for() -> None:
    one = TokenLogprob("a", -0.5)
    assert result_of(
        writing({"logprobs": 0}, logprobs=[one]), "stop", model="m", prompt_tokens=1
    ).logprobs == (one,)
    assert result_of(writing({"logprobs": 0}), "stop", model="m", prompt_tokens=1).logprobs == ()


def test_a_call_leaves_the_text_where_tools_were_offered() -> None:
    said = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    with_tools = result_of(writing({"tools": (TOOL,)}, answer=[said]), "stop", model="m", prompt_tokens=1)
    assert (with_tools.text, with_tools.tool_calls[0]["function"]["name"]) == ("", "weather")
    without = result_of(writing(answer=[said]), "stop", model="m", prompt_tokens=1)
    assert (without.text, without.tool_calls) == (said, ())


def test_the_error_of_a_cut_answer_carries_the_answer() -> None:
    result = result_of(writing(answer=['{"a": ']), "length", model="m", prompt_tokens=1)
    error = cut_short(result, "3 tokens")
    assert str(error) == "the answer was cut after 3 tokens, before it was whole: raise max_tokens."
    assert error.raw == '{"a": '
    assert error.result == result.with_changes(error=str(error))


def test_a_seed_that_nobody_knows_is_none() -> None:
    asked = CompletionRequest(prompt="Hi", sampling=Sampling(temperature=0.0), stop=("x",))
    assert result_params(asked, seed=None, adapter=None) == {"temperature": 0.0, "seed": None, "stop": ["x"]}
