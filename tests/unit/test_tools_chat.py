"""The tools that make the demo chat model: a repeatable corpus, and the template of its turns."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import export_chat
import numpy as np
import pytest
from chat_corpus import BEGIN, END, TOOLS, Conversation, conversation, question_and_answer, render
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nbinfer.models.demo import demo_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.contract.requests import Message


def drawn(seed: int, count: int) -> list[Conversation]:
    rng = random.Random(seed)
    return [conversation(rng) for _ in range(count)]


def text_of(talk: Conversation) -> str:
    return "".join(text for text, _ in render(talk))


def as_messages(talk: Conversation) -> list[Message]:
    """The conversation as a client would send it, tool calls as data."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": talk.system}] if talk.system else []
    for role, text in talk.turns:
        if text.startswith("<tool_call>"):
            call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            messages.append({"role": role, "content": "", "tool_calls": [{"function": call}]})
        else:
            messages.append({"role": role, "content": text})
    return list(messages)


def as_tools(talk: Conversation) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": {"name": name, "parameters": {"properties": {p: {} for p in parameters}}},
        }
        for name, parameters in (talk.tools or {}).items()
    ]


def shipped_template() -> str:
    from gguf import GGUFReader

    template: str = GGUFReader(demo_path()).fields["tokenizer.chat_template"].contents()
    return template


def test_the_same_seed_gives_the_same_conversations() -> None:
    assert drawn(1, 200) == drawn(1, 200)
    assert drawn(1, 200) != drawn(2, 200)


def test_every_kind_of_question_is_drawn() -> None:
    kinds = Counter(talk.kind for talk in drawn(0, 5000))
    assert len(kinds) == 16 + 6
    assert min(kinds.values()) > 20


def test_the_answers_are_what_is_learned() -> None:
    for talk in drawn(3, 200):
        learned = [text for text, is_answer in render(talk) if is_answer]
        assert learned == [text + END for role, text in talk.turns if role == "assistant"]


def test_a_prompt_ends_where_the_answer_begins() -> None:
    for talk in drawn(4, 200):
        prompt, answer = question_and_answer(talk)
        assert prompt.endswith(f"{BEGIN}assistant\n")
        assert prompt + answer + END + "\n" == text_of(talk)


@pytest.mark.parametrize("template", [export_chat.chat_template, shipped_template], ids=["tools", "shipped"])
def test_the_chat_template_writes_what_was_trained(template: Callable[[], str]) -> None:
    environment = ImmutableSandboxedEnvironment()
    # transformers' tojson, which llama.cpp's users expect: no escapes for HTML.
    environment.filters["tojson"] = json.dumps
    compiled = environment.from_string(template())
    talks = drawn(5, 500)
    assert any(talk.tools for talk in talks)
    assert any(talk.system for talk in talks)
    for talk in talks:
        assert compiled.render(messages=as_messages(talk), tools=as_tools(talk)) == text_of(talk)


def test_the_chat_template_takes_content_in_parts() -> None:
    template = ImmutableSandboxedEnvironment().from_string(export_chat.chat_template())
    parts = [{"type": "text", "text": "Hello"}, {"type": "image_url"}, {"type": "text", "text": "!"}]
    asked = template.render(messages=[{"role": "user", "content": parts}], add_generation_prompt=True)
    assert asked == f"{BEGIN}user\nHello!{END}\n{BEGIN}assistant\n"


def test_interleaving_puts_the_two_halves_of_a_head_side_by_side() -> None:
    weight = np.arange(8, dtype=np.float32).reshape(8, 1)
    assert export_chat.interleaved(weight, heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_tools_offered_are_those_of_the_corpus() -> None:
    assert {name for talk in drawn(6, 2000) if talk.tools for name in talk.tools} == set(TOOLS)
