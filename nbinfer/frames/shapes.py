"""From a JSON Schema to typed columns: one per top-level field.

Text, numbers, booleans and dates become columns of their own types, enumerations become categories, lists and
objects Arrow lists and structs. What has no column type (a union, a free-form object) is kept as JSON text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import RequestError, SchemaError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Convert = Callable[[Any], Any]

_INT64 = 2**63
_VALUE = "value"


@dataclass(frozen=True)
class Field:
    """One column of a schema.

    ``categories`` are the allowed texts of an enumeration, in its order; None for other fields. ``convert``
    turns a JSON value into what Arrow takes, and raises ``SchemaError`` when it does not fit.
    """

    name: str
    arrow: Any
    convert: Convert
    required: bool = True
    categories: tuple[str, ...] | None = None


class Shape:
    """The columns of a schema.

    Parameters
    ----------
    schema
        A JSON Schema. An object has one column per property; anything else one column called ``value``.

    Raises
    ------
    RequestError
        An object without properties: there is no column to make of it.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._definitions = {**schema.get("definitions", {}), **schema.get("$defs", {})}
        top = self._resolved(schema)
        self._object = _type_of(top) == "object" or "properties" in top
        if not self._object:
            self.fields: tuple[Field, ...] = (self._field(_VALUE, schema, required=True),)
            return
        properties = top.get("properties") or {}
        if not properties:
            raise RequestError(
                "the schema is an object without properties, so that there is no column to make of it.\n"
                "Name its fields, or use complete(…, schema=…) for the JSON text.",
            )
        required = set(top.get("required", ()))
        self.fields = tuple(
            self._field(name, inner, required=name in required) for name, inner in properties.items()
        )

    def row(self, value: Any) -> tuple[Any, ...]:
        """Return a JSON value as the row's values, one per field.

        Raises
        ------
        SchemaError
            It does not fit: a field is missing, or of another type.
        """
        if not self._object:
            return (self._convert(self.fields[0], value),)
        if not isinstance(value, dict):
            raise SchemaError(f"the answer is {_name(value)}, not an object.")
        out: list[Any] = []
        for field in self.fields:
            if field.name not in value:
                if field.required:
                    raise SchemaError(f"the answer has no field {field.name!r}.")
                out.append(None)
                continue
            out.append(self._convert(field, value[field.name]))
        return tuple(out)

    @staticmethod
    def _convert(field: Field, value: Any) -> Any:
        try:
            return field.convert(value)
        except SchemaError as error:
            raise SchemaError(f"{field.name}: {error}") from None

    # -- types --------------------------------------------------------------------------------------------

    def _field(self, name: str, schema: Mapping[str, Any], *, required: bool) -> Field:
        import pyarrow as pa

        inner, nullable = self._without_null(schema)
        choices = inner.get("enum", [inner["const"]] if "const" in inner else None)
        if choices is not None and all(isinstance(c, str) for c in choices):
            convert = _one_of(tuple(choices))
            return Field(name, pa.string(), _maybe(convert, nullable), required, tuple(choices))
        arrow, convert = self._type(schema, seen=())
        return Field(name, arrow, convert, required)

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """Follow ``$ref`` and a lone ``allOf``; what stands beside them wins."""
        for _ in range(16):
            if "$ref" in schema:
                name = str(schema["$ref"]).rpartition("/")[2]
                beside = {key: value for key, value in schema.items() if key != "$ref"}
                schema = {**self._definitions.get(name, {}), **beside}
            elif len(schema.get("allOf", ())) == 1:
                beside = {key: value for key, value in schema.items() if key != "allOf"}
                schema = {**schema["allOf"][0], **beside}
            else:
                break
        return schema

    def _without_null(self, schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
        """Return the schema without its null alternative, and whether it had one."""
        schema = self._resolved(schema)
        for word in ("anyOf", "oneOf"):
            if word in schema:
                kept = [s for s in schema[word] if self._resolved(s).get("type") != "null"]
                nullable = len(kept) < len(schema[word])
                if len(kept) == 1:
                    inner, also = self._without_null(kept[0])
                    return inner, nullable or also
                return {word: kept}, nullable
        if isinstance(schema.get("type"), list):
            kept = [t for t in schema["type"] if t != "null"]
            return {**schema, "type": kept[0] if len(kept) == 1 else kept}, len(kept) < len(schema["type"])
        if "enum" in schema and None in schema["enum"]:
            return {**schema, "enum": [c for c in schema["enum"] if c is not None]}, True
        return schema, False

    def _type(self, schema: Mapping[str, Any], *, seen: tuple[str, ...]) -> tuple[Any, Convert]:
        """Return the Arrow type of a schema, and the conversion of its JSON values."""
        if "$ref" in schema:
            if schema["$ref"] in seen:  # a type that holds itself has no column type
                return _json_text(nullable=True)
            seen = (*seen, schema["$ref"])
        inner, nullable = self._without_null(schema)
        if "$ref" in inner or inner.get("anyOf") or inner.get("oneOf"):
            return self._union(inner, nullable)
        found = self._plain_type(inner, seen)
        if found is None:
            return _json_text(nullable=nullable)
        arrow, convert = found
        return arrow, _maybe(convert, nullable)

    def _union(self, schema: Mapping[str, Any], nullable: bool) -> tuple[Any, Convert]:  # noqa: FBT001
        import pyarrow as pa

        kinds = {_type_of(self._resolved(s)) for s in (*schema.get("anyOf", ()), *schema.get("oneOf", ()))}
        if kinds == {"integer", "number"}:
            return pa.float64(), _maybe(_number, nullable)
        return _json_text(nullable=nullable)

    def _plain_type(self, schema: Mapping[str, Any], seen: tuple[str, ...]) -> tuple[Any, Convert] | None:
        import pyarrow as pa

        kind = _type_of(schema)
        if kind == "string":
            if schema.get("format") in {"date-time", "date"}:
                return pa.timestamp("us"), _moment
            choices = schema.get("enum")
            return pa.large_string(), _text if choices is None else _one_of(tuple(choices))
        simple = {"integer": (pa.int64(), _integer), "number": (pa.float64(), _number)}
        simple["boolean"] = (pa.bool_(), _boolean)
        if kind in simple:
            return simple[kind]
        if kind == "array" and isinstance(schema.get("items"), dict) and "prefixItems" not in schema:
            arrow, convert = self._type(schema["items"], seen=seen)
            return pa.list_(arrow), _list_of(convert)
        if kind == "object" and schema.get("properties"):
            parts = {name: self._type(inner, seen=seen) for name, inner in schema["properties"].items()}
            required = set(schema.get("required", ()))
            struct = pa.struct([(name, arrow) for name, (arrow, _) in parts.items()])
            return struct, _struct_of({name: convert for name, (_, convert) in parts.items()}, required)
        return None


def _type_of(schema: Mapping[str, Any]) -> str | None:
    if isinstance(schema.get("type"), str):
        return str(schema["type"])
    if "properties" in schema:
        return "object"
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    names = {_name(v) for v in values}
    return names.pop() if len(names) == 1 else None


def _name(value: Any) -> str:
    """Return the JSON name of a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    for kind, name in (
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (list, "array"),
        (dict, "object"),
    ):
        if isinstance(value, kind):
            return name
    return type(value).__name__


def _unfit(value: Any, wanted: str) -> SchemaError:
    return SchemaError(f"{json.dumps(value, ensure_ascii=False, default=str)[:60]} is not {wanted}.")


def _maybe(convert: Convert, nullable: bool) -> Convert:  # noqa: FBT001 - one word at every call
    if not nullable:
        return convert
    return lambda value: None if value is None else convert(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _unfit(value, "text")
    return value


def _integer(value: Any) -> int:
    # JSON has one kind of number: 3.0 is a whole one.
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (whole or isinstance(value, int)):
        raise _unfit(value, "a whole number")
    number = int(value)
    if not -_INT64 <= number < _INT64:
        raise _unfit(value, "a number of 64 bits")
    return number


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unfit(value, "a number")
    return float(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _unfit(value, "true or false")
    return value


def _moment(value: Any) -> datetime:
    """Return a date or time; one with an offset is moved to UTC, and the column carries no zone."""
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise _unfit(value, "a date") from None
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


def _one_of(choices: tuple[Any, ...]) -> Convert:
    def convert(value: Any) -> Any:
        if value not in choices:
            raise _unfit(value, f"one of {', '.join(map(repr, choices))}")
        return value

    return convert


def _list_of(convert: Convert) -> Convert:
    def convert_all(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise _unfit(value, "a list")
        return [convert(item) for item in value]

    return convert_all


def _struct_of(converts: Mapping[str, Convert], required: set[str]) -> Convert:
    def convert_all(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _unfit(value, "an object")
        missing = sorted(required - value.keys())
        if missing:
            raise SchemaError(f"an object has no field {missing[0]!r}.")
        return {name: convert(value[name]) if name in value else None for name, convert in converts.items()}

    return convert_all


def _json_text(*, nullable: bool) -> tuple[Any, Convert]:
    import pyarrow as pa

    return pa.large_string(), _maybe(lambda value: json.dumps(value, ensure_ascii=False), nullable)
