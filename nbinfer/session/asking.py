"""From what a person writes to a request: options by name, prompts, pictures, and the form of the answer."""

from __future__ import annotations

import base64
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import RequestError, SchemaError
from nbinfer.contract.requests import CompletionRequest, Constraint, ImageRequest, Sampling
from nbinfer.contract.units import plain_number

if TYPE_CHECKING:
    from nbinfer.contract.requests import Message
    from nbinfer.contract.results import Result
    from nbinfer.contract.schemas import Schema

_SAMPLING = tuple(f.name for f in dataclasses.fields(Sampling))
OPTIONS = (
    *_SAMPLING,
    "messages",
    "system",
    "images",
    "tools",
    "max_tokens",
    "stop",
    "schema",
    "choices",
    "regex",
    "grammar",
    "json",
    "logprobs",
    "think",
    "reasoning_budget",
    "adapter",
    "raw",
    "params",
    "priority",
)
"""Every option that :func:`infer` and its siblings take, besides the prompt and the model."""
IMAGE_OPTIONS = ("size", "n", "steps", "guidance", "negative_prompt", "seed", "previews", "priority")
"""Every option that :func:`generate_image` takes, besides the prompt and the model."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request, and the schema its answer is read with."""

    request: CompletionRequest
    schema: Schema | None = None
    choices: tuple[str, ...] | None = None

    def read(self, result: Result) -> Result:
        """Add the typed value to a finished result.

        Raises
        ------
        SchemaError
            The answer does not fit the schema.
        """
        if result.finish_reason == "interrupted" or self.request.constraint is None:
            return result
        kind = self.request.constraint.kind
        if self.choices is not None:
            return result.with_changes(parsed=result.text)
        if self.schema is not None:
            return result.with_changes(parsed=self.schema.parse(result.text))
        if kind == "json":
            import json

            try:
                return result.with_changes(parsed=json.loads(result.text))
            except ValueError as e:
                raise SchemaError(f"the answer is not whole JSON: {e}", raw=result.text) from e
        return result


def prepare(prompt: str | None = None, **options: Any) -> Prepared:
    """Build and validate a request; runs nothing. The options are those of :func:`infer`.

    Raises
    ------
    RequestError
        An option is unknown, contradictory or out of range.
    """
    _add_params(options, options.pop("params", None))
    _reject_unknown(options)
    options = {name: plain_number(value) for name, value in options.items() if value is not None}
    sampling = Sampling(**{name: options.pop(name) for name in _SAMPLING if name in options})
    constraint, schema, choices = _constraint(options)
    messages, raw_prompt = _conversation(prompt, options)
    stop = options.pop("stop", ())
    request = CompletionRequest(
        messages=messages,
        prompt=raw_prompt,
        sampling=sampling,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        constraint=constraint,
        tools=tuple(options.pop("tools", ())),
        images=tuple(_image_bytes(image) for image in _listed(options.pop("images", ()))),
        **options,
    )
    return Prepared(request, schema, choices)


def prepare_images(prompt: str, **options: Any) -> ImageRequest:
    """Build and validate a request for images; runs nothing.

    Raises
    ------
    RequestError
        An option is unknown or out of range.
    """
    _add_params(options, options.pop("params", None))
    _reject_unknown(options, IMAGE_OPTIONS)
    given = {name: plain_number(value) for name, value in options.items() if value is not None}
    return ImageRequest(prompt=prompt, **given)


def _add_params(options: dict[str, Any], params: Any) -> None:
    """Add ``params`` to the options given by name."""
    if params is None:
        return
    if not isinstance(params, Mapping):
        raise RequestError(f"params is {type(params).__name__}, not a dict of options.")
    for name, value in params.items():
        if options.get(name) is not None and options[name] != value:
            raise RequestError(
                f"{name} is given twice: {options[name]!r:.60} by name, {value!r:.60} in params. Say which."
            )
        options[name] = value


def _reject_unknown(options: Mapping[str, Any], known: Sequence[str] = OPTIONS) -> None:
    unknown = [name for name in options if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RequestError(f"unknown option {unknown[0]!r}.{hint}\nOptions: {', '.join(sorted(known))}.")


def _constraint(options: dict[str, Any]) -> tuple[Constraint | None, Schema | None, tuple[str, ...] | None]:
    given = [
        name
        for name in ("schema", "choices", "regex", "grammar", "json")
        if options.get(name) is not None and options[name] is not False
    ]
    values = {name: options.pop(name, None) for name in ("schema", "choices", "regex", "grammar", "json")}
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} cannot be combined: each fixes the whole output.")
    if not given:
        return None, None, None
    kind, value = given[0], values[given[0]]
    if kind == "schema":
        from nbinfer.contract.schemas import Schema

        schema = value if isinstance(value, Schema) else Schema(value)
        return Constraint("json_schema", schema.closed), schema, None
    if kind == "choices":
        choices = (
            tuple(str(c) for c in value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
        )
        if not choices or any(not c for c in choices):
            raise RequestError("choices needs a list of at least one non-empty text.")
        return Constraint("choices", choices), None, choices
    if kind == "json":
        return Constraint("json"), None, None
    return Constraint("regex" if kind == "regex" else "grammar", str(value)), None, None


def _conversation(prompt: Any, options: dict[str, Any]) -> tuple[tuple[Message, ...] | None, str | None]:
    messages, system, raw = (
        options.pop("messages", None),
        options.pop("system", None),
        options.pop("raw", False),
    )
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError(
            f"the prompt is {type(prompt).__name__}, not text. For a conversation use messages=[…]."
        )
    if (prompt is None) == (messages is None):
        raise RequestError("give a prompt or messages=[…], not both and not neither.")
    if raw:
        if system is not None or messages is not None:
            raise RequestError(
                "raw=True sends the prompt as it is: it goes with neither system nor messages."
            )
        return None, prompt
    conversation = list(messages) if messages is not None else [{"role": "user", "content": prompt}]
    if system is not None:
        conversation.insert(0, {"role": "system", "content": str(system)})
    return tuple(conversation), None


def with_images(prompt: str, images: Any) -> Any:
    """The content of a message: the text alone, or images before it, as they stay in a conversation."""
    parts: list[dict[str, Any]] = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"},
        }
        for data in map(_image_bytes, _listed(images))
    ]
    return [*parts, {"type": "text", "text": prompt}] if parts else prompt


def _listed(images: Any) -> Any:
    """One image counts as a list of one."""
    return images if isinstance(images, list | tuple) else [images]


def _image_bytes(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        path = Path(image)
        try:
            return path.read_bytes()
        except OSError as e:
            raise RequestError(f"cannot read the image {path}: {e.strerror or e}") from e
    if hasattr(image, "save"):  # a PIL image
        import io

        buffer = io.BytesIO()
        try:
            image.save(buffer, "PNG")
        except OSError:  # a colour space that PNG does not have
            image.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()
    if hasattr(image, "_repr_png_"):
        png = image._repr_png_()
        return base64.b64decode(png) if isinstance(png, str) else bytes(png)
    raise RequestError(f"an image is {type(image).__name__}: give a path, bytes or a PIL image.")
