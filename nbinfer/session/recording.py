"""What is written down of a request and its answer."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING

from nbinfer.contract.results import Result

if TYPE_CHECKING:
    from nbinfer.contract.requests import CompletionRequest
    from nbinfer.request_log import Entry
    from nbinfer.session.model import Model


def entry(model: Model, request: CompletionRequest, result: Result, error: BaseException | None) -> Entry:
    """Return the log's entry for an answer, for what there was of it, or for an error."""
    from nbinfer.contract.errors import NbinferError
    from nbinfer.request_log import Entry, now

    cut = getattr(error, "result", None)
    result = cut if isinstance(cut, Result) else result
    prompt, failed = result.prompt, isinstance(error, Exception)
    if not prompt:
        # An answer that was stopped or refused does not bring its prompt along.
        with suppress(NbinferError):
            prompt = model.engine.render(request)[0]
    version = model.info.version
    return Entry(
        at=now(),
        model=model.name,
        ref=model.ref,
        where=model.where,
        engine=f"{model.backend} {version}".strip(),
        digest=model.digest,
        request=request,
        prompt=prompt,
        params=result.params or {"seed": request.sampling.seed},
        text=result.text,
        reasoning=result.reasoning,
        finish_reason="error" if failed and cut is None else result.finish_reason,
        tool_calls=result.tool_calls,
        usage=dataclasses.asdict(result.usage),
        timings=dataclasses.asdict(result.timings),
        error=str(error) if failed else None,
    )
