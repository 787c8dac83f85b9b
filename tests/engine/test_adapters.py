"""LoRA adapters on the demo model: made by the test, small, and strong enough to be seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from support.demo_engine import open_demo

from nbinfer.contract.errors import ModelLoadError, ModelNotFound, RequestError
from nbinfer.contract.requests import CompletionRequest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

QUESTION = ({"role": "user", "content": "What is the capital of France?"},)
PLAIN = "The capital of France is Paris."


def write_adapter(path: Path, *, scale: float, rows: int = 384, seed: int = 0) -> Path:
    """A rank-2 adapter of the first layer's feed-forward."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    writer.add_tensor(
        "blk.0.ffn_up.weight.lora_a", (scale * rng.standard_normal((2, 128))).astype(np.float32)
    )
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", rng.standard_normal((rows, 2)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def width() -> int:
    from nbinfer.gguf import read_header
    from nbinfer.models.demo import demo_path

    (tensor,) = (t for t in read_header(demo_path()).tensors if t.name == "blk.0.ffn_up.weight")
    return int(tensor.shape[1])


def test_adapters_are_chosen_by_name_and_do_not_mix(tmp_path: Path, width: int) -> None:
    files = {
        "nothing": write_adapter(tmp_path / "nothing.gguf", scale=0.0, rows=width),
        "wild": write_adapter(tmp_path / "wild.gguf", scale=3.0, rows=width),
    }
    engine = open_demo(lora=files)
    try:

        def ask(adapter: str | None) -> CompletionRequest:
            return CompletionRequest(messages=QUESTION, adapter=adapter, max_tokens=20, priority="batch")

        wild = engine.submit(ask("wild")).result(30).text
        assert wild != PLAIN
        mixed = [engine.submit(ask(name)) for name in (None, "wild", "nothing") * 6]
        texts = [stream.result(30) for stream in mixed]
        assert [r.text for r in texts] == [PLAIN, wild, PLAIN] * 6
        assert texts[1].params["adapter"] == "wild"
        with pytest.raises(RequestError, match="nothing, wild"):
            engine.submit(ask("missing"))
    finally:
        engine.close()


def test_one_adapter_without_a_name_is_always_on(tmp_path: Path, width: int) -> None:
    engine = open_demo(lora=write_adapter(tmp_path / "wild.gguf", scale=3.0, rows=width))
    try:
        assert engine.submit(CompletionRequest(messages=QUESTION, max_tokens=20)).result(30).text != PLAIN
    finally:
        engine.close()


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path, width: int) -> None:
    with pytest.raises(ModelNotFound, match="no adapter file"):
        open_demo(lora=tmp_path / "missing.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(60))
    other = write_adapter(tmp_path / "other.gguf", scale=1.0, rows=width + 32)
    for path in (bad, other):
        with pytest.raises(ModelLoadError, match=path.name):
            open_demo(lora=path)
