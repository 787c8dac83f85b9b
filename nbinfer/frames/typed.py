"""``extract``: text in, typed columns out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.schemas import Schema
from nbinfer.contract.units import plain_number
from nbinfer.frames.operators import check_options, completion_work, plain_options
from nbinfer.frames.output import SIDE, side_columns
from nbinfer.frames.rules import Rules
from nbinfer.frames.shapes import Shape
from nbinfer.frames.tables import read

if TYPE_CHECKING:
    from nbinfer.frames.outcomes import Columns
    from nbinfer.frames.plan import CacheMode, Nulls, OnError, TooLong
    from nbinfer.frames.progress import Sink
    from nbinfer.frames.run import Run
    from nbinfer.frames.shapes import Field

_SIDE = ("raw", *SIDE)


def extract(
    data: Any,
    schema: Any,
    prompt: Any = None,
    *,
    on: Any = None,
    name: str = "extract",
    model: Any = None,
    client: Any = None,
    endpoints: Any = None,
    cache: CacheMode = True,
    on_error: OnError = "null",
    nulls: Nulls = "skip",
    too_long: TooLong = "error",
    keep: bool = True,
    progress: bool | Sink | None = None,
    max_tokens: int | None = 512,
    temperature: float = 0.0,
    seed: int | None = 0,
    **options: Any,
) -> Any:
    """Fill a schema from each row, one typed column per field.

    Parameters
    ----------
    schema
        A pydantic model, dataclass, TypedDict, Enum, ``Literal``, or a JSON Schema as a dict. What is no
        object gives one column, ``value``.
    prompt
        As for :func:`complete`. Without one, and with ``on`` or a list or Series, the prompt asks for the
        schema's fields and shows the schema.
    name
        What the columns beside the fields are prefixed with where their names are taken.
    data, on, model, client, endpoints, cache, on_error, nulls, too_long, keep, progress
        As for :func:`complete`.
    max_tokens, temperature, seed, **options
        As for :func:`complete`.

    Returns
    -------
    DataFrame
        The fields, as text, ``Int64``, ``Float64``, ``boolean``, category (enumerations), datetime, or Arrow
        lists and structs (a saved frame with these: ``pd.read_parquet(path, dtype_backend="pyarrow")``);
        ``raw`` (the text as the model wrote it), ``error`` and the other columns of
        :func:`complete`. An answer that was cut short is an error, its fields null.

    Raises
    ------
    RequestError
        The call itself is wrong.
    """
    rules = Rules(model, client, endpoints, cache, on_error, nulls, too_long, keep, progress)
    table = read(data)
    taken = sorted({"choices", "regex", "grammar", "json"} & options.keys())
    if taken:
        raise RequestError(f"extract: the schema is the rule for the answers; {taken[0]} is a second one.")
    if schema is None:
        raise RequestError("extract: schema is None; it is a class or a JSON Schema with the fields to fill.")
    made = Schema(schema)
    shape = Shape(made.json_schema)
    output = rules.output(table, [field.name for field in shape.fields], _SIDE, name=name)
    asked = table.prompt(prompt, on, default=_default_prompt(made), call="extract")
    check_options(extract, options)
    loaded = rules.model_for(Mode.COMPLETION)
    seed = plain_number(seed)
    params = plain_options({"max_tokens": max_tokens, "temperature": temperature, **options})
    work = completion_work(
        "extract",
        {**params, "schema": made},
        seed=seed,
        parse=lambda text: shape.row(made.plain(made.parse(text))),
    )

    def build(run: Run, columns: Columns) -> Any:
        values = {field.name: _column(columns, i, field) for i, field in enumerate(shape.fields)}
        return output.frame(run, columns, values, side_columns(columns, _SIDE))

    run = rules.batch(
        table,
        asked,
        work,
        loaded,
        build,
        params={**params, "schema": made.json_schema, "name": name},
        seed=0 if work.greedy else seed,
        draws=not work.greedy,
    )
    return rules.result(run)


def _default_prompt(schema: Schema) -> str:
    """Return the template that asks for a schema's fields; the row comes last: rows share the rest."""
    text = json.dumps(schema.json_schema, ensure_ascii=False).replace("{", "{{").replace("}", "}}")
    return (
        "Take the information that the JSON Schema asks for from the text, and answer with JSON that follows "
        "the schema. Use null for what the text does not say, where the schema allows it.\n\n"
        f"JSON Schema: {text}\n\nText: {{text}}"
    )


def _column(columns: Columns, position: int, field: Field) -> Any:
    parsed = columns.outcomes.parsed
    items = [parsed[job][position] if job in parsed else None for job in range(len(columns.outcomes))]
    if field.categories is not None:
        return columns.categories(items, field.categories)
    return columns.values(field.arrow, items)
