"""Nearest neighbours: every pair compared, in blocks of one matrix product each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Metric = Literal["cosine", "dot", "euclidean"]
Found: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]"
"""Pairs: query rows, corpus rows, ranks from 1, scores."""

# Scores of one block: 1 024 queries x 16 384 rows are 64 MiB of float32.
_QUERY_BLOCK = 1024
_CORPUS_BLOCK = 16_384


def top_k(
    queries: NDArray[np.float32],
    corpus: NDArray[np.float32],
    k: int,
    *,
    metric: Metric = "cosine",
    min_score: float | None = None,
) -> Found:
    """Return the k best pairs of each query: query rows, corpus rows, ranks from 1, scores.

    Parameters
    ----------
    queries, corpus
        float32 of shapes (m, d) and (n, d); rows that hold NaN match nothing.
    """
    empty = np.zeros(0, np.int64)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]] = []
    for start in range(0, len(queries) if len(corpus) else 0, _QUERY_BLOCK):
        block = queries[start : start + _QUERY_BLOCK]
        scores, rows = _best_of_block(block, corpus, k, metric)
        keep = np.isfinite(scores)
        if min_score is not None:
            keep &= scores >= min_score
        left, place = np.nonzero(keep)
        found.append(
            (left.astype(np.int64) + start, rows[keep], (place + 1).astype(np.int32), scores[keep]),
        )
    if not found:
        return empty, empty, empty.astype(np.int32), empty.astype(np.float32)
    left, right, rank, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return left, right, rank, score


def _best_of_block(
    block: NDArray[np.float32],
    corpus: NDArray[np.float32],
    k: int,
    metric: Metric,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scores and corpus rows of shape (len(block), up to k), best first; -inf where there is none."""
    best = np.full((len(block), 0), -np.inf, np.float32)
    best_rows = np.zeros((len(block), 0), np.int64)
    left = unit(block) if metric == "cosine" else block
    for start in range(0, len(corpus), _CORPUS_BLOCK):
        part = corpus[start : start + _CORPUS_BLOCK]
        scores = _scores(left, part, metric)
        np.copyto(scores, -np.inf, where=~np.isfinite(scores))
        rows = np.broadcast_to(np.arange(start, start + len(part)), scores.shape)
        if scores.shape[1] > k:
            chosen = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:]
            scores, rows = np.take_along_axis(scores, chosen, 1), np.take_along_axis(rows, chosen, 1)
        best, best_rows = np.hstack([best, scores]), np.hstack([best_rows, rows])
        # Best first; of equal scores the row that comes first.
        order = np.lexsort((best_rows, -best), axis=1)[:, :k]
        best, best_rows = np.take_along_axis(best, order, 1), np.take_along_axis(best_rows, order, 1)
    return best, best_rows


def _scores(left: NDArray[np.float32], part: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
    with np.errstate(invalid="ignore", over="ignore"):
        if metric == "cosine":
            return left @ unit(part).T
        if metric == "dot":
            return left @ part.T
        squares = (left**2).sum(1)[:, None] + (part**2).sum(1)[None, :] - 2 * (left @ part.T)
        out: NDArray[np.float32] = -np.sqrt(np.maximum(squares, 0))
        return out


def scores_of(left: NDArray[np.float32], right: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
    """Return the scores of pairs, row by row: float32 of shape (pairs,)."""
    if metric == "cosine":
        left, right = unit(left), unit(right)
    if metric == "euclidean":
        out: NDArray[np.float32] = -np.sqrt(((left - right) ** 2).sum(1))
        return out
    products: NDArray[np.float32] = np.einsum("ij,ij->i", left, right)
    return products


def best_first(
    left: list[NDArray[np.int64]],
    right: list[NDArray[np.int64]],
    score: list[NDArray[np.float32]],
    *,
    min_score: float | None,
) -> Found:
    """Put pairs in order and rank them: by query, best first, of equal scores the row that comes first."""
    if not left:
        empty = np.zeros(0, np.int64)
        return empty, empty, empty.astype(np.int32), empty.astype(np.float32)
    lefts, rights, scores = np.concatenate(left), np.concatenate(right), np.concatenate(score)
    if min_score is not None:
        stays = scores >= min_score
        lefts, rights, scores = lefts[stays], rights[stays], scores[stays]
    order = np.lexsort((rights, -scores, lefts))
    lefts, rights, scores = lefts[order], rights[order], scores[order]
    rank = places(lefts) + 1
    return lefts.astype(np.int64), rights, rank.astype(np.int32), scores.astype(np.float32)


def places(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each element's place, from 0, among the equal ones that stand together: 7 7 3 is 0 1 0."""
    if not len(groups):
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.r_[True, np.diff(groups) != 0])
    out: NDArray[np.int64] = np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))
    return out


def unit(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the rows at length 1; a row of zeros has no direction and becomes NaN."""
    lengths = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
    if np.all(np.abs(lengths - 1) < 1e-6):  # noqa: PLR2004 - float32's own rounding
        return matrix
    with np.errstate(invalid="ignore", divide="ignore"):
        out: NDArray[np.float32] = matrix / lengths[:, None]
    return out
