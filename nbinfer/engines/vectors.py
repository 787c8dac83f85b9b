"""From the vectors that a model gives to those that were asked for: cut, then of length 1; or none at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nbinfer.contract.errors import RequestError
from nbinfer.contract.requests import EmbeddingRequest, RerankRequest
from nbinfer.contract.results import EmbeddingResult, RerankResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbinfer.contract.results import FinishReason
    from nbinfer.engines.protocol import EngineInfo


def as_asked(vectors: NDArray[np.float32], request: EmbeddingRequest) -> NDArray[np.float32]:
    """Return vectors with the components and the length that a request wants.

    Parameters
    ----------
    vectors
        As the model gives them, float32 of shape (n, components); they may be overwritten.

    Returns
    -------
    float32 of shape (n, dims): the first ``request.dims`` components, or all of them.
    """
    if request.dims is not None:
        vectors = np.ascontiguousarray(vectors[:, : request.dims])
    return unit_length(vectors) if request.normalize else vectors


def check_dims(request: EmbeddingRequest, info: EngineInfo) -> None:
    """Refuse a request for more components than the model's vectors have.

    Raises
    ------
    RequestError
        It wants more.
    """
    size = info.dimensions or 0
    if request.dims is not None and request.dims > size:
        raise RequestError(f"dims={request.dims}, but {info.model} has vectors of {size} components.")


def unit_length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Make the length of each row 1, in place, and return them; what is all zeros stays so.

    ``vectors`` is float32 of shape (n, components).
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    np.divide(vectors, lengths, out=vectors, where=lengths > 0)
    return vectors


def nothing(
    request: EmbeddingRequest | RerankRequest, info: EngineInfo, reason: FinishReason
) -> EmbeddingResult | RerankResult:
    """Return the result without a vector, or a score: of no texts, or of a request that was cancelled.

    Half of the rows would be worth nothing to anybody: a row that is missing looks like one of zeros.
    """
    if isinstance(request, RerankRequest):
        none = np.zeros(0, np.float32)
        return RerankResult(scores=none, n_tokens=(), finish_reason=reason, model=info.model)
    vectors = np.zeros((0, request.dims or info.dimensions or 0), np.float32)
    return EmbeddingResult(vectors=vectors, n_tokens=(), finish_reason=reason, model=info.model)
