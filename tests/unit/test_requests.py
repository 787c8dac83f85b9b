"""Requests: what they accept, what they refuse, and that they cannot change."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from nbinfer.contract.errors import NbinferError, RequestError
from nbinfer.contract.requests import (
    CompletionRequest,
    Constraint,
    EmbeddingRequest,
    RerankRequest,
    Sampling,
    ScoreRequest,
)

USER = {"role": "user", "content": "hello"}
INT32 = 2**31 - 1


def refused(make: Any, **fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        make(**fields)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5
    assert len(message) < 400
    assert isinstance(caught.value, NbinferError | ValueError)
    return message


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("temperature", 0, 5),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("repeat_penalty", 0.01, 10),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
    ],
)
def test_sampling_numbers_have_a_range(field: str, low: float, high: float) -> None:
    make: Any = Sampling
    for value in (low, high, (low + high) / 2):
        assert getattr(make(**{field: value}), field) == value
    for value in (low - 0.001, high + 0.001, math.nan, math.inf, -math.inf, 10**400):
        assert f"between {low:g} and {high:g}" in refused(Sampling, **{field: value})
    for other in ("1", None, True, [1]):
        assert field in refused(Sampling, **{field: other})


@pytest.mark.parametrize(
    ("make", "fields", "field", "low", "high"),
    [
        (Sampling, {}, "top_k", 0, INT32),
        (Sampling, {}, "seed", 0, 2**32 - 1),
        (CompletionRequest, {"prompt": "x"}, "max_tokens", 1, INT32),
        (CompletionRequest, {"prompt": "x"}, "logprobs", 0, 20),
        (CompletionRequest, {"prompt": "x"}, "n", 1, 128),
        (CompletionRequest, {"prompt": "x"}, "reasoning_budget", -1, INT32),
        (EmbeddingRequest, {"texts": ("x",)}, "dims", 1, 2**20),
    ],
)
def test_counts_are_whole_numbers_with_a_range(
    make: Any, fields: dict[str, Any], field: str, low: int, high: int
) -> None:
    for value in (low, high):
        assert getattr(make(**fields, **{field: value}), field) == value
    for value in (low - 1, high + 1, 10**400):
        assert f"between {low} and {high}" in refused(make, **fields, **{field: value})
    for other in (1.0, 2.5, "1", True, math.nan):
        assert "whole number" in refused(make, **fields, **{field: other})


def test_greedy_is_the_default() -> None:
    assert Sampling().temperature == 0
    assert Sampling().seed is None


@pytest.mark.parametrize(
    ("bias", "good"),
    [
        ({}, True),
        ({5: -100, 6: 100, 0: 0.5}, True),
        ({5: 100.5}, False),
        ({5: math.nan}, False),
        ({-1: 0}, False),
        ({"5": 0}, False),
        ({5: "1"}, False),
    ],
)
def test_logit_bias_maps_token_ids_to_numbers(bias: dict[Any, Any], good: bool) -> None:
    if good:
        assert Sampling(logit_bias=bias).logit_bias == bias
    else:
        assert "logit_bias" in refused(Sampling, logit_bias=bias)


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        ("json_schema", {"type": "object"}, {"type": "object"}),
        ("json", None, None),
        ("choices", ("a", "b"), ("a", "b")),
        ("choices", ["a"], ("a",)),
        ("regex", "[0-9]+", "[0-9]+"),
        ("grammar", 'start: "a"', 'start: "a"'),
    ],
)
def test_constraints_that_are_allowed(kind: Any, value: Any, kept: Any) -> None:
    assert Constraint(kind, value).value == kept


@pytest.mark.parametrize(
    ("kind", "value", "word"),
    [
        ("json_schema", "{}", "schema is str"),
        ("json_schema", None, "schema is NoneType"),
        ("json", {}, "takes no value"),
        ("choices", (), "at least one"),
        ("choices", "ab", "list of texts"),
        ("choices", ("a", ""), "none of them empty"),
        ("choices", ("a", 1), "choices[1]"),
        ("choices", None, "list of texts"),
        ("choices", {"a", "b"}, "list of texts"),
        ("regex", "", "empty"),
        ("regex", None, "NoneType"),
        ("grammar", b"x", "bytes"),
        ("xml", "x", "no constraint of kind 'xml'"),
    ],
)
def test_constraints_that_are_refused(kind: Any, value: Any, word: str) -> None:
    with pytest.raises(RequestError) as caught:
        Constraint(kind, value)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": (USER,)},
        {"messages": [USER]},
        {"messages": ({"role": "system", "content": "x"}, USER, {"role": "assistant", "content": "y"}, USER)},
        {"messages": ({"role": "user", "content": [{"type": "text", "text": "x"}]},)},
        {
            "messages": (
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                {"role": "tool", "content": ""},
            )
        },
        {"prompt": "x"},
        {"prompt": ""},
        {"prompt": (1, 2, 0)},
        {"prompt": "\U0001f600 \x00"},
        {"prompt": "x", "stop": ("a", "\n")},
        {"prompt": "x", "stop": ["a"]},
        {"prompt": "x", "priority": "batch"},
    ],
)
def test_prompts_that_are_allowed(fields: dict[str, Any]) -> None:
    request = CompletionRequest(**fields)
    if "messages" in fields:
        assert request.messages == tuple(fields["messages"])


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "either messages or prompt"),
        ({"messages": (USER,), "prompt": "x"}, "either messages or prompt"),
        ({"messages": ()}, "messages is empty"),
        ({"messages": "hello"}, "list of messages"),
        ({"messages": USER}, "list of messages"),
        ({"messages": ("hello",)}, "messages[0] has role None"),
        ({"messages": (USER, {"role": "robot", "content": "x"})}, "messages[1] has role 'robot'"),
        ({"messages": ({"content": "x"},)}, "messages[0] has role None"),
        ({"messages": ({"role": "user"},)}, "messages[0] has a content of NoneType"),
        ({"messages": ({"role": "user", "content": 5},)}, "content of int"),
        ({"messages": ({"role": "assistant", "content": None},)}, "content of NoneType"),
        (
            {"messages": ({"role": "user", "content": "a\ud800"},)},
            "messages[0] holds half a character at position 1",
        ),
        ({"prompt": 5}, "prompt is int"),
        ({"prompt": b"x"}, "prompt is bytes"),
        ({"prompt": ["x"]}, "prompt is list"),
        ({"prompt": ()}, "empty list of tokens"),
        ({"prompt": (1, -1)}, "prompt[1]=-1"),
        ({"prompt": (1, "a")}, "prompt[1]='a'"),
        ({"prompt": (True,)}, "prompt[0]=True"),
        ({"prompt": "ok \udfff"}, "half a character at position 3"),
        ({"prompt": "x", "stop": "end"}, "stop is str: it must be a list"),
        ({"prompt": "x", "stop": ("a", "")}, "empty text"),
        ({"prompt": "x", "stop": (5,)}, "stop[0] is int"),
        ({"prompt": "x", "stop": None}, "stop is NoneType"),
        ({"prompt": "x", "priority": "urgent"}, "'urgent'"),
    ],
)
def test_prompts_that_are_refused(fields: dict[str, Any], word: str) -> None:
    assert word in refused(CompletionRequest, **fields)


@pytest.mark.parametrize("texts", [(), ("a",), ["a", ""], ("\U0001f600",)])
def test_texts_to_embed(texts: Any) -> None:
    assert EmbeddingRequest(texts=texts).texts == texts


@pytest.mark.parametrize(
    ("make", "fields", "word"),
    [
        (EmbeddingRequest, {"texts": "abc"}, "texts is str: it must be a list"),
        (EmbeddingRequest, {"texts": ("a", 5)}, "texts[1] is int"),
        (EmbeddingRequest, {"texts": ("a", None)}, "texts[1] is NoneType"),
        (EmbeddingRequest, {"texts": ("a", math.nan)}, "texts[1] is float"),
        (EmbeddingRequest, {"texts": ("\ud800",)}, "texts[0] holds half a character"),
        (EmbeddingRequest, {"texts": None}, "texts is NoneType"),
        (EmbeddingRequest, {"texts": b"ab"}, "texts[0] is int"),
        (EmbeddingRequest, {"texts": ("a",), "priority": 1}, "priority=1"),
        (RerankRequest, {"query": 5, "documents": ("a",)}, "query is int"),
        (RerankRequest, {"query": "q", "documents": "abc"}, "documents is str"),
        (RerankRequest, {"query": "q", "documents": ("a", None)}, "documents[1] is NoneType"),
        (RerankRequest, {"query": "\ud800", "documents": ()}, "query holds half a character"),
        (RerankRequest, {"query": "q", "documents": (), "priority": None}, "priority=None"),
        (ScoreRequest, {"prompt": "x", "answers": ()}, "at least one"),
        (ScoreRequest, {"prompt": "x", "answers": "yes"}, "answers is str"),
        (ScoreRequest, {"prompt": "x", "answers": ("yes", "")}, "none that is empty"),
        (ScoreRequest, {"prompt": "x", "answers": ("yes", 1)}, "answers[1] is int"),
        (ScoreRequest, {"answers": ("yes",)}, "either messages or prompt"),
        (ScoreRequest, {"messages": (), "answers": ("yes",)}, "messages is empty"),
        (ScoreRequest, {"prompt": "x", "answers": ("yes",), "priority": ""}, "priority=''"),
    ],
)
def test_other_requests_that_are_refused(make: Any, fields: dict[str, Any], word: str) -> None:
    assert word in refused(make, **fields)


def test_a_score_request_asks_the_same_question_as_a_completion() -> None:
    request = ScoreRequest(answers=("yes", "no"), messages=(USER,), think=False, priority="batch")
    assert request.question() == CompletionRequest(messages=(USER,), think=False, priority="batch")


@pytest.mark.parametrize(
    "value",
    [
        CompletionRequest(prompt="x"),
        EmbeddingRequest(texts=("x",)),
        RerankRequest(query="q", documents=()),
        ScoreRequest(prompt="x", answers=("y",)),
        Sampling(),
        Constraint("json"),
    ],
)
def test_a_request_cannot_change_after_it_was_checked(value: Any) -> None:
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)


def test_equal_requests_are_equal_and_a_change_is_checked_again() -> None:
    request = CompletionRequest(prompt="x", max_tokens=5)
    assert request == CompletionRequest(prompt="x", max_tokens=5)
    assert dataclasses.replace(request, max_tokens=6) != request
    with pytest.raises(RequestError):
        dataclasses.replace(request, max_tokens=0)
