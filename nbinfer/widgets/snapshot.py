"""A widget as a still picture: what is seen where widgets cannot run.

That is an untrusted or exported notebook, a terminal, and a notebook without the ``widgets`` extra. Words
carry all of it; bars are an ornament that a sanitizer may drop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbinfer.display.style import page
from nbinfer.display.text import escape, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from nbinfer.contract.rendering import Bundle
    from nbinfer.widgets.state import Parts, Row

HINT = "Live widgets need anywidget: pip install 'nbinfer[widgets]'"


_KINDS = ("ok", "warn", "error", "busy", "off")


@dataclass(frozen=True)
class Table:
    """One titled table of a snapshot: ``rows`` of cells, each a text, a bar or a badge."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """So much of a whole."""

    used: float
    total: float


@dataclass(frozen=True)
class Badge:
    """A word of state."""

    word: str
    kind: str


def snapshot(kind: str, parts: Parts, *, hint: str = "") -> Bundle:
    """Return (data, metadata) with ``text/html`` and ``text/plain`` of a widget's state.

    Parameters
    ----------
    kind
        ``panel``, ``bar``, ``badge`` or ``monitor``.
    parts
        Its state.
    hint
        A line to add below, as :data:`HINT`.
    """
    tables = [table for table in (make(parts) for make in _PARTS[kind]) if table is not None]
    note = f"as of {time.strftime('%H:%M:%S')}" if kind != "badge" else ""
    foot = ". ".join(part for part in (note, hint) if part)
    html = "".join(_html(table) for table in tables)
    if foot:
        html += f'<div class="nbinfer-foot">{escape(foot)}</div>'
    text = "\n\n".join(_text(table) for table in tables)
    return {"text/html": page(html), "text/plain": printable("\n".join(filter(None, (text, foot))))}, {}


# -- tables of the parts --------------------------------------------------------------------------------


def _machine(parts: Parts) -> Table:
    machine = parts["machine"]
    rows = tuple((row["name"], Bar(row["used"], row["total"]), row["text"]) for row in machine["rows"])
    return Table("This machine", (), rows, machine["text"])


def _loaded(parts: Parts) -> Table:
    found = parts["loaded"]["rows"]
    columns = ("name", "mode", "where", "context", "queue", "memory", "keep")
    keys = tuple(key for key in columns if any(row[key] for row in found))
    rows = tuple(tuple(row[key] for key in keys) for row in found)
    head = tuple({"name": "model", "keep": "stays"}.get(key, key) for key in keys)
    return Table("Loaded", head if rows else (), rows, "" if rows else "Nothing is loaded.")


def _requests(parts: Parts) -> Table | None:
    rows = tuple((row["what"], row["model"]) for row in parts["requests"]["rows"])
    return Table("Running", (), rows) if rows else None


def _models(parts: Parts) -> Table:
    part = parts["models"]
    rows = []
    for row in part["rows"]:
        state = Badge("cannot be used", "error") if row["problem"] else Badge(row["verdict"], row["kind"])
        rows.append((row["name"], row["source"], row["problem"] or row["about"], row["size"], state))
    note = part["text"] or ("looking…" if part["busy"] else "")
    head = ("model", "source", "about", "size", "fits here")
    return Table("On this disk", head if rows else (), tuple(rows), note)


def _plan(parts: Parts) -> Table | None:
    plan: Row = parts["plan"]
    if not plan:
        return None
    if plan.get("error"):
        return Table("Will it fit?", (), ((plan["ref"], plan["error"]),))
    rows: list[tuple[Any, ...]] = [
        (row["name"], Bar(row["used"], row["total"]), row["text"]) for row in plan["bars"]
    ]
    rows += [("", "", segment["text"]) for segment in plan["segments"]]
    rows.append(("verdict", Badge(plan["verdict"]["word"], plan["verdict"]["kind"]), plan["verdict"]["text"]))
    rows += [("" if i else "what fits", "", row["label"]) for i, row in enumerate(plan["advice"])]
    return Table(f"Will it fit? {plan.get('name', plan['ref'])}", (), tuple(rows), plan["source"])


def _backends(parts: Parts) -> Table:
    rows = tuple(
        (row["name"], Badge(row["word"], row["kind"]), row["detail"], _sentences(row["install"], row["more"]))
        for row in parts["backends"]["rows"]
    )
    return Table("Backends", (), rows)


def _sentences(*texts: str) -> str:
    return ". ".join(text.rstrip(".") for text in texts if text)


def _messages(parts: Parts) -> Table | None:
    rows = tuple((row["text"],) for row in parts["messages"]["rows"])
    return Table("Messages", (), rows) if rows else None


def _badge(parts: Parts) -> Table:
    row = parts["badge"]
    return Table("", (), ((row["name"], Badge(row["word"], row["kind"]), row["detail"]),))


_PARTS: dict[str, tuple[Callable[[Parts], Table | None], ...]] = {
    "panel": (_messages, _machine, _loaded, _requests, _models, _plan, _backends),
    "bar": (_plan,),
    "monitor": (_machine,),
    "badge": (_badge,),
}


# -- as HTML and as text --------------------------------------------------------------------------------


def _html(table: Table) -> str:
    head = "".join(f'<th style="text-align:left">{escape(title)}</th>' for title in table.head)
    # A sanitizer takes our style sheet away, and then the notebook's own would put all cells to the right.
    left = '<td style="text-align:left">'
    body = "".join(f"<tr>{''.join(f'{left}{_cell(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    grid = f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>" if table.rows else ""
    title = f"<div><strong>{escape(table.title)}</strong></div>" if table.title else ""
    return title + grid + (f'<div class="nbinfer-foot">{escape(table.note)}</div>' if table.note else "")


def _cell(cell: Any) -> str:
    if isinstance(cell, Bar):
        used = min(cell.used, cell.total)
        return f'<meter min="0" max="{cell.total:.0f}" value="{used:.0f}"></meter>' if cell.total else ""
    if isinstance(cell, Badge):
        return _badge_html(cell) if cell.word else ""
    return escape(cell)


def _badge_html(cell: Badge) -> str:
    kind = cell.kind if cell.kind in _KINDS else "off"
    return f'<span class="nbinfer-badge nbinfer-{kind}">{escape(cell.word)}</span>'


def _text(table: Table) -> str:
    rows = [table.head, *table.rows] if table.head else list(table.rows)
    cells = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)] if cells else []
    lines = [_line(row, widths) for row in cells]
    return "\n".join(part for part in (table.title, *lines, table.note) if part)


def _line(row: Iterable[str], widths: list[int]) -> str:
    pairs = zip(row, widths, strict=True)
    return "  " + "  ".join(cell.ljust(width) for cell, width in pairs if width).rstrip()


def _plain(cell: Any) -> str:
    if isinstance(cell, Bar):
        part = min(1.0, cell.used / cell.total) if cell.total else 0.0
        return "█" * round(20 * part) + "░" * (20 - round(20 * part))
    return cell.word if isinstance(cell, Badge) else " ".join(str(cell).split())
