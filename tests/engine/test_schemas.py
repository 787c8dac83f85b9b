"""Five hundred JSON Schemas: whatever is finished, validates."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from nbinfer.contract.errors import SchemaError
from nbinfer.contract.requests import CompletionRequest, Constraint, Sampling

if TYPE_CHECKING:
    from nbinfer.engines.llamacpp.generate import CompletionEngine

pytestmark = pytest.mark.engine

WORDS = "name city age tone stars price tags note id kind open size".split()
N_SCHEMAS = 500


def make_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A small schema: scalars with limits, enums, optional fields, arrays, objects, unions, references."""
    kinds = ["string", "integer", "number", "boolean", "enum", "null", "date", "pattern", "const"]
    kinds += ["object", "array", "anyOf"] * 2 if depth < 2 else []
    kind = "object" if depth == 0 else rng.choice(kinds)
    if kind == "object":
        names = rng.sample(WORDS, rng.randint(1, 4))
        properties = {name: make_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    low = rng.randint(-50, 50)
    simple: dict[str, dict[str, Any]] = {
        "string": {"type": "string", "maxLength": rng.randint(1, 12)},
        "integer": {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 90)},
        "number": {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 90)},
        "boolean": {"type": "boolean"},
        "enum": {"enum": rng.sample([*WORDS, 1, None, True], 3)},
        "null": {"type": "null"},
        "date": {"type": "string", "format": "date"},
        "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
        "const": {"const": rng.choice(WORDS)},
    }
    if kind == "array":
        least = rng.randint(0, 1)
        return {
            "type": "array",
            "items": make_schema(rng, depth + 1),
            "minItems": least,
            "maxItems": least + 2,
        }
    if kind == "anyOf":
        return {"anyOf": [make_schema(rng, depth + 1) for _ in range(2)]}
    return simple[kind]


def test_everything_finished_validates(engine: CompletionEngine) -> None:
    rng = random.Random(11)
    schemas = [make_schema(rng) for _ in range(N_SCHEMAS)]
    sampling = Sampling(temperature=1.0, seed=3)
    streams = [
        engine.submit(
            CompletionRequest(
                messages=({"role": "user", "content": f"Give me JSON about a {rng.choice(WORDS)}."},),
                constraint=Constraint("json_schema", schema),
                sampling=sampling,
                max_tokens=300,
                priority="batch",
            ),
        )
        for schema in schemas
    ]
    finished = 0
    for schema, stream in zip(schemas, streams, strict=True):
        try:
            text = stream.result(120).text
        except SchemaError:
            continue  # cut by max_tokens: an error, never half a value
        jsonschema.validate(json.loads(text), schema)
        finished += 1
    assert finished > 0.95 * N_SCHEMAS
