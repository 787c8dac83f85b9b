"""What a result says of its request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbinfer.contract.requests import CompletionRequest


def result_params(request: CompletionRequest, *, seed: int | None, adapter: str | None) -> dict[str, Any]:
    """Return ``Result.params``: what was asked and had an effect, with the seed that was drawn.

    ``seed`` is None where a server drew it and did not say which.
    """
    sampling = request.sampling
    params: dict[str, Any] = {"temperature": sampling.temperature, "seed": seed}
    if adapter is not None:
        params["adapter"] = adapter
    if sampling.temperature > 0:
        params |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
    if request.max_tokens is not None:
        params["max_tokens"] = request.max_tokens
    if request.stop:
        params["stop"] = list(request.stop)
    return params
