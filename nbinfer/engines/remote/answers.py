"""What a server has answered to a request so far, and the result that this becomes."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import SchemaError
from nbinfer.contract.requests import (
    CompletionRequest,
    EmbeddingRequest,
    ImageRequest,
    RerankRequest,
    ScoreRequest,
)
from nbinfer.contract.results import (
    Delta,
    GeneratedImage,
    ImageResult,
    PromptProgress,
    Result,
    Timings,
    TokenLogprob,
    Usage,
)
from nbinfer.engines.asked import result_params
from nbinfer.engines.remote.wire import details_from_json
from nbinfer.engines.stream import Stream
from nbinfer.engines.vectors import nothing
from nbinfer.engines.writing import cut_short

if TYPE_CHECKING:
    from nbinfer.contract.requests import Request
    from nbinfer.engines.protocol import EngineInfo
    from nbinfer.engines.stream import AnyResult


class Job:
    """One request to a server, and its answer so far.

    ``submitted`` is of ``time.perf_counter()``. ``began`` says that somebody may have seen a piece of the
    answer.
    """

    def __init__(self, request: Request, submitted: float) -> None:
        self.request = request
        self.submitted = submitted
        self.stream: Stream = Stream()
        self.began = False
        self.restart()

    def restart(self) -> None:
        """Forget what a lost server said; nobody saw any of it."""
        self.text = self.reasoning = ""
        self.tokens = 0
        self.first: float | None = None
        self.last: float | None = None
        self.finish: str | None = None
        self.details: Any = None
        self.usage: Any = None
        self.measured: dict[str, Any] | None = None
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[TokenLogprob] = []
        self.images: list[GeneratedImage] = []

    def take(self, chunk: dict[str, Any]) -> None:
        """Take a piece of a completion."""
        if chunk.get("nbinfer"):
            self.details = chunk["nbinfer"]["results"][0]
        if chunk.get("usage"):
            self.usage = chunk["usage"]
        if isinstance(chunk.get("timings"), dict):
            self.measured = chunk["timings"]
        progress = chunk.get("prompt_progress")
        if isinstance(progress, dict):
            done, total = int(progress.get("processed", 0)), int(progress.get("total", 0))
            self.stream.put(PromptProgress(done, total, int(progress.get("cache", 0))))
        for choice in (chunk.get("choices") or ())[:1]:
            if choice.get("finish_reason"):
                self.finish = choice["finish_reason"]
            delta = choice.get("delta")
            if delta:
                self._add_extras(delta)
            text = choice.get("text") if delta is None else delta.get("content")
            if text:
                self._add(text)
            if choice.get("logprobs") and self._wants_logprobs:
                self._add_logprobs(choice["logprobs"])

    def result(self, request: CompletionRequest, *, model: str, own: bool) -> Result:
        """Return the whole completion.

        Parameters
        ----------
        request
            The job's.
        model
            What results call the model.
        own
            The server is nbinfer's: it keeps to choices by itself.

        Raises
        ------
        SchemaError
            It was cut before it kept to its constraint, or does not.
        """
        common: dict[str, Any] = {
            "model": model,
            "messages": request.messages,
        }
        if self.details is not None:
            fields = details_from_json(self.details)
            if request.constraint is not None and self.details.get("error"):
                error = str(self.details["error"])
                raise SchemaError(error, raw=fields["text"], result=Result(**fields, **common, error=error))
            return Result(**fields, **common)
        cut = request.constraint is not None and self.finish == "length"
        # What is cut is no whole object to take the choice from.
        text = self.text if own or cut else _chosen(self.text, request)
        usage = self.usage or {}
        result = Result(
            text=text,
            reasoning=self.reasoning.strip("\n") or None,
            finish_reason="length" if self.finish == "length" else "stop",
            usage=Usage(
                prompt_tokens=usage.get("prompt_tokens") or 0,
                completion_tokens=usage.get("completion_tokens") or self.tokens,
                cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            ),
            timings=self._timings(usage),
            logprobs=tuple(self.logprobs) if request.logprobs is not None else None,
            prompt=request.prompt if isinstance(request.prompt, str) else "",
            params=result_params(request, seed=request.sampling.seed, adapter=None),
            tool_calls=tuple(self.calls),
            **common,
        )
        if not cut:
            return result
        raise cut_short(result, f"{self.tokens} pieces")

    def interrupted(self, info: EngineInfo) -> AnyResult | None:
        """Return what there is so far of a request that was cancelled; None where that is worth nothing."""
        request = self.request
        if isinstance(request, ScoreRequest):
            return None
        if isinstance(request, EmbeddingRequest | RerankRequest):
            return nothing(request, info, "interrupted")
        if isinstance(request, ImageRequest):
            return ImageResult(
                images=tuple(self.images),
                prompt=request.prompt,
                finish_reason="interrupted",
                params={"n": request.n, "seed": request.seed},
                model=info.model,
                seconds=time.perf_counter() - self.submitted,
            )
        return Result(
            text=self.text,
            reasoning=self.reasoning or None,
            finish_reason="interrupted",
            usage=Usage(completion_tokens=self.tokens),
            timings=self._timings(None),
            model=info.model,
            params=result_params(request, seed=request.sampling.seed, adapter=None),
            messages=request.messages,
        )

    @property
    def _wants_logprobs(self) -> bool:
        return isinstance(self.request, CompletionRequest) and self.request.logprobs is not None

    def _add(self, text: str, *, reasoning: bool = False) -> None:
        self.last = time.perf_counter()
        if self.first is None:
            self.first = self.last
        self.began = True
        self.tokens += 1
        if reasoning:
            self.reasoning += text
        else:
            self.text += text
        self.stream.put(Delta(text, reasoning=reasoning))

    def _add_extras(self, delta: dict[str, Any]) -> None:
        """Take what a chat's piece holds beside its text."""
        # The two names that servers use.
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if thought:
            self._add(str(thought), reasoning=True)
        for call in delta.get("tool_calls") or ():
            self._add_call(call)

    def _add_call(self, call: dict[str, Any]) -> None:
        """Put the pieces of a tool call together."""
        index = int(call.get("index") or 0)
        while len(self.calls) <= index:
            self.calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        made, function = self.calls[index], call.get("function") or {}
        made["id"] += call.get("id") or ""
        for key in ("name", "arguments"):
            made["function"][key] += function.get(key) or ""

    def _add_logprobs(self, found: dict[str, Any]) -> None:
        """Take log-probabilities, in the shape of chats or in that of text completions."""
        for each in found.get("content") or ():
            top = tuple((other["token"], other["logprob"]) for other in each.get("top_logprobs") or ())
            self.logprobs.append(TokenLogprob(each["token"], each["logprob"], top))
        others = found.get("top_logprobs") or ()
        for i, token in enumerate(found.get("tokens") or ()):
            top = tuple((others[i] or {}).items()) if i < len(others) else ()
            self.logprobs.append(TokenLogprob(token, found["token_logprobs"][i] or 0.0, top))

    def _timings(self, usage: Any) -> Timings:
        """Return the times as this side saw them."""
        first = self.first
        if first is None:
            return Timings()
        return Timings(
            prompt_seconds=first - self.submitted,
            generation_seconds=(self.last or first) - first,
            first_token_seconds=first - self.submitted,
            prompt_tokens=(usage or {}).get("prompt_tokens") or 0,
            generated_tokens=(usage or {}).get("completion_tokens") or self.tokens,
        )


def _chosen(text: str, request: CompletionRequest) -> str:
    """Take the choice out of the object that an external server was asked to wrap it in."""
    if request.constraint is None or request.constraint.kind != "choices":
        return text
    try:
        choice = json.loads(text)["choice"]
    except (ValueError, KeyError, TypeError):
        raise SchemaError(
            "the server did not keep to the choices: it may not support them.", raw=text
        ) from None
    if choice not in request.constraint.value:
        raise SchemaError(f"the server chose {choice!r:.60}, which is not among the choices.", raw=text)
    return str(choice)
