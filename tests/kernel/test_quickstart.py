"""The quickstart, as it is committed and as it runs in a real kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from show_notebook import answers

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01-quickstart.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """What each cell shows, by the cell's id; a cell that fails fails the fixture."""
    notebook = read()
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return {
        cell.id: "\n".join(text for text, _ in answers(cell))
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("ask", "The capital of France is Paris."),
        ("stream", "plt.plot(x, np.sin(x))"),
        ("loop", "Once there was a"),
        ("interpolate", "The capital of Japan is Tokyo."),
        ("result", "('The capital of Japan is Tokyo.', "),
        ("parsed", "'Tokyo'"),
        ("frame", "The capital of Kenya is Nairobi."),
        ("embed", "(4, 384)"),
    ],
)
def test_a_cell_shows_its_answer(cell: str, text: str, shown: dict[str, str]) -> None:
    assert text in shown[cell]


@pytest.mark.kernel
def test_the_nearest_note_is_the_one_that_means_the_same(shown: dict[str, str]) -> None:
    first, second = shown["similar"].splitlines()[1:3]
    assert "A feline rested on the rug." in first
    assert "A feline" not in second


@pytest.mark.kernel
def test_both_models_are_listed_before_they_are_unloaded(shown: dict[str, str]) -> None:
    assert "demo-embed" in shown["ps"]
    assert "completion" in shown["ps"]
