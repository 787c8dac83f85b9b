"""Print a notebook in the terminal: each cell's code, and what it answered.

    python tools/show_notebook.py --execute notebooks/01-quickstart.ipynb    # run it, cell by cell
    python tools/show_notebook.py executed.ipynb                             # one that was run before

The file is not changed. Exits with 1 when a cell failed, or when none was run.
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


def executed(notebook: Any, folder: Path) -> Iterator[Any]:
    """Run a notebook in a kernel of its own and yield each cell when it is done; the first error ends it."""
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook,
        timeout=600,
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
        # The kernel greets with a warning about its own transport, which is not what was asked for.
        extra_arguments=["--log-level=ERROR"],
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                client.execute_cell(cell, index)
            yield cell
            if any(is_error for _, is_error in answers(cell)):
                return


def answers(cell: Any) -> Iterator[tuple[str, bool]]:
    """Yield each answer of a cell as (plain text, is it an error).

    Text that was printed in pieces comes back as one.
    """
    outputs = cell.get("outputs", [])
    for kind, group in itertools.groupby(outputs, lambda output: (output.output_type, output.get("name"))):
        texts = [_plain_text(output) for output in group]
        for text in ["".join(texts)] if kind[0] == "stream" else texts:
            if text.strip("\n"):
                yield text.strip("\n"), kind[0] == "error"


def _plain_text(output: Any) -> str:
    match output.output_type:
        case "stream":
            text = output.text
        case "error":
            text = f"{output.ename}: {output.evalue}"
        case _:
            # Pictures and the like have none.
            text = output.get("data", {}).get("text/plain", "")
    # Text of a model or a library must not move the cursor or recolour the terminal.
    return _CONTROL.sub("", text)


def show(cell: Any, console: Console) -> bool:
    """Print a cell and its answers; returns whether none of them is an error."""
    if cell.cell_type == "markdown":
        console.print(Markdown(cell.source))
    if cell.cell_type != "code":
        return True
    console.print(Syntax(cell.source, "python", background_color="default", word_wrap=True))
    good = True
    for text, is_error in answers(cell):
        good = good and not is_error
        console.print(Text(text, style="bold red" if is_error else "bold green"))
    console.print()
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a notebook, with its answers, in the terminal.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--execute", action="store_true", help="run it first; the file is not changed")
    options = parser.parse_args()
    notebook = nbformat.read(options.notebook, as_version=4)  # type: ignore[no-untyped-call]
    cells = executed(notebook, options.notebook.parent) if options.execute else notebook.cells
    console = Console()
    good = True
    for cell in cells:
        good = show(cell, console) and good
    ran = any(cell.get("execution_count") is not None for cell in notebook.cells)
    if not (good and ran):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
