"""Tool calls out of a model's text.

Every family of models writes them in its own way, and small models write them almost right. What can be read
becomes OpenAI's shape; what cannot stays in the text.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# <tool_call>{…}</tool_call>: Hermes, Qwen, and many tuned after them. The end may be missing.
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
# [TOOL_CALLS] [{…}, …]: Mistral.
_LISTED = re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])", re.DOTALL)
# <|python_tag|>{…} or a bare object: Llama 3.
_BARE = re.compile(r"\A\s*(?:<\|python_tag\|>)?\s*(\{.*\}|\[.*\])\s*\Z", re.DOTALL)
# <function=name><parameter=key>value</parameter>…</function>: Qwen's coders; with {…} inside: Llama.
_FUNCTION = re.compile(r"<function=([\w.-]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([\w.-]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def parse_tool_calls(
    text: str,
    tools: Sequence[Mapping[str, Any]],
) -> tuple[str, tuple[dict[str, Any], ...]]:
    """Split an answer into its text and its tool calls.

    Parameters
    ----------
    text
        What the model wrote.
    tools
        The tools it was offered, in OpenAI's shape; a call of any other name is left in the text.

    Returns
    -------
    The text without the calls, and the calls in OpenAI's shape: ``{"id", "type": "function", "function":
    {"name", "arguments": JSON text}}``. With nothing that can be read: the text as it was, and none.
    """
    names = {name for tool in tools if (name := tool.get("function", tool).get("name"))}
    for pattern, read in _FORMS:
        calls: list[dict[str, Any]] = []
        for found in pattern.finditer(text):
            for name, arguments in read(found):
                if name not in names or not isinstance(arguments, dict):
                    calls.clear()
                    break
                calls.append(_call(len(calls), name, arguments))
        if calls:
            return pattern.sub("", text).strip(), tuple(calls)
    return text, ()


def _call(number: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    written = json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": written}}


def _read_json(found: re.Match[str]) -> Iterator[tuple[str, Any]]:
    """Objects with a name and arguments, one or a list; several may follow one another."""
    text, at = found.group(1), 0
    decoder = json.JSONDecoder(strict=False)
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            # Small models like to forget the last brace.
            if at == 0 and (value := _closed(text)) is not None:
                at = len(text)
            else:
                return
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, dict):
                function = entry.get("function")
                inner = function if isinstance(function, dict) else entry
                arguments = inner.get("arguments", inner.get("parameters", {}))
                if isinstance(arguments, str):
                    arguments = _loads(arguments)
                yield str(inner.get("name")), arguments
        while at < len(text) and text[at] in " \t\r\n,;":
            at += 1


def _read_function(found: re.Match[str]) -> Iterator[tuple[str, Any]]:
    name, body = found.groups()
    parameters = {key: _value(value) for key, value in _PARAMETER.findall(body)}
    if parameters or not body.strip():
        yield name, parameters
    else:
        yield name, _loads(body.strip())


def _closed(text: str) -> Any:
    for tail in ("}", "}}", '"}}', "]}"):
        value = _loads(text + tail)
        if value is not None:
            return value
    return None


def _loads(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None


def _value(text: str) -> Any:
    """A parameter's value: JSON when it reads as a number, list or the like, else the text itself."""
    value = _loads(text)
    return text if value is None and text != "null" else value


_FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Iterator[tuple[str, Any]]]], ...] = (
    (_FUNCTION, _read_function),
    (_TAGGED, _read_json),
    (_LISTED, _read_json),
    (_BARE, _read_json),
)
