"""What can be asked of an engine: immutable, validated once when made.

A request knows nothing of placement: the same object runs in the kernel and, as JSON, in a sidecar.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from nbinfer.contract.errors import RequestError

Message: TypeAlias = Mapping[str, Any]
"""One chat message: ``{"role": "user", "content": "…"}``, in OpenAI's shape."""

_INT32_MAX = 2**31 - 1

MAX_SIDE = 8192
"""Pixels of an image's longer side, at most."""

ROLES = ("system", "developer", "user", "assistant", "tool")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name}={value!r:.60} is not a number: it must be between {low:g} and {high:g}.")
    if not low <= value <= high:  # true for NaN as well
        raise RequestError(f"{name}={value!r:.60} is out of range: it must be between {low:g} and {high:g}.")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(
            f"{name}={value!r:.60} is not a whole number: it must be between {low} and {high}."
        )
    if not low <= value <= high:
        raise RequestError(f"{name}={value!r:.60} is out of range: it must be between {low} and {high}.")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {type(value).__name__}, not text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} holds half a character at position {error.start} (a lone surrogate).\n"
            "Clean it with text.encode(errors='replace').decode().",
        ) from None


def _texts(name: str, value: object) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RequestError(f"{name} is {type(value).__name__}: it must be a list of texts.")
    for i, text in enumerate(value):
        _text(f"{name}[{i}]", text)


def _priority(value: object) -> None:
    if value not in ("interactive", "batch"):
        raise RequestError(f"priority={value!r:.60} is not known: it is interactive or batch.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    ``temperature=0`` (the default) is greedy: the same prompt gives the same text. The other defaults are
    llama.cpp's own and take effect only above temperature 0.

    Parameters
    ----------
    temperature
        0 to 5; 0 takes the most likely token.
    top_p, min_p
        Probability cuts, 0 to 1 (``top_p=1`` and ``min_p=0`` are off).
    top_k
        Keep the k most likely tokens; 0 is off.
    seed
        Seed of the random choice; None draws one, which the result then records.
    repeat_penalty, presence_penalty, frequency_penalty
        Penalties on the last 64 tokens; 1, 0 and 0 are off.
    logit_bias
        Token id to a number added to its logit, -100 to 100.
    """

    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    seed: int | None = None
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 5)
        _number("top_p", self.top_p, 0, 1)
        _number("min_p", self.min_p, 0, 1)
        _whole("top_k", self.top_k, 0, _INT32_MAX)
        _number("repeat_penalty", self.repeat_penalty, 0.01, 10)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**32 - 1)
        for token, bias in self.logit_bias.items():
            _whole("logit_bias: the token id", token, 0, _INT32_MAX)
            _number(f"logit_bias[{token}]", bias, -100, 100)


@dataclass(frozen=True, slots=True)
class Constraint:
    """A rule that every output obeys.

    ``kind`` is ``json_schema`` (``value``: the schema as a JSON-able dict), ``json`` (any JSON object;
    ``value`` is None), ``choices`` (a tuple of strings), ``regex`` (a string) or ``grammar`` (Lark or GBNF
    text).
    """

    kind: Literal["json_schema", "json", "choices", "regex", "grammar"]
    value: Any = None

    def __post_init__(self) -> None:
        value: object = self.value
        if self.kind == "json_schema":
            if not isinstance(value, Mapping):
                raise RequestError(f"the schema is {type(value).__name__}, not a JSON Schema (a dict).")
        elif self.kind == "json":
            if value is not None:
                raise RequestError("json takes no value; give a schema for a certain shape.")
        elif self.kind == "choices":
            _texts("choices", value)
            object.__setattr__(self, "value", tuple(self.value))
            if not self.value or "" in self.value:
                raise RequestError("choices needs at least one text, and none of them empty.")
        elif self.kind in ("regex", "grammar"):
            _text(self.kind, value)
            if not value:
                raise RequestError(f"{self.kind} is empty: it would allow no output at all.")
        else:
            raise RequestError(f"there is no constraint of kind {self.kind!r:.60}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """Ask for text.

    Parameters
    ----------
    messages
        A conversation, rendered with the model's own chat template; or
    prompt
        raw text (or token ids) that reaches the model as it is. Exactly one of the two.
    max_tokens
        Upper bound on generated tokens; None: as many as the context has room for.
    stop
        Strings that end the answer; they are not part of it.
    constraint
        A schema, choices, regular expression or grammar that the output obeys.
    logprobs
        None: none; k: the chosen token's log-probability and the k most likely ones.
    n
        Independent answers to the same prompt.
    think
        For models with a thinking switch in their template: on, off, or the template's default (None).
    reasoning_budget
        Tokens of reasoning: -1 unlimited, 0 none, n at most n; None: the model's configuration.
    adapter
        Name of a LoRA adapter that was loaded with the model.
    priority
        ``interactive`` requests go before ``batch`` ones.
    """

    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    images: tuple[bytes, ...] = ()
    logprobs: int | None = None
    n: int = 1
    think: bool | None = None
    reasoning_budget: int | None = None
    adapter: str | None = None
    priority: Literal["interactive", "batch"] = "interactive"

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise RequestError("give either messages or prompt, not both and not neither.")
        if self.messages is not None:
            _check_messages(self.messages)
            object.__setattr__(self, "messages", tuple(self.messages))
        else:
            _check_prompt(self.prompt)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, _INT32_MAX)
        _texts("stop", self.stop)
        if "" in self.stop:
            raise RequestError("stop holds an empty text; each stop must be at least one character.")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, 20)
        _whole("n", self.n, 1, 128)
        if self.reasoning_budget is not None:
            _whole("reasoning_budget", self.reasoning_budget, -1, _INT32_MAX)
        _priority(self.priority)


def _check_messages(messages: object) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is {type(messages).__name__}: it must be a list of messages.")
    if not messages:
        raise RequestError("messages is empty: it needs at least one message with a role and a content.")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise RequestError(
                f"messages[{i}] has role {role!r:.60}; a message is "
                f'{{"role": …, "content": …}} with a role of {", ".join(ROLES)}.',
            )
        content = message.get("content")
        if isinstance(content, str):
            _text(f"messages[{i}]", content)
        elif not isinstance(content, list | tuple) and not (content is None and message.get("tool_calls")):
            raise RequestError(
                f"messages[{i}] has a content of {type(content).__name__}; it must be text or a list."
            )


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, tuple):
        _text("prompt", prompt)
        return
    if not prompt:
        raise RequestError("prompt is an empty list of tokens: it needs at least one.")
    for i, token in enumerate(prompt):
        _whole(f"prompt[{i}]", token, 0, _INT32_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """Ask for one vector per text.

    ``dims`` keeps the first ``dims`` components (matryoshka models), then normalises again if asked.
    """

    texts: Sequence[str]
    normalize: bool = True
    dims: int | None = None
    priority: Literal["interactive", "batch"] = "interactive"

    def __post_init__(self) -> None:
        _texts("texts", self.texts)
        if self.dims is not None:
            _whole("dims", self.dims, 1, 2**20)
        _priority(self.priority)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Ask how likely each of several answers is, without generating any.

    ``messages`` or ``prompt`` are as in :class:`CompletionRequest`; ``answers`` are labels and the like.
    """

    answers: tuple[str, ...]
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    think: bool | None = None
    priority: Literal["interactive", "batch"] = "interactive"

    def __post_init__(self) -> None:
        _texts("answers", self.answers)
        if not self.answers or not all(self.answers):
            raise RequestError("answers needs at least one text, and none that is empty.")
        self.question()
        _priority(self.priority)

    def question(self) -> CompletionRequest:
        """The same prompt as a completion."""
        return CompletionRequest(
            messages=self.messages,
            prompt=self.prompt,
            think=self.think,
            priority=self.priority,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """Ask how well each document answers the query; higher is better, on the model's own scale."""

    query: str
    documents: Sequence[str]
    priority: Literal["interactive", "batch"] = "interactive"

    def __post_init__(self) -> None:
        _text("query", self.query)
        _texts("documents", self.documents)
        _priority(self.priority)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """Ask for images.

    Parameters
    ----------
    prompt
        What they show.
    negative_prompt
        What they do not show; only where guidance is in use.
    size
        (width, height) in pixels, each a multiple of 8; None: what the model was trained for.
    n
        How many; image ``i`` is that of ``seed + i`` alone.
    steps
        Denoising steps; None: the pipeline's own number.
    guidance
        How closely the prompt is followed; 1 and less is without guidance. None: the pipeline's own number.
    seed
        Seed of the first image; None draws one, which the result then records.
    previews
        Small pictures of each image on its way, spread evenly over its steps.
    """

    prompt: str
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    n: int = 1
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    previews: int = 0
    priority: Literal["interactive", "batch"] = "interactive"

    def __post_init__(self) -> None:
        _text("prompt", self.prompt)
        if self.negative_prompt is not None:
            _text("negative_prompt", self.negative_prompt)
        if self.size is not None:
            object.__setattr__(self, "size", parse_size(self.size))
        _whole("n", self.n, 1, 128)
        if self.steps is not None:
            _whole("steps", self.steps, 1, 1000)
        if self.guidance is not None:
            _number("guidance", self.guidance, 0, 100)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**32 - 1)
        _whole("previews", self.previews, 0, 1000)
        _priority(self.priority)


def parse_size(size: object) -> tuple[int, int]:
    """Read the size of an image: ``"512x768"`` (width first), or a pair of numbers.

    Raises
    ------
    RequestError
        It is none, or a side is not a multiple of 8, up to 8,192 pixels.
    """
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size.strip()) if isinstance(size, str) else None
    pair = (int(found[1]), int(found[2])) if found else size
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:  # noqa: PLR2004 - a pair
        raise RequestError(f'size={size!r:.60} is not a size: it is "WIDTHxHEIGHT", such as "512x768".')
    for side in pair:
        if isinstance(side, bool) or not isinstance(side, int) or side % 8 or not 0 < side <= MAX_SIDE:
            raise RequestError(
                f"size={size!r:.60} is refused: each side is a multiple of 8, up to {MAX_SIDE:,} pixels."
            )
    return (pair[0], pair[1])


Request: TypeAlias = CompletionRequest | ScoreRequest | EmbeddingRequest | RerankRequest | ImageRequest
