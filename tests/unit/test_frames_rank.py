"""Reranking and joining: the right rows, best first, and nothing invented where there is no score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from support.frames import chat_model, embedding_model, engine_of, reranking_model

from nbinfer.contract.errors import NotSupported, RequestError
from nbinfer.contract.requests import RerankRequest
from nbinfer.frames import embed, enable_accessor, join, rerank, similar
from nbinfer.frames.accessor import Infer

pytestmark = pytest.mark.usefixtures("results_folder")

DOCS = ["a lamp", None, "late delivery of parcels", "late delivery", "delivery"]


def test_documents_come_best_first_with_their_index() -> None:
    frame = pd.DataFrame({"t": DOCS}, index=["a", "a", "b", "c", "d"])
    out = rerank("late delivery", frame, on="t", model=reranking_model())
    assert list(out.columns) == ["t", "score", "rank", "error", "n_tokens"]
    assert list(out.index) == ["c", "d", "b", "a", "a"]
    assert (out["score"].dtype, str(out["rank"].dtype)) == (np.float32, "Int32")
    assert out["rank"].tolist() == [1, 2, 3, 4, pd.NA]
    assert list(rerank("late delivery", frame, on="t", k=2, model=reranking_model()).index) == ["c", "d"]
    same = rerank("late delivery", frame, on="t", sort=False, model=reranking_model())
    assert list(same.index) == list(frame.index)
    assert same["rank"].tolist() == [4, pd.NA, 3, 1, 2]


def test_lists_and_series_keep_their_labels_and_other_families_say_the_row() -> None:
    assert list(rerank("late delivery", DOCS, k=1, model=reranking_model()).index) == [3]
    series = pd.Series(DOCS, index=list("vwxyz"))
    assert list(rerank("late delivery", series, k=2, model=reranking_model()).index) == ["y", "z"]
    out = rerank("late delivery", pl.Series(DOCS), k=2, model=reranking_model())
    assert out["row"].to_list() == [3, 4]
    arrow = rerank("late delivery", pa.array(DOCS), k=2, model=reranking_model())
    assert arrow["row"].to_pylist() == [3, 4]
    frame = rerank("late delivery", pl.DataFrame({"t": DOCS}), on="t", k=1, model=reranking_model())
    assert frame["t"].to_list() == ["late delivery"]


def test_rows_may_have_queries_of_their_own() -> None:
    frame = pd.DataFrame(
        {
            "q": ["red", "blue", "red", "blue", None],
            "t": ["a blue thing", "blue", "red", "a red thing", "x"],
        },
    )
    model = reranking_model()
    out = rerank("q", frame, on="t", model=model)
    assert list(out["t"]) == ["red", "a blue thing", "blue", "a red thing", "x"]
    assert out["rank"].tolist() == [1, 2, 1, 2, pd.NA]
    asked = [r.query for r in engine_of(model).requests if isinstance(r, RerankRequest)]
    assert sorted(asked) == ["blue", "red"]
    assert list(rerank("q", frame, on="t", k=1, model=reranking_model())["t"]) == ["red", "blue"]


def test_a_document_that_is_too_long_is_that_rows_error_and_comes_last() -> None:
    out = rerank("late", ["late", "w " * 600, "soon"], model=reranking_model(), progress=False)
    assert list(out.index) == [0, 2, 1]
    assert out["error"].iloc[2].startswith("ContextOverflow")
    assert pd.isna(out["rank"].iloc[2])


def test_scores_come_from_the_journal() -> None:
    first = rerank("late delivery", DOCS, model=reranking_model())
    model = reranking_model()
    pd.testing.assert_frame_equal(rerank("late delivery", DOCS, model=model), first)
    assert engine_of(model).requests == []


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rerank(["a"], DOCS, model=reranking_model()), "query is list"),
        (lambda: rerank("a", DOCS, k=0, model=reranking_model()), "k=0"),
        (
            lambda: rerank("a", pd.DataFrame({"t": DOCS}), model=reranking_model()),
            r"which column holds the documents\? Pass on='column'\.\nColumns: 't'",
        ),
    ],
)
def test_a_wrong_call_raises(call: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        call()


def test_another_modes_model_is_refused() -> None:
    with pytest.raises(NotSupported, match="needs reranking"):
        rerank("a", DOCS, model=chat_model())


# -- join ---------------------------------------------------------------------------------------------------

LEFT: dict[str, list[Any]] = {"id": [1, 2, 3, 4], "text": ["red apple", "green pear", None, "blue sky"]}
RIGHT: dict[str, list[Any]] = {"id": [10, 20, 30], "question": ["apple red", "pear green", "a dog"]}


def as_pandas(frame: Any) -> Any:
    return frame if isinstance(frame, pd.DataFrame) else frame.to_pandas()


def joined(out: Any) -> list[tuple[Any, ...]]:
    frame = as_pandas(out)
    return [
        (a, None if pd.isna(b) else int(b), None if pd.isna(q) else q)
        for a, b, q in zip(frame["id"], frame["id_right"], frame["question"], strict=True)
    ]


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
def test_rows_that_mean_the_same_are_joined(make: Any) -> None:
    options: dict[str, Any] = {"left_on": "text", "right_on": "question", "min_score": 0.9, "progress": False}
    left, right = make(LEFT), make(RIGHT)
    out = join(left, right, model=embedding_model(), **options)
    assert isinstance(out, type(left))
    assert joined(out) == [(1, 10, "apple red"), (2, 20, "pear green")]
    whole = join(left, right, how="left", model=embedding_model(), **options)
    assert joined(whole) == [(1, 10, "apple red"), (2, 20, "pear green"), (3, None, None), (4, None, None)]
    names = whole.column_names if isinstance(whole, pa.Table) else list(whole.columns)
    assert names == ["id", "text", "id_right", "question", "score"]


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
@pytest.mark.parametrize("nothing", ["left", "right", "both"])
@pytest.mark.parametrize("rows", [0, 2])
def test_sides_without_any_text_have_no_matches(make: Any, nothing: str, rows: int) -> None:
    def side(name: str, full: dict[str, list[Any]]) -> Any:
        if nothing not in (name, "both"):
            return make(full)
        # Typed, as a frame whose rows were all filtered out would be.
        return make(full)[:0] if rows == 0 else make({"id": [1, 2], list(full)[1]: [None, None]})

    left, right = side("left", LEFT), side("right", RIGHT)
    options: dict[str, Any] = {"left_on": "text", "right_on": "question", "progress": False}
    whole = join(left, right, how="left", rerank=reranking_model(), model=embedding_model(), **options)
    assert len(whole) == len(left)
    assert joined(whole) == [(each, None, None) for each in list(as_pandas(left)["id"])]
    assert len(join(left, right, model=embedding_model(), **options)) == 0


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
def test_a_search_without_any_text_finds_nothing(make: Any) -> None:
    empty, full = make({"t": [None, None]}), make({"t": ["a", "b"]})
    for query, corpus in (("a", empty), (empty, full), (empty, empty), ([], full), ([None], full)):
        found = similar(query, corpus, on="t", model=embedding_model())
        assert len(found) == 0
        names = found.column_names if isinstance(found, pa.Table) else list(found.columns)
        assert names == ["query", "match", "position", "rank", "score"]


def test_a_frame_whose_columns_have_levels_keeps_them() -> None:
    levels = pd.MultiIndex.from_tuples([("a", "text"), ("b", "")])
    left = pd.DataFrame([["red apple", 1]], columns=levels)
    out = join(left, pd.DataFrame(RIGHT), left_on=("a", "text"), right_on="question", model=embedding_model())
    assert list(out.columns) == [*levels, ("id", ""), ("question", ""), ("score", "")]
    assert out["id"].tolist() == [10]


def test_the_left_index_is_kept_and_vectors_are_taken_as_they_are() -> None:
    model = embedding_model()
    left = embed(pd.DataFrame(LEFT, index=["a", "a", "b", "c"]), on="text", name="v", model=model)
    right = embed(pd.DataFrame(RIGHT), on="question", name="w", model=model)
    before = len(engine_of(model).requests)
    out = join(
        left[["id", "v"]], right[["id", "w"]], left_on="v", right_on="w", k=2, model=model, progress=False
    )
    assert len(engine_of(model).requests) == before
    assert list(out.index) == ["a", "a", "a", "a", "c", "c"]
    assert list(out["id_right"])[:2] == [10, out["id_right"].iloc[1]]
    assert (np.diff(out["score"].to_numpy().reshape(3, 2)) <= 0).all()


def test_a_reranker_orders_and_a_question_decides() -> None:
    left = pd.DataFrame({"text": ["red apple pie"]})
    right = pd.DataFrame(
        {"question": ["red apple", "apple pie and red sauce for all", "red apple pie", "a dog"]}
    )
    options: dict[str, Any] = {"left_on": "text", "right_on": "question", "progress": False}
    out = join(left, right, k=2, rerank=reranking_model(), model=embedding_model(), **options)
    assert list(out["question"]) == ["red apple pie", "red apple"]
    talk = chat_model()
    decided = join(
        left,
        right,
        k=4,
        predicate="Is {left} the same dish as {right}?",
        chat_model=talk,
        model=embedding_model(),
        **options,
    )
    assert len(engine_of(talk).requests) == 4
    assert len(decided) in range(5)


def test_a_wrong_call_is_refused_before_its_cost_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="k=0"):
        join(pd.DataFrame(LEFT), pd.DataFrame(RIGHT), left_on="text", right_on="question", k=0)
    assert capsys.readouterr().err == ""


def test_the_planned_calls_are_said_first(capsys: pytest.CaptureFixture[str]) -> None:
    join(
        pd.DataFrame(LEFT), pd.DataFrame(RIGHT), left_on="text", right_on="question", model=embedding_model()
    )
    assert capsys.readouterr().err.startswith("nbinfer.join: 4 + 3 embeddings")


@pytest.mark.parametrize(
    ("left", "right", "options", "says"),
    [
        (pd.DataFrame(LEFT), pl.DataFrame(RIGHT), {}, "one family"),
        (["a"], pd.DataFrame(RIGHT), {}, "two frames"),
        (pd.DataFrame(LEFT), pd.DataFrame(RIGHT), {"left_on": "txt"}, "Did you mean 'text'"),
        (pd.DataFrame(LEFT), pd.DataFrame(RIGHT), {"how": "outer"}, "how="),
        (pd.DataFrame(LEFT), pd.DataFrame(RIGHT), {"suffix": ""}, "twice"),
        (pd.DataFrame(LEFT), pd.DataFrame(RIGHT), {"k": 0}, "k=0"),
    ],
)
def test_a_join_that_means_nothing_is_refused(
    left: Any, right: Any, options: dict[str, Any], says: str
) -> None:
    asked = {"left_on": "text", "right_on": "question", **options}
    with pytest.raises(RequestError, match=says):
        join(left, right, model=embedding_model(), **asked)


# -- accessor -----------------------------------------------------------------------------------------------


def test_the_accessor_is_there_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hasattr(pd.DataFrame, "infer")
    enable_accessor()
    enable_accessor()
    try:
        model = chat_model()
        frame = pd.DataFrame({"t": ["a", "b"]})
        assert list(frame.infer.complete("say {t}", model=model)["completion"]) == ["say a", "say b"]
        assert list(frame["t"].infer.complete(model=model)["completion"]) == ["a", "b"]
        polars: Any = pl.DataFrame({"t": ["a"]})
        assert polars.infer.complete(on="t", model=model)["completion"].to_list() == ["a"]
        assert list(frame.infer.rerank("a", on="t", k=1, model=reranking_model())["t"]) == ["a"]
        corpus = embed(frame, on="t", model=embedding_model())
        assert list(corpus.infer.similar("b", on="embedding", k=1, model=embedding_model())["match"]) == [1]
        assert "complete" in dir(frame.infer)
        with pytest.raises(AttributeError, match="no operator 'summarise'"):
            frame.infer.summarise()
    finally:
        kinds: tuple[Any, ...] = (pd.DataFrame, pd.Series, pl.DataFrame, pl.Series)
        for kind in kinds:
            del kind.infer
            kind._accessors.discard("infer")


def test_the_accessor_holds_no_state_of_its_own() -> None:
    frame = pd.DataFrame({"t": ["a"]})
    frame.attrs["mine"] = 1
    Infer(frame)
    assert frame.attrs == {"mine": 1}
    assert (
        similar("a", embed(["a"], model=embedding_model()), on="embedding", model=embedding_model())["rank"][
            0
        ]
        == 1
    )


def test_ranking_and_embedding_a_frame_again_replaces_their_columns() -> None:
    out = pd.DataFrame({"t": ["red apple", "blue sea"]}, index=["x", "y"])
    for query in ("red apple", "blue sea"):
        out = rerank(query, out, on="t", model=reranking_model())
        out = embed(out, on="t", model=embedding_model())
    assert sorted(out.columns) == sorted(
        ["t", "score", "rank", "error", "n_tokens", "embedding", "embedding_n_tokens", "embedding_error"]
    )
    assert out.index[0] == "y"
    assert out["rank"].iloc[0] == 1
