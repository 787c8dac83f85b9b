"""What an operator asks of the engine: requests out of rows, records out of results."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nbinfer.contract.errors import EngineError, NotSupported, SchemaError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest, EmbeddingRequest, RerankRequest, Sampling
from nbinfer.frames.outcomes import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbinfer.contract.requests import Request
    from nbinfer.contract.results import EmbeddingResult, RerankResult, Result
    from nbinfer.engines.protocol import Engine, EngineInfo
    from nbinfer.engines.stream import Stream

MIN_WINDOW = 32
TEXTS_PER_REQUEST = 32


class FrameModel(Protocol):
    """What a batch needs of a loaded model."""

    @property
    def name(self) -> str:
        """The name that a person gave it."""
        ...

    @property
    def engine(self) -> Engine:
        """The engine behind it."""
        ...

    @property
    def info(self) -> EngineInfo:
        """What the engine really uses."""
        ...

    @property
    def digest(self) -> str:
        """The weights' digest; empty when the engine does not say which weights it runs."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """What was asked for when it was loaded."""
        ...

    def submit(self, request: Any) -> Stream:
        """Start a request."""
        ...


class Work(Protocol):
    """One operator's share of a batch; the runner knows nothing else of it."""

    @property
    def op(self) -> str:
        """The operator's name."""
        ...

    @property
    def mode(self) -> Mode:
        """What the model must be loaded for."""
        ...

    @property
    def batch(self) -> int:
        """Contents per request."""
        ...

    def constants(self, model: FrameModel) -> dict[str, Any]:
        """Return what all rows share and results depend on, as JSON."""
        ...

    def window(self, info: EngineInfo) -> int:
        """Return how many requests to keep with the engine at once."""
        ...

    def order(self, content: Any) -> Any:
        """Return the sort key that brings contents with a common beginning together."""
        ...

    def fits(self, engine: Engine, content: Any) -> bool:
        """Whether a content fits the model, with room for an answer.

        Raises
        ------
        NotSupported
            The engine cannot count tokens.
        """
        ...

    def request(self, contents: Sequence[Any], seeds: Sequence[int | None]) -> Request:
        """Return the request for these contents."""
        ...

    def records(self, result: Any, contents: Sequence[Any]) -> list[Record]:
        """Return one record per content."""
        ...

    def accept(self, record: Record) -> tuple[Any, Exception | None]:
        """Return the typed value of a record, and why it is not valid (or None)."""
        ...

    def lasting(self, record: Record) -> bool:
        """Whether the same question will always have this answer, so that the journal may keep it."""
        ...

    def encode(self, value: Any) -> bytes:
        """Return a value as the bytes that the journal keeps."""
        ...

    def decode(self, data: bytes) -> Any:
        """Return the value behind such bytes."""
        ...


def weights(model: FrameModel) -> str:
    """Return the digest of the model's weights; empty when it cannot be known."""
    try:
        return model.digest
    except OSError:  # the file was removed after the load
        return ""


def identity(model: FrameModel) -> dict[str, Any]:
    """Return what of the loaded model its results depend on; the chat template is in the weights' file."""
    config = model.config
    # Only where they were asked for: what was kept before there were such options is still found.
    computed = {name: str(config[name]) for name in ("dtype", "quantization") if config.get(name) is not None}
    return {
        "backend": model.info.backend,
        "weights": weights(model),
        "adapters": _digests(config.get("lora")),
        "projector": _digests(config.get("projector")),
        "kv_type": config.get("kv_type"),
        # Batches may flip near ties; who asked for the exact text is not given a batch's.
        "exact": bool(config.get("exact")),
        **computed,
    }


def _digests(files: Any) -> Any:
    """Return the digests of what was loaded beside the weights, by name where it has one."""
    if files is None:
        return None
    if isinstance(files, Mapping):
        return {str(name): _digest(path) for name, path in files.items()}
    return _digest(files)


def _digest(path: Any) -> str:
    """Return the digest of a file, or of all files of an adapter's folder."""
    from nbinfer.models.digest import file_digest, weights_digest

    folder = Path(path).expanduser()
    if not folder.is_dir():
        return file_digest(folder)
    return weights_digest(sorted(file for file in folder.iterdir() if file.is_file()))


@dataclass(frozen=True)
class CompletionWork:
    """Text for each row.

    Parameters
    ----------
    base
        The request with its options checked; its last message (or its prompt) is where the row goes.
    parse
        Turns the text into a typed value; raises ``SchemaError``. None: the text is the value.
    """

    op: str
    base: CompletionRequest
    parse: Callable[[str], Any] | None = None

    mode = Mode.COMPLETION
    batch = 1

    @property
    def greedy(self) -> bool:
        """Whether the same prompt gives the same text whatever the seed."""
        return self.base.sampling.temperature == 0

    @property
    def system(self) -> tuple[Any, ...]:
        """The messages before the row's own."""
        return () if self.base.messages is None else self.base.messages[:-1]

    def constants(self, model: FrameModel) -> dict[str, Any]:
        """Return what all rows share and results depend on, as JSON."""
        base = self.base
        return {
            "op": "complete",  # extract and classify are completions too: the same question has one answer
            **identity(model),
            "system": [dict(m) for m in self.system],
            "raw": base.messages is None,
            "sampling": sampling_key(base.sampling),
            # Without a bound of its own the answer ends where the context does.
            "max_tokens": ["context", model.info.context_size]
            if base.max_tokens is None
            else base.max_tokens,
            "stop": list(base.stop),
            "constraint": None if base.constraint is None else [base.constraint.kind, base.constraint.value],
            "tools": [dict(tool) for tool in base.tools],
            "images": [hashlib.sha256(image).hexdigest() for image in base.images],
            "logprobs": base.logprobs,
            "think": base.think,
            "reasoning_budget": model.config.get("reasoning_budget")
            if base.reasoning_budget is None
            else base.reasoning_budget,
            "adapter": base.adapter,
        }

    def window(self, info: EngineInfo) -> int:
        """Return how many requests to keep with the engine at once."""
        return max(MIN_WINDOW, 4 * info.parallel)

    def order(self, content: Any) -> str:
        """Return the sort key that brings contents with a common beginning together."""
        if isinstance(content, str):
            return content
        return "\n".join(_said(m.get("content", "")) for m in content)

    def _surely_short(self, content: Any, tokens: int) -> bool:
        # A token is at least one byte of text, so only texts near or above the context need counting.
        return len(self.order(content).encode("utf-8", "replace")) < tokens // 2

    def fits(self, engine: Engine, content: Any) -> bool:
        """Whether a content fits the model, with room for an answer."""
        size = engine.info.context_size
        room = size - min(self.base.max_tokens or size // 4, size // 2)
        return self._surely_short(content, room) or engine.render(self.request([content], [None]))[1] <= room

    def request(self, contents: Sequence[Any], seeds: Sequence[int | None]) -> CompletionRequest:
        """Return the request for these contents."""
        (content,), (seed,) = contents, seeds
        changes: dict[str, Any] = {}
        if self.base.messages is None:
            changes["prompt"] = content if isinstance(content, str) else self.order(content)
        elif isinstance(content, str):
            changes["messages"] = (*self.system, {**self.base.messages[-1], "content": content})
        else:
            # A conversation that brings its own system prompt keeps it.
            own = content[0].get("role") in {"system", "developer"}
            changes["messages"] = content if own else (*self.system, *content)
        if seed is not None and not self.greedy:
            changes["sampling"] = replace(self.base.sampling, seed=seed)
        return replace(self.base, priority="batch", **changes)

    def records(self, result: Result, contents: Sequence[Any]) -> list[Record]:
        """Return one record per content."""
        del contents
        if result.finish_reason == "error":
            raise EngineError(result.error or "the engine failed while it answered")
        timings = result.timings
        extra: dict[str, Any] = {}
        if result.reasoning:
            extra["reasoning"] = result.reasoning
        if result.error is not None:
            extra["cut"] = True  # before it kept to its rule, as the engine says
        if result.logprobs is not None:
            extra["logprobs"] = [[lp.token, lp.logprob, [list(t) for t in lp.top]] for lp in result.logprobs]
        return [
            Record(
                result.text,
                result.finish_reason,
                result.usage.prompt_tokens,
                result.usage.cached_tokens,
                result.usage.completion_tokens,
                timings.prompt_seconds + timings.generation_seconds,
                extra or None,
            ),
        ]

    def accept(self, record: Record) -> tuple[Any, Exception | None]:
        """Return the typed value of a record, and why it is not valid (or None)."""
        cut = record.finish_reason == "length"
        try:
            if (record.extra or {}).get("cut") or (cut and self._unfinished(record.value)):
                raise SchemaError("the answer is not whole.", raw=record.value)  # noqa: TRY301
            if self.parse is not None:
                return self.parse(record.value), None
        except SchemaError as error:
            if not cut:
                return None, error
            why = f"reached max_tokens={self.base.max_tokens} before its end; raise max_tokens."
            if self._context_ended(record):
                why = "filled the context before its end; load the model with a larger context_size."
            return None, Truncated(f"the answer {why}", raw=record.value)
        return None, None

    def _unfinished(self, text: str) -> bool:
        constraint = self.base.constraint
        return constraint is not None and constraint.kind == "choices" and text not in constraint.value

    def lasting(self, record: Record) -> bool:
        """Whether a larger context would give no more; its size is in the key where nothing else bounds."""
        return self.base.max_tokens is None or not self._context_ended(record)

    def _context_ended(self, record: Record) -> bool:
        bound = self.base.max_tokens
        if record.finish_reason != "length":
            return False
        return bound is None or record.completion_tokens is None or record.completion_tokens < bound

    def encode(self, value: str) -> bytes:
        """Return a value as the bytes that the journal keeps."""
        return value.encode("utf-8", "surrogatepass")

    def decode(self, data: bytes) -> str:
        """Return the value behind such bytes."""
        return data.decode("utf-8", "surrogatepass")


def _said(content: Any) -> str:
    """Return the text of a message; its images have no place in an order."""
    if not isinstance(content, list | tuple):
        return str(content)
    return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


class Truncated(SchemaError):  # noqa: N818 - what happened, as the error column names it
    """A constrained answer was cut short, so it is not valid."""


def sampling_key(sampling: Sampling) -> dict[str, Any]:
    """Return what the choice of tokens depends on: greedy choice knows no seed and no cuts."""
    out: dict[str, Any] = {
        "temperature": float(sampling.temperature),
        "repeat_penalty": float(sampling.repeat_penalty),
        "presence_penalty": float(sampling.presence_penalty),
        "frequency_penalty": float(sampling.frequency_penalty),
        "logit_bias": {str(token): float(bias) for token, bias in sorted(sampling.logit_bias.items())},
    }
    if sampling.temperature > 0:
        out |= {
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k,
            "min_p": float(sampling.min_p),
            "seed": sampling.seed,
        }
    return out


@dataclass(frozen=True)
class EmbeddingWork:
    """A vector for each text; ``prefix`` is what the model wants before texts of this kind."""

    normalize: bool = True
    dims: int | None = None
    prefix: str = ""

    op = "embed"
    mode = Mode.EMBEDDING
    batch = TEXTS_PER_REQUEST

    def constants(self, model: FrameModel) -> dict[str, Any]:
        """Return what all rows share and results depend on, as JSON.

        Raises
        ------
        NotSupported
            The model makes vectors of tokens, not of texts.
        """
        pooling = model.info.effective.get("pooling")
        if pooling == "none":
            raise NotSupported(f"{model.name} was loaded with pooling='none': use its embed_tokens.")
        return {
            "op": "embed",
            **identity(model),
            "pooling": pooling,
            "normalize": self.normalize,
            "dims": self.dims,
            "prefix": self.prefix,
        }

    def window(self, info: EngineInfo) -> int:
        """Return how many requests to keep with the engine at once."""
        del info
        return 4

    def order(self, content: Any) -> int:
        """Return the sort key that brings contents with a common beginning together."""
        # Texts of one length side by side: their requests take the same time.
        return len(content)

    def fits(self, engine: Engine, content: Any) -> bool:
        """Whether a content fits the model."""
        size = engine.info.context_size
        text = self.prefix + str(content)
        if len(text.encode("utf-8", "replace")) < size // 2:
            return True
        tokenize = getattr(engine, "tokenize", None)
        if tokenize is None:
            raise NotSupported("this engine does not count tokens, so that over-long texts cannot be cut.")
        return len(tokenize(text, special=False)) <= size

    def request(self, contents: Sequence[Any], seeds: Sequence[int | None]) -> EmbeddingRequest:
        """Return the request for these contents."""
        del seeds
        texts = tuple(self.prefix + text for text in contents)
        return EmbeddingRequest(texts=texts, normalize=self.normalize, dims=self.dims, priority="batch")

    def records(self, result: EmbeddingResult, contents: Sequence[Any]) -> list[Record]:
        """Return one record per content."""
        _same_count(len(result.vectors), len(contents), "vectors")
        # Copies: a row must not keep its whole batch alive.
        return [
            Record(np.array(vector, np.float32), prompt_tokens=int(tokens))
            for vector, tokens in zip(result.vectors, result.n_tokens, strict=True)
        ]

    def accept(self, record: Record) -> tuple[None, Exception | None]:
        """Return the typed value of a record, and why it is not valid (or None)."""
        if not np.isfinite(record.value).all():
            return None, EngineError("the vector holds NaN or infinite numbers.")
        return None, None

    def lasting(self, record: Record) -> bool:
        """Whether the same question will always have this answer; it will."""
        del record
        return True

    def encode(self, value: Any) -> bytes:
        """Return a value as the bytes that the journal keeps."""
        return np.asarray(value, "<f4").tobytes()

    def decode(self, data: bytes) -> Any:
        """Return the value behind such bytes."""
        return np.frombuffer(data, "<f4")


@dataclass(frozen=True)
class RerankWork:
    """A score for each (query, document)."""

    op = "rerank"
    mode = Mode.RERANKING
    batch = TEXTS_PER_REQUEST

    def constants(self, model: FrameModel) -> dict[str, Any]:
        """Return what all rows share and results depend on, as JSON."""
        return {"op": "rerank", **identity(model)}

    def window(self, info: EngineInfo) -> int:
        """Return how many requests to keep with the engine at once."""
        del info
        return 4

    def order(self, content: Any) -> Any:
        """Return the sort key that brings contents with a common beginning together."""
        # One request has one query: the runner cuts batches where the order's first part changes.
        return (content[0], len(content[1]))

    def fits(self, engine: Engine, content: Any) -> bool:
        """Raise: how a pair becomes tokens is the model's own business."""
        del content
        raise NotSupported(f"{engine.info.model} cannot say how long a pair is; use too_long='error'.")

    def request(self, contents: Sequence[Any], seeds: Sequence[int | None]) -> RerankRequest:
        """Return the request for these contents."""
        del seeds
        documents = tuple(document for _, document in contents)
        return RerankRequest(query=contents[0][0], documents=documents, priority="batch")

    def records(self, result: RerankResult, contents: Sequence[Any]) -> list[Record]:
        """Return one record per content."""
        _same_count(len(result.scores), len(contents), "scores")
        return [
            Record(float(score), prompt_tokens=int(tokens))
            for score, tokens in zip(result.scores, result.n_tokens, strict=True)
        ]

    def accept(self, record: Record) -> tuple[None, Exception | None]:
        """Return the typed value of a record, and why it is not valid (or None)."""
        if not np.isfinite(record.value):
            return None, EngineError(f"the score is {record.value}.")
        return None, None

    def lasting(self, record: Record) -> bool:
        """Whether the same question will always have this answer; it will."""
        del record
        return True

    def encode(self, value: float) -> bytes:
        """Return a value as the bytes that the journal keeps."""
        return struct.pack("<d", value)

    def decode(self, data: bytes) -> float:
        """Return the value behind such bytes."""
        return float(struct.unpack("<d", data)[0])


def _same_count(got: int, asked: int, what: str) -> None:
    if got != asked:
        raise EngineError(f"the engine returned {got} {what} for {asked} texts.")
