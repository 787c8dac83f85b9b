"""What can be asked of an engine: immutable, validated once when made.

A request knows nothing of placement: the same object runs in the kernel and, as JSON, in a sidecar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from nbinfer.contract.errors import RequestError

Message: TypeAlias = Mapping[str, Any]
"""One chat message: ``{"role": "user", "content": "…"}``, in OpenAI's shape."""

ROLES = ("system", "developer", "user", "assistant", "tool")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name}={value!r} is out of range: it must be between {low:g} and {high:g}.")


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
        _in_range("temperature", self.temperature, 0, 5)
        _in_range("top_p", self.top_p, 0, 1)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("top_k", self.top_k, 0, 2**31 - 1)
        _in_range("repeat_penalty", self.repeat_penalty, 0.01, 10)
        _in_range("presence_penalty", self.presence_penalty, -2, 2)
        _in_range("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _in_range("seed", self.seed, 0, 2**32 - 1)
        for token, bias in self.logit_bias.items():
            _in_range(f"logit_bias[{token}]", bias, -100, 100)


@dataclass(frozen=True, slots=True)
class Constraint:
    """A rule that every output obeys.

    ``kind`` is ``json_schema`` (``value``: the schema as a JSON-able dict), ``json`` (any JSON object;
    ``value`` is None), ``choices`` (a tuple of strings), ``regex`` (a string) or ``grammar`` (Lark or GBNF
    text).
    """

    kind: Literal["json_schema", "json", "choices", "regex", "grammar"]
    value: Any = None


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
    priority: Literal["interactive", "batch"] = "interactive"

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise RequestError("give either messages or prompt, not both and not neither.")
        if self.messages is not None:
            if not self.messages:
                raise RequestError("messages is empty: it needs at least one message with a role and a content.")
            for i, message in enumerate(self.messages):
                role = message.get("role") if isinstance(message, Mapping) else None
                if role not in ROLES:
                    raise RequestError(
                        f"messages[{i}] has role {role!r}; a message is "
                        f'{{"role": …, "content": …}} with a role of {", ".join(ROLES)}.',
                    )
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError("stop holds an empty or non-text string; each stop must be at least one character.")
        if self.logprobs is not None:
            _in_range("logprobs", self.logprobs, 0, 20)
        _in_range("n", self.n, 1, 128)
        if self.reasoning_budget is not None:
            _in_range("reasoning_budget", self.reasoning_budget, -1, 2**31 - 1)


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
        for i, text in enumerate(self.texts):
            if not isinstance(text, str):
                raise RequestError(f"texts[{i}] is {type(text).__name__}, not text.")
        if self.dims is not None:
            _in_range("dims", self.dims, 1, 2**20)


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """Ask how well each document answers the query; higher is better, on the model's own scale."""

    query: str
    documents: Sequence[str]
    priority: Literal["interactive", "batch"] = "interactive"

    def __post_init__(self) -> None:
        for i, text in enumerate((self.query, *self.documents)):
            if not isinstance(text, str):
                name = f"documents[{i - 1}]" if i else "query"
                raise RequestError(f"{name} is {type(text).__name__}, not text.")


Request: TypeAlias = CompletionRequest | EmbeddingRequest | RerankRequest
