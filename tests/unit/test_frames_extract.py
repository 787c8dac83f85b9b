"""Schemas become typed columns; what does not fit is an error of its row, never a guess."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date, datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from pydantic import BaseModel, Field
from support.frames import asked, chat_model, engine_of, last_text
from typing_extensions import TypedDict

from nbinfer.contract.errors import RequestError, SchemaError
from nbinfer.frames import complete, extract, submit
from nbinfer.frames.shapes import Shape

if TYPE_CHECKING:
    from nbinfer.contract.requests import CompletionRequest
    from nbinfer.session import Model

pytestmark = pytest.mark.usefixtures("results_folder")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    name: str
    size: float | None = None


class Review(BaseModel):
    product: str
    stars: int | None
    price: float
    good: bool
    tone: Literal["angry", "neutral", "happy"]
    colour: Colour | None = None
    day: date | None = None
    at: datetime | None = None
    tags: list[str] = []
    part: Part | None = None
    parts: list[Part] = []
    anything: Any = None
    either: int | str | None = None
    named: dict[str, int] = {}


GOOD: dict[str, Any] = {
    "product": "lamp",
    "stars": 4,
    "price": 9.5,
    "good": True,
    "tone": "happy",
    "colour": "blue",
    "day": "2024-02-29",
    "at": "2024-02-29T12:00:00+02:00",
    "tags": ["a", "b"],
    "part": {"name": "bulb", "size": 1.5},
    "parts": [{"name": "cord"}],
    "anything": {"x": [1]},
    "either": "seven",
    "named": {"one": 1},
}
LEAST = {"product": "mug", "stars": None, "price": 3, "good": False, "tone": "angry"}


def answering(**answers: Any) -> Model:
    """A model that answers each row with the JSON given under a word of its prompt."""

    def script(request: CompletionRequest) -> list[str]:
        found = [a for word, a in answers.items() if word in last_text(request)]
        return [found[0] if isinstance(found[0], str) else json.dumps(found[0])]

    return chat_model(script, context_size=4096)


def test_each_field_is_a_column_of_its_type() -> None:
    frame = pd.DataFrame({"text": ["one", None, "two", "broken"]}, index=[3, 3, 4, 5])
    model = answering(one=GOOD, two=LEAST, broken="{")
    out = extract(frame, Review, "Review: {text}", model=model, progress=False)
    assert list(out.index) == [3, 3, 4, 5]
    fields = list(Review.model_fields)
    part = pa.struct([("name", pa.large_string()), ("size", pa.float64())])
    assert {name: str(out[name].dtype) for name in fields} == {
        "product": "str",
        "stars": "Int64",
        "price": "Float64",
        "good": "boolean",
        "tone": "category",
        "colour": "category",
        "day": "datetime64[us]",
        "at": "datetime64[us]",
        "tags": str(pd.ArrowDtype(pa.list_(pa.large_string()))),
        "part": str(pd.ArrowDtype(part)),
        "parts": str(pd.ArrowDtype(pa.list_(part))),
        "anything": "str",
        "either": "str",
        "named": "str",
    }
    first = out.iloc[0]
    assert (first["product"], first["stars"], first["price"], first["good"]) == ("lamp", 4, 9.5, True)
    assert first["day"] == pd.Timestamp("2024-02-29")
    assert first["at"] == pd.Timestamp("2024-02-29 10:00")
    assert list(first["tags"]) == ["a", "b"]
    assert first["part"] == {"name": "bulb", "size": 1.5}
    assert list(first["parts"]) == [{"name": "cord", "size": None}]
    assert [json.loads(first[c]) for c in ("anything", "either", "named")] == [
        {"x": [1]},
        "seven",
        {"one": 1},
    ]
    assert list(out["tone"].cat.categories) == ["angry", "neutral", "happy"]
    assert list(out["colour"].cat.categories) == ["red", "blue"]
    # Nothing is made up: missing rows and failed rows are null in every field.
    assert out.iloc[1][fields].isna().all()
    assert out.iloc[3][fields].isna().all()
    assert out["error"].iloc[3].startswith("SchemaError: the answer does not fit the schema")
    assert out["raw"].iloc[3] == "{"
    assert pd.isna(out["stars"].iloc[2])
    assert list(out["parts"].iloc[2]) == []


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
def test_the_types_are_the_same_when_every_row_fails(make: Any) -> None:
    model = answering(one=GOOD, broken="{")
    frames = [
        extract(make({"text": [word]}), Review, "Review: {text}", model=model, progress=False)
        for word in ("one", "broken")
    ]
    whole, failed = ([str(kind) for kind in _types(frame)] for frame in frames)
    assert whole == failed


def _types(frame: Any) -> list[Any]:
    if isinstance(frame, pa.Table):
        return list(frame.schema.types)
    return list(frame.dtypes)


@pytest.mark.parametrize("family", ["polars", "pyarrow"])
def test_other_families_get_their_own_types(family: str) -> None:
    make: Any = pl.DataFrame if family == "polars" else pa.table
    model = answering(one=GOOD, two=LEAST)
    out = extract(make({"text": ["one", "two", None]}), Review, "Review: {text}", model=model)
    if family == "polars":
        schema = out.schema
        assert schema["stars"] == pl.Int64
        assert schema["tone"] == pl.Enum(["angry", "neutral", "happy"])
        assert schema["day"] == pl.Datetime("us")
        assert schema["tags"] == pl.List(pl.String)
        assert schema["part"] == pl.Struct({"name": pl.String, "size": pl.Float64})
        assert out["tone"].to_list() == ["happy", "angry", None]
        return
    assert out.schema.field("tone").type == pa.dictionary(pa.int16(), pa.string())
    assert out.schema.field("part").type == pa.struct([("name", pa.large_string()), ("size", pa.float64())])
    assert out["stars"].to_pylist() == [4, None, None]


@dataclass
class Point:
    x: int
    y: int


class Typed(TypedDict):
    x: int
    y: int


JSON_SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": ["integer", "null"]}},
    "required": ["x", "y"],
}


@pytest.mark.parametrize("schema", [Point, Typed, JSON_SCHEMA], ids=["dataclass", "TypedDict", "JSON Schema"])
def test_every_kind_of_schema_is_taken(schema: Any) -> None:
    model = answering(one={"x": 1, "y": 2})
    out = extract(["one"], schema, model=model)
    assert (out["x"][0], out["y"][0], str(out["x"].dtype)) == (1, 2, "Int64")
    request: Any = engine_of(model).requests[0]
    assert request.constraint.kind == "json_schema"
    assert set(request.constraint.value["properties"]) == {"x", "y"}


@pytest.mark.parametrize(
    ("schema", "answer", "kind", "value"),
    [
        (Colour, '"red"', "category", "red"),
        (Literal["a", "b"], '"b"', "category", "b"),
        (int, "7", "Int64", 7),
        (list[int], "[1, 2]", None, [1, 2]),
        ({"type": "string"}, '"x"', "str", "x"),
        ({"enum": [1, 2]}, "2", "Int64", 2),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, "2", "Float64", 2.0),
        ({"allOf": [{"$ref": "#/$defs/T"}], "$defs": {"T": {"type": "boolean"}}}, "true", "boolean", True),
    ],
)
def test_what_is_no_object_is_one_column(schema: Any, answer: str, kind: str | None, value: Any) -> None:
    out = extract(["one"], schema, model=answering(one=answer))
    found = out["value"][0]
    assert (list(found) if isinstance(value, list) else found) == value
    assert kind is None or str(out["value"].dtype) == kind


@pytest.mark.parametrize(
    ("schema", "value", "says"),
    [
        ({"type": "integer"}, "7", "not a whole number"),
        ({"type": "integer"}, True, "not a whole number"),
        ({"type": "integer"}, 2.5, "not a whole number"),
        ({"type": "integer"}, 2**63, "64 bits"),
        ({"type": "number"}, "1", "not a number"),
        ({"type": "number"}, True, "not a number"),
        ({"type": "boolean"}, 1, "not true or false"),
        ({"type": "string"}, 1, "not text"),
        ({"type": "string"}, None, "not text"),
        ({"type": "string", "format": "date"}, "tomorrow", "not a date"),
        ({"enum": ["a", "b"]}, "c", "not one of 'a', 'b'"),
        ({"const": "a"}, "b", "not one of 'a'"),
        ({"type": "array", "items": {"type": "integer"}}, [1, "x"], "not a whole number"),
        ({"type": "array", "items": {"type": "integer"}}, {"a": 1}, "not a list"),
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {}, "no field 'a'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(schema: Any, value: Any, says: str) -> None:
    shape = Shape({"type": "object", "properties": {"f": schema}, "required": ["f"]})
    with pytest.raises(SchemaError, match=f"f: .*{says}"):
        shape.row({"f": value})
    with pytest.raises(SchemaError, match="no field 'f'"):
        shape.row({})
    with pytest.raises(SchemaError, match="not an object"):
        shape.row([])


def test_a_whole_number_may_be_written_with_a_point_and_extra_fields_are_left() -> None:
    shape = Shape({"properties": {"f": {"type": "integer"}, "g": {"type": "string"}}, "required": ["f"]})
    assert shape.row({"f": 3.0, "other": 1}) == (3, None)


class Tree(BaseModel):
    name: str
    children: list[Tree] = Field(default_factory=list)


def test_a_type_that_holds_itself_is_kept_as_json_text() -> None:
    answer = {"name": "root", "children": [{"name": "leaf", "children": []}]}
    out = extract(["one"], Tree, model=answering(one=answer))
    assert out["error"].isna()[0]
    assert out["name"][0] == "root"
    assert "leaf" in str(list(out["children"][0]))


def test_an_answer_that_was_cut_short_is_an_error_and_its_raw_text_is_kept() -> None:
    model = chat_model(lambda r: ['{"x": 1', ', "y"', ": 2}"])
    out = extract(["one"], Point, max_tokens=2, model=model)
    assert out["error"][0].startswith("Truncated")
    assert out["raw"][0] == '{"x": 1, "y"'
    assert out["finish_reason"][0] == "length"
    assert out[["x", "y"]].isna().all(axis=None)


def test_an_engine_that_says_itself_that_an_answer_was_cut_gives_the_raw_text_too() -> None:
    model = chat_model(lambda r: [SchemaError("the answer was cut.", raw='{"x":')])
    out = extract(["one"], Point, model=model, progress=False)
    assert (out["error"][0], out["raw"][0]) == ("SchemaError: the answer was cut.", '{"x":')


def test_an_answer_that_ends_with_the_last_token_is_whole() -> None:
    model = chat_model(lambda r: ['{"x": 1', ', "y"', ": 2}", "too much"])
    out = extract(["one"], Point, max_tokens=3, model=model)
    assert (out["y"][0], out["finish_reason"][0], out["error"].isna()[0]) == (2, "length", True)


def test_no_field_is_generated_that_has_no_column() -> None:
    schema = {
        "type": "object",
        "properties": {
            "type": {"type": "object", "properties": {"properties": {"type": "string"}}},
            "open": {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
            "any": {"type": "object"},
            "fixed": {"enum": [{"properties": {"x": 1}}]},
        },
    }
    model = chat_model(["{}"])
    extract(["one"], schema, model=model)
    request: Any = engine_of(model).requests[0]
    sent = request.constraint.value
    assert sent["additionalProperties"] is False
    assert sent["properties"]["type"]["additionalProperties"] is False
    assert sent["properties"]["open"]["additionalProperties"] == {"type": "integer"}
    assert "additionalProperties" not in sent["properties"]["any"]
    assert sent["properties"]["fixed"] == schema["properties"]["fixed"]  # type: ignore[index]


def test_without_a_prompt_the_schema_is_shown_and_the_row_comes_last() -> None:
    model = answering(one={"x": 1, "y": 2})
    extract(pd.DataFrame({"t": ["one {x}"]}), Point, on="t", model=model)
    text = asked(model)[0]
    assert text.endswith("Text: one {x}")
    assert '"properties"' in text


def test_fields_may_be_called_like_the_columns_beside_them() -> None:
    schema = {"properties": {"error": {"type": "string"}, "raw": {"type": "string"}}}
    out = extract(["one"], schema, model=answering(one={"error": "E", "raw": "R"}))
    assert (out["error"][0], out["raw"][0]) == ("E", "R")
    assert out["extract_error"].isna()[0]
    assert list(out.columns[:3]) == ["error", "raw", "extract_raw"]


def test_a_field_that_the_frame_already_has_raises_before_any_work() -> None:
    model = answering(one={"x": 1, "y": 2})
    with pytest.raises(RequestError, match="already has a column 'x'"):
        extract(pd.DataFrame({"x": ["one"]}), Point, on="x", model=model)
    assert engine_of(model).requests == []


@pytest.mark.parametrize(
    ("schema", "options", "says"),
    [
        ({"type": "object"}, {}, "without properties"),
        (object(), {}, "cannot be described"),
        (Point, {"choices": ["a"]}, "second one"),
    ],
)
def test_a_wrong_schema_raises_before_any_work(schema: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        extract(["one"], schema, model=chat_model(), **options)


def test_the_answers_come_from_the_journal_and_are_read_again() -> None:
    first = extract(["one", "two"], Review, "Review: {text}", model=answering(one=GOOD, two=LEAST))
    model = answering()
    again = extract(["one", "two"], Review, "Review: {text}", model=model)
    assert engine_of(model).requests == []
    pd.testing.assert_frame_equal(first.drop(columns="source"), again.drop(columns="source"))


def test_it_runs_in_the_background() -> None:
    run = submit(["one"], operation="extract", schema=Point, model=answering(one={"x": 1, "y": 2}))
    assert run.wait(30)["y"][0] == 2


def test_a_schema_reaches_the_engine_alike_from_complete_and_extract() -> None:
    model = answering(one=GOOD)
    extract(["one"], Review, "Review: {text}", model=model, progress=False, cache=False)
    complete(["one"], "Review: {text}", schema=Review, model=model, progress=False, cache=False)
    first, second = (getattr(r, "constraint", None) for r in engine_of(model).requests)
    assert first == second
    assert first is not None
    assert first.value["additionalProperties"] is False


def test_a_schema_that_was_forgotten_is_asked_for() -> None:
    with pytest.raises(RequestError, match="schema is None"):
        extract(["a"], None, model=chat_model())
