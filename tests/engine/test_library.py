"""What the bindings' build allows: fast kernels without the ones that crash."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from perf_model import Shape, write_perf_model

from nbinfer.engines.llamacpp.library import library, may_rearrange_weights
from nbinfer.memory.probe import amx

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

SMALL = Shape(layers=2, hidden=256, heads=4, kv_heads=2, ffn=512, context=256, vocabulary=4000)
LOAD_AND_GENERATE = """
import sys
import nbinfer as nb
with nb.load(sys.argv[1], threads=1) as model:
    print(model.infer("a b c", raw=True, max_tokens=8).usage.completion_tokens)
"""


def test_weights_are_rearranged_only_where_amx_is_kept_out() -> None:
    library()
    allowed = may_rearrange_weights()
    if b"AMX_INT8 = 1" in library().llama_print_system_info():
        bound = library()._lib
        layouts = amx._weight_layouts(ctypes.CDLL(bound._name, handle=bound._handle))
        assert allowed == ("AMX" not in layouts)
    else:
        assert allowed


def test_four_bit_weights_run_and_nothing_is_said_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_perf_model(path, "q4_0", shape=SMALL)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_GENERATE, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "8"
