"""Nearest neighbours: every pair compared, in blocks of one matrix product each; for very many, a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from nbinfer.contract.errors import RequestError
from nbinfer.contract.modes import Mode
from nbinfer.frames.matrix import vectors
from nbinfer.frames.operators import embed
from nbinfer.frames.plan import choice
from nbinfer.frames.prompts import unknown_column
from nbinfer.frames.rules import loaded
from nbinfer.frames.tables import Table, read
from nbinfer.frames.work import weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Metric = Literal["cosine", "dot", "euclidean"]
Found: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]"
"""Pairs: query rows, corpus rows, ranks from 1, scores."""

# Scores of one block: 1 024 queries x 16 384 rows are 64 MiB of float32.
_QUERY_BLOCK = 1024
_CORPUS_BLOCK = 16_384
EXACT_PAIRS = 20_000_000_000
"""Pairs that are compared one by one where nobody says otherwise: some minutes of one core."""


def similar(
    query: Any,
    corpus: Any,
    *,
    on: Any = None,
    k: int = 10,
    metric: Metric = "cosine",
    min_score: float | None = None,
    by: Any = None,
    exact: bool | None = None,
    model: Any = None,
    progress: Any = False,
) -> Any:
    """Find the k nearest rows of a corpus for each query.

    Rows without a vector match nothing.

    Parameters
    ----------
    query
        A text or a list of texts (embedded with ``model``), a vector or matrix, a Series of texts or
        vectors, or a frame with the column ``on``.
    corpus
        A frame whose column ``on`` holds vectors or texts, a Series of them, or a matrix.
    on
        The column of both frames; the corpus' vectors as :func:`nbinfer.embed` made them.
    k
        Matches per query, at most.
    metric
        "cosine" (-1 to 1), "dot", or "euclidean" (the score is the negative distance): higher is nearer.
    min_score
        Leave out matches below this score.
    by
        A column of both frames: only rows with the same value match.
    exact
        True: compare every pair. False: search a graph (HNSW; needs the extra ``search``), which takes a
        while to build, answers many queries in a fraction of the time, and misses some matches. None: exact
        up to 20 billion pairs; beyond, the graph where it is installed.
    model
        The embedding model for texts; None: the default, else the only one loaded.

    Returns
    -------
    DataFrame
        One row per match, in the corpus' family: ``query`` and ``match`` (index labels in pandas, else
        positions), ``position`` (the match's row number, for ``corpus.iloc``), ``rank`` from 1, ``score``;
        best first within each query.

    Raises
    ------
    RequestError
        The vectors have different lengths or come from different weights, or a column is unknown.
    """
    left, right, found = _search(
        query,
        corpus,
        on=on,
        k=k,
        metric=metric,
        min_score=min_score,
        by=by,
        exact=exact,
        model=model,
        progress=progress,
    )
    return _long(left, right, *found)


def neighbours(
    left: Any,
    right: Any,
    *,
    names: tuple[str, str],
    left_made: dict[str, Any] | None,
    right_made: dict[str, Any] | None,
    k: int,
    metric: Metric,
    min_score: float | None,
    model: Any,
    progress: Any,
) -> Found:
    """Return the positions of the nearest pairs of two columns, as :func:`top_k` does.

    Parameters
    ----------
    names
        What the columns are called in their frames.
    left_made, right_made
        The frames' provenance, which may say who made the vectors.
    """
    _check(k, metric)
    sides = (
        Side(read(left), left, _made_by(left_made, names[0])),
        Side(read(right), right, _made_by(right_made, names[1])),
    )
    return _matched(*sides, k=k, metric=metric, min_score=min_score, by=None, model=model, progress=progress)


def both_sides(
    data: Any, *, on: Any, query: Any, model: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, Table]:
    """Return a corpus' vectors, those of a query as :func:`similar` would compare them, and the corpus' rows.

    Raises
    ------
    RequestError
        As :func:`similar`.
    """
    right = _side(data, on, "corpus")
    corpus, made = _vectors(right, None, model=model, progress=False, what="corpus")
    if query is None:
        return corpus, None, right.table
    left = _side(query, on, "query")
    asked, asked_made = _vectors(left, made, model=model, progress=False, what="query")
    _same_space(asked, corpus, asked_made, made)
    return corpus, asked, right.table


def _check(k: int, metric: str) -> None:
    choice("metric", metric, ("cosine", "dot", "euclidean"))
    if isinstance(k, bool) or k < 1:
        raise RequestError(f"k={k!r}: it is the number of matches per query, at least 1.")


@dataclass(frozen=True)
class Side:
    """Queries or corpus: the rows, their column of texts or vectors, and what made the vectors (if known)."""

    table: Table
    column: Any
    made: dict[str, Any] | None


def _search(
    query: Any,
    corpus: Any,
    *,
    on: Any,
    k: int,
    metric: Metric,
    min_score: float | None,
    by: Any,
    exact: bool | None,
    model: Any,
    progress: Any,
) -> tuple[Table, Table, Found]:
    _check(k, metric)
    right, left = _side(corpus, on, "corpus"), _side(query, on, "query")
    options = {
        "k": k,
        "metric": metric,
        "min_score": min_score,
        "by": by,
        "exact": exact,
        "model": model,
        "progress": progress,
    }
    return left.table, right.table, _matched(left, right, **options)


def _side(data: Any, on: Any, what: str) -> Side:
    if isinstance(data, str):
        data = [data]
    if isinstance(data, np.ndarray) and data.dtype != object and data.ndim:
        matrix = np.atleast_2d(np.asarray(data, np.float32))
        return Side(read(list(range(len(matrix)))), matrix, None)
    table = read(data)
    if table.only:
        return Side(table, table.native, _made_by(table.provenance(), None))
    if on is None:
        raise RequestError(f"similar: which column of the {what}? Pass on='column'.")
    if str(on) not in table.names:
        raise unknown_column(str(on), table.names, asked_by=f"on (the {what})")
    return Side(table, table.column(on), _made_by(table.provenance(), str(on)))


def _matched(
    left: Side,
    right: Side,
    *,
    k: int,
    metric: Metric,
    min_score: float | None,
    by: Any,
    model: Any,
    progress: Any,
    exact: bool | None = None,
) -> Found:
    corpus, right_made = _vectors(right, None, model=model, progress=progress, what="corpus")
    queries, left_made = _vectors(left, right_made, model=model, progress=progress, what="query")
    _same_space(queries, corpus, left_made, right_made)
    search = _search_for(len(queries), len(corpus), exact=exact)
    if by is None:
        return search(queries, corpus, k, metric=metric, min_score=min_score)
    groups = left.table, right.table, by
    return _grouped(*groups, queries, corpus, k, search=search, metric=metric, min_score=min_score)


def _search_for(queries: int, rows: int, *, exact: bool | None) -> Callable[..., Found]:
    """Return how to search: as asked, else exactly unless it is too much for that."""
    from nbinfer.frames import graph

    choice("exact", exact, (None, True, False))
    if exact is None:
        exact = queries * rows <= EXACT_PAIRS or not graph.available()
    return top_k if exact else graph.graph_top_k


def _vectors(
    side: Side, made: dict[str, Any] | None, *, model: Any, progress: Any, what: str
) -> tuple[NDArray[np.float32], dict[str, Any] | None]:
    """Return a side's vectors, embedding its texts as the other side (``made``) was, and what made them."""
    column = side.column
    if isinstance(column, np.ndarray) or not _is_text(read(column)):
        return vectors(column), side.made
    maker = loaded(model, Mode.EMBEDDING)
    if made is not None and made.get("digest") not in {None, weights(maker)}:
        raise RequestError(
            f"the corpus was embedded by {made.get('model')!r}, the {what} would be by "
            f"{maker.info.model!r}: vectors of different models cannot be compared.\n"
            "Pass the corpus' model, or embed the corpus again.",
        )
    params = (made or {}).get("params", {})
    kind: Literal["query"] | None = "query" if what == "query" and params.get("kind") == "document" else None
    out = embed(
        column,
        model=maker,
        kind=kind,
        normalize=params.get("normalize", True),
        dims=params.get("dims"),
        on_error="raise" if what == "query" else "null",
        progress=progress,
    )
    return vectors(out["embedding"]), {"digest": weights(maker), "model": maker.info.model, "params": {}}


def _is_text(column: Table) -> bool:
    for start in range(0, column.rows, 64):
        for value in column.values(column.names, start, start + 64)[0]:
            if value is not None:
                return isinstance(value, str)
    return False


def _made_by(provenance: dict[str, Any] | None, name: str | None) -> dict[str, Any] | None:
    """Find the call that made a column."""
    if provenance is None:
        return None
    for entry in (provenance, *provenance.get("earlier", [])):
        if entry.get("op") == "embed" and (name is None or name in entry.get("columns", ())):
            return dict(entry)
    return None


def _same_space(
    left: NDArray[np.float32],
    right: NDArray[np.float32],
    left_made: dict[str, Any] | None,
    right_made: dict[str, Any] | None,
) -> None:
    if len(left) and len(right) and left.shape[1] != right.shape[1]:
        raise RequestError(
            f"the query's vectors have {left.shape[1]} components and the corpus' {right.shape[1]}: "
            "they come from different models or dims.",
        )
    digests = {made["digest"] for made in (left_made, right_made) if made is not None and made.get("digest")}
    if len(digests) > 1:
        models = " and ".join(repr(made["model"]) for made in (left_made, right_made) if made is not None)
        raise RequestError(f"the vectors come from different models ({models}) and cannot be compared.")


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
    starts = np.flatnonzero(np.r_[True, np.diff(lefts) != 0]) if len(lefts) else lefts
    rank = np.arange(len(lefts)) - np.repeat(starts, np.diff(np.r_[starts, len(lefts)])) + 1
    return lefts.astype(np.int64), rights, rank.astype(np.int32), scores.astype(np.float32)


def unit(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the rows at length 1; a row of zeros has no direction and becomes NaN."""
    lengths = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
    if np.all(np.abs(lengths - 1) < 1e-6):  # noqa: PLR2004 - float32's own rounding
        return matrix
    with np.errstate(invalid="ignore", divide="ignore"):
        out: NDArray[np.float32] = matrix / lengths[:, None]
    return out


def _grouped(
    left: Table,
    right: Table,
    by: Any,
    queries: NDArray[np.float32],
    corpus: NDArray[np.float32],
    k: int,
    *,
    search: Callable[..., Found],
    metric: Metric,
    min_score: float | None,
) -> Found:
    if left.only or right.only:
        raise RequestError("by='column' needs a frame on both sides.")
    lefts, rights = (table.values([str(by)], 0, table.rows)[0] for table in (left, right))
    members: dict[Any, list[int]] = {}
    for row, value in enumerate(rights):
        if value is not None:
            members.setdefault(value, []).append(row)
    askers: dict[Any, list[int]] = {}
    for row, value in enumerate(lefts):
        if value in members:
            askers.setdefault(value, []).append(row)
    parts = []
    for value, asking in askers.items():
        rows, candidates = np.array(asking), np.array(members[value])
        a, b, rank, score = search(queries[rows], corpus[candidates], k, metric=metric, min_score=min_score)
        parts.append((rows[a], candidates[b], rank, score))
    if not parts:
        return top_k(queries[:0], corpus, k)
    out = tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((out[2], out[0]))
    return out[0][order], out[1][order], out[2][order], out[3][order]


def _long(
    left: Table,
    right: Table,
    query: NDArray[np.int64],
    match: NDArray[np.int64],
    rank: NDArray[np.int32],
    score: NDArray[np.float32],
) -> Any:
    if right.family == "pandas":
        import pandas as pd

        labels = [_labels(left, query), _labels(right, match)]
        return pd.DataFrame(
            {"query": labels[0], "match": labels[1], "position": match, "rank": rank, "score": score}
        )
    columns = {"query": query, "match": match, "position": match, "rank": rank, "score": score}
    if right.family == "polars":
        import polars as pl

        return pl.DataFrame(columns)
    import pyarrow as pa

    return pa.table(columns)


def _labels(table: Table, rows: NDArray[np.int64]) -> Any:
    """Return the rows' index labels (tuples for a multi-level index), positions where there is no index."""
    if table.family != "pandas" or table.kind == "list":
        return rows
    index = table.native.index
    index = index.to_flat_index() if index.nlevels > 1 else index
    return index.take(rows).array
