"""The README, as somebody copies it into a new notebook cell by cell."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.kernel import Ran, kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kernel, pytest.mark.engine]

README = Path(__file__).parents[2] / "README.md"
FIVE_MINUTES = README.read_text(encoding="utf-8").split("## Five minutes")[1].split("\n## ")[0]
CELLS = [cell for _, cell in re.findall(r"^```(python)?\n(.*?)^```", FIVE_MINUTES, re.DOTALL | re.MULTILINE)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Ran]]:
    with kernel(tmp_path_factory.mktemp("r")) as notebook:
        yield [notebook.run(cell) for cell in CELLS]


def _shown(ran: list[Ran], words: str) -> str:
    """What the cell shows that has these words in its source."""
    (found,) = (each for cell, each in zip(CELLS, ran, strict=True) if words in cell)
    values = [content["data"]["text/plain"] for content in found.of("execute_result")]
    return "\n".join([*found.shown, *values])


def test_every_cell_runs_after_those_before_it(ran: list[Ran]) -> None:
    failed = {cell: each.error_text for cell, each in zip(CELLS, ran, strict=True) if each.error_text}
    assert failed == {}
    assert len(ran) >= 7


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        ("capital of France", "The capital of France is Paris."),
        ("%%infer -o answer", "The capital of Japan is Tokyo."),
        ("schema=City", r"City\(country='Japan', capital='Tokyo'\)"),
        ("nb.complete", "The capital of Norway is Oslo."),
        ("nb.extract", r"(?s)capital.*\n1 +Norway.* Oslo "),
        ("nb.classify", r"(?s)label.*\n2 +Cuba +Havana"),
        ("nb.similar", r"\n0 .*0\.\d+"),
        ("nb.estimate", "demo: fits"),
    ],
)
def test_a_cell_shows_what_the_text_says(ran: list[Ran], words: str, pattern: str) -> None:
    shown = _shown(ran, words)
    assert re.search(pattern, shown), shown


def test_its_commands_run_in_a_terminal() -> None:
    (command,) = re.findall(r"^```bash\n(nbinfer .*)\n```", FIVE_MINUTES, re.MULTILINE)
    line = [sys.executable, "-c", "from nbinfer.cli import main; main()", *shlex.split(command)[1:]]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "demo" in done.stdout
    assert "fits" in done.stdout
