"""Request bodies of the HTTP API, in OpenAI's shapes, and the requests they become."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nbinfer.contract.errors import NotSupported, RequestError
from nbinfer.contract.requests import (
    CompletionRequest,
    Constraint,
    EmbeddingRequest,
    ImageRequest,
    RerankRequest,
    Sampling,
    ScoreRequest,
    parse_size,
)

MAX_PROMPTS = 2048
MAX_ANSWERS = 128


class Body(BaseModel):
    """Unknown fields are ignored, as OpenAI's clients send ones that only its own service reads."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(Body):
    """What a stream says beside the text."""

    include_usage: bool = False


class ConstraintBody(Body):
    """nbinfer's own: any constraint, as the engine takes it."""

    kind: Literal["json_schema", "json", "choices", "regex", "grammar"]
    value: Any = None


class StructuredOutputsBody(BaseModel):
    """vLLM's constraint: one of its fields."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    choice: list[str] | None = None
    regex: str | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None

    def constraint(self) -> Constraint:
        """Return it as the engine takes it.

        Raises
        ------
        RequestError
            None of its fields is given, or several are.
        """
        schema = self.json_schema
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError:
                raise RequestError("structured_outputs.json is text that is not JSON.") from None
        given = [
            Constraint("choices", tuple(self.choice)) if self.choice is not None else None,
            Constraint("regex", self.regex) if self.regex is not None else None,
            Constraint("grammar", self.grammar) if self.grammar is not None else None,
            Constraint("json_schema", schema) if schema is not None else None,
            Constraint("json") if self.json_object else None,
        ]
        found = [each for each in given if each is not None]
        if len(found) != 1:
            raise RequestError(
                "structured_outputs takes one of choice, regex, grammar, json and json_object."
            )
        return found[0]


class SamplingBody(Body):
    """Fields that chat and text completions share. Absent ones have OpenAI's defaults."""

    model: str = Field(min_length=1, max_length=1024)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's word for the same.
    structured_outputs: StructuredOutputsBody | None = None
    # nbinfer's own.
    constraint: ConstraintBody | None = None
    adapter: str | None = None
    priority: Literal["interactive", "batch"] = "interactive"
    nbinfer: bool = Field(False, description="add the rendered prompt, timings and parameters to the answer")

    def sampling(self) -> Sampling:
        """Return how tokens are chosen.

        Raises
        ------
        RequestError
            A value is out of range.
        """
        given: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
        for field in dataclasses.fields(Sampling):
            value = getattr(self, field.name)
            if value is not None:
                given[field.name] = value
        if "seed" in given:
            given["seed"] = _seed(given["seed"])
        if "logit_bias" in given:
            given["logit_bias"] = _biases(given["logit_bias"])
        return Sampling(**given)

    def stops(self) -> tuple[str, ...]:
        """Return the strings that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def answers(self) -> int:
        """Return how many answers are asked for."""
        n = 1 if self.n is None else self.n
        if not 1 <= n <= MAX_ANSWERS:
            raise RequestError(f"n={n} is out of range: it must be between 1 and {MAX_ANSWERS}.")
        return n

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_ignored(cls, given: Any) -> Any:
        """Refuse fields that older vLLMs knew: whoever sends one relies on it."""
        old = next((name for name in given if str(name).startswith("guided_")), None) if given else None
        if old is not None:
            raise RequestError(
                f"{old} is not known any more: use "
                '"structured_outputs": {"choice": …}, with regex, grammar or json instead of choice.'
            )
        return given

    def own_constraint(self) -> Constraint | None:
        """Return the constraint in nbinfer's own words, or in vLLM's.

        Raises
        ------
        RequestError
            Both are given.
        """
        given = self.constraint
        if self.structured_outputs is not None:
            if given is not None:
                raise RequestError("constraint and structured_outputs cannot be combined.")
            return self.structured_outputs.constraint()
        if given is None:
            return None
        value = tuple(given.value) if isinstance(given.value, list) else given.value
        return Constraint(given.kind, value)


class ChatBody(SamplingBody):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    think: bool | None = None
    reasoning_budget: int | None = None
    return_progress: bool = Field(False, description="report how far the prompt is, before the first token")

    def request(self) -> CompletionRequest:
        """Return the engine's request.

        Raises
        ------
        RequestError, NotSupported
            The body asks for something that is contradictory, out of range or not offered.
        """
        switch = (self.chat_template_kwargs or {}).get("enable_thinking")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true.")
        return CompletionRequest(
            messages=tuple(_messages(self.messages)),
            sampling=self.sampling(),
            max_tokens=self.max_completion_tokens if self.max_tokens is None else self.max_tokens,
            stop=self.stops(),
            constraint=self._constraint(),
            tools=() if self.tool_choice == "none" else tuple(self.tools or ()),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            think=self.think if self.think is not None else switch if isinstance(switch, bool) else None,
            reasoning_budget=self.reasoning_budget,
            adapter=self.adapter,
            priority=self.priority,
        )

    def _constraint(self) -> Constraint | None:
        own, form, tool = self.own_constraint(), self._response_format(), self._tool_schema()
        given = [each for each in (own, form, tool) if each is not None]
        if len(given) > 1:
            raise RequestError("constraint, response_format and a required tool cannot be combined.")
        return given[0] if given else None

    def _response_format(self) -> Constraint | None:
        form = self.response_format
        if form is None or form.get("type") == "text":
            return None
        if form.get("type") == "json_object":
            return Constraint("json")
        wrapped = form.get("json_schema")
        if form.get("type") == "json_schema" and isinstance(wrapped, dict):
            return Constraint("json_schema", wrapped.get("schema"))
        raise RequestError(
            'response_format must be {"type": "text"}, {"type": "json_object"} or '
            '{"type": "json_schema", "json_schema": {"name": …, "schema": …}}.'
        )

    def _tool_schema(self) -> Constraint | None:
        """Return the constraint that makes the answer a call of a tool, when one is required."""
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return None
        tools = dict(map(_function, self.tools or ()))
        if isinstance(choice, dict):
            wanted = (
                (choice.get("function") or {}).get("name")
                if isinstance(choice.get("function"), dict)
                else None
            )
            if wanted not in tools:
                raise RequestError(f"tool_choice names {wanted!r:.60}, which is not among the tools.")
            tools = {wanted: tools[wanted]}
        elif choice != "required":
            raise RequestError(
                f"tool_choice={choice!r:.60} is not known: none, auto, required or a function."
            )
        if not tools:
            raise RequestError("tool_choice=required needs at least one tool.")
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": schema},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, schema in tools.items()
        ]
        return Constraint("json_schema", calls[0] if len(calls) == 1 else {"anyOf": calls})

    @property
    def tool_names(self) -> tuple[str, ...]:
        """Names of the tools that the answer may call."""
        return () if self.tool_choice == "none" else tuple(_function(tool)[0] for tool in self.tools or ())


class TextBody(SamplingBody):
    """``POST /v1/completions``."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def requests(self) -> list[CompletionRequest]:
        """Return one request per prompt.

        Raises
        ------
        RequestError, NotSupported
            The body asks for something that is out of range or not offered.
        """
        if self.echo:
            raise NotSupported("echo is not offered: the prompt is known to who sent it.")
        if self.suffix:
            raise NotSupported("suffix is not offered.")
        if self.best_of not in (None, self.answers()):
            raise NotSupported("best_of is not offered: ask for n answers and choose.")
        return [
            CompletionRequest(
                prompt=prompt,
                sampling=self.sampling(),
                max_tokens=16 if self.max_tokens is None and not self.nbinfer else self.max_tokens,
                stop=self.stops(),
                constraint=self.own_constraint(),
                logprobs=self.logprobs,
                adapter=self.adapter,
                priority=self.priority,
            )
            for prompt in self._prompts()
        ]

    def _prompts(self) -> list[str | tuple[int, ...]]:
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and all(isinstance(item, int) for item in given):
            return [tuple(given)]
        if not given or len(given) > MAX_PROMPTS:
            raise RequestError(f"prompt holds {len(given)} prompts; it must be 1 to {MAX_PROMPTS}.")
        return [tuple(item) if isinstance(item, list) else item for item in given]


class EmbeddingBody(Body):
    """``POST /v1/embeddings``."""

    model: str = Field(min_length=1, max_length=1024)
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool = True
    priority: Literal["interactive", "batch"] = "interactive"

    def request(self) -> EmbeddingRequest:
        """Return the engine's request.

        Raises
        ------
        NotSupported
            The input is tokens.
        RequestError
            The input is not text, or empty.
        """
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not texts or len(texts) > MAX_PROMPTS:
            raise RequestError(f"input holds {len(texts)} texts; it must be 1 to {MAX_PROMPTS}.")
        if any(isinstance(text, int | list) for text in texts):
            raise NotSupported("input must be text: tokens are not taken here.")
        return EmbeddingRequest(
            texts=texts, normalize=self.normalize, dims=self.dimensions, priority=self.priority
        )


class RerankBody(Body):
    """``POST /v1/rerank`` and ``/rerank``, in the shape that Jina and Cohere share."""

    model: str = Field(min_length=1, max_length=1024)
    query: str
    documents: list[str | dict[str, Any]]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False
    priority: Literal["interactive", "batch"] = "interactive"

    def texts(self) -> list[str]:
        """Return the documents' texts."""
        return [each if isinstance(each, str) else str(each.get("text", "")) for each in self.documents]

    def request(self) -> RerankRequest:
        """Return the engine's request."""
        if not self.documents or len(self.documents) > MAX_PROMPTS:
            raise RequestError(f"documents holds {len(self.documents)}; it must be 1 to {MAX_PROMPTS}.")
        return RerankRequest(query=self.query, documents=self.texts(), priority=self.priority)


class ScoreBody(Body):
    """``POST /score``: one text against one or several others."""

    model: str = Field(min_length=1, max_length=1024)
    text_1: str
    text_2: str | list[str]

    def request(self) -> RerankRequest:
        """Return the engine's request."""
        texts = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if not texts or len(texts) > MAX_PROMPTS:
            raise RequestError(f"text_2 holds {len(texts)} texts; it must be 1 to {MAX_PROMPTS}.")
        return RerankRequest(query=self.text_1, documents=texts)


class ImageBody(Body):
    """``POST /v1/images/generations``; the fields after ``partial_images`` are those of local servers."""

    model: str | None = Field(None, max_length=1024)
    prompt: str
    n: int | None = None
    size: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    stream: bool | None = None
    partial_images: int | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    priority: Literal["interactive", "batch"] = "interactive"
    nbinfer: bool = Field(False, description="report every step, and the seed and the settings of each image")

    def request(self) -> ImageRequest:
        """Return the engine's request.

        Raises
        ------
        NotSupported
            Images are asked for as addresses, or in another format than PNG.
        RequestError
            A value is out of range.
        """
        if self.response_format not in (None, "b64_json"):
            raise NotSupported(
                f"response_format={self.response_format!r:.60} is not offered: images are not kept here, so "
                "that no address could name them. Ask for b64_json."
            )
        if self.output_format not in (None, "png"):
            raise NotSupported(f"output_format={self.output_format!r:.60} is not offered: ask for png.")
        return ImageRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            size=None if self.size in (None, "auto") else parse_size(self.size),
            n=1 if self.n is None else self.n,
            steps=self.steps,
            guidance=self.guidance,
            seed=None if self.seed is None else _seed(self.seed),
            previews=self.partial_images or 0,
            priority=self.priority,
        )


class AnswersBody(Body):
    """``POST /answers/score``: how likely each of some answers is; nbinfer's own."""

    model: str = Field(min_length=1, max_length=1024)
    answers: list[str] = Field(max_length=MAX_PROMPTS)
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    think: bool | None = None
    priority: Literal["interactive", "batch"] = "interactive"

    def request(self) -> ScoreRequest:
        """Return the engine's request."""
        return ScoreRequest(
            answers=tuple(self.answers),
            messages=None if self.messages is None else tuple(_messages(self.messages)),
            prompt=tuple(self.prompt) if isinstance(self.prompt, list) else self.prompt,
            think=self.think,
            priority=self.priority,
        )


class TokenizeBody(Body):
    """``POST /tokenize``."""

    model: str | None = Field(None, max_length=1024)
    content: str | None = None
    prompt: str | None = None
    add_special: bool = True
    parse_special: bool = True


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: str | None = Field(None, max_length=1024)
    tokens: list[int] = Field(max_length=1_000_000)


class TemplateBody(Body):
    """``POST /apply-template``: what a chat, or a prompt, becomes."""

    model: str | None = Field(None, max_length=1024)
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    tools: list[dict[str, Any]] | None = None
    think: bool | None = None

    def request(self) -> CompletionRequest:
        """Return the request to render."""
        messages = None if self.messages is None else tuple(_messages(self.messages))
        prompt = tuple(self.prompt) if isinstance(self.prompt, list) else self.prompt
        return CompletionRequest(
            messages=messages, prompt=prompt, tools=tuple(self.tools or ()), think=self.think
        )


# -- parts ----------------------------------------------------------------------------------------------


def _seed(seed: int) -> int | None:
    # OpenAI's seeds are 64 bits and may be negative; llama.cpp's habit is -1 for a random one.
    if not -(2**63) <= seed < 2**64:
        raise RequestError("seed is out of range: it must be a whole number of 64 bits.")
    return None if seed == -1 else seed % 2**32


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise RequestError('logit_bias maps token ids to numbers, such as {"42": -100}.') from None


def _function(tool: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise RequestError('a tool is {"type": "function", "function": {"name": …, "parameters": …}}.')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise RequestError("a tool's function needs a name.")
    return name, parameters if isinstance(parameters, dict) else {"type": "object"}


def _messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages, with text that came in parts in one piece; parts with images stay as they are."""
    messages = []
    for i, message in enumerate(given):
        content = message.get("content")
        if isinstance(content, list):
            kinds = [_check_part(part, i) for part in content]
            if "image_url" not in kinds:
                message = {**message, "content": "".join(part["text"] for part in content)}  # noqa: PLW2901
        messages.append(message)
    return messages


def _check_part(part: Any, i: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "text"
    if kind == "image_url":
        image = part.get("image_url")
        if isinstance(image, dict) and isinstance(image.get("url"), str):
            # Fetching an address for a client would let it reach what only this machine can.
            if image["url"].startswith("data:"):
                return "image_url"
            raise RequestError(f"messages[{i}]: an image is a data: URL with base64; nothing is fetched.")
    raise RequestError(
        f"messages[{i}] holds a part of type {kind!r:.60} that cannot be read: a part is "
        '{"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": "data:…"}}.'
    )
