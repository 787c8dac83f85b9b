"""Vectors cut and normalised as a request asks, the same way behind every engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nbinfer.contract.errors import RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import EmbeddingRequest, RerankRequest
from nbinfer.engines.protocol import EngineInfo
from nbinfer.engines.vectors import as_asked, check_dims, nothing, unit_length


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalize": False}, [[3, 4, 12], [0, 0, 5], [0, 0, 0]]),
        ({}, [[3 / 13, 4 / 13, 12 / 13], [0, 0, 1], [0, 0, 0]]),
        ({"dims": 2, "normalize": False}, [[3, 4], [0, 0], [0, 0]]),
        ({"dims": 2}, [[0.6, 0.8], [0, 0], [0, 0]]),
    ],
    ids=str,
)
def test_vectors_are_cut_before_their_length_is_made_one(
    options: dict[str, int], expected: list[list[float]]
) -> None:
    given = np.array([[3, 4, 12], [0, 0, 5], [0, 0, 0]], np.float32)
    found = as_asked(given, EmbeddingRequest(texts=("a", "b", ""), **options))  # type: ignore[arg-type]
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_no_texts_keep_the_number_of_components() -> None:
    assert as_asked(np.zeros((0, 8), np.float32), EmbeddingRequest(texts=(), dims=3)).shape == (0, 3)
    assert unit_length(np.zeros((0, 8), np.float32)).shape == (0, 8)


@pytest.mark.parametrize(("dims", "known", "columns"), [(None, 8, 8), (3, 8, 3), (None, None, 0)])
def test_a_result_of_nothing_says_why_and_keeps_its_shape(
    dims: int | None, known: int | None, columns: int
) -> None:
    info = EngineInfo(backend="b", model="m", mode=Mode.EMBEDDING, context_size=8, dimensions=known)
    found: Any = nothing(EmbeddingRequest(texts=("a",), dims=dims), info, "interrupted")
    assert (found.finish_reason, found.model, found.n_tokens) == ("interrupted", "m", ())
    assert (found.vectors.shape, found.vectors.dtype) == ((0, columns), np.float32)
    scored: Any = nothing(RerankRequest(query="a", documents=("b",)), info, "stop")
    assert (scored.finish_reason, scored.scores.shape, scored.scores.dtype) == ("stop", (0,), np.float32)


def test_more_components_than_there_are_are_refused() -> None:
    info = EngineInfo(backend="b", model="m", mode=Mode.EMBEDDING, context_size=8, dimensions=8)
    for dims in (None, 1, 8):
        check_dims(EmbeddingRequest(texts=("a",), dims=dims), info)
    with pytest.raises(RequestError, match="dims=9, but m has vectors of 8 components"):
        check_dims(EmbeddingRequest(texts=("a",), dims=9), info)
