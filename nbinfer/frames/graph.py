"""Nearest neighbours by a graph of near neighbours (HNSW): for corpora too large to compare every pair.

It finds nearly all of the nearest rows. How they rank, and their scores, is computed from the vectors
themselves, so that a match has the score that the exact search gives it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import BackendUnavailable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbinfer.frames.neighbours import Found, Metric

_METRICS: dict[str, str] = {"cosine": "cos", "dot": "ip", "euclidean": "l2sq"}
# More candidates looked at than rows wanted: recall against time.
_CONNECTIVITY, _LOOK_WHEN_ADDING, _LOOK_WHEN_ASKED = 16, 128, 128
_QUERY_BLOCK = 4096


def available() -> bool:
    """Whether the package is there."""
    return find_spec("usearch") is not None


def graph_top_k(
    queries: NDArray[np.float32],
    corpus: NDArray[np.float32],
    k: int,
    *,
    metric: Metric = "cosine",
    min_score: float | None = None,
) -> Found:
    """Return nearly the k best pairs of each query, as :func:`nbinfer.frames.neighbours.top_k` does.

    Raises
    ------
    BackendUnavailable
        The package is not installed; the message is the install line.
    """
    from nbinfer.frames.neighbours import best_first, scores_of

    if not available():
        raise BackendUnavailable("exact=False needs usearch: pip install 'nbinfer[search]'")
    from usearch.index import Index

    rows = np.flatnonzero(np.isfinite(corpus).all(axis=1))
    asked = np.flatnonzero(np.isfinite(queries).all(axis=1))
    if metric == "cosine":
        # A vector of zeros has no direction.
        rows, asked = rows[corpus[rows].any(axis=1)], asked[queries[asked].any(axis=1)]
    k = min(k, len(rows))
    if not len(asked) or not k:
        return best_first([], [], [], min_score=min_score)
    index: Any = Index(
        ndim=corpus.shape[1],
        metric=_METRICS[metric],
        dtype="f32",
        connectivity=_CONNECTIVITY,
        expansion_add=_LOOK_WHEN_ADDING,
        expansion_search=max(_LOOK_WHEN_ASKED, 2 * k),
    )
    index.add(rows, corpus[rows])
    lefts, rights, scores = [], [], []
    for start in range(0, len(asked), _QUERY_BLOCK):
        block = asked[start : start + _QUERY_BLOCK]
        found = index.search(queries[block], k)
        keys = np.asarray(found.keys).reshape(len(block), -1)
        counts = np.asarray(getattr(found, "counts", np.full(len(block), keys.shape[1]))).reshape(-1)
        there = np.arange(keys.shape[1])[None, :] < counts[:, None]
        left = np.broadcast_to(block[:, None], keys.shape)[there]
        right = keys[there].astype(np.int64)
        lefts.append(left)
        rights.append(right)
        scores.append(scores_of(queries[left], corpus[right], metric))
    return best_first(lefts, rights, scores, min_score=min_score)
