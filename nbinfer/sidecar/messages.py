"""Anthropic's ``/v1/messages`` over the same engine: its bodies, answers, events and errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import Field

from nbinfer.contract.errors import RequestError
from nbinfer.contract.results import Delta, PromptProgress
from nbinfer.engines.remote.wire import error_to_json, shaped
from nbinfer.sidecar.answers import CallSplitter, new_id
from nbinfer.sidecar.bodies import Body, ChatBody

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.contract.requests import CompletionRequest
    from nbinfer.contract.results import Event, Result

PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"


# -- requests -------------------------------------------------------------------------------------------


class Tool(Body):
    """A tool that the answer may call."""

    name: str = Field(min_length=1)
    type: str | None = None
    description: str = ""
    input_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object"})


class ToolChoice(Body):
    """Whether a tool must be called: ``auto``, ``any``, ``tool`` or ``none``."""

    type: str
    name: str | None = None


class Thinking(Body):
    """Whether to reason before the answer (``enabled``, ``disabled``, else as it likes), and how far."""

    type: str
    budget_tokens: int | None = None


_THINKS = {"enabled": True, "disabled": False}


class CountBody(Body):
    """``POST /v1/messages/count_tokens``."""

    model: str = Field(min_length=1, max_length=1024)
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def chat(self, **more: Any) -> ChatBody:
        """Return the same request in OpenAI's shape.

        Raises
        ------
        RequestError
            A part cannot be read.
        """
        messages = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        for i, message in enumerate(self.messages):
            messages += _messages(message, i)
        for i, tool in enumerate(self.tools or ()):
            if tool.type not in (None, "custom"):
                raise RequestError(
                    f"tools[{i}] has type {tool.type!r:.60}, which runs on a server elsewhere.\n"
                    'Here a tool is the caller\'s own: leave type out, or "custom", and give input_schema.'
                )
        thinks = None if self.thinking is None else _THINKS.get(self.thinking.type)
        return ChatBody(
            model=self.model,
            messages=messages,
            tools=[
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.input_schema,
                    },
                }
                for tool in self.tools or ()
            ],
            tool_choice=self._choice(),
            think=thinks,
            reasoning_budget=self.thinking.budget_tokens if self.thinking is not None and thinks else None,
            **more,
        )

    def _choice(self) -> str | dict[str, Any] | None:
        choice = self.tool_choice
        if choice is None:
            return None
        if choice.type == "tool":
            return {"type": "function", "function": {"name": choice.name}}
        known = {"auto": "auto", "any": "required", "none": "none"}
        if choice.type not in known:
            raise RequestError(f"tool_choice.type={choice.type!r:.60}: use auto, any, tool or none.")
        return known[choice.type]


class MessagesBody(CountBody):
    """``POST /v1/messages``."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    output_config: dict[str, Any] | None = None

    def whole(self) -> ChatBody:
        """Return the same request in OpenAI's shape."""
        return self.chat(
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            response_format=self._format(),
        )

    def _format(self) -> dict[str, Any] | None:
        found = (self.output_config or {}).get("format")
        if found is None:
            return None
        if not isinstance(found, dict) or found.get("type") != "json_schema":
            raise RequestError('output_config.format is {"type": "json_schema", "schema": …}.')
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": found.get("schema")}}

    def request(self) -> CompletionRequest:
        """Return the engine's request.

        Raises
        ------
        RequestError, NotSupported
            The body asks for something that is contradictory, out of range or not offered.
        """
        return self.whole().request()


def _text(content: Any) -> str:
    """Return the text of a system prompt or of a tool's result."""
    if isinstance(content, str):
        return content
    texts = [
        part.get("text") for part in content or () if isinstance(part, dict) and part.get("type") == "text"
    ]
    if len(texts) != len(content or ()) or not all(isinstance(text, str) for text in texts):
        raise RequestError('here only text is read: {"type": "text", "text": …}.')
    return "\n".join(str(text) for text in texts)


def _messages(message: dict[str, Any], i: int) -> list[dict[str, Any]]:  # noqa: C901 - kind by kind
    """Return one message as OpenAI's: a tool's results are messages of their own there."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise RequestError(f"messages[{i}] has role {role!r:.60}: it is user, assistant or system.")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RequestError(f"messages[{i}] has no content: it is text or a list of blocks.")
    out: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result":
            found = {"role": "tool", "tool_call_id": str(block.get("tool_use_id"))}
            out.append({**found, "content": _text(block.get("content") or "")})
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input") or {})
            function = {"name": str(block.get("name")), "arguments": arguments}
            calls.append({"id": str(block.get("id")), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):  # what a model thought is not shown to it again
            parts.append(_part(block, kind, i))
    if calls:
        texts = "".join(part.get("text", "") for part in parts)
        out.append({"role": role, "content": texts or None, "tool_calls": calls})
    elif parts:
        out.append({"role": role, "content": parts})
    if not out and role != "assistant":
        raise RequestError(f"messages[{i}] holds nothing.")
    # A turn without a word keeps its place: what was only thought, or an answer that ended at once.
    return out or [{"role": role, "content": ""}]


def _part(block: Any, kind: Any, i: int) -> dict[str, Any]:
    if kind == "text" and isinstance(block.get("text"), str):
        return {"type": "text", "text": block["text"]}
    source = block.get("source") if kind == "image" else None
    if isinstance(source, dict) and source.get("type") == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
        return {"type": "image_url", "image_url": {"url": url}}
    if kind == "image":
        raise RequestError(f"messages[{i}]: an image's source is base64; nothing is fetched.")
    raise RequestError(
        f"messages[{i}] holds a block of type {kind!r:.60} that cannot be read: "
        "text, image, tool_use and tool_result can."
    )


# -- answers --------------------------------------------------------------------------------------------


def event(kind: str, **body: Any) -> bytes:
    """Return one server-sent event."""
    data = json.dumps({"type": kind, **body}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()


def error_event(error: Exception) -> bytes:
    """Return the event that reports an error."""
    status, body = error_to_json(error)
    return event("error", error=shaped(PATH, status, body)["error"])


def usage(result: Result) -> dict[str, int]:
    """Return the token counts; what came from a cache is not part of ``input_tokens``."""
    counts = result.usage
    return {
        "input_tokens": counts.prompt_tokens - counts.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached_tokens,
        "output_tokens": counts.completion_tokens,
    }


def stop_reason(result: Result) -> str:
    """Return why the answer ended; the engine does not tell a stop sequence from the turn's end."""
    if result.tool_calls:
        return "tool_use"
    return "max_tokens" if result.finish_reason == "length" else "end_turn"


def _calls(result: Result) -> list[dict[str, Any]]:
    out = []
    for call in result.tool_calls:
        function = call["function"]
        try:
            given = json.loads(function["arguments"])
        except ValueError:
            given = {}
        out.append({"type": "tool_use", "id": new_id("toolu"), "name": function["name"], "input": given})
    return out


class Message:
    """Writes one answer, whole or event by event."""

    def __init__(self, model: str, body: ChatBody) -> None:
        self._head = {
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "stop_sequence": None,
        }
        forced = body.tool_choice not in (None, "none", "auto")
        self._splitter = CallSplitter(tools=bool(body.tool_names), forced=forced)
        self._begun = False
        self._block: str | None = None
        self._index = -1

    def whole(self, result: Result) -> dict[str, Any]:
        """Return the message."""
        content: list[dict[str, Any]] = []
        if result.reasoning:
            content.append({"type": "thinking", "thinking": result.reasoning, "signature": ""})
        if result.text:
            content.append({"type": "text", "text": result.text})
        content += _calls(result)
        return {**self._head, "content": content, "stop_reason": stop_reason(result), "usage": usage(result)}

    def take(self, found: Event) -> Iterator[bytes]:
        """Yield the events that a piece of the answer stands for."""
        if isinstance(found, PromptProgress):
            yield from self._begin(found.total - found.cached, found.cached)
        elif isinstance(found, Delta):
            if found.reasoning:
                yield from self._piece("thinking", found.text)
            elif text := self._splitter.push(found.text):
                yield from self._piece("text", text)

    def close(self, result: Result) -> Iterator[bytes]:
        """Yield the events of the answer's end."""
        yield from self._begin(result.usage.prompt_tokens - result.usage.cached_tokens)
        if rest := self._splitter.rest(result):
            yield from self._piece("text", rest)
        for call in _calls(result):
            yield from self._open({**call, "input": {}})
            arguments = json.dumps(call["input"])
            yield self._delta({"type": "input_json_delta", "partial_json": arguments})
        yield from self._end_block()
        delta = {"stop_reason": stop_reason(result), "stop_sequence": None}
        yield event("message_delta", delta=delta, usage=usage(result))
        yield event("message_stop")

    def _begin(self, tokens: int = 0, cached: int = 0) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            counts = {
                "input_tokens": tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": cached,
                "output_tokens": 0,
            }
            message: dict[str, Any] = {**self._head, "content": [], "stop_reason": None, "usage": counts}
            yield event("message_start", message=message)

    def _piece(self, kind: str, text: str) -> Iterator[bytes]:
        yield from self._begin()
        if self._block != kind:
            empty = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            yield from self._open(empty)
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _open(self, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._end_block()
        self._block = block["type"]
        self._index += 1
        yield event("content_block_start", index=self._index, content_block=block)

    def _end_block(self) -> Iterator[bytes]:
        if self._block is not None:
            self._block = None
            yield event("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event("content_block_delta", index=self._index, delta=delta)
