"""The configuration of a model: typed, checked when it is set, merged field by field."""

from __future__ import annotations

import json
import math
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_serializer,
)

from nbinfer.contract.errors import ConfigError
from nbinfer.contract.flags import check_flag_items
from nbinfer.contract.keepalive import KeepAlive

_INT32_MAX = 2**31 - 1
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_DEPTH = 16
_MAX_VALUES = 10_000
_MAX_BYTES = 65_536


def check_hf_overrides(value: object) -> dict[str, Any]:
    """Check a set of overrides of a model's Hugging Face configuration and return a copy of it.

    Raises
    ------
    ConfigError
        A key is not an identifier, a value is not a finite JSON value, or the whole is nested or sized beyond
        reason (16 levels, 10,000 values, 64 KiB of JSON).
    """
    if not isinstance(value, dict):
        raise ConfigError(f"hf-overrides={value!r:.60} is refused: it is a JSON object.")
    copy = _copy_json(value, "hf-overrides", depth=1, budget=[_MAX_VALUES])
    size = len(json.dumps(copy))
    if size > _MAX_BYTES:
        raise ConfigError(
            f"hf-overrides is refused: {size:,} bytes of JSON, at most {_MAX_BYTES:,} are allowed."
        )
    return dict(copy)


def _copy_json(value: object, where: str, depth: int, budget: list[int]) -> Any:
    budget[0] -= 1
    if budget[0] < 0:
        raise ConfigError(f"hf-overrides is refused: it holds more than {_MAX_VALUES:,} values.")
    if not isinstance(value, list | dict):
        _check_scalar(value, where[:120])
        return value
    if depth > _MAX_DEPTH:
        raise ConfigError(f"hf-overrides is refused: nested more than {_MAX_DEPTH} levels deep.")
    if isinstance(value, list):
        return [_copy_json(item, f"{where}[{i}]", depth + 1, budget) for i, item in enumerate(value)]
    for key in value:
        if not (isinstance(key, str) and _KEY.fullmatch(key)):
            raise ConfigError(
                f"{where[:120]}: the key {key!r:.60} is refused: a key is letters, digits and underscores, "
                "and does not start with a digit.",
            )
    return {key: _copy_json(item, f"{where}.{key}", depth + 1, budget) for key, item in value.items()}


def _check_scalar(value: object, where: str) -> None:
    if value is None or isinstance(value, bool | str):
        return
    if not isinstance(value, int | float):
        raise ConfigError(
            f"{where} is refused: {type(value).__name__} is not a JSON value "
            "(text, number, true or false, null, list or object).",
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value} is refused: a number must be finite.")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{where} is refused: the number needs more than 64 bits.")


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError
    return value


class _Block(BaseModel):
    """Fields that may each be absent (None), with wire names by alias."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    def merged(self, other: Self) -> Self:
        """Return this configuration with every field that ``other`` sets; what it leaves out stays."""
        fields: dict[str, Any] = {}
        for name in type(self).model_fields:
            old, new = getattr(self, name), getattr(other, name)
            if isinstance(old, _Block) and isinstance(new, _Block):
                new = old.merged(new)
            fields[name] = old if new is None else new
        return type(self)(**fields)

    @model_serializer
    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, under their wire names, as JSON-able values."""
        out: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value is not None:
                out[field.alias or name] = _to_json(value)
        return out


_AnyBlock = TypeVar("_AnyBlock", bound=_Block)


_Share = Annotated[float, Field(ge=0, le=1)]
_ContextSize = Annotated[int, Field(ge=-1, le=_INT32_MAX), AfterValidator(_not_zero)]
_Flags = Annotated[tuple[str, ...], PlainValidator(check_flag_items)]
_Overrides = Annotated[dict[str, Any], PlainValidator(check_hf_overrides)]
_KeepAlive = Annotated[KeepAlive, PlainValidator(KeepAlive.parse)]


class SpeculativeConfig(_Block):
    """Speculative decoding: a small draft model proposes tokens that the model checks."""

    if TYPE_CHECKING:  # wire names, and looser types than the fields: the checks are those of construction

        def __init__(self, /, **fields: Any) -> None: ...

    draft_model: str | None = Field(None, min_length=1, description="the name of a model")
    num_tokens: int | None = Field(
        None, ge=1, le=_INT32_MAX, description="a whole number of tokens, 1 or more"
    )
    min_acceptance_rate: _Share | None = Field(None, description="a number from 0 to 1")


class VllmConfig(_Block):
    """Settings that only vLLM has. Absent GPU memory utilisation means vLLM's own, 0.9."""

    if TYPE_CHECKING:

        def __init__(self, /, **fields: Any) -> None: ...

    hf_overrides: _Overrides | None = Field(None, alias="hf-overrides", description="a JSON object")
    gpu_memory_utilization: _Share | None = Field(
        None, alias="gpu-memory-utilization", description="a number from 0.0 to 1.0"
    )


class LlamaCppConfig(_Block):
    """Settings that only llama.cpp has."""

    if TYPE_CHECKING:

        def __init__(self, /, **fields: Any) -> None: ...

    reasoning_budget: int | None = Field(
        None,
        alias="reasoning-budget",
        ge=-1,
        le=_INT32_MAX,
        description="a whole number of tokens, -1 for unlimited or 0 for none",
    )


class ModelConfig(_Block):
    """What was asked of a model's engine. Immutable; a field that is None was not asked for.

    Fields go by their Python names (``context_size``) or their wire names (``context-size``).

    Parameters
    ----------
    context_size
        Tokens, above 0, or -1 for the model's trained maximum.
    runtime_flags
        Flags of the engine's command line, sidecar only. Checked here for what no backend allows, and with
        :func:`nbinfer.contract.flags.check_flags` once the backend is known.
    speculative
        Speculative decoding.
    keep_alive
        How long the idle model stays loaded: text, seconds or a ``timedelta``; absent means 5 minutes.
    vllm, llamacpp
        Settings of one backend.

    Raises
    ------
    ConfigError
        A value is refused; the message names the field and its rule.
    """

    if TYPE_CHECKING:

        def __init__(self, /, **fields: Any) -> None: ...

    context_size: _ContextSize | None = Field(
        None,
        alias="context-size",
        description="a whole number of tokens above 0, or -1 for the model's trained maximum",
    )
    runtime_flags: _Flags | None = Field(None, alias="runtime-flags", description="a list of strings")
    speculative: SpeculativeConfig | None = Field(None, description="an object")
    keep_alive: _KeepAlive | None = Field(None, description="a duration")
    vllm: VllmConfig | None = Field(None, description="an object")
    llamacpp: LlamaCppConfig | None = Field(None, description="an object")

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read the wire form: JSON text, or what it decodes to.

        Raises
        ------
        ConfigError
            It is not a JSON object, or a field is refused. NaN and Infinity are not JSON; a keep-alive is
            always a string here.
        """
        if isinstance(value, str | bytes):
            try:
                value = json.loads(value, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"the configuration is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ConfigError(f"the configuration is {type(value).__name__}, not a JSON object.")
        fields = {str(key): item for key, item in value.items()}
        if fields.get("keep_alive") is not None:
            fields["keep_alive"] = KeepAlive.from_json(fields["keep_alive"])
        return cls(**fields)

    def with_fields(self, **fields: Any) -> Self:
        """Return this configuration with some fields set; the others, nested ones too, stay as they are."""
        return self.merged(type(self)(**fields))

    def without(self, *names: str) -> Self:
        """Return this configuration with some fields absent, named as in ``vllm.hf-overrides``.

        Raises
        ------
        ConfigError
            There is no such field.
        """
        out = self
        for name in names:
            out = _without(out, name)
        return out

    def key(self) -> str:
        """Return a text that is equal for equal configurations: what a runner is found by."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    @property
    def effective_keep_alive(self) -> KeepAlive:
        """The keep-alive that was asked for, or the default of 5 minutes."""
        return KeepAlive.DEFAULT if self.keep_alive is None else self.keep_alive


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _to_json(value: Any) -> Any:
    if isinstance(value, _Block | KeepAlive):
        return value.to_json()
    # Values inside hf-overrides are JSON already, and were copied on the way in; copy them on the way out.
    return json.loads(json.dumps(value))


def _wire_names(block: type[_Block]) -> dict[str, str]:
    return {name: field.alias or name for name, field in block.model_fields.items()}


def _field(block: type[_Block], name: str) -> str:
    """Return the Python name of a field given by that or by its wire name.

    Raises
    ------
    ConfigError
        There is no such field; the message has the nearest one.
    """
    wire = _wire_names(block)
    if name in wire:
        return name
    for python_name, wire_name in wire.items():
        if name == wire_name:
            return python_name
    near = get_close_matches(name, wire.values(), n=1)
    advice = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(wire.values())}."
    raise ConfigError(f"there is no field {name!r:.60}; {advice}")


def _is_block(block: type[_Block], field: str) -> bool:
    types = get_args(block.model_fields[field].annotation)
    return any(isinstance(kind, type) and issubclass(kind, _Block) for kind in types)


def _without(block: _AnyBlock, name: str) -> _AnyBlock:
    first, _, rest = name.partition(".")
    field = _field(type(block), first)
    fields = {name: getattr(block, name) for name in type(block).model_fields}
    inner = fields[field]
    if rest and not _is_block(type(block), field):
        raise ConfigError(f"there is no field {rest!r:.60} in {first}: it is a single value.")
    fields[field] = _without(inner, rest) if rest and inner is not None else None
    return type(block)(**fields)


def _explain(block: type[_Block], error: ValidationError) -> str:
    first, *others = error.errors(include_url=False)
    name = str(first["loc"][0])
    inner = first.get("ctx", {}).get("error")
    try:
        field = _field(block, name)
    except ConfigError as unknown:
        text = str(unknown)
    else:
        wire = _wire_names(block)[field]
        if first["type"] == "extra_forbidden":
            text = f"{wire} is given twice: as {field} and as {wire}."
        elif isinstance(inner, ConfigError):
            # A block inside says which of its fields it was; the other checks name their field themselves.
            text = f"{wire}: {inner}" if _is_block(block, field) else str(inner)
        else:
            rule = block.model_fields[field].description
            text = f"{wire}={first['input']!r:.60} is refused: it must be {rule}."
    return text if not others else f"{text}\n({len(others)} more refused.)"
