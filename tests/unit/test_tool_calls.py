from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbinfer.engines.toolcalls import parse_tool_calls

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
]
PARIS = ("get_weather", {"city": "Paris"})
SUM = ("add", {"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS]),
        ('Sure.<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}', "Sure.", [PARIS]),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}</tool_call>', "", [PARIS]),
        (
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>'
            '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>',
            "",
            [PARIS, SUM],
        ),
        ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
        ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        ('{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}', "", [SUM]),
        (
            "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
            "</function>\n</tool_call>",
            None,
            [SUM],
        ),
        ('<function=get_weather>{"city": "Paris"}</function>', "", [PARIS]),
        ("<function=add></function>", "", [("add", {})]),
    ],
)
def test_calls_are_read_as_models_write_them(
    text: str, rest: str | None, calls: list[tuple[str, object]]
) -> None:
    remaining, found = parse_tool_calls(text, TOOLS)
    assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in found] == calls
    assert [c["id"] for c in found] == [f"call_{i}" for i in range(len(calls))]
    if rest is not None:
        assert remaining == rest


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>',
        "<tool_call>not json at all</tool_call>",
        '<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>',
        '{"capital": "Paris"}',
        "<function=unknown></function>",
        "<tool_call>",
    ],
)
def test_what_cannot_be_read_stays_in_the_text(text: str) -> None:
    assert parse_tool_calls(text, TOOLS) == (text, ())


@given(st.text(max_size=200) | st.text('<tool_call>{}"name:[]/=function ', max_size=80))
def test_no_text_makes_it_fail(text: str) -> None:
    remaining, found = parse_tool_calls(text, TOOLS)
    assert isinstance(remaining, str)
    assert all(json.loads(c["function"]["arguments"]) is not None for c in found)
