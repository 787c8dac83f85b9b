"""What is written down of a request and its answer, where the notebook asked for that."""

from __future__ import annotations

import dataclasses
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

from nbinfer.contract.results import Result
from nbinfer.session.held import session

if TYPE_CHECKING:
    from nbinfer.contract.requests import CompletionRequest
    from nbinfer.request_log import Entry
    from nbinfer.session.model import Model


def record(
    model: Model, request: CompletionRequest, result: Result, error: BaseException | None = None
) -> None:
    """Write down an answer, what there is of it, or an error; what goes wrong with that is only a warning."""
    log = session.history
    if log is None:
        return
    try:
        log.add(entry(model, request, result, error))
    except Exception as problem:  # noqa: BLE001 - whatever it is, the answer is there and counts more
        from nbinfer.request_log import HistoryWarning

        with suppress(HistoryWarning):  # where warnings are errors, too
            warnings.warn(
                f"{log.path}: the request was not recorded: {problem}", HistoryWarning, stacklevel=2
            )


def entry(model: Model, request: CompletionRequest, result: Result, error: BaseException | None) -> Entry:
    """Return the log's entry for an answer, for what there was of it, or for an error."""
    from nbinfer.request_log import Entry, now

    cut = getattr(error, "result", None)
    result = cut if isinstance(cut, Result) else result
    prompt, digest, failed = result.prompt, "", isinstance(error, Exception)
    if not prompt:
        # An answer that was stopped or refused does not bring its prompt along.
        with suppress(Exception):
            prompt = model.engine.render(request)[0]
    with suppress(Exception):  # the files may be gone since they were loaded
        digest = model.digest
    return Entry(
        at=now(),
        model=model.name,
        ref=model.ref,
        where=model.where,
        engine=f"{model.backend} {model.info.version}".strip(),
        digest=digest,
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
