"""Write the tables of options into the documentation, from the table that the parser reads.

python tools/docs_tables.py          # rewrites docs/guides/cells.md
"""

from __future__ import annotations

from pathlib import Path

from nbinfer.magics.options import COMMANDS, INFER, describe

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "cells.md"


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    # A bar would end the cell; braces in backticks are text everywhere.
    lines = [f"| `{left}` | {right} |" for left, right in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines])


def tables() -> dict[str, str]:
    """Return each generated part of the page by its name."""
    commands = [
        ("%nbinfer " + " ".join((command.name, *command.words)), command.help) for command in COMMANDS
    ]
    load = next(command for command in COMMANDS if command.name == "load")
    return {
        "options": _table(("option", "meaning"), describe(INFER)),
        "commands": _table(("command", "meaning"), commands)
        + "\n\nOptions of `%nbinfer load`:\n\n"
        + _table(("option", "meaning"), describe(load.options)),
    }


def written(page: str) -> str:
    """Return the page with every generated part as it should be."""
    for name, text in tables().items():
        mark, end = f"<!-- {name}: begin (written by tools/docs_tables.py) -->", f"<!-- {name}: end -->"
        before, rest = page.split(mark)
        page = f"{before}{mark}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()
