"""The benchmark of vLLM's overhead runs, at a tiny size, and prints its table; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vllm_overhead.py"


def test_the_benchmark_runs_and_writes_its_table(tmp_path: Path) -> None:
    target = tmp_path / "table.json"
    sizes = "--model demo-hf --rows 4 --new 4 --parallel 2 --rounds 1".split()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *sizes, "--json", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(target.read_text(encoding="utf-8"))
    assert [row["side"] for row in table["rows"]] == ["vllm.LLM.generate", "Model.submit", "nb.complete"]
    assert table["rows"][0]["CPU ratio"] == 1
    assert table["notes"][1].startswith("16 tokens")
