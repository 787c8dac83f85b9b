"""What the bindings' build allows: fast kernels without the ones that crash."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from perf_model import Shape, write_perf_model

from nbinfer.engines.llamacpp.library import library, may_rearrange_weights
from nbinfer.processor import amx, amx_check

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


def test_a_build_without_the_functions_to_try_is_not_called_broken() -> None:
    other = next(Path(library()._lib._name).parent.glob("*ggml-base*"))
    assert not amx.computes(str(other))
    assert not amx.is_broken(str(other))


def test_without_an_interpreter_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", None)
    path = library()._lib._name
    assert (amx.computes(path), amx.is_broken(path)) == (False, False)


def test_another_build_under_the_same_name_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [1, 0]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), ends.pop(0)))
    path = tmp_path / "libllama.so"
    path.write_bytes(b"one")
    assert [amx.is_broken(str(path)) for _ in range(2)] == [True, True]
    path.write_bytes(b"another")
    assert amx.computes(str(path))


def test_an_interrupt_of_the_kernel_does_not_reach_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "win32":
        pytest.skip("no sessions of processes there")
    trial = tmp_path / "trial.py"
    trial.write_text("import os, sys\nsys.exit(os.getsid(0) != os.getpid())")
    monkeypatch.setattr(amx_check, "__file__", str(trial))
    assert amx.computes(str(trial))


def test_a_system_that_cannot_refuse_amx_leaves_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: object) -> None:
        raise TypeError(name)  # as Windows does, where no library is the program itself

    bound = library()._lib
    shared = ctypes.CDLL(bound._name, handle=bound._handle)
    monkeypatch.setattr(amx, "has_amx", lambda _: True)
    monkeypatch.setattr(amx, "computes", lambda _: False)
    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert amx.may_rearrange(shared) is False


def test_two_threads_that_load_first_leave_stderr_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("AMX is refused on Linux only")
    bound = library()._lib
    shared = ctypes.CDLL(bound._name, handle=bound._handle)
    entered, first_left = threading.Event(), threading.Event()
    second = threading.Thread(target=amx.may_rearrange, args=(shared,))

    def layouts(_: object) -> dict[str, int]:
        if threading.current_thread() is second:
            entered.set()
            first_left.wait(10)
        else:
            second.start()
            entered.wait(0.2)
        return {}

    monkeypatch.setattr(amx, "has_amx", lambda _: True)
    monkeypatch.setattr(amx, "computes", lambda _: False)
    monkeypatch.setattr(amx_check, "weight_layouts", layouts)
    before, kept = os.fstat(2), os.dup(2)
    try:
        assert amx.may_rearrange(shared)
        first_left.set()
        second.join()
        assert os.path.samestat(os.fstat(2), before)
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_a_build_that_crashes_leaves_no_file_behind() -> None:
    pytest.importorskip("resource")
    tried = (
        "import resource, runpy, sys\n"
        "sys.argv = ['check', '/absent']\n"
        "try:\n    runpy.run_path({!r}, run_name='__main__')\n"
        "except OSError:\n    print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", tried.format(amx_check.__file__)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "(0, 0)"


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
