"""Answers of the HTTP API, in OpenAI's shapes."""

from __future__ import annotations

import json
import re
import secrets
import time
from typing import TYPE_CHECKING, Any

from nbinfer.contract.results import Result, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nbinfer.contract.results import TokenLogprob

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
CALL_OPEN = "<tool_call>"


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


def finish_reason(result: Result, *, calls: bool = False) -> str:
    """Return the reason in OpenAI's words."""
    if calls:
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


def split_calls(text: str, names: Sequence[str], *, forced: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """Find the tool calls in an answer.

    Parameters
    ----------
    text
        The answer, with calls as ``<tool_call>{"name": …, "arguments": …}</tool_call>``, or as one bare JSON
        object of a known tool.
    names
        The tools that exist.
    forced
        The answer can only be a call.

    Returns
    -------
    tuple of str and list
        The text beside the calls, and the calls in OpenAI's shape. What cannot be read stays in the text.
    """
    if not names:
        return text, []
    calls: list[dict[str, Any]] = []

    def take(found: re.Match[str]) -> str:
        call = _call(found.group(1), names)
        if call is None:
            return found.group(0)
        calls.append(call)
        return ""

    rest = _CALL.sub(take, text)
    if not calls and (forced or text.lstrip().startswith("{")):
        call = _call(text.strip(), names)
        if call is not None:
            return "", [call]
    return (rest.strip() if calls else text), calls


def _call(text: str, names: Sequence[str]) -> dict[str, Any] | None:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or given.get("name") not in names:
        return None
    arguments = given.get("arguments", given.get("parameters", {}))
    return {
        "id": new_id("call"),
        "type": "function",
        "function": {
            "name": given["name"],
            "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
        },
    }


def chat_message(result: Result, names: Sequence[str], *, forced: bool) -> tuple[dict[str, Any], bool]:
    """Return the assistant's message, and whether it calls tools."""
    content, calls = split_calls(result.text, names, forced=forced)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if result.reasoning:
        message["reasoning_content"] = result.reasoning
    if calls:
        message["content"] = content or None
        message["tool_calls"] = calls
    return message, bool(calls)


def envelope(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """Return what every chunk of one answer begins with."""
    return {"id": new_id(prefix), "object": kind, "created": int(time.time()), "model": model}


class CallSplitter:
    """Passes text on as it comes, and holds back what may be a tool call.

    Parameters
    ----------
    names
        The tools; without any, nothing is held back.
    forced
        The whole answer is a call.
    """

    def __init__(self, names: Sequence[str], *, forced: bool) -> None:
        self._holds = bool(names)
        self._held = ""
        self._all = bool(names) and forced
        self.sent = ""

    def push(self, text: str) -> str:
        """Return what can be sent now."""
        if not self._holds:
            return text
        self._held += text
        if self._all or (not self.sent and self._held.lstrip()[:1] in ("", "{")):
            return ""
        at = self._held.find("<")
        while at >= 0 and not _may_begin(self._held[at:], CALL_OPEN):
            at = self._held.find("<", at + 1)
        out, self._held = (self._held, "") if at < 0 else (self._held[:at], self._held[at:])
        self.sent += out
        return out


def _may_begin(text: str, mark: str) -> bool:
    return text.startswith(mark) or mark.startswith(text)
