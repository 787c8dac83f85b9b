"""Tables of models, backends and settings: a word and a colour for each state, sizes in readable units."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nbinfer.contract.units import human_bytes
from nbinfer.display.style import page
from nbinfer.display.text import escape, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nbinfer.contract.rendering import Bundle

# The four words of a backend's status, and those of the doctor.
_KINDS = {
    "Running": "ok",
    "Installing": "busy",
    "Error": "error",
    "Not Installed": "off",
    "ok": "ok",
    "error": "error",
    "missing": "off",
}

_STATE_COLUMNS = ("status", "state")
_ADVICE_COLUMNS = ("install", "detail")
_COMMAND = re.compile(
    r"""(?:\$?[\w:]+=(?:"[^"]*"|'[^']*'|\S+)\s+)*pip (?:un)?install .+?(?=\s+\# |$)""", re.MULTILINE
)
"""What is to be typed, within advice; a remark may follow it, as in a shell."""


def badge(status: str) -> str:
    """Return ``word`` or ``word: detail`` as HTML: the word in a coloured frame, the detail beside it."""
    word, _, detail = status.partition(": ")
    shown = f'<span class="nbinfer-badge nbinfer-{_KINDS.get(word, "off")}">{escape(word)}</span>'
    return f"{shown} {escape(detail)}" if detail else shown


def badges_html(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as an HTML table, everything escaped.

    Columns called ``status`` or ``state`` become badges, whole numbers in columns that end in ``_bytes``
    become sizes, and missing values stay empty.
    """
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not rows:
        return page("<p>Nothing to show.</p>")
    head = "".join(f"<th>{escape(_title(name))}</th>" for name in names)
    body = "".join(f"<tr>{''.join(_cell(name, row.get(name)) for name in names)}</tr>" for row in rows)
    return page(f"<table><tr>{head}</tr>{body}</table>")


def _title(name: str) -> str:
    return str(name).removesuffix("_bytes").replace("_", " ")


def _nothing(value: Any) -> bool:
    # The names are pandas' own words for nothing.
    nan = isinstance(value, float) and math.isnan(value)
    return value is None or nan or type(value).__name__ in ("NAType", "NaTType")


def _cell(name: str, value: Any) -> str:
    if _nothing(value):
        return "<td></td>"
    if name in _STATE_COLUMNS:
        return f"<td>{badge(str(value))}</td>"
    if str(name).endswith("_bytes"):
        return f"<td>{escape(human_bytes(value))}</td>"
    lines = (_advice(value) if name in _ADVICE_COLUMNS else escape(value)).split("\n")
    return f"<td>{'<br>'.join(lines)}</td>"


def _advice(text: Any) -> str:
    """Return text with its commands as code, each word of them whole."""
    pieces, done = [], 0
    for found in _COMMAND.finditer(str(text)):
        words = (f"<span>{escape(word)}</span>" for word in found.group().split(" "))
        pieces += [escape(str(text)[done : found.start()]), f"<code>{' '.join(words)}</code>"]
        done = found.end()
    return "".join([*pieces, escape(str(text)[done:])])


def _running_model(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of :func:`nbinfer.ps` in the columns that fit a page."""
    busy = row["running"] or row["waiting"]
    # Engines whose sequences share one cache may hold more than one request's context.
    room = max(row["context"], row["context_used"])
    return {
        "name": row["name"],
        "mode": row["mode"],
        "runs": f"{row['backend']}, {row['where']}",
        "context": f"{row['context_used']:,} of {room:,}" if room else "",
        "requests": f"{row['running']} running, {row['waiting']} waiting" if busy else "idle",
        "tokens": f"{row['tokens']:,}",
        "memory": "" if _nothing(row["memory_bytes"]) else human_bytes(row["memory_bytes"]),
    }


def _found_model(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of :func:`nbinfer.models` in the columns that fit a page."""
    parameters, context = row["parameters"], row["context"]
    return {
        "ref": row["ref"],  # what one types; the name is a part of it
        "source": row["source"],
        "architecture": row["architecture"],
        "parameters": "" if _nothing(parameters) else _millions(parameters),
        "quantisation": row["quantisation"],
        "size": human_bytes(row["size_bytes"]),
        "context": "" if _nothing(context) else f"{context:,.0f}",
        "modes": row["modes"],
        "verdict": row["problem"] or row["verdict"],
    }


def _millions(count: float) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"  # noqa: PLR2004 - a billion


_SHORT = {"ps": _running_model, "models": _found_model}
"""Frames with more columns than fit a page, by what they show."""


def frame_bundle(frame: Any) -> Bundle:
    """Return (data, metadata) of a pandas DataFrame of ours."""
    rows: list[dict[str, Any]] = frame.to_dict("records")
    shorter = _SHORT.get(frame.attrs.get("nbinfer_table", ""))
    if shorter is not None and rows:
        with suppress(KeyError):  # somebody took columns out: what is left is shown
            rows = [shorter(row) for row in rows]
            frame = type(frame)(rows)
    return {"text/plain": printable(frame.to_string(index=False)), "text/html": badges_html(rows)}, {}
