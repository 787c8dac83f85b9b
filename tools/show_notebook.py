"""Print an executed notebook in the terminal: each cell's code, and what it answered.

    python tools/show_notebook.py build/01-quickstart.ipynb

Exits with 1 when a cell failed, or when none was run.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import nbformat
from rich.console import Console
from rich.markdown import Markdown
from rich.syntax import Syntax
from rich.text import Text

_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def answer(output: Any) -> str:
    """Return what a cell's output shows as plain text; empty for pictures and the like."""
    match output.output_type:
        case "stream":
            text = output.text
        case "error":
            text = f"{output.ename}: {output.evalue}"
        case _:
            text = output.get("data", {}).get("text/plain", "")
    # Text of a model or a library must not move the cursor or recolour the terminal.
    return _CONTROL.sub("", text).strip("\n")


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
        for output in cell.outputs:
            is_error = output.output_type == "error"
            failed = failed or is_error
            text = answer(output)
            if text:
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
