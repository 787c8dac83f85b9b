"""The random-weight model for measurements is a model that llama.cpp loads, tokenises with and runs."""

from __future__ import annotations

import filecmp
from typing import TYPE_CHECKING

import pytest
from perf_model import SPECIAL_TOKENS, Shape, WeightType, perf_model, vocabulary, write_perf_model
from support.plain_llama import plain_llama

if TYPE_CHECKING:
    from pathlib import Path

SMALL = Shape(layers=1, hidden=128, heads=2, kv_heads=1, ffn=256, context=256, vocabulary=4000)


@pytest.mark.parametrize("size", [259, 260, 3000, 151_936])
def test_every_token_is_a_byte_or_made_by_one_merge(size: int) -> None:
    tokens, merges = vocabulary(size)
    assert len(tokens) == len(set(tokens)) == size
    assert tuple(tokens[-3:]) == SPECIAL_TOKENS
    made = set(tokens[:256])
    for merge, token in zip(merges, tokens[256:-3], strict=True):
        left, right = merge.split(" ")
        assert {left, right} <= made
        assert left + right == token
        made.add(token)


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(SystemExit, match="at least 259"):
        vocabulary(258)


@pytest.mark.engine
@pytest.mark.parametrize("weight_type", ["q8_0", "q4_0", "f16"])
def test_llama_cpp_runs_it(weight_type: WeightType, tmp_path: Path) -> None:
    path = tmp_path / "perf.gguf"
    write_perf_model(path, weight_type, shape=SMALL)
    with plain_llama(path, n_ctx=256) as model:
        assert model.n_vocab() == SMALL.vocabulary
        for text in ("The quick brown fox jumps.", "Żółw, 日本 😀\n\n  x\t1234"):
            tokens = model.tokenize(text.encode(), add_bos=False)
            assert model.detokenize(tokens).decode() == text
        assert len(model.tokenize(b"<|im_start|>user", add_bos=False, special=True)) < 5
        generated = [token for token, _ in zip(model.generate([1, 2, 3], temp=0), range(8), strict=False)]
        assert all(0 <= token < SMALL.vocabulary for token in generated)


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_perf_model(tmp_path / name, "q8_0", seed=seed, shape=SMALL)
    assert filecmp.cmp(tmp_path / "a", tmp_path / "b", shallow=False)
    assert not filecmp.cmp(tmp_path / "a", tmp_path / "c", shallow=False)


def test_it_is_written_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path))
    path = perf_model("q8_0", shape=SMALL)
    assert list((tmp_path / "perf").iterdir()) == [path]
    before = path.stat().st_mtime_ns
    assert perf_model("q8_0", shape=SMALL) == path
    assert path.stat().st_mtime_ns == before
    assert perf_model("q8_0", seed=1, shape=SMALL) != path
