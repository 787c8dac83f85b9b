"""From a conversation to a prompt that may be computed, behind every engine."""

from __future__ import annotations

from typing import Any

import pytest

from nbinfer.contract.errors import ContextOverflow, NotSupported, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest
from nbinfer.engines.plaintext import SEAM, control_pattern
from nbinfer.engines.prompts import check_length, check_texts, only_text, rendered
from nbinfer.engines.protocol import EngineInfo
from nbinfer.engines.template import ChatTemplate

USER = {"role": "user", "content": "Hi <|end|>"}
TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if tools %} tools={{ tools | length }}{% endif %}"
    "{% if enable_thinking is defined %} think={{ enable_thinking }}{% endif %}"
)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], USER["content"]),
        ([], None),
        ([USER, USER], None),
        ([{"role": "system", "content": "x"}], None),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], None),
    ],
    ids=str,
)
def test_only_a_single_text_of_a_user_can_be_continued_without_a_template(
    messages: list[dict[str, Any]], expected: str | None
) -> None:
    assert only_text(messages) == expected


def prompt(template: ChatTemplate | None = TEMPLATE, budget: int | None = None, **options: Any) -> str:
    request = CompletionRequest(messages=(USER,), **options)
    controls = control_pattern(["<|end|>"])
    return rendered(template, (USER,), request, name="m", controls=controls, budget=budget)


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, ""),
        ({"think": True}, " think=True"),
        ({"think": False}, " think=False"),
        ({"budget": 5}, ""),
        ({"budget": 0}, " think=False"),
        ({"budget": 0, "think": True}, " think=True"),
        ({"tools": ({"type": "function", "function": {"name": "f"}},)}, " tools=1"),
    ],
    ids=str,
)
def test_a_template_hears_of_thinking_only_what_was_said_or_follows(
    options: dict[str, Any], end: str
) -> None:
    assert prompt(**options) == f"user: Hi <{SEAM}|end|>{end}"


def test_without_a_template_a_conversation_is_refused_with_what_works() -> None:
    with pytest.raises(NotSupported, match=r"m has no chat template.*\n.*raw=True"):
        prompt(None)


@pytest.mark.parametrize(
    ("n", "trained", "error", "said"),
    [
        (0, 4096, RequestError, "empty"),
        (1, 4096, None, ""),
        (99, 4096, None, ""),
        (100, 4096, ContextOverflow, r"100 tokens.* of m holds 100 .*context_size=128"),
        (3000, 4096, ContextOverflow, r"context_size=4096"),
        (100, 100, ContextOverflow, r"trained for 100 tokens"),
        (3000, None, ContextOverflow, r"context_size=4096"),
    ],
)
def test_a_prompt_leaves_room_for_an_answer_or_is_refused(
    n: int, trained: int | None, error: type[RequestError] | None, said: str
) -> None:
    info = EngineInfo(
        backend="b", model="m", mode=Mode.COMPLETION, context_size=100, trained_context_size=trained
    )
    if error is None:
        check_length(n, info)
        return
    with pytest.raises(error, match=said) as caught:
        check_length(n, info)
    if isinstance(caught.value, ContextOverflow):
        assert (caught.value.prompt_tokens, caught.value.context_size) == (n, 100)


def test_a_text_longer_than_the_model_takes_is_named() -> None:
    info = EngineInfo(backend="b", model="m", mode=Mode.EMBEDDING, context_size=3)
    check_texts([[1, 2, 3], []], info)
    with pytest.raises(
        ContextOverflow, match=r"text 1 has 4 tokens, but m takes at most 3\. Shorten"
    ) as caught:
        check_texts([[1], [1, 2, 3, 4]], info)
    assert (caught.value.prompt_tokens, caught.value.context_size) == (4, 3)
