"""Print an executed notebook in the terminal: each cell's code, and what it answered.

    python tools/show_notebook.py build/01-quickstart.ipynb

Exits with 1 when a cell failed, or when none was run.
"""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from rich.console import Console
from rich.markdown import Markdown
from rich.syntax import Syntax
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def answers(outputs: list[Any]) -> Iterator[tuple[str, bool]]:
    """Yield each answer as (plain text, is it an error).

    Text that was printed in pieces comes back as one.
    """
    for kind, group in itertools.groupby(outputs, lambda output: (output.output_type, output.get("name"))):
        texts = [plain_text(output) for output in group]
        for text in ["".join(texts)] if kind[0] == "stream" else texts:
            if text.strip("\n"):
                yield text.strip("\n"), kind[0] == "error"


def plain_text(output: Any) -> str:
    """Return what one output shows as plain text; empty for pictures and the like."""
    match output.output_type:
        case "stream":
            text = output.text
        case "error":
            text = f"{output.ename}: {output.evalue}"
        case _:
            text = output.get("data", {}).get("text/plain", "")
    # Text of a model or a library must not move the cursor or recolour the terminal.
    return _CONTROL.sub("", text)


def show(notebook: Any, console: Console) -> bool:
    """Print the notebook; returns whether it ran and no cell failed."""
    ran = failed = False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            console.print(Markdown(cell.source))
            continue
        if cell.cell_type != "code":
            continue
        console.print(Syntax(cell.source, "python", background_color="default", word_wrap=True))
        ran = ran or cell.execution_count is not None
        for text, is_error in answers(cell.outputs):
            failed = failed or is_error
            console.print(Text(text, style="bold red" if is_error else "bold green"))
        console.print()
    return ran and not failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Print an executed notebook in the terminal.")
    parser.add_argument("notebook", type=Path)
    options = parser.parse_args()
    notebook = nbformat.read(options.notebook, as_version=4)  # type: ignore[no-untyped-call]
    if not show(notebook, Console()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
