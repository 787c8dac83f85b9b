"""A result as a mimebundle: what was said, how it ended, and what it cost."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from nbinfer.display.code import code_block
from nbinfer.display.markdown import render
from nbinfer.display.style import page
from nbinfer.display.text import escape, printable

if TYPE_CHECKING:
    from nbinfer.contract.rendering import Bundle
    from nbinfer.contract.results import Result

View: TypeAlias = Literal["rich", "text", "code", "json", "html"]
"""How to show an answer; the result itself always holds the raw text."""

VIEWS: tuple[View, ...] = get_args(View)

_FIRST_FENCE = re.compile(r"^[ ]{0,3}(?:`{3,}|~{3,})[ \t]*([^\s`]*)", re.MULTILINE)
_TABLE_ROWS = 100


def result_bundle(
    result: Result,
    *,
    view: View = "rich",
    footer: bool = True,
    running: bool = False,
) -> Bundle:
    """Return (data, metadata) that show ``result``: plain text always, and HTML or JSON by ``view``.

    Parameters
    ----------
    view
        ``rich`` renders Markdown, or ``parsed`` as a table; ``text`` is the raw text; ``code`` the first
        fenced block; ``json`` the answer as JSON; ``html`` the answer as a page in a frame that runs no
        script and loads nothing.
    footer
        Whether a line under the answer names the model, tokens, speed and how it ended.
    running
        Whether more is to come: the state of a stream.
    """
    data: dict[str, Any] = {"text/plain": _plain(result, view, running=running)}
    if view == "json" and not running:
        value, valid = _json_value(result)
        if valid:
            data["application/json"] = value
            return data, metadata(result)
    if view != "text":
        parts = [_reasoning(result, running=running), _answer(result, view, running=running), _state(result)]
        if footer:
            parts.append(f'<div class="nbinfer-foot">{escape(summary(result, running=running))}</div>')
        data["text/html"] = page(*parts)
    return data, metadata(result)


def metadata(result: Result) -> dict[str, Any]:
    """Return what a saved notebook remembers of the request: plain JSON under the key ``nbinfer``."""
    from nbinfer._version import __version__

    kept = {
        "version": __version__,
        "model": result.model,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.usage.prompt_tokens,
        "completion_tokens": result.usage.completion_tokens,
        "seed": result.params.get("seed"),
        "temperature": result.params.get("temperature"),
    }
    return {"nbinfer": {name: value for name, value in kept.items() if value not in (None, "")}}


def summary(result: Result, *, running: bool = False) -> str:
    """Return the one line under an answer: model · tokens · speed · how it ended."""
    count = result.usage.completion_tokens
    parts = [result.model, f"{count} token{'' if count == 1 else 's'}" if count else ""]
    speed = result.timings.tokens_per_second
    if speed is not None:
        parts.append(f"{speed:.3g} tok/s" if speed < 100 else f"{speed:.0f} tok/s")  # noqa: PLR2004 - three digits
    parts.append("…" if running else result.finish_reason)
    return " · ".join(part for part in parts if part)


def state_words(result: Result) -> str:
    """Return why an answer is not what was asked for; empty for one that is complete."""
    if result.finish_reason == "error":
        return f"failed: {result.error or 'the engine gave no reason'}"
    if result.finish_reason == "interrupted":
        return "interrupted: the answer is not complete"
    if result.finish_reason == "length":
        return "cut off: max_tokens, or the end of the context, was reached"
    return ""


def _state(result: Result) -> str:
    words = state_words(result)
    kind = "error" if result.finish_reason == "error" else "warn"
    return f'<div class="nbinfer-note nbinfer-{kind}">{escape(words)}</div>' if words else ""


def _plain(result: Result, view: View, *, running: bool) -> str:
    text = result.text
    if view == "code" and not running:
        text = result.code or text
    elif view == "json" and not running:
        value, valid = _json_value(result)
        text = _dumps(value) if valid else text
    words = "" if running else state_words(result)
    return printable("\n".join(part for part in (text, words and f"[{words}]") if part))


def _reasoning(result: Result, *, running: bool) -> str:
    if not result.reasoning:
        return ""
    # Open while it is all there is to see, folded as soon as the answer begins.
    state = " open" if running and not result.text else ""
    words = len(result.reasoning.split())
    title = f"Reasoning ({words} word{'' if words == 1 else 's'})"
    return f"<details{state}><summary>{title}</summary><div>{render(result.reasoning)}</div></details>"


def _answer(result: Result, view: View, *, running: bool) -> str:
    if view == "json":
        return code_block(result.text, "json")
    if view == "code":
        fence = _FIRST_FENCE.search(result.text)
        if result.code is None:
            return code_block(result.text)
        return code_block(result.code, fence.group(1) if fence else "")
    if view == "html":
        return code_block(result.text, "html") if running else _frame(result.text)
    if result.parsed is not None and not isinstance(result.parsed, str):
        return _value(_plain_value(result.parsed))
    calls = code_block(_dumps(list(result.tool_calls)), "json") if result.tool_calls else ""
    return render(result.text) + calls


def _frame(page: str) -> str:
    """Show a page that a model wrote: no script, no request, no way out of the frame."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"
    # The policy does not cover what these tags do; the sandbox covers the rest.
    inert = re.sub(r"<(?=/?\s*(?:link|meta|base)\b)", "&lt;", page, flags=re.IGNORECASE)
    source = f'<meta http-equiv="Content-Security-Policy" content="{policy}">{inert}'
    return (
        f'<iframe sandbox="" srcdoc="{escape(source)}" title="HTML written by the model" '
        'style="width:100%;height:24em;border:1px solid;background:#fff"></iframe>'
    )


# -- parsed values ------------------------------------------------------------------------------------------


def _plain_value(value: Any) -> Any:
    """Return ``value`` as dicts, lists and scalars."""
    if hasattr(value, "model_dump"):  # pydantic, without importing it
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain_value(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain_value(v) for v in value]
    return value


def _dumps(value: Any) -> str:
    return json.dumps(_plain_value(value), indent=2, ensure_ascii=False, default=str)


def _json_value(result: Result) -> tuple[Any, bool]:
    """Return the answer as a JSON value, and whether it is one."""
    text = result.text if result.parsed is None else _dumps(result.parsed)
    try:
        return json.loads(text), True
    except ValueError:
        return None, False


def _is_flat(value: Any) -> bool:
    return not isinstance(value, Mapping | list)


def _value(value: Any) -> str:
    """Return a flat record or a list of flat records as a table, anything else as JSON."""
    if isinstance(value, Mapping) and value and all(map(_is_flat, value.values())):
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{_cell(v)}</td></tr>" for k, v in value.items())
        return f"<table>{rows}</table>"
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        names = list(dict.fromkeys(name for row in value for name in row))
        if names and all(_is_flat(cell) for row in value for cell in row.values()):
            head = "".join(f"<th>{escape(name)}</th>" for name in names)
            rows = "".join(
                f"<tr>{''.join(f'<td>{_cell(row.get(name))}</td>' for name in names)}</tr>"
                for row in value[:_TABLE_ROWS]
            )
            more = f"<p>… {len(value) - _TABLE_ROWS} more rows</p>" if len(value) > _TABLE_ROWS else ""
            return f"<table><tr>{head}</tr>{rows}</table>{more}"
    return code_block(_dumps(value), "json")


def _cell(value: Any) -> str:
    return "" if value is None else escape(value)
