"""Reranking on a model with a RANK head: MiniLM's weights and a head of the test's own."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest

import nbinfer as nb
from nbinfer.contract.errors import ContextOverflow, NotSupported
from nbinfer.contract.requests import EmbeddingRequest, RerankRequest
from nbinfer.models.demo import demo_embed_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.engine

DOCUMENTS = ["A cat sat.", "The stock market fell today, and with it the mood.", "x", "A cat sat."]


def write_reranker(path: Path) -> Path:
    """The demo embedding model with a ranking head of random weights."""
    reader = gguf.GGUFReader(demo_embed_path())
    writer = gguf.GGUFWriter(str(path), "bert")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name.endswith(".pooling_type"):
            continue
        kind, value = field.types[0], field.contents()
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(name, value, kind, sub_type=field.types[1])
        else:
            writer.add_key_value(name, value, kind)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(["relevance"])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    rng = np.random.default_rng(5)
    for name, shape in {
        "cls.weight": (384, 384),
        "cls.bias": (384,),
        "cls.output.weight": (1, 384),
        "cls.output.bias": (1,),
    }.items():
        writer.add_tensor(name, (0.05 * rng.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nb.Model]:
    path = write_reranker(tmp_path_factory.mktemp("rank") / "ranker.gguf")
    with nb.load(path, threads=1) as model:
        yield model


def test_the_mode_is_read_from_the_file(model: nb.Model) -> None:
    assert model.mode == "reranking"


def test_a_cancelled_ranking_is_interrupted(model: nb.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = model.engine
    submitted, decode = threading.Event(), engine._context.decode

    def cancelled_meanwhile() -> int:
        submitted.wait(30)
        stream.cancel()
        code: int = decode()
        return code

    monkeypatch.setattr(engine._context, "decode", cancelled_meanwhile)
    # More than one batch holds.
    stream = model.submit(RerankRequest(query="Where is the cat?", documents=DOCUMENTS * 20))
    submitted.set()
    result = stream.result(60)
    assert (result.finish_reason, result.scores.shape, result.n_tokens) == ("interrupted", (0,), ())


def test_scores_are_one_number_per_document_in_their_order(model: nb.Model) -> None:
    scores = model.rerank("Where is the cat?", DOCUMENTS)
    assert scores.shape == (4,)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert scores[0] == pytest.approx(scores[3], abs=1e-3)
    assert len({round(float(s), 3) for s in scores[:3]}) == 3
    assert model.rerank("Where is the cat?", DOCUMENTS[::-1]) == pytest.approx(scores[::-1], abs=1e-3)


def test_a_score_does_not_depend_on_the_pack(model: nb.Model) -> None:
    together = model.rerank("Where is the cat?", DOCUMENTS * 20)[:4]
    alone = np.concatenate([model.rerank("Where is the cat?", [d]) for d in DOCUMENTS])
    assert together == pytest.approx(alone, abs=2e-3)


def test_query_and_document_are_not_interchangeable(model: nb.Model) -> None:
    assert model.rerank("A cat sat.", ["x y z"])[0] != pytest.approx(model.rerank("x y z", ["A cat sat."])[0])


def test_no_documents_no_scores_and_long_ones_are_refused(model: nb.Model) -> None:
    assert model.rerank("q", []).shape == (0,)
    with pytest.raises(ContextOverflow, match="text 1"):
        model.rerank("q", ["fine", "word " * 600])


def test_a_ranking_model_does_not_embed(model: nb.Model) -> None:
    with pytest.raises(NotSupported, match="reranking"):
        model.submit(EmbeddingRequest(texts=["x"]))


@pytest.mark.parametrize("mmap", [True, False])
def test_the_estimate_is_what_a_ranking_model_takes(model: nb.Model, mmap: bool) -> None:
    assert model.path is not None
    estimate = nb.estimate(model.path, mmap=mmap, gpus=[])
    with nb.load(model.path, name="again", mmap=mmap, threads=1) as loaded:
        real = loaded.measured_memory()
    assert real is not None
    assert estimate.exact
    assert real["CPU"]["compute"] == estimate.ram.compute
    assert real["CPU"]["context"] == estimate.ram.cache == 0
    assert real["CPU"]["weights"] == estimate.ram.weights + estimate.ram.file_backed
