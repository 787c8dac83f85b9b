"""What a caller gives as a schema, as JSON Schema for the engine and as a typed value for the caller.

A schema is a pydantic model, dataclass, TypedDict, Enum, ``Literal[…]``, any other type that pydantic can
describe, or a JSON Schema as a dict.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from nbinfer.contract.errors import RequestError, SchemaError


class Schema:
    """A schema in both its forms.

    Parameters
    ----------
    source
        A type, or a JSON Schema as a mapping.

    Raises
    ------
    RequestError
        Neither a mapping nor a type that can be described.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self._adapter: Any = None
        if isinstance(source, Mapping):
            self.json_schema: dict[str, Any] = dict(source)
            return
        from pydantic import TypeAdapter
        from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

        try:
            self._adapter = TypeAdapter(_describable(source))
            self.json_schema = self._adapter.json_schema()
        except (PydanticSchemaGenerationError, PydanticUserError, TypeError) as e:
            raise RequestError(
                f"schema={source!r} cannot be described as JSON Schema.\n"
                "Use a pydantic model, dataclass, TypedDict, Enum, Literal or a JSON Schema dict.\n"
                f"{str(e).splitlines()[0]}",
            ) from e

    @cached_property
    def closed(self) -> dict[str, Any]:
        """The JSON Schema for an engine: objects take no further properties unless it says that they do.

        Of a type, what the engine's grammar cannot say is left to :meth:`parse`, which checks it afterwards.
        """
        made: dict[str, Any] = closed(self.json_schema)
        return made if self._adapter is None else {**made, "x-guidance": {"lenient": True}}

    def parse(self, text: str) -> Any:
        """Return the typed value of ``text``.

        Raises
        ------
        SchemaError
            The text is not JSON, or does not validate; ``raw`` holds it.
        """
        from pydantic import ValidationError

        try:
            if self._adapter is None:
                return json.loads(text)
            return self._adapter.validate_json(text)
        except ValidationError as e:
            first = e.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole answer"
            raise SchemaError(f"the answer does not fit the schema: {where}: {first['msg']}", raw=text) from e
        except ValueError as e:
            raise SchemaError(f"the answer is not valid JSON: {e}", raw=text) from e

    def plain(self, value: Any) -> Any:
        """Return a value of :meth:`parse` as JSON-able data: dicts, lists, text, numbers, dates as text."""
        if self._adapter is None:
            return value
        return self._adapter.dump_python(value, mode="json", by_alias=True)


def closed(schema: Any) -> Any:
    """Return a JSON Schema whose objects take no further properties, unless it says so itself.

    Fields that no column waits for would be generated for nothing.
    """
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    for word in ("items", "prefixItems", "anyOf", "oneOf"):
        if word in schema:
            out[word] = closed(schema[word])
    if len(schema.get("allOf", ())) == 1:  # several parts each see the others' properties as further ones
        out["allOf"] = closed(schema["allOf"])
    for word in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(word), dict):
            out[word] = {name: closed(part) for name, part in schema[word].items()}
    if schema.get("properties") and "additionalProperties" not in schema:
        out["additionalProperties"] = False
    return out


def _describable(source: Any) -> Any:
    """The source itself; before Python 3.12, pydantic takes a ``typing.TypedDict`` only remade."""
    if sys.version_info >= (3, 12) or not typing.is_typeddict(source):
        return source
    from typing_extensions import TypedDict

    hints = typing.get_type_hints(source, include_extras=True)
    optional = source.__optional_keys__
    fields = {name: typing.NotRequired[hint] if name in optional else hint for name, hint in hints.items()}
    return TypedDict(source.__name__, fields)  # type: ignore[operator]
