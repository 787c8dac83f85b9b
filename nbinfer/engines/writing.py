"""An answer as it is written by an engine in this package, and the result that it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import SchemaError
from nbinfer.contract.results import Result, Timings, Usage
from nbinfer.engines.asked import result_params
from nbinfer.engines.toolcalls import parse_tool_calls

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.contract.requests import CompletionRequest
    from nbinfer.contract.results import FinishReason, TokenLogprob
    from nbinfer.engines.stream import Stream
    from nbinfer.engines.text import TextAssembler


@dataclass(eq=False, slots=True, kw_only=True)
class Writing:
    """What there is of an answer, and of its times; each engine adds what its own work needs.

    ``submitted``, ``started``, ``prompt_done`` and ``last_token`` are of ``time.perf_counter()``. ``limit``
    is how many tokens the answer may have, ``thoughts`` how many of them are reasoning, ``cached`` how many
    of the prompt's were not computed.
    """

    request: CompletionRequest
    stream: Stream
    prompt_text: str
    assembler: TextAssembler
    seed: int
    limit: int
    submitted: float
    adapter: str | None = None
    started: float | None = None
    prompt_done: float | None = None
    last_token: float | None = None
    cached: int = 0
    thoughts: int = 0
    generated: list[int] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def interactive(self) -> bool:
        """Whether somebody waits at a cell."""
        return self.request.priority == "interactive"


def result_of(
    writing: Writing,
    reason: FinishReason,
    *,
    model: str,
    prompt_tokens: int,
    drafted: int = 0,
    accepted: int = 0,
    speedup: float | None = None,
) -> Result:
    """Return what was written as a result.

    Parameters
    ----------
    writing
        The answer, as far as it came.
    reason
        Why it ends.
    model
        What results call the model.
    prompt_tokens
        Tokens of the prompt, those of images among them.
    drafted, accepted, speedup
        What came of guessing tokens, where the engine does so; see :class:`nbinfer.contract.results.Usage`
        and ``Timings.speculative_speedup``.
    """
    request = writing.request
    started = writing.started or writing.submitted
    done = writing.prompt_done or writing.last_token or started
    last = writing.last_token or done
    text = "".join(writing.answer)
    calls: tuple[Mapping[str, Any], ...] = ()
    if request.tools:
        text, calls = parse_tool_calls(text, request.tools)
    return Result(
        text=text,
        tool_calls=calls,
        reasoning="".join(writing.reasoning).strip("\n") or None,
        finish_reason=reason,
        usage=Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=len(writing.generated),
            cached_tokens=writing.cached,
            drafted_tokens=drafted,
            accepted_tokens=accepted,
        ),
        timings=Timings(
            queue_seconds=started - writing.submitted,
            prompt_seconds=done - started,
            generation_seconds=last - done,
            first_token_seconds=done - writing.submitted if writing.prompt_done else None,
            prompt_tokens=prompt_tokens - writing.cached,
            generated_tokens=len(writing.generated),
            speculative_speedup=speedup,
        ),
        logprobs=tuple(writing.logprobs) if request.logprobs is not None else None,
        model=model,
        prompt=writing.prompt_text,
        params=result_params(request, seed=writing.seed, adapter=writing.adapter),
        messages=request.messages,
    )


def cut_short(result: Result, count: str) -> SchemaError:
    """Return the error of an answer that ended before it kept to its constraint; it carries the answer.

    ``count`` says how much there is of it: ``"12 tokens"``.
    """
    message = f"the answer was cut after {count}, before it was whole: raise max_tokens."
    return SchemaError(message, raw=result.text, result=result.with_changes(error=message))
