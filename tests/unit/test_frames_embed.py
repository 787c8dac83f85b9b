"""Vectors: null where there is none, a matrix without a copy, and exact neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from support.fake_engine import FakeEngine, vector
from support.frames import embedding_model, engine_of

from nbinfer.contract.errors import BackendUnavailable, EngineError, NotSupported, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import EmbeddingRequest
from nbinfer.frames import embed, graph, neighbours, searching, similar, submit, vectors
from nbinfer.frames.graph import graph_top_k
from nbinfer.frames.neighbours import top_k
from nbinfer.frames.operators import kind_prefix
from nbinfer.session import Model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("results_folder")

WRONG: Any = "cos"
WORDS = ["red apple", None, "green pear", "red apple"]


def unit(text: str) -> Any:
    full = vector(text, 8)
    return full / np.linalg.norm(full)


def test_each_row_gets_its_vector_and_missing_rows_null() -> None:
    frame = pd.DataFrame({"t": WORDS}, index=["a", "a", "b", "c"])
    out = embed(frame, on="t", model=embedding_model())
    assert list(out.columns) == ["t", "embedding", "n_tokens", "error"]
    assert str(out["embedding"].dtype) == "fixed_size_list<item: float>[8][pyarrow]"
    assert list(out["embedding"].isna()) == [False, True, False, False]
    np.testing.assert_allclose(out["embedding"].iloc[2], unit("green pear"), rtol=1e-6)
    assert out["n_tokens"].dtype == "Int32"
    assert list(out["n_tokens"].fillna(-1)) == [2, -1, 2, 2]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (pl.DataFrame, pl.Array(pl.Float32, 8)),
        (pa.table, pa.list_(pa.float32(), 8)),
    ],
)
def test_every_family_has_a_fixed_size_vector_type(make: Any, kind: Any) -> None:
    out = embed(make({"t": WORDS}), on="t", model=embedding_model())
    assert (
        out.schema["embedding"] if isinstance(out, pl.DataFrame) else out.schema.field("embedding").type
    ) == kind
    matrix = vectors(out["embedding"])
    assert matrix.shape == (4, 8)
    assert matrix.dtype == np.float32
    assert np.isnan(matrix[1]).all()
    np.testing.assert_allclose(matrix[2], unit("green pear"), rtol=1e-6)


def test_the_type_is_the_same_when_every_row_is_missing() -> None:
    for rows in ([], [None, None]):
        out = embed(pd.DataFrame({"t": pd.Series(rows, dtype="str")}), on="t", model=embedding_model())
        assert str(out["embedding"].dtype) == "fixed_size_list<item: float>[8][pyarrow]"
        assert vectors(out["embedding"]).shape == (len(rows), 8)


def test_one_text_that_is_too_long_is_that_rows_error() -> None:
    rows = [f"text {i}" for i in range(100)]
    rows[41] = "w " * 600
    rows[77] = "v " * 600
    model = embedding_model()
    out = embed(rows, model=model)
    assert list(np.flatnonzero(out["error"].notna())) == [41, 77]
    assert out["error"][41].startswith("ContextOverflow: the prompt has 600 tokens")
    assert list(np.flatnonzero(out["embedding"].isna())) == [41, 77]
    sizes = [len(r.texts) for r in engine_of(model).requests if isinstance(r, EmbeddingRequest)]
    assert sum(sizes) == 98


def test_an_engine_that_fails_on_a_text_fails_that_row_only() -> None:
    class Fragile(FakeEngine):
        def _run(self, job: Any) -> Any:
            if "bad" in job.request.texts:
                raise EngineError("NaN in the encoder")
            return super()._run(job)

    rows = [f"text {i}" for i in range(40)]
    rows[7] = "bad"
    model = Model(Fragile(mode=Mode.EMBEDDING), "fragile", mode=Mode.EMBEDDING)
    out = embed(rows, model=model)
    assert list(np.flatnonzero(out["error"].notna())) == [7]


def test_a_vector_that_holds_nan_is_an_error() -> None:
    class Broken(FakeEngine):
        def _run(self, job: Any) -> Any:
            result: Any = super()._run(job)
            result.vectors[0, 0] = np.nan
            return result

    out = embed(["a"], model=Model(Broken(mode=Mode.EMBEDDING), "broken", mode=Mode.EMBEDDING))
    assert out["error"][0].startswith("EngineError")
    assert out["embedding"].isna()[0]


def test_rows_come_from_the_journal_and_equal_texts_are_embedded_once() -> None:
    first = embed(["a", "b", "a"], model=embedding_model())
    model = embedding_model()
    again = embed(["a", "b", "a", "c"], model=model)
    assert [list(r.texts) for r in engine_of(model).requests] == [["c"]]  # type: ignore[union-attr]
    np.testing.assert_array_equal(vectors(first["embedding"]), vectors(again["embedding"])[:3])
    for options in ({"normalize": False}, {"dims": 4}):
        other = embedding_model()
        embed(["a"], model=other, **options)
        assert len(engine_of(other).requests) == 1


def test_dims_are_checked_before_any_work() -> None:
    assert vectors(embed(["a"], dims=3, model=embedding_model())["embedding"]).shape == (1, 3)
    for dims in (0, 9):
        with pytest.raises(RequestError, match="8 components"):
            embed(["a"], dims=dims, model=embedding_model())


@pytest.mark.parametrize(
    ("model", "kind", "prefix"),
    [
        ("nomic-embed-text-v1.5", "query", "search_query: "),
        ("nomic-embed-text-v1.5", "document", "search_document: "),
        ("multilingual-e5-small", "document", "passage: "),
        ("bge-small-en-v1.5", "document", ""),
        ("bge-m3", "query", ""),
        ("all-minilm-l6-v2", "query", ""),
        ("nomic-embed-text-v1.5", None, ""),
    ],
)
def test_a_kind_adds_what_the_model_was_trained_with(model: str, kind: Any, prefix: str) -> None:
    assert kind_prefix(model, kind) == prefix
    if kind:
        loaded = embedding_model(model=model)
        out = embed(["a"], kind=kind, model=loaded)
        assert engine_of(loaded).requests[0].texts == (f"{prefix}a",)  # type: ignore[union-attr]
        assert out.attrs["nbinfer"]["params"].get("prefix", "") == prefix


def test_conversations_and_other_modes_are_refused() -> None:
    out = embed([[{"role": "user", "content": "a"}]], model=embedding_model())
    assert "an embedding is of text" in out["error"][0]
    with pytest.raises(NotSupported, match="needs embedding"):
        embed(["a"], model=Model(FakeEngine(), "chat"))
    with pytest.raises(RequestError, match="kind="):
        embed(["a"], kind="passage", model=embedding_model())  # type: ignore[arg-type]


def test_embeddings_can_run_in_the_background() -> None:
    run = submit(["a", "b"], operation="embed", model=embedding_model())
    assert list(run.wait(30)["n_tokens"]) == [1, 1]


# -- vectors ------------------------------------------------------------------------------------------------


def test_a_column_without_nulls_is_a_view_in_every_family() -> None:
    for make in (pd.DataFrame, pl.DataFrame, pa.table):
        out = embed(make({"t": ["a", "b", "c"]}), on="t", model=embedding_model())
        column = out["embedding"]
        one, two = vectors(column), vectors(column)
        assert one.shape == (3, 8)
        assert np.shares_memory(one, two)


def test_slices_filters_and_chunks_give_their_own_rows() -> None:
    rows = [f"text {i}" for i in range(10)]
    frame = embed(pd.DataFrame({"t": rows}), on="t", model=embedding_model())
    whole = vectors(frame["embedding"])
    np.testing.assert_array_equal(vectors(frame["embedding"].iloc[3:7]), whole[3:7])
    np.testing.assert_array_equal(vectors(frame[frame["t"].str.contains("[24]")]["embedding"]), whole[[2, 4]])
    table = pa.Table.from_pandas(frame)
    chunked = pa.concat_tables([table.slice(0, 4), table.slice(4)])
    np.testing.assert_array_equal(vectors(chunked["embedding"]), whole)
    np.testing.assert_array_equal(vectors(table["embedding"].slice(2, 3)), whole[2:5])


def test_a_parquet_round_trip_is_exact(tmp_path: Any) -> None:
    frame = embed(pd.DataFrame({"t": WORDS}), on="t", model=embedding_model())
    frame.to_parquet(tmp_path / "v.parquet")
    # pandas' default cannot name nested Arrow types again when it reads.
    back = pd.read_parquet(tmp_path / "v.parquet", dtype_backend="pyarrow")
    np.testing.assert_array_equal(vectors(back["embedding"]), vectors(frame["embedding"]))
    assert back.attrs["nbinfer"] == frame.attrs["nbinfer"]
    np.testing.assert_array_equal(
        vectors(pl.read_parquet(tmp_path / "v.parquet")["embedding"]), vectors(frame["embedding"])
    )


@pytest.mark.parametrize(
    "column",
    [
        np.array([[1, 2], [3, 4]]),
        [[1, 2], [3, 4]],
        [np.array([1.0, 2.0]), (3, 4)],
        pd.Series([[1, 2], [3, 4]]),
        pl.Series([[1.0, 2.0], [3.0, 4.0]]),
        pl.Series([[1.0, 2.0], [3.0, 4.0]], dtype=pl.Array(pl.Float64, 2)),
        pa.array([[1.0, 2.0], [3.0, 4.0]]),
    ],
    ids=lambda c: type(c).__module__.split(".")[0],
)
def test_vectors_from_elsewhere_are_read_too(column: Any) -> None:
    matrix = vectors(column)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, [[1, 2], [3, 4]])


def test_what_holds_no_vectors_is_refused() -> None:
    np.testing.assert_array_equal(vectors([[1.0, 2.0], None])[1], [np.nan, np.nan])
    for column in ([[1, 2], [3]], pd.Series(["a", "b"]), [None], [1.5, 2.5]):
        with pytest.raises((RequestError, ValueError)):
            vectors(column)


# -- similar ------------------------------------------------------------------------------------------------


def brute(queries: Any, corpus: Any, k: int) -> list[list[int]]:
    q, c = np.asarray(queries, float), np.asarray(corpus, float)
    q, c = q / np.linalg.norm(q, axis=1, keepdims=True), c / np.linalg.norm(c, axis=1, keepdims=True)
    return [list(np.argsort(-row, kind="stable")[:k]) for row in q @ c.T]


@pytest.mark.parametrize("blocks", [(1024, 16_384), (3, 7)])
def test_neighbours_are_exact_whatever_the_blocks(
    blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(neighbours, "_CORPUS_BLOCK", blocks[1])
    rng = np.random.default_rng(0)
    corpus, queries = rng.standard_normal((50, 6)), rng.standard_normal((8, 6))
    out = similar(queries, corpus, k=5)
    assert [list(g["match"]) for _, g in out.groupby("query")] == brute(queries, corpus, 5)
    assert list(out["rank"])[:5] == [1, 2, 3, 4, 5]
    assert (out.dtypes["rank"], out.dtypes["score"]) == (np.int32, np.float32)
    dot = similar(queries, corpus, k=3, metric="dot")
    best = np.argsort(-(queries @ corpus.T), axis=1, kind="stable")[:, :3]
    assert list(dot["match"]) == list(best.ravel())
    near = similar(queries, corpus, k=1, metric="euclidean")
    distance = np.linalg.norm(queries[:, None] - corpus[None], axis=2)
    assert list(near["match"]) == list(distance.argmin(1))
    np.testing.assert_allclose(near["score"], -distance.min(1), rtol=1e-4)


def test_labels_of_the_index_name_queries_and_matches() -> None:
    corpus = embed(
        pd.DataFrame({"t": ["red apple", None, "green pear", "blue sky"]}, index=["x", "y", "z", "x"]),
        on="t",
        model=embedding_model(),
    )
    out = similar("red apple pie", corpus, on="embedding", k=2, model=embedding_model())
    assert list(out["query"]) == [0, 0]
    assert out["match"][0] == "x"
    queries = pd.Series(["green pear", "blue sky"], index=[10, 20])
    out = similar(queries, corpus, on="embedding", k=1, model=embedding_model())
    assert list(zip(out["query"], out["match"], strict=True)) == [(10, "z"), (20, "x")]
    np.testing.assert_allclose(out["score"], 1, rtol=1e-5)
    assert "y" not in set(similar("pear", corpus, on="embedding", k=10, model=embedding_model())["match"])
    levels = corpus.set_index(pd.MultiIndex.from_product([["a", "b"], [1, 2]]))
    assert similar("green pear", levels, on="embedding", k=1, model=embedding_model())["match"][0] == ("b", 1)


@pytest.mark.parametrize("make", [pl.DataFrame, pa.table])
def test_other_families_name_positions(make: Any) -> None:
    corpus = embed(make({"t": ["a b", "c d", "e f"]}), on="t", model=embedding_model())
    out = similar(["e f", "a b"], corpus, on="embedding", k=1, model=embedding_model())
    assert isinstance(out, type(corpus))
    assert [int(str(v)) for v in out["match"]] == [2, 0]


def test_texts_of_the_corpus_are_embedded_on_the_way() -> None:
    frame = pd.DataFrame({"t": ["red apple", "green pear"], "u": ["pear green", "apple red"]})
    assert list(similar("green pear", frame, on="t", k=1, model=embedding_model())["match"]) == [1]
    assert list(similar(frame["u"], frame["t"], k=1, model=embedding_model())["match"]) == [1, 0]


def test_min_score_and_ties() -> None:
    corpus = np.array([[1, 0], [0, 1], [1, 0], [-1, 0]], float)
    out = similar(np.array([1.0, 0.0]), corpus, k=4, min_score=0)
    assert list(out["match"]) == [0, 2, 1]
    assert len(similar(np.array([[0.0, 0.0]]), corpus, k=2)) == 0


def test_by_compares_only_rows_of_one_group() -> None:
    left = pd.DataFrame({"v": [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], "g": ["a", "b", None]})
    right = pd.DataFrame({"v": [[0.0, 1.0], [1.0, 0.1], [1.0, 0.0]], "g": ["a", "b", "c"]})
    out = similar(left, right, on="v", by="g", k=5)
    assert list(zip(out["query"], out["match"], strict=True)) == [(0, 0), (1, 1)]


def test_a_document_corpus_is_asked_with_query_prefixes() -> None:
    corpus = embed(["a b", "c d"], kind="document", model=embedding_model(model="nomic-embed"))
    model = embedding_model(model="nomic-embed")
    similar("a b", corpus, on="embedding", model=model)
    assert engine_of(model).requests[0].texts == ("search_query: a b",)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda c: similar("a", c, on="embedding", model=embedding_model(model="other")),
            "cannot be compared",
        ),
        (lambda c: similar("a", c), "Pass on="),
        (lambda c: similar("a", c, on="embeding"), "Did you mean 'embedding'"),
        (lambda c: similar(np.ones(3), c, on="embedding"), "3 components"),
        (lambda c: similar("a", c, on="embedding", k=0), "k=0"),
        (lambda c: similar("a", c, on="embedding", metric=WRONG), "metric='cos'"),
        (
            lambda c: similar(embed(["x"], model=embedding_model(model="other")), c, on="embedding"),
            "different models",
        ),
    ],
)
def test_a_comparison_that_means_nothing_is_refused(call: Any, says: str) -> None:
    corpus = embed(["a", "b"], model=embedding_model(model="one"))
    with pytest.raises(RequestError, match=says):
        call(corpus)


def test_a_matchs_position_finds_its_row_where_labels_repeat() -> None:
    corpus = pd.DataFrame({"t": ["red apple", "blue sea", "green tree"]}, index=[0, 0, 0])
    embedded = embed(corpus, on="t", model=embedding_model())
    found = similar("blue sea", embedded, on="embedding", k=1, model=embedding_model())
    assert found["position"].dtype == np.int64
    assert list(embedded.iloc[found["position"]]["t"]) == ["blue sea"]


def test_a_saved_frame_is_read_with_its_vectors(tmp_path: Path) -> None:
    frame = embed(pd.DataFrame({"t": ["red apple", None]}, index=["x", "y"]), on="t", model=embedding_model())
    frame.to_parquet(tmp_path / "vectors.parquet")
    back = pd.read_parquet(tmp_path / "vectors.parquet", dtype_backend="pyarrow")
    np.testing.assert_array_equal(vectors(back["embedding"]), vectors(frame["embedding"]))
    assert list(back.index) == ["x", "y"]
    found = similar("red apple", back, on="embedding", k=1, model=embedding_model())
    assert list(found["match"]) == ["x"]
    assert list(similar(frame, back, on="embedding", k=1)["match"]) == ["x"]


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_a_graph_finds_nearly_all_neighbours_and_scores_them_exactly(metric: Any) -> None:
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((40, 32))
    corpus = (centres[rng.integers(0, 40, 3000)] + 0.4 * rng.standard_normal((3000, 32))).astype(np.float32)
    queries = corpus[:200] + 0.1 * rng.standard_normal((200, 32)).astype(np.float32)
    # What is missing matches nothing, and is not in the way.
    corpus[5], queries[7] = np.nan, np.nan
    whole = top_k(queries, corpus, 10, metric=metric)
    found = graph_top_k(queries, corpus, 10, metric=metric)
    exactly = {(q, m): s for q, m, _, s in zip(*whole, strict=True)}
    shared = [(exactly[q, m], s) for q, m, _, s in zip(*found, strict=True) if (q, m) in exactly]
    assert len(shared) >= 0.97 * len(whole[0])
    assert all(abs(first - second) < 1e-4 for first, second in shared)
    assert 7 not in found[0]
    assert 5 not in found[1]
    for query in (0, 1, 199):
        mine = found[0] == query
        assert list(found[2][mine]) == list(range(1, 11))
        assert (np.diff(found[3][mine]) <= 0).all()
    assert graph_top_k(queries, corpus, 10, metric=metric, min_score=np.inf)[0].size == 0
    assert graph_top_k(queries[:0], corpus, 10, metric=metric)[0].size == 0
    assert len(graph_top_k(queries[:1], corpus[:3], 10, metric=metric)[0]) == 3


def test_large_corpora_are_searched_by_the_graph_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = pd.DataFrame({"v": list(np.eye(6, dtype=np.float32)), "g": list("aabbcc")})
    used: list[int] = []
    real = graph.graph_top_k

    def counted(*arguments: Any, **options: Any) -> Any:
        used.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(graph, "graph_top_k", counted)

    def first(**options: Any) -> list[int]:
        return list(similar(frame, frame, on="v", k=1, **options)["match"])

    assert first() == first(exact=True) == list(range(6))
    assert used == []
    assert first(exact=False) == list(range(6))
    assert first(exact=False, by="g") == list(range(6))
    assert len(used) == 4
    monkeypatch.setattr(searching, "EXACT_PAIRS", 35)
    first()
    assert len(used) == 5
    monkeypatch.setattr(graph, "available", lambda: False)
    first()
    assert len(used) == 5
    with pytest.raises(BackendUnavailable, match="pip install"):
        first(exact=False)
    with pytest.raises(RequestError, match="exact='no'"):
        first(exact="no")


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pd.Series(["a", "b"]), "holds str"),
        (pl.Series([{"a": 1}]), "holds dict"),
        (pd.DataFrame({"v": [[1.0]]}), "not a frame"),
        (pl.DataFrame({"v": [[1.0]]}), "not a frame"),
        (pa.table({"v": [[1.0]]}), "not a frame"),
    ],
)
def test_what_holds_no_vectors_is_said_in_words(column: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        vectors(column)


def test_a_search_lists_the_columns_that_there_are() -> None:
    with pytest.raises(RequestError, match=r"which column of the corpus\?.*\nColumns: 't', 'u'"):
        similar("a", pd.DataFrame({"t": ["a"], "u": ["b"]}), model=embedding_model())
