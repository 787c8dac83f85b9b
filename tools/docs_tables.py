"""Write the tables of options and settings into the documentation, from the tables that the program reads.

python tools/docs_tables.py          # rewrites docs/guides/cells.md and docs/guides/settings.md
"""

from __future__ import annotations

from pathlib import Path

from nbinfer.contract.settings import SETTINGS, Setting
from nbinfer.magics.options import COMMANDS, INFER, describe

_GUIDES = Path(__file__).parents[1] / "docs" / "guides"
PAGES = (_GUIDES / "cells.md", _GUIDES / "settings.md")


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    # A bar would end the cell; braces in backticks are text everywhere.
    lines = [f"| `{left}` | {right} |" for left, right in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *lines])


def _setting(setting: Setting) -> str:
    name = f"`NbInfer.{setting.name}`" if setting.magics else "—"
    words = f"{setting.help} ({', '.join(setting.choices)})" if setting.choices else setting.help
    default = "" if setting.default is None else f"`{setting.default!r}`"
    return f"| `{setting.name}` | `{setting.variable}` | {name} | {default} | {words} |"


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
        "settings": "\n".join(
            [
                "| in a file | in the environment | in a notebook | default | meaning |",
                "| --- | --- | --- | --- | --- |",
                *map(_setting, SETTINGS),
            ]
        ),
    }


def written(page: str) -> str:
    """Return the page with every generated part as it should be."""
    for name, text in tables().items():
        mark, end = f"<!-- {name}: begin (written by tools/docs_tables.py) -->", f"<!-- {name}: end -->"
        if mark not in page:
            continue
        before, rest = page.split(mark)
        page = f"{before}{mark}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    for page in PAGES:
        page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main()
