"""``similar``: the nearest rows of a corpus, by vectors that are there or are made of texts."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nbinfer.contract.errors import RequestError
from nbinfer.contract.modes import Mode
from nbinfer.frames.matrix import vectors
from nbinfer.frames.neighbours import best_first, top_k
from nbinfer.frames.operators import embed
from nbinfer.frames.plan import choice
from nbinfer.frames.prompts import list_columns, unknown_column
from nbinfer.frames.rules import Rules
from nbinfer.frames.tables import Table, read
from nbinfer.frames.work import weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from nbinfer.frames.neighbours import Found, Metric
    from nbinfer.frames.progress import Sink
    from nbinfer.frames.work import FrameModel

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
    client: Any = None,
    endpoints: Any = None,
    progress: bool | Sink | None = False,
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
    client, endpoints
        Where texts are embedded, as for :func:`nbinfer.complete`. Vectors are compared here.

    Returns
    -------
    DataFrame
        One row per match, in the corpus' family: ``query`` and ``match`` (index labels in pandas, else
        positions), ``position`` (the match's row number, for ``corpus.iloc``), ``rank`` from 1, ``score``;
        best first within each query.

    Raises
    ------
    RequestError
        The call itself is wrong: a column is unknown, or the vectors have different lengths or come from
        different weights.
    """
    embedder = Embedder(Rules(model, client, endpoints, progress=progress))
    wanted = Wanted(k, metric, min_score, by, exact)
    right, left = _side(corpus, on, "corpus"), _side(query, on, "query")
    return _long(left.table, right.table, *nearest(left, right, wanted, embedder))


@dataclass(frozen=True)
class Wanted:
    """Which matches are wanted, as :func:`similar` documents them.

    Raises
    ------
    RequestError
        One of them is wrong.
    """

    k: int
    metric: Metric = "cosine"
    min_score: float | None = None
    by: Any = None
    exact: bool | None = None

    def __post_init__(self) -> None:
        choice("metric", self.metric, ("cosine", "dot", "euclidean"))
        choice("exact", self.exact, (None, True, False))
        if isinstance(self.k, bool) or not hasattr(self.k, "__index__") or operator.index(self.k) < 1:
            raise RequestError(f"k={self.k!r}: it is the number of matches per query, at least 1.")

    def search(self, queries: int, rows: int) -> Callable[..., Found]:
        """Return how to search: as asked, else exactly unless it is too much for that."""
        from nbinfer.frames import graph

        exact = self.exact
        if exact is None:
            exact = queries * rows <= EXACT_PAIRS or not graph.available()
        return top_k if exact else graph.graph_top_k


class Embedder:
    """Makes vectors of texts; which model does it is only asked where there are texts."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    @cached_property
    def model(self) -> FrameModel:
        """The embedding model: one for both sides of a search."""
        return self._rules.model_for(Mode.EMBEDDING)

    def __call__(self, column: Any, **options: Any) -> Any:
        """Return the frame that :func:`nbinfer.embed` makes of a column of texts."""
        return embed(column, model=self.model, progress=self._rules.progress, **options)


@dataclass(frozen=True)
class Side:
    """Queries or corpus: the rows, their column of texts or vectors, and what made the vectors (if known)."""

    table: Table
    column: Any
    made: dict[str, Any] | None = None


def side_of(table: Table, on: Any, *, asked_by: str) -> Side:
    """Return a frame's side of a search.

    Raises
    ------
    RequestError
        There is no such column.
    """
    if str(on) not in table.names:
        raise unknown_column(str(on), table.names, asked_by=asked_by)
    return Side(table, table.column(on), _made_by(table.provenance(), str(on)))


def _side(data: Any, on: Any, what: Literal["query", "corpus"]) -> Side:
    if isinstance(data, str):
        data = [data]
    if isinstance(data, np.ndarray) and data.dtype != object and data.ndim:
        matrix = np.atleast_2d(np.asarray(data, np.float32))
        return Side(read(list(range(len(matrix)))), matrix)
    table = read(data)
    if table.only:
        return Side(table, table.native, _made_by(table.provenance(), None))
    if on is None:
        raise RequestError(
            f"similar: which column of the {what}? Pass on='column'.\nColumns: {list_columns(table.names)}."
        )
    return side_of(table, on, asked_by=f"on (the {what})")


def _made_by(provenance: dict[str, Any] | None, name: str | None) -> dict[str, Any] | None:
    """Find the call that made a column."""
    if provenance is None:
        return None
    for entry in (provenance, *provenance.get("earlier", [])):
        if entry.get("op") == "embed" and (name is None or name in entry.get("columns", ())):
            return dict(entry)
    return None


def both_sides(
    data: Any, *, on: Any, query: Any, model: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, Table]:
    """Return a corpus' vectors, those of a query as :func:`similar` would compare them, and the corpus' rows.

    Raises
    ------
    RequestError
        As :func:`similar`.
    """
    embedder = Embedder(Rules(model, progress=False))
    right = _side(data, on, "corpus")
    if query is None:
        return _vectors(right, None, embedder, "corpus")[0], None, right.table
    asked, corpus = _comparable(_side(query, on, "query"), right, embedder)
    return corpus, asked, right.table


def nearest(left: Side, right: Side, wanted: Wanted, embedder: Embedder) -> Found:
    """Return the nearest rows of ``right`` for each of ``left``, by position.

    Raises
    ------
    RequestError
        The vectors have different lengths or come from different weights.
    """
    queries, corpus = _comparable(left, right, embedder)
    if not queries.size or not corpus.size:
        return best_first([], [], [], min_score=None)
    search = wanted.search(len(queries), len(corpus))
    if wanted.by is None:
        return search(queries, corpus, wanted.k, metric=wanted.metric, min_score=wanted.min_score)
    return _grouped(left.table, right.table, queries, corpus, wanted, search)


def _comparable(
    left: Side, right: Side, embedder: Embedder
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the vectors of query and corpus."""
    corpus, right_made = _vectors(right, None, embedder, "corpus")
    queries, left_made = _vectors(left, right_made, embedder, "query")
    _same_space(queries, corpus, left_made, right_made)
    return queries, corpus


def _vectors(
    side: Side, made: dict[str, Any] | None, embedder: Embedder, what: Literal["query", "corpus"]
) -> tuple[NDArray[np.float32], dict[str, Any] | None]:
    """Return a side's vectors, embedding its texts as the other side (``made``) was, and what made them."""
    column = side.column
    if isinstance(column, np.ndarray):
        return vectors(column), side.made
    first = _first_value(read(column))
    if first is None:
        return np.zeros((side.table.rows, 0), np.float32), side.made
    if not isinstance(first, str):
        return vectors(column), side.made
    maker = embedder.model
    _may_compare(made, maker)
    params = (made or {}).get("params", {})
    kind: Literal["query"] | None = "query" if what == "query" and params.get("kind") == "document" else None
    out = embedder(
        column,
        kind=kind,
        normalize=params.get("normalize", True),
        dims=params.get("dims"),
        on_error="raise" if what == "query" else "null",
    )
    return vectors(out["embedding"]), {"digest": weights(maker), "model": maker.info.model, "params": {}}


def _may_compare(made: dict[str, Any] | None, maker: FrameModel) -> None:
    """Refuse to embed a query by other weights than those that made the corpus."""
    digest = weights(maker)
    if made is None or made.get("digest") in {None, digest}:
        return
    if not digest:
        raise RequestError(
            f"the corpus was embedded by {made.get('model')!r}, and {maker.info.model!r} does not say which "
            "weights it runs.\nWhere they are the same, say so with the corpus' digest: "
            f'endpoints=[{{"base_url": …, "weights": "{made["digest"]}"}}].',
        )
    raise RequestError(
        f"the corpus was embedded by {made.get('model')!r}, the query would be by {maker.info.model!r}: "
        "vectors of different models cannot be compared.\nPass the corpus' model, or embed the corpus again.",
    )


def _first_value(column: Table) -> Any:
    """Return the first value that is there, which says what a column holds; None where there is none."""
    for start in range(0, column.rows, 64):
        for value in column.values(column.names, start, start + 64)[0]:
            if value is not None:
                return value
    return None


def _same_space(
    left: NDArray[np.float32],
    right: NDArray[np.float32],
    left_made: dict[str, Any] | None,
    right_made: dict[str, Any] | None,
) -> None:
    if left.size and right.size and left.shape[1] != right.shape[1]:
        raise RequestError(
            f"the query's vectors have {left.shape[1]} components and the corpus' {right.shape[1]}: "
            "they come from different models or dims.",
        )
    digests = {made["digest"] for made in (left_made, right_made) if made is not None and made.get("digest")}
    if len(digests) > 1:
        models = " and ".join(repr(made["model"]) for made in (left_made, right_made) if made is not None)
        raise RequestError(f"the vectors come from different models ({models}) and cannot be compared.")


def _grouped(
    left: Table,
    right: Table,
    queries: NDArray[np.float32],
    corpus: NDArray[np.float32],
    wanted: Wanted,
    search: Callable[..., Found],
) -> Found:
    """Search within the rows that have the same value in the column ``by``."""
    if left.only or right.only:
        raise RequestError("by='column' needs a frame on both sides.")
    lefts, rights = (table.values([str(wanted.by)], 0, table.rows)[0] for table in (left, right))
    members: dict[Any, list[int]] = {}
    for row, value in enumerate(rights):
        if value is not None:
            members.setdefault(value, []).append(row)
    askers: dict[Any, list[int]] = {}
    for row, value in enumerate(lefts):
        if value in members:
            askers.setdefault(value, []).append(row)
    how = {"metric": wanted.metric, "min_score": wanted.min_score}
    parts = []
    for value, asking in askers.items():
        rows, candidates = np.array(asking), np.array(members[value])
        a, b, rank, score = search(queries[rows], corpus[candidates], wanted.k, **how)
        parts.append((rows[a], candidates[b], rank, score))
    if not parts:
        return top_k(queries[:0], corpus, wanted.k)
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
