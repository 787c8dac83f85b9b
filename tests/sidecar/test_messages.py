"""Anthropic's API over the same engine: its own package, unmodified, and what it does not send."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import anthropic
import pytest
from pydantic import ValidationError

from nbinfer.contract.errors import RequestError
from nbinfer.contract.results import Delta, PromptProgress, Result, Usage
from nbinfer.sidecar.messages import Message, MessagesBody

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.sidecar import Sidecar

pytestmark = pytest.mark.engine

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
# Newer versions of the package do not know the parameter any more.
GREEDY = {"temperature": 0}
ANSWER = "The capital of France is Paris."
TOOL: Any = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(served: Sidecar) -> Iterator[Any]:
    address = served.address.removesuffix("/v1")
    with anthropic.Anthropic(base_url=address, api_key=served.token, max_retries=0, timeout=60) as made:
        yield made


def test_a_message_is_answered_and_counted(client: Any) -> None:
    found = client.messages.create(model="demo", max_tokens=50, messages=QUESTION, extra_body=GREEDY)
    assert [block.type for block in found.content] == ["text"]
    assert found.content[0].text == ANSWER
    assert (found.role, found.model, found.stop_reason) == ("assistant", "demo", "end_turn")
    counted = client.messages.count_tokens(model="demo", messages=QUESTION)
    cached = found.usage.cache_read_input_tokens or 0
    assert found.usage.input_tokens + cached == counted.input_tokens
    assert found.usage.output_tokens > 0


def test_a_streamed_message_is_the_same_message(client: Any) -> None:
    options: Any = {"model": "demo", "max_tokens": 50, "messages": QUESTION, "extra_body": GREEDY}
    with client.messages.stream(**options) as stream:
        pieces = list(stream.text_stream)
        found = stream.get_final_message()
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 1 or found.usage.output_tokens > 1
    assert found.stop_reason == "end_turn"
    whole = client.messages.create(**options)
    assert found.content[0].text == whole.content[0].text
    assert found.usage.output_tokens == whole.usage.output_tokens


def test_the_system_prompt_the_limit_and_stop_sequences_hold(client: Any) -> None:
    found = client.messages.create(
        model="demo",
        max_tokens=3,
        messages=QUESTION,
        extra_body=GREEDY,
        system=[{"type": "text", "text": "You are terse."}],
    )
    assert found.stop_reason == "max_tokens"
    assert found.usage.output_tokens == 3
    cut = client.messages.create(
        model="demo", max_tokens=50, messages=QUESTION, extra_body=GREEDY, stop_sequences=[" is"]
    )
    assert cut.content[0].text == "The capital of France"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_a_required_tool_is_called_and_its_result_can_be_given(
    client: Any, stream: bool, choice: Any
) -> None:
    options: Any = {"model": "demo", "max_tokens": 80, "tools": [TOOL], "tool_choice": choice}
    options["messages"] = QUESTION
    if stream:
        with client.messages.stream(**options) as events:
            found = events.get_final_message()
    else:
        found = client.messages.create(**options)
    assert found.stop_reason == "tool_use"
    (call,) = [block for block in found.content if block.type == "tool_use"]
    assert call.name == "weather"
    assert call.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    follow: Any = [
        *QUESTION,
        {"role": "assistant", "content": [block.model_dump() for block in found.content]},
        {"role": "user", "content": [result]},
    ]
    after = client.messages.create(model="demo", max_tokens=5, messages=follow, tools=[TOOL])
    assert after.usage.output_tokens > 0


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"model": "nonsense"}, anthropic.NotFoundError),
        ({"messages": []}, anthropic.BadRequestError),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, anthropic.BadRequestError),
        ({"extra_body": {"temperature": 9}}, anthropic.BadRequestError),
        ({"max_tokens": 0}, anthropic.BadRequestError),
        ({"tool_choice": {"type": "tool", "name": "absent"}, "tools": [TOOL]}, anthropic.BadRequestError),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_come_in_anthropics_shape(
    client: Any, request_: Any, error: type[anthropic.APIStatusError]
) -> None:
    given: Any = {"model": "demo", "max_tokens": 5, "messages": QUESTION, **request_}
    with pytest.raises(error) as caught:
        client.messages.create(**given)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["message"]


def test_the_token_is_asked_for(served: Sidecar) -> None:
    address = served.address.removesuffix("/v1")
    with (
        anthropic.Anthropic(base_url=address, api_key="wrong", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        client.messages.create(model="demo", max_tokens=5, messages=QUESTION)


# -- without a model ------------------------------------------------------------------------------------


def body(**given: Any) -> MessagesBody:
    return MessagesBody(**{"model": "m", "max_tokens": 9, "messages": QUESTION, **given})


def test_blocks_become_messages_that_the_template_knows() -> None:
    image = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(b"x").decode()}
    request = body(
        system="Be kind.",
        messages=[
            {"role": "user", "content": [{"type": "image", "source": image}, {"type": "text", "text": "?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "42"},
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
    ).request()
    assert request.messages is not None
    roles = [message["role"] for message in request.messages]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    assert request.messages[1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert request.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert request.messages[3] == {"role": "tool", "tool_call_id": "t1", "content": "42"}


@pytest.mark.parametrize(
    "content",
    [[], [{"type": "thinking", "thinking": "hm", "signature": ""}], [{"type": "redacted_thinking"}]],
    ids=str,
)
def test_an_assistant_turn_without_a_word_keeps_its_place(content: Any) -> None:
    turn = {"role": "assistant", "content": content}
    request = body(messages=[*QUESTION, turn, {"role": "user", "content": "Go on."}]).request()
    assert request.messages is not None
    assert [message["role"] for message in request.messages] == ["user", "assistant", "user"]
    assert request.messages[1]["content"] == ""


def test_a_tool_is_the_callers_own_and_a_servers_is_refused() -> None:
    for kind in (None, "custom"):
        assert len(body(tools=[{**TOOL, "type": kind}]).request().tools) == 1
    with pytest.raises(RequestError, match=r"tools\[1\] has type 'web_search_20250305'"):
        body(tools=[TOOL, {"type": "web_search_20250305", "name": "web_search"}]).request()


@pytest.mark.parametrize(
    "given",
    [
        {"messages": [{"role": "tool", "content": "x"}]},
        {"output_config": {"format": {"type": "regex"}}},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "u"}}]}
            ]
        },
        {"tool_choice": {"type": "maybe"}},
        {"system": [{"type": "image"}]},
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        body(**given).request()


def test_how_long_it_may_be_must_be_said() -> None:
    with pytest.raises(ValidationError):
        MessagesBody.model_validate({"model": "m", "messages": QUESTION})


def test_a_schema_constrains_the_answer() -> None:
    schema = {"type": "object", "properties": {}}
    request = body(output_config={"format": {"type": "json_schema", "schema": schema}}).request()
    assert request.constraint is not None
    assert (request.constraint.kind, request.constraint.value) == ("json_schema", schema)


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [("enabled", (True, 100)), ("disabled", (False, None)), ("adaptive", (None, None))],
)
def test_thinking_is_switched_and_bounded(thinking: str, expected: tuple[bool | None, int | None]) -> None:
    request = body(thinking={"type": thinking, "budget_tokens": 100}).request()
    assert (request.think, request.reasoning_budget) == expected


def test_events_of_thought_text_and_calls_are_blocks_in_order() -> None:
    answer = Message("m", body(tools=[TOOL]).whole())
    call = {"id": "0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    result = Result(
        text="Well.",
        reasoning="hm",
        tool_calls=(call,),
        usage=Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=7),
    )
    raw = b"".join(
        [
            *answer.take(PromptProgress(9, 9, 4)),
            *answer.take(Delta("hm", reasoning=True)),
            *answer.take(Delta("Well.")),
            *answer.close(result),
        ]
    )
    blocks = [block.split("\n") for block in raw.decode().strip().split("\n\n")]
    found = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [each["type"] for each in found]
    assert found[0]["message"]["usage"]["input_tokens"] == 5
    starts = [each["content_block"]["type"] for each in found if each["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use"]
    assert [each["index"] for each in found if each["type"] == "content_block_stop"] == [0, 1, 2]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    assert found[-2]["usage"]["output_tokens"] == 7
    assert found[-1] == {"type": "message_stop"}
