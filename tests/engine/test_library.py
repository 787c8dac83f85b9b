"""What the bindings' build allows: fast kernels without the ones that crash."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from perf_model import Shape, write_perf_model

from nbinfer.engines.llamacpp.library import library, may_rearrange_weights
from nbinfer.memory.probe import amx, amx_check

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


def test_weights_are_rearranged_where_amx_computes_or_is_kept_out() -> None:
    allowed = may_rearrange_weights()
    bound = library()._lib
    shared = ctypes.CDLL(bound._name, handle=bound._handle)
    layouts = amx_check.weight_layouts(amx_check.bind(shared))
    if amx.uses(shared):
        assert allowed
        assert "AMX" in layouts
    else:
        assert allowed == ("AMX" not in layouts)


def test_a_library_that_cannot_be_tried_does_not_compute_with_amx(tmp_path: Path) -> None:
    broken = tmp_path / "libllama.so"
    broken.write_bytes(b"not a library")
    assert not amx.computes(str(broken))
    assert not amx.computes(str(tmp_path / "absent.so"))


def test_the_check_finds_products_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = library()._lib
    may_rearrange_weights()
    shared = ctypes.CDLL(bound._name, handle=bound._handle)
    # The file's own layout in the place of AMX's, and then with another sum.
    plain = amx_check.bind(shared)["ggml_backend_cpu_buffer_type"]()
    monkeypatch.setattr(amx_check, "weight_layouts", lambda _: {"AMX": plain})
    assert amx_check.wrong_types(shared) == []
    right = amx_check._products

    def wrong(ggml: Any, layout: int, kind: int, *rest: Any) -> list[float]:
        found = right(ggml, layout, kind, *rest)
        drift = 1.0 if kind == 8 and next(calls) % 2 else 0.0
        return [number + drift for number in found]

    calls = itertools.count()
    monkeypatch.setattr(amx_check, "_products", wrong)
    assert amx_check.wrong_types(shared) == [8, 8]


def test_four_bit_weights_run_and_nothing_is_said_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_perf_model(path, "q4_0", shape=SMALL)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_GENERATE, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "8"
