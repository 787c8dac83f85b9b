"""The estimate, beside what llama.cpp holds after the load."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from perf_model import Shape, write_perf_model

import nbinfer as nb

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.engine

SMALL = Shape(layers=3, hidden=256, heads=4, kv_heads=2, ffn=512, context=4096, vocabulary=5000)


@pytest.fixture(scope="module")
def perf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("perf")

    def make(kind: Any) -> str:
        path: Path = folder / f"{kind}.gguf"
        if not path.exists():
            write_perf_model(path, kind, shape=SMALL)
        return str(path)

    return make


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("demo", {}),
        ("demo", {"context_size": 700, "parallel": 3}),
        ("demo", {"kv_type": "q8_0", "parallel": 1}),
        ("demo-embed", {}),
        ("demo-vision", {}),
        ("q4_0", {}),
        ("q4_0", {"context_size": 2048, "parallel": 1, "kv_type": "q8_0"}),
        ("q8_0", {"flash_attention": False}),
        ("f16", {"batch_size": 512, "micro_batch": 128}),
    ],
)
def test_the_estimate_is_what_the_load_takes(
    perf: Callable[[str], str], model: str, options: dict[str, Any], mmap: bool, exact: bool
) -> None:
    ref = model if model.startswith("demo") else perf(model)
    estimate = nb.estimate(ref, mmap=mmap, exact=exact, gpus=[], **options)
    assert estimate.exact is exact
    with nb.load(ref, name="measured", mmap=mmap, threads=1, **options) as loaded:
        real = loaded.measured_memory()
        assert loaded.info.effective["context_size"] == estimate.context_size
        assert loaded.info.parallel == estimate.settings.parallel
    assert real is not None
    ram = estimate.ram
    assert real["CPU"]["context"] == ram.cache + ram.state
    assert real["CPU"]["compute"] == pytest.approx(ram.compute, rel=0 if exact else 0.08)
    assert real["CPU"]["weights"] == ram.weights + ram.file_backed


def test_a_model_that_does_not_fit_is_refused_with_a_setting_that_does(
    perf: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbinfer.memory.machine import Machine, Ram

    small = Machine(ram=Ram(total=64 << 20, available=52 << 20))
    monkeypatch.setattr(sys.modules["nbinfer.memory.estimate"], "machine", lambda: small)
    with pytest.raises(nb.NbinferError, match=r"does not fit(.|\n)*context_size=") as caught:
        nb.load(perf("q8_0"), context_size=4096 * 16, threads=1)
    assert isinstance(caught.value, MemoryError)
    assert len(str(caught.value).splitlines()) <= 5
    with nb.load(perf("q8_0"), context_size=4096, force=True, threads=1) as forced:
        assert forced.memory.verdict in ("fits", "tight", "does not fit")


def test_a_loaded_model_knows_its_estimate_and_its_measure() -> None:
    with nb.load("demo", threads=1, name="known") as model:
        assert model.memory.verdict == "fits"
        measured = model.measured_memory()
        assert measured is not None
        assert measured["CPU"]["context"] == model.memory.ram.cache
