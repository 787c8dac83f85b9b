"""Answers of an executed notebook, in the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from nbformat import v4
from rich.console import Console
from show_notebook import show

make: Any = v4  # its functions carry no types


def executed(*outputs: Any, count: int | None = 1) -> Any:
    cells = [
        make.new_markdown_cell("## Ask"),
        make.new_code_cell("%infer What?", execution_count=count, outputs=list(outputs)),
    ]
    return make.new_notebook(cells=cells)


def shown(notebook: Any) -> tuple[bool, str]:
    out = io.StringIO()
    good = show(notebook, Console(file=out, width=80))
    return good, out.getvalue()


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
    good, text = shown(executed(output))
    assert good
    assert "Paris." in text
    assert "%infer What?" in text
    assert "<p>" not in text


def test_text_printed_in_pieces_is_shown_as_one() -> None:
    pieces = [make.new_output("stream", name="stdout", text=text) for text in ("The ", "capital\n", "of")]
    _, text = shown(executed(*pieces))
    assert "The capital\nof\n" in text


def test_a_failed_cell_is_shown_and_reported() -> None:
    good, text = shown(
        executed(make.new_output("error", ename="ModelNotFound", evalue="no model", traceback=[]))
    )
    assert not good
    assert "ModelNotFound: no model" in text


def test_a_notebook_that_was_not_run_is_reported() -> None:
    good, _ = shown(executed(count=None))
    assert not good


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    hostile = "\x1b[2Jcleared\x1b]0;title\x07 \x9b31mred [bold]not markup[/bold]"
    _, text = shown(executed(make.new_output("stream", name="stdout", text=hostile)))
    assert not set("\x1b\x07\x9b") & set(text)
    assert "[bold]not markup[/bold]" in text
