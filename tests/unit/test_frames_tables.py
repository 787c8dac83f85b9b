"""The rows that come in go out: family, order, index, and the types of the columns beside the results."""

from __future__ import annotations

import gc
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from support.frames import chat_model

from nbinfer.contract.errors import RequestError
from nbinfer.frames import complete, tables
from nbinfer.frames.tables import read

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("results_folder")

RESULTS = [
    "completion",
    "error",
    "finish_reason",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "seconds",
    "source",
]
TEXTS = ["one", None, "two words", "one", ""]

FAMILIES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], type]] = {
    "pandas": (pd.DataFrame, lambda f: f, pd.DataFrame),
    "polars": (pl.DataFrame, lambda f: f.to_pandas(), pl.DataFrame),
    "pyarrow": (pa.table, lambda f: f.to_pandas(), pa.Table),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_family_comes_back_with_the_same_results(family: str) -> None:
    make, to_pandas, kind = FAMILIES[family]
    out = complete(make({"text": TEXTS}), on="text", model=chat_model())
    assert isinstance(out, kind)
    plain = to_pandas(out)
    assert list(plain.columns) == ["text", *RESULTS]
    answers = plain["completion"].astype(object).where(plain["completion"].notna(), None)
    assert list(answers) == ["one", None, "two words", "one", ""]
    assert list(plain["finish_reason"].astype(object))[:2] == ["stop", "skipped"]
    assert [s if isinstance(s, str) else None for s in plain["source"]] == [
        "run",
        None,
        "run",
        "duplicate",
        "run",
    ]


def test_the_types_of_the_results_are_fixed_in_every_family() -> None:
    model = chat_model()
    for rows in (TEXTS, [], [None, None]):
        frame = complete(pd.DataFrame({"text": pd.Series(rows, dtype="str")}), on="text", model=model)
        assert [str(t) for t in frame.dtypes[1:]] == [
            "str",
            "str",
            "category",
            "Int32",
            "Int32",
            "Int32",
            "float32",
            "category",
        ]
        assert list(frame["finish_reason"].cat.categories) == [
            "stop",
            "length",
            "error",
            "skipped",
            "cancelled",
        ]
        assert list(frame["source"].cat.categories) == ["run", "cache", "duplicate"]
        schema = complete(
            pl.DataFrame({"text": rows}, schema={"text": pl.String}), on="text", model=model
        ).schema
        assert [schema[c] for c in RESULTS] == [
            pl.String,
            pl.String,
            pl.Enum(["stop", "length", "error", "skipped", "cancelled"]),
            pl.Int32,
            pl.Int32,
            pl.Int32,
            pl.Float32,
            pl.Enum(["run", "cache", "duplicate"]),
        ]
        table = complete(pa.table({"text": pa.array(rows, pa.string())}), on="text", model=model)
        assert [table.schema.field(c).type for c in RESULTS] == [
            pa.large_string(),
            pa.large_string(),
            pa.dictionary(pa.int8(), pa.string()),
            pa.int32(),
            pa.int32(),
            pa.int32(),
            pa.float32(),
            pa.dictionary(pa.int8(), pa.string()),
        ]


INDEXES: dict[str, pd.Index[Any]] = {
    "duplicates": pd.Index(["a", "a", "b", "a", "b"], name="key"),
    "dates": pd.date_range("2024-01-01", periods=5),
    "levels": pd.MultiIndex.from_tuples([("x", 1), ("x", 1), ("y", 2), ("z", 1), ("x", 2)], names=["l", "n"]),
    "unsorted": pd.Index([9, 3, 7, 1, 5]),
}


@pytest.mark.parametrize("name", INDEXES)
def test_the_index_is_kept_whatever_it_is(name: str) -> None:
    index = INDEXES[name]
    frame = pd.DataFrame({"text": TEXTS}, index=index)
    out = complete(frame, on="text", model=chat_model())
    pd.testing.assert_index_equal(out.index, index)
    assert list(out["completion"].fillna("-")) == ["one", "-", "two words", "one", ""]
    alone = complete(frame["text"], model=chat_model())
    pd.testing.assert_index_equal(alone.index, index)
    assert list(alone.columns) == RESULTS


def test_columns_beside_the_results_are_untouched() -> None:
    frame = pd.DataFrame(
        {
            "text": ["a", "b"],
            "cat": pd.Categorical(["x", None], categories=["y", "x"], ordered=True),
            "when": pd.DatetimeIndex(["2024-01-01", "NaT"], tz="Europe/Paris"),
            "int": pd.array([1, None], dtype="Int64"),
            "flag": pd.array([True, None], dtype="boolean"),
            "object": [{"k": [1]}, (1, 2)],
            "arrow": pd.arrays.ArrowExtensionArray(pa.array([[1], None], pa.list_(pa.int8()))),
            7: [1, 2],
        },
    )
    before = frame.copy(deep=True)
    out = complete(frame, on="text", model=chat_model())
    pd.testing.assert_frame_equal(out[list(frame.columns)], before)
    pd.testing.assert_frame_equal(frame, before)
    assert out["object"].iloc[1] is frame["object"].iloc[1]
    polars = pl.DataFrame(
        {
            "text": ["a"],
            "cat": pl.Series(["x"], dtype=pl.Categorical),
            "when": [datetime(2024, 1, 1, tzinfo=UTC)],
        },
    )
    kept = complete(polars, on="text", model=chat_model())
    assert kept.select(polars.columns).equals(polars)
    assert kept.schema["cat"] == polars.schema["cat"]


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(["a", None, np.nan]),
        pd.Series(["a", None, np.nan], dtype=object),
        pd.Series(["a", None, pd.NA], dtype="string"),
        pd.Series(["a", None, None], dtype="category"),
        pd.Series(["a", None, None], dtype=pd.ArrowDtype(pa.string())),
        pl.Series(["a", None, None]),
        pa.chunked_array([["a"], [None, None]]),
        pa.array(["a", None, None]),
        ["a", None, float("nan")],
        ("a", None, pd.NA),
    ],
    ids=lambda c: f"{type(c).__module__.split('.')[0]}-{getattr(c, 'dtype', type(c).__name__)}",
)
def test_a_missing_value_never_reaches_the_model_as_text(column: Any) -> None:
    table = read(column)
    assert table.values(table.names, 0, 3) == [["a", None, None]]


@pytest.mark.parametrize(
    "column",
    [
        pd.Series([1.5, np.nan]),
        pd.Series([1.5, None], dtype="Float64"),
        pl.Series([1.5, float("nan")]),
        [1.5, None],
    ],
)
def test_a_float_nan_is_missing_too(column: Any) -> None:
    table = read(column)
    assert table.values(table.names, 0, 2) == [[1.5, None]]


def test_missing_dates_are_missing() -> None:
    table = read(pd.Series([pd.Timestamp("2024-01-01"), pd.NaT]))
    assert table.values(table.names, 0, 2)[0][1] is None


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("text", "one str"),
        ({"a": 1}, r"one dict.*pandas\.DataFrame\(data\)"),
        (7, "builtins.int"),
        (pl.LazyFrame({"a": ["x"]}), "collect"),
        (pd.DataFrame([["x", "y"]], columns=["a", "a"]), "repeat: 'a'"),
        (pa.table([["x"], ["y"]], names=["a", "a"]), "repeat: 'a'"),
        (iter(["a"]), "it is a list"),
        (np.array([["a"]]), "it is a list"),
        (pd.DataFrame({"a": ["x"]}).groupby("a"), "pandas DataFrameGroupBy"),
        (pd.DataFrame({"a": ["x"]}).rolling(1), "pandas Rolling"),
        (pd.MultiIndex.from_tuples([("a", "b")]), "to_frame"),
    ],
)
def test_other_data_is_refused_in_words(data: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read(data)


@pytest.mark.parametrize(
    "index",
    [
        pd.Index(["a", "b"]),
        pd.array(["a", "b"], dtype="string"),
        pd.Categorical(["a", "b"]),
        np.array(["a", "b"]),
        np.array(["a", "b"], dtype=object),
    ],
)
def test_other_sequences_of_text_are_read(index: Any) -> None:
    assert list(complete(index, model=chat_model())["completion"]) == ["a", "b"]


@pytest.mark.parametrize("column", [pl.Series("q", ["a", "b"]), pa.chunked_array([["a"], ["b"]]), ("a", "b")])
def test_a_column_alone_gives_the_results_alone(column: Any) -> None:
    out = complete(column, "say {text}", model=chat_model())
    names = out.column_names if isinstance(out, pa.Table) else list(out.columns)
    assert names == RESULTS
    assert [str(v) for v in out["completion"]] == ["say a", "say b"]
    alone = complete(pl.DataFrame({"q": ["a"]}), on="q", keep=False, model=chat_model())
    assert alone.columns == RESULTS


def test_a_taken_name_raises_before_any_work() -> None:
    model = chat_model()
    for columns, name, says in (
        (["text", "completion"], "completion", "already has a column 'completion'"),
        (["text", "error", "completion_error"], "completion", "'completion_error'"),
        (["text", "error_error"], "error", "'error_error'"),
        (["text"], "text", "already has a column 'text'"),
    ):
        frame = pd.DataFrame([["x"] * len(columns)], columns=columns)
        with pytest.raises(RequestError, match=says):
            complete(frame, on="text", name=name, model=model)
    assert model.engine.load().running == 0
    assert (
        complete(pd.DataFrame({"text": ["x"]}), on="text", name="text", keep=False, model=model).columns[0]
        == "text"
    )


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
def test_a_cell_that_replaces_its_own_frame_can_run_again(make: Any) -> None:
    frame = make({"text": ["a", "b"], "mine": [1, 2]})
    out = complete(frame, on="text", model=chat_model(), cache=False)
    out = complete(out, on="text", name="second", model=chat_model())
    second = complete(out, "say {text}", logprobs=1, model=chat_model())
    again = complete(second, "Shout {completion}", model=chat_model())
    names = again.column_names if isinstance(again, pa.Table) else list(again.columns)
    kept = ["text", "mine", "second", *(f"second_{c}" for c in RESULTS[1:])]
    assert names == [*kept, *RESULTS]
    assert [str(v) for v in again["completion"]] == ["Shout say a", "Shout say b"]
    made = read(again).provenance()
    assert made is not None
    assert [entry["params"]["name"] for entry in (made, *made["earlier"])] == ["completion", "second"]


def test_a_polars_frame_is_known_until_it_is_changed() -> None:
    out = complete(pl.DataFrame({"text": ["a"]}), on="text", model=chat_model())
    changed = out.with_columns(other=pl.lit(1))
    with pytest.raises(RequestError, match="rename the column or drop it"):
        complete(changed, on="text", model=chat_model())
    assert read(changed).provenance() is None
    known = len(tables._polars_made._known)
    del out
    gc.collect()
    assert len(tables._polars_made._known) == known - 1


def test_columns_that_a_person_made_are_never_replaced() -> None:
    out = complete(pd.DataFrame({"text": ["a"]}), on="text", model=chat_model())
    out["other"] = ["mine"]
    with pytest.raises(RequestError, match="already has a column 'other'"):
        complete(out, on="text", name="other", model=chat_model())
    # Of a call's columns some may be gone: the next call's column of the same name is not that call's.
    second = complete(out.drop(columns="error"), on="text", name="second", keep=True, model=chat_model())
    assert "completion" in second.columns


def test_two_calls_on_one_frame_keep_their_columns_apart() -> None:
    frame = pd.DataFrame({"text": ["a", "b"]})
    first = complete(frame, on="text", model=chat_model())
    both = complete(first, "again {text}", name="second", model=chat_model())
    assert list(both.columns) == ["text", *RESULTS, "second", *(f"second_{c}" for c in RESULTS[1:])]
    assert list(both["second"]) == ["again a", "again b"]


def test_provenance_is_plain_json_and_survives_concat_and_parquet(tmp_path: Any) -> None:
    frame = pd.DataFrame({"text": ["a", "b"]})
    frame.attrs["mine"] = {"kept": True}
    out = complete(frame, "say {text}", system="be brief", model=chat_model())
    info = out.attrs["nbinfer"]
    assert json.loads(json.dumps(info)) == info
    assert info["op"] == "complete"
    assert info["template"] == "say {text}"
    assert info["params"]["system"] == "be brief"
    assert info["digest"].startswith("sha256:")
    assert (info["rows"], info["failed"], info["columns"][0]) == (2, 0, "completion")
    assert out.attrs["mine"] == {"kept": True}
    assert "nbinfer" not in frame.attrs
    assert pd.concat([out, out]).attrs["nbinfer"] == info
    out.to_parquet(tmp_path / "out.parquet")
    back = pd.read_parquet(tmp_path / "out.parquet")
    assert back.attrs["nbinfer"] == info
    assert list(back["completion"]) == ["say a", "say b"]
    twice = complete(out, on="text", name="second", model=chat_model())
    assert twice.attrs["nbinfer"]["columns"][0] == "second"
    assert [e["columns"][0] for e in twice.attrs["nbinfer"]["earlier"]] == ["completion"]


def test_arrow_carries_the_provenance_in_its_schema() -> None:
    table = pa.table({"text": ["a"]}).replace_schema_metadata({"other": "kept"})
    out = complete(table, on="text", model=chat_model())
    assert json.loads(out.schema.metadata[b"nbinfer"])["op"] == "complete"
    assert out.schema.metadata[b"other"] == b"kept"


def test_an_empty_frame_comes_back_empty() -> None:
    for data in (
        pd.DataFrame({"text": []}),
        pl.DataFrame({"text": []}),
        pa.table({"text": pa.array([], pa.string())}),
    ):
        assert len(complete(data, on="text", model=chat_model())) == 0
    assert len(complete([], model=chat_model())) == 0


def test_a_column_of_conversations_is_sent_as_conversations() -> None:
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "bye"},
    ]
    for data in (pd.DataFrame({"m": [talk]}), pl.DataFrame({"m": [talk]}), pa.table({"m": [talk]})):
        model = chat_model()
        out = complete(data, on="m", system="short", model=model, cache=False)
        request: Any = model.engine.requests[0]  # type: ignore[attr-defined]
        assert [m["role"] for m in request.messages] == ["system", "user", "assistant", "user"]
        assert str(out["completion"][0]) == "bye"


def test_columns_of_several_levels_are_called_by_the_levels_that_say_something() -> None:
    frame = pd.DataFrame([["x", "y"], ["z", "w"]], columns=pd.MultiIndex.from_tuples([("a", "t"), ("b", "")]))
    model = chat_model()
    for _ in range(2):
        frame = complete(frame, "say {b} and {('a', 't')}", model=model)
    names: list[Any] = list(frame.columns)
    assert names[:3] == [("a", "t"), ("b", ""), ("completion", "")]
    assert frame.columns.is_unique
    assert frame["completion"].tolist() == ["say y and x", "say w and z"]
    again = complete(frame, "{completion}!", name="again", model=model)
    assert again["again"].tolist() == ["say y and x!", "say w and z!"]


@pytest.mark.parametrize("name", [5, ("a", "b"), "", None])
def test_a_new_column_is_called_by_a_text(name: Any) -> None:
    with pytest.raises(RequestError, match="name="):
        complete(["a"], name=name, model=chat_model())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": "say {k}"}, r"'k' is the frame's index.*reset_index"),
        ({"on": "k"}, r"'k' is the frame's index.*reset_index"),
        ({"prompt": "say {T}"}, "Did you mean 't'"),
    ],
)
def test_a_column_that_is_elsewhere_or_written_otherwise_is_pointed_at(
    options: dict[str, Any], says: str
) -> None:
    frame = pd.DataFrame({"k": ["x"], "t": ["y"]}).set_index("k")
    with pytest.raises(RequestError, match=says):
        complete(frame, model=chat_model(), **options)
