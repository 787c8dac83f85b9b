"""Answers of the HTTP API, in OpenAI's shapes."""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING, Any

from nbinfer.contract.results import Result, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nbinfer.contract.results import TokenLogprob

# How families of models begin a tool call; see nbinfer.engines.toolcalls.
_MARKS = ("<tool_call>", "<function=", "[TOOL_CALLS]", "<|python_tag|>")


def new_id(prefix: str) -> str:
    """Return a fresh identifier of an answer."""
    return f"{prefix}-{secrets.token_hex(12)}"


def sse(body: dict[str, Any] | str) -> bytes:
    """Return one server-sent event."""
    data = body if isinstance(body, str) else json.dumps(body, separators=(",", ":"))
    return f"data: {data}\n\n".encode()


DONE = sse("[DONE]")


def usage_body(results: Iterable[Result]) -> dict[str, Any]:
    """Return the token counts of one request's answers; a prompt that they share counts once."""
    results = list(results)
    usages = [result.usage for result in results] or [Usage()]
    prompt = max(usage.prompt_tokens for usage in usages)
    generated = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": max(usage.cached_tokens for usage in usages)},
    }


def finish_reason(result: Result) -> str:
    """Return the reason in OpenAI's words."""
    if result.tool_calls:
        return "tool_calls"
    return "length" if result.finish_reason == "length" else "stop"


def chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    """Return log-probabilities in the shape of chat completions."""
    if logprobs is None:
        return None
    return {
        "content": [
            {
                **_token(each.token, each.logprob),
                "top_logprobs": [_token(token, logprob) for token, logprob in each.top],
            }
            for each in logprobs
        ],
        "refusal": None,
    }


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def text_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    """Return log-probabilities in the older shape of text completions."""
    if logprobs is None:
        return None
    offsets, at = [], 0
    for each in logprobs:
        offsets.append(at)
        at += len(each.token)
    return {
        "tokens": [each.token for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [dict(each.top) for each in logprobs],
        "text_offset": offsets,
    }


def chat_message(result: Result) -> dict[str, Any]:
    """Return the assistant's message."""
    message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
    if result.reasoning:
        message["reasoning_content"] = result.reasoning
    if result.tool_calls:
        message["content"] = result.text or None
        # The engine numbers the calls of one answer; a conversation needs names that are its own.
        message["tool_calls"] = [{**call, "id": new_id("call")} for call in result.tool_calls]
    return message


def envelope(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """Return what every chunk of one answer begins with."""
    return {"id": new_id(prefix), "object": kind, "created": int(time.time()), "model": model}


class CallSplitter:
    """Passes text on as it comes, and holds back what may be a tool call, however the model writes those.

    Parameters
    ----------
    tools
        Whether there are tools; without any, nothing is held back.
    forced
        The whole answer is a call.
    """

    def __init__(self, *, tools: bool, forced: bool) -> None:
        self._holds = tools
        self._all = tools and forced
        self._held = ""
        self.sent = ""

    def push(self, text: str) -> str:
        """Return what can be sent now."""
        if not self._holds:
            return text
        self._held += text
        # An answer that is JSON from its first character may be a call without a mark.
        if self._all or (not self.sent and self._held.lstrip()[:1] in ("", "{", "[")):
            return ""
        at = next((i for i in range(len(self._held)) if _may_begin(self._held[i:])), len(self._held))
        out, self._held = self._held[:at], self._held[at:]
        self.sent += out
        return out

    def rest(self, result: Result) -> str:
        """Return what was held back and is no call after all."""
        if not self._holds or not result.text.startswith(self.sent):
            return ""
        return result.text[len(self.sent) :]


def _may_begin(text: str) -> bool:
    return any(text.startswith(mark) or mark.startswith(text) for mark in _MARKS)
