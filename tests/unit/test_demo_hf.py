"""The chat model that ships as GGUF, in Hugging Face's form: the same weights, the same tokens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nbinfer.models import demo_hf, discover, resolve
from nbinfer.models.demo import demo_embed_path, demo_path
from nbinfer.models.llama_hf import convert_llama

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path))
    return resolve("demo-hf").path


def test_it_is_made_once_and_listed_then(folder: Path) -> None:
    made = (folder / "model.safetensors").stat().st_mtime_ns
    again = resolve("demo-hf")
    assert (again.name, again.format, again.source) == ("demo-hf", "safetensors", "demo")
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert "demo-hf" in [model.ref for model in discover("demo")]
    left = sorted(path.name for path in folder.parent.iterdir())
    assert [name for name in left if not name.endswith(".lock")] == [folder.name]


def test_half_a_model_never_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path))

    def broken(source: Path, target: Path) -> None:
        convert_llama(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_hf, "convert_llama", broken)
        with pytest.raises(KeyboardInterrupt):
            resolve("demo-hf")
    assert not demo_hf.demo_hf_folder().exists()
    assert (resolve("demo-hf").path / "tokenizer.json").is_file()


def test_the_header_is_that_of_the_gguf_file(folder: Path) -> None:
    ours, theirs = resolve("demo-hf").header, resolve("demo").header
    assert ours.context_length == theirs.context_length == 1024
    assert ours.parameters == theirs.parameters
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 64)


def test_weights_are_what_the_quantised_ones_stand_for(folder: Path) -> None:
    import gguf
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(demo_path()).tensors}
    assert len(weights) == len([name for name in tensors if name.endswith(".weight")])
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
    ):
        found = tensors[theirs]
        expected = gguf.quants.dequantize(found.data, found.tensor_type)
        assert weights[ours].dtype == np.float32
        assert np.array_equal(weights[ours], expected)
    # GGUF has neighbouring rows where Hugging Face has the halves of a head.
    found = tensors["blk.0.attn_k.weight"]
    rows = gguf.quants.dequantize(found.data, found.tensor_type)
    assert np.array_equal(
        weights["model.layers.0.self_attn.k_proj.weight"], np.concatenate([rows[::2], rows[1::2]])
    )


@pytest.mark.engine
@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "  two  spaces\n\nand\tlines \r\n ",
        "naïve café, 東京, 🙂 and 12345 it's WE'LL",
        "def f(x):\n    return x ** 2  # square\n",
        "<|im_start|>user\nHello<|im_end|>\n",
    ],
)
def test_a_text_has_the_same_tokens(folder: Path, text: str) -> None:
    from support.demo_engine import open_demo
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine = open_demo()
    try:
        ids = engine.tokenize(text)
    finally:
        engine.close()
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="llama model"):
        convert_llama(demo_embed_path(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
