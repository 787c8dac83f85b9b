"""The tutorials: how they are committed, and that each shows what its text says it shows."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from save_tutorials import WIDGET, clean, machine_paths
from show_notebook import answers

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_is_committed_with_its_outputs_and_nothing_of_the_machine(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook == clean(read(path)), "run: python tools/save_tutorials.py"
    assert machine_paths(notebook) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    kinds = [output.output_type for cell in code for output in cell.outputs]
    assert "error" not in kinds
    assert len(kinds) >= 3
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_fits_a_phone(path: Path) -> None:
    cells = read(path).cells
    assert cells[0].source.startswith("# ")
    for cell in cells:
        if cell.cell_type == "code":
            assert max(map(len, cell.source.splitlines())) <= 88, cell.id
    assert len(cells) <= 34
    assert sum(len(cell.source) for cell in cells) < 8_000


def test_what_belongs_to_a_run_is_taken_out() -> None:
    v4: Any = nbformat.v4  # not typed
    view = {WIDGET: {"model_id": "1"}, "text/html": "<p>still</p>", "text/plain": "still"}
    bare = {WIDGET: {"model_id": "2"}, "text/plain": "no picture"}
    outputs = [v4.new_output("display_data", data=data) for data in (view, bare)]
    cell = v4.new_code_cell("x", outputs=outputs, metadata={"execution": {"iopub.status.busy": "now"}})
    metadata = {"widgets": {"state": {}}, "language_info": {"name": "python", "version": "3"}}
    notebook = clean(v4.new_notebook(cells=[cell], metadata=metadata))
    assert notebook.metadata == {"language_info": {"name": "python"}}
    assert notebook.cells[0].metadata == {}
    assert [sorted(o.data) for o in notebook.cells[0].outputs] == [["text/html", "text/plain"], sorted(bare)]


@pytest.mark.parametrize(
    "text", ["/home/ada/x.gguf", "in /tmp/abc", r"C:\\Users\\ada", "file:///x", "<b>/root/a</b>"]
)
def test_folders_of_a_machine_are_found(text: str) -> None:
    v4: Any = nbformat.v4  # not typed
    output = v4.new_output("display_data", data={"text/html": text, "image/png": "x/home/y"})
    notebook = v4.new_notebook(cells=[v4.new_code_cell("x", outputs=[output])])
    assert len(machine_paths(notebook)) == 1
    notebook.cells[0].outputs[0].data["text/html"] = "1/2, a/b and https://example.org/home"
    assert machine_paths(notebook) == []


@lru_cache
def shown(name: str) -> dict[str, str]:
    """What each cell of a tutorial shows, by the cell's id; a cell that fails fails the test."""
    (path,) = (path for path in NOTEBOOKS if path.stem.startswith(name))
    notebook = read(path)
    NotebookClient(notebook, timeout=170, kernel_name="python3").execute()
    return {
        cell.id: "\n".join(text for text, _ in answers(cell))
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


@pytest.mark.kernel
@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "cell", "pattern"),
    [
        ("02", "load", r"demo: fits\n.*asked of llama\.cpp"),
        ("02", "gpu", r"(?s)does not fit: [\d.]+ GiB needed on GPU 0, 10 GiB free.*weights 7\.43 GiB"),
        ("02", "advice-shown", r"\{'context_size': \d+\}\n'(fits|tight)"),
        ("02", "sweep", r"65536 +15\.\d +12\.\d +does not fit +does not fit"),
        (
            "02",
            "sweep-picture",
            r"(?s)Memory of .* by context_size and kv_type.*65536 +q8_0 +GPU 0 +12\.3 GiB",
        ),
        ("02", "parts", r"GPU 0 +cache +4294967296 +llama\.cpp"),
        ("03", "interrupt", r"^\d+ of 1000 answered$"),
        ("03", "resume", r"extract 1000/1000 rows"),
        ("03", "answers", r"What is the capital of|Customer \d+"),
        ("03", "count", r"Havana +\d+"),
        ("03", "crosstab", r"carrot +0 +0 +0 +\d\d\d +0 +0"),
        ("03", "bad", r"ContextOverflow: the prompt has [\d,]+ tokens"),
        ("04", "ask", r"\n1 +Grandma's soup.* 0\.\d+\n"),
        ("04", "ask-2", r"\n0 +The boiler was serviced.* 0\.\d+\n"),
        ("04", "map", r"Grandma's soup.* 0\.4\d"),
        ("04", "many", r"(?s)Doctor Weber.*bicycle's rear tyre.*lettuce.*train to Vienna"),
        ("04", "threshold", r"0 +1 +3 +0\.\d+$"),
        ("04", "prompt", r"(?s)Our train to Vienna leaves at 7:40.*nothing was run"),
        ("05", "chat-2", r"Your favorite thing is the moon\."),
        ("05", "table-prompt", r"\| Tue \| 4 \| 5 \|"),
        ("05", "rows-shown", r"Wed +2 +7 +2 plus 7 is 9\."),
        ("05", "vision", r"The background is yellow\."),
        ("06", "other", r"The capital of Japan is Tokyo\."),
        ("06", "crash", r"The capital of Norway is Oslo\."),
        ("06", "openai", r"The capital of Kenya is Nairobi\."),
        ("06", "embeddings", r"\(2, 384\)"),
        ("06", "room", r"(?s)second would be loaded.*huge would not be loaded"),
        ("06", "history", r"^True$"),
        ("06", "end", r"(?s)The sidecar has stopped.*True"),
        ("08", "run", r"200/200 rows done in (?s:.*)row-0 .* run\n"),
        ("08", "journal", r"cache +200\nrun +0\n"),
        ("08", "die", r"True"),
        ("08", "die-notes", r"800/800 rows done"),
        ("08", "spread", r"200/200 rows done in (?s:.*)row-0 .* run\n"),
        ("09", "batch", r"mean +16\.0 +[\d.]+ +8\.25"),
        ("09", "compare", r"(?s)\n1 .*\n2 .*\n4 "),
        ("09", "compare-picture", r"Speed of demo, by how many requests run at once"),
        ("09", "sure", r"(?s)The capital of Peru is Lima\..*perplexity 1\b"),
        ("09", "unsure", r"(?s)Norway.*' N' .* %"),
        ("09", "speculative", r"same text: True\n(\d+) of \1 guesses right"),
        ("09", "repeat", r"same story: True\nOnce there was a"),
    ],
)
def test_a_cell_shows_what_the_text_says(name: str, cell: str, pattern: str) -> None:
    assert re.search(pattern, shown(name)[cell]), shown(name)[cell]


@pytest.mark.kernel
@pytest.mark.engine
def test_what_was_interrupted_is_not_asked_again() -> None:
    before = int(shown("03")["interrupt"].split()[0])
    counts = dict(re.findall(r"^(run|cache) +(\d+)$", shown("03")["resume"], re.MULTILINE))
    # An interrupt may come between a row's commit and its count.
    assert int(counts["cache"]) >= before
    assert int(counts["run"]) + int(counts["cache"]) == 1000
