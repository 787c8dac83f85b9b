"""Answers of a notebook, in the terminal."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import nbformat
import pytest
import show_notebook
from nbformat import v4
from rich.console import Console

if TYPE_CHECKING:
    from pathlib import Path

make: Any = v4  # its functions carry no types


def code_cell(*outputs: Any) -> Any:
    return make.new_code_cell("%infer What?", execution_count=1, outputs=list(outputs))


def shown(cell: Any) -> tuple[bool, str]:
    out = io.StringIO()
    good = show_notebook.show(cell, Console(file=out, width=80))
    return good, out.getvalue()


def run_tool(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, show_notebook.__file__, *options, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def saved(folder: Path, *cells: Any) -> Path:
    path = folder / "notebook.ipynb"
    nbformat.write(make.new_notebook(cells=cells), path)  # type: ignore[no-untyped-call]
    return path


@pytest.mark.parametrize(
    "output",
    [
        make.new_output("stream", name="stdout", text="Paris.\n"),
        make.new_output("display_data", data={"text/plain": "Paris.", "text/html": "<p>Paris.</p>"}),
        make.new_output("execute_result", data={"text/plain": "Paris."}, execution_count=1),
    ],
    ids=["printed", "displayed", "returned"],
)
def test_answers_are_shown_as_plain_text(output: Any) -> None:
    good, text = shown(code_cell(output))
    assert good
    assert "Paris." in text
    assert "%infer What?" in text
    assert "<p>" not in text


def test_text_printed_in_pieces_is_shown_as_one() -> None:
    pieces = [make.new_output("stream", name="stdout", text=text) for text in ("The ", "capital\n", "of")]
    _, text = shown(code_cell(*pieces))
    assert "The capital\nof\n" in text


def test_a_failed_cell_is_shown_and_reported() -> None:
    good, text = shown(
        code_cell(make.new_output("error", ename="ModelNotFound", evalue="no model", traceback=[]))
    )
    assert not good
    assert "ModelNotFound: no model" in text


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    hostile = "\x1b[2Jcleared\x1b]0;title\x07 \x9b31mred [bold]not markup[/bold]"
    _, text = shown(code_cell(make.new_output("stream", name="stdout", text=hostile)))
    assert not set("\x1b\x07\x9b") & set(text)
    assert "[bold]not markup[/bold]" in text


def test_a_notebook_that_was_not_run_is_reported(tmp_path: Path) -> None:
    path = saved(tmp_path, make.new_code_cell("1 + 1"))
    assert run_tool(path).returncode == 1


@pytest.mark.kernel
def test_execution_shows_what_cells_answer_and_leaves_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, make.new_markdown_cell("# Sums"), make.new_code_cell("1234 + 1"))
    before = path.read_bytes()
    done = run_tool(path, "--execute")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Sums" in done.stdout
    assert "1235" in done.stdout
    assert path.read_bytes() == before


@pytest.mark.kernel
def test_execution_ends_at_the_first_error(tmp_path: Path) -> None:
    path = saved(tmp_path, make.new_code_cell("1 / 0"), make.new_code_cell("print('went on')"))
    done = run_tool(path, "--execute")
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stdout
    assert "went on" not in done.stdout
