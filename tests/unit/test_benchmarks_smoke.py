"""Every benchmark runs, at tiny sizes on the demo models, and prints its table; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "batch": "--model demo --rows 3 --prefix 30 --row 6 --new 4 --context 512",
    "structured": "--model demo --rows 1 --peer-rows 1 --new 8",
    "latency": "--model demo --prompt 24 --new 4 --parallel 1 2 --runs 1 --rows 2 --questions 1",
    "busy": "--model demo --tokens 8",
    "embed": "--rows 6",
}
FIRST = {
    "batch": "nbinfer, nb.complete",
    "structured": "nbinfer, free",
    "latency": 1,
    "busy": "nbinfer's default",
    "embed": "nbinfer, model.embed",
}


@pytest.mark.engine
@pytest.mark.parametrize("name", sorted(TINY))
def test_a_benchmark_runs_and_writes_its_table(name: str, tmp_path: Path) -> None:
    target = tmp_path / "table.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), *TINY[name].split(), "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tables = json.loads(target.read_text(encoding="utf-8"))
    assert tables[0]["title"] in " ".join(done.stdout.split())
    rows = tables[0]["rows"]
    assert next(iter(rows[0].values())) == FIRST[name]
    if name == "batch":
        assert all(row["same text"] == "3/3" for row in rows[:-1])
    if name == "embed":
        assert float(rows[1]["least cosine"]) > 0.999
