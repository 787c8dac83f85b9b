"""Embeddings on the real demo embedding model."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nbinfer.contract.errors import ContextOverflow, EngineClosed, NotSupported, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest, EmbeddingRequest, RerankRequest
from nbinfer.engines.llamacpp import open_engine
from nbinfer.engines.llamacpp.pooled import PooledEngine
from nbinfer.models.demo import demo_embed_path, demo_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from nbinfer.engines.stream import Stream

pytestmark = pytest.mark.engine

TEXTS = ["a cat", "A kitten sleeps.", "The stock market fell today.", "shares dropped", "x", "a " * 200]


@pytest.fixture(scope="module")
def engine() -> Iterator[PooledEngine]:
    engine = open_engine(demo_embed_path(), mode=Mode.EMBEDDING, name="demo-embed", threads=1)
    assert isinstance(engine, PooledEngine)
    yield engine
    engine.close()


def embed(engine: PooledEngine, texts: list[str], **options: object) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = engine.submit(EmbeddingRequest(texts=texts, **options)).result(60).vectors  # type: ignore[arg-type]
    return vectors


def test_vectors_are_unit_float32_of_the_models_size(engine: PooledEngine) -> None:
    vectors = embed(engine, TEXTS)
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert engine.info.dimensions == 384


def test_nearest_neighbours_mean_the_same(engine: PooledEngine) -> None:
    vectors = embed(engine, TEXTS[:4])
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    assert similarity.argmax(axis=1).tolist() == [1, 0, 3, 2]


def test_a_text_has_the_same_vector_alone_and_in_a_pack(engine: PooledEngine) -> None:
    together = embed(engine, TEXTS * 7)
    alone = np.concatenate([embed(engine, [t]) for t in TEXTS])
    cosine = (together.reshape(7, len(TEXTS), -1) * alone).sum(axis=-1)
    assert cosine.min() > 0.9999


def test_order_is_the_callers_order(engine: PooledEngine) -> None:
    assert np.allclose(embed(engine, TEXTS)[::-1], embed(engine, TEXTS[::-1]), atol=1e-3)


def test_no_texts_give_no_vectors(engine: PooledEngine) -> None:
    assert embed(engine, []).shape == (0, 384)


def test_dims_cut_and_normalise_again(engine: PooledEngine) -> None:
    full, cut = embed(engine, TEXTS[:2]), embed(engine, TEXTS[:2], dims=64)
    assert cut.shape == (2, 64)
    assert np.allclose(cut, full[:, :64] / np.linalg.norm(full[:, :64], axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(RequestError, match="384"):
        embed(engine, ["x"], dims=1000)


def test_raw_vectors_are_not_normalised(engine: PooledEngine) -> None:
    raw = embed(engine, ["a cat"], normalize=False)
    assert not np.allclose(np.linalg.norm(raw), 1, atol=1e-2)


def test_a_text_too_long_is_an_error_with_numbers_never_a_cut(engine: PooledEngine) -> None:
    with pytest.raises(ContextOverflow, match="text 1") as caught:
        embed(engine, ["fine", "word " * 600])
    assert caught.value.context_size == 512
    assert caught.value.prompt_tokens > 600


def test_special_tokens_in_a_text_are_only_text(engine: PooledEngine) -> None:
    assert engine.count_tokens("[SEP]") > 3


def test_other_kinds_of_request_are_refused(engine: PooledEngine) -> None:
    for request in (RerankRequest(query="q", documents=["d"]), CompletionRequest(prompt="x")):
        with pytest.raises(NotSupported, match="embedding"):
            engine.submit(request)


def test_a_chat_model_is_not_taken_for_an_embedding_model() -> None:
    with pytest.raises(NotSupported, match="mode='completion'"):
        open_engine(demo_path(), mode=Mode.EMBEDDING, threads=1)


def test_an_encoder_is_not_taken_for_a_chat_model() -> None:
    with pytest.raises(NotSupported, match="encoder"):
        open_engine(demo_embed_path(), mode=Mode.COMPLETION, threads=1)


def test_closing_ends_what_waits() -> None:
    engine = open_engine(demo_embed_path(), mode=Mode.EMBEDDING, threads=1)
    streams = [engine.submit(EmbeddingRequest(texts=["some words to embed"] * 50)) for _ in range(5)]
    engine.close()
    with pytest.raises(EngineClosed):
        streams[-1].result(5)
    with pytest.raises(EngineClosed):
        engine.submit(EmbeddingRequest(texts=["x"]))


def test_a_cancelled_request_is_interrupted_and_the_engine_goes_on(
    engine: PooledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = threading.Event()
    streams: list[Stream] = []
    decode = engine._context.decode

    def cancelled_meanwhile() -> int:
        submitted.wait(30)
        for stream in streams[:2]:
            stream.cancel()
        return decode()

    monkeypatch.setattr(engine._context, "decode", cancelled_meanwhile)
    for texts, dims in ((TEXTS, None), (TEXTS[:1], 16), (TEXTS, None)):
        streams.append(engine.submit(EmbeddingRequest(texts=texts, dims=dims)))
    submitted.set()
    running, waiting, after = (stream.result(60) for stream in streams)
    for result, size in ((running, 384), (waiting, 16)):
        assert (result.finish_reason, result.vectors.shape, result.n_tokens) == ("interrupted", (0, size), ())
    assert (after.finish_reason, after.vectors.shape) == ("stop", (len(TEXTS), 384))
    assert engine.load().waiting == 0


def test_token_vectors_average_to_the_texts_vector(engine: PooledEngine) -> None:
    texts = [*TEXTS, "a cat"]
    loose = open_engine(demo_embed_path(), mode=Mode.EMBEDDING, pooling="none", threads=1)
    try:
        result = loose.submit(EmbeddingRequest(texts=texts, normalize=False)).result(60)
        by_text = result.by_text()
        assert [len(rows) for rows in by_text] == [engine.count_tokens(text) for text in texts]
        means = np.stack([rows.mean(axis=0) for rows in by_text])
        np.testing.assert_allclose(means, embed(engine, texts, normalize=False), atol=1e-3)
        unit = loose.submit(EmbeddingRequest(texts=texts, dims=64)).result(60).vectors
        assert unit.shape == (sum(result.n_tokens), 64)
        np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    finally:
        loose.close()


def test_a_chat_model_makes_embeddings_when_told_how_to_pool() -> None:
    with pytest.raises(NotSupported, match="pooling='mean'"):
        open_engine(demo_path(), mode=Mode.EMBEDDING, threads=1)
    chat = open_engine(demo_path(), mode=Mode.EMBEDDING, pooling="mean", threads=1)
    try:
        vectors = chat.submit(EmbeddingRequest(texts=["What is the capital of Peru?"] * 2)).result(60).vectors
        assert vectors.shape == (2, 128)
        np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    finally:
        chat.close()


@pytest.mark.parametrize("where", ["kernel", "sidecar"])
def test_a_model_says_which_kind_of_vectors_it_makes(where: str) -> None:
    import nbinfer as nb

    texts = ["a cat", "A kitten sleeps."]
    with nb.load("demo-embed", pooling="none", where=where, threads=1, name="loose") as model:
        rows = model.embed_tokens(texts)
        assert [each.shape[1] for each in rows] == [384, 384]
        assert [len(each) for each in rows] == [4, 6]  # with the marks at both ends
        with pytest.raises(NotSupported, match="embed_tokens"):
            model.embed("a cat")
        with pytest.raises(NotSupported, match="embed_tokens"):
            nb.embed(["a cat"], model=model)
