"""``rerank``: how well each document answers a query, by a reranking model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import RequestError
from nbinfer.contract.modes import Mode
from nbinfer.frames.neighbours import places
from nbinfer.frames.prompts import list_columns
from nbinfer.frames.rules import Rules
from nbinfer.frames.tables import read
from nbinfer.frames.work import RerankWork

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbinfer.frames.outcomes import Columns
    from nbinfer.frames.output import Output
    from nbinfer.frames.plan import CacheMode, Nulls, OnError
    from nbinfer.frames.progress import Sink
    from nbinfer.frames.prompts import Prompt
    from nbinfer.frames.run import Run

_SIDE = ("rank", "error", "n_tokens")


class _Pair:
    """A document beside its own query, or the one query of all."""

    takes_null = False

    def __init__(self, document: Prompt, query: str | None, column: str | None) -> None:
        self._document = document
        self._query = query
        self.columns = document.columns if column is None else (*document.columns, column)
        self.source = document.source

    def render(self, values: Sequence[Any]) -> Any:
        """Return (query, document)."""
        own = values[: len(self._document.columns)]
        document = self._document.render(own)
        query = values[-1] if self._query is None else self._query
        if not isinstance(document, str) or not isinstance(query, str):
            raise RequestError("a query or document of this row is not text.")
        return (query, document)


def rerank(
    query: Any,
    docs: Any,
    *,
    on: Any = None,
    k: int | None = None,
    sort: bool = True,
    name: str = "score",
    model: Any = None,
    client: Any = None,
    endpoints: Any = None,
    cache: CacheMode = True,
    on_error: OnError = "null",
    nulls: Nulls = "skip",
    keep: bool = True,
    progress: bool | Sink | None = None,
) -> Any:
    """Score documents against a query, best first.

    Parameters
    ----------
    query
        A text; or, for a frame, the name of the column that holds each row's own query.
    docs
        The documents: a list, Series or frame.
    on
        The frame's column of documents.
    k
        Keep the k best (of each query); None: all.
    sort
        Best first; False keeps the order. With queries of their own, rows are sorted within their query,
        queries in the order of their first row.
    name
        The scores' column.
    model, client, endpoints, cache, on_error, nulls, keep, progress
        As for :func:`nbinfer.complete`; the model is loaded with ``mode="reranking"``.

    Returns
    -------
    DataFrame
        ``score`` float32, on the model's own scale (higher is better, not a probability), ``rank`` Int32 from
        1 within the query, ``error``, ``n_tokens``. Rows without a score come last and have no rank. Without
        a frame and without an index to tell rows apart (polars, pyarrow), ``row`` is the position.

    Raises
    ------
    RequestError
        The call itself is wrong.
    """
    rules = Rules(model, client, endpoints, cache, on_error, nulls, keep=keep, progress=progress)
    table = read(docs)
    if not isinstance(query, str):
        raise RequestError(
            f"query is {type(query).__name__}: it is a text, or the name of a column of queries."
        )
    if k is not None and (isinstance(k, bool) or k < 1):
        raise RequestError(f"k={k!r}: it is the number of documents to keep, at least 1.")
    beside = (*(("row",) if table.only and table.family != "pandas" else ()), *_SIDE)
    output = rules.output(table, [name], beside, name=name)
    if on is None and not table.only:
        raise RequestError(
            "rerank: which column holds the documents? Pass on='column'.\n"
            f"Columns: {list_columns(table.names)}."
        )
    documents = table.prompt(None, on, call="rerank")
    column = query if not table.only and query in table.names else None
    pair = _Pair(documents, None if column is not None else query, column)
    loaded = rules.model_for(Mode.RERANKING)

    def build(run: Run, columns: Columns) -> Any:
        return _ranked(output, run, columns, column, name=name, k=k, sort=sort)

    params = {"query": query, "k": k, "name": name}
    return rules.result(rules.batch(table, pair, RerankWork(), loaded, build, params=params))


def _ranked(
    output: Output,
    run: Run,
    columns: Columns,
    column: str | None,
    *,
    name: str,
    k: int | None,
    sort: bool,
) -> Any:
    import pyarrow as pa

    table, names = output.table, output.names
    rows = np.arange(table.rows) if columns.rows is None else columns.rows
    errors = columns.outcomes.errors
    per_job = [np.nan if v is None or j in errors else v for j, v in enumerate(columns.outcomes.value)]
    scores = columns.numbers(np.array(per_job, np.float64))
    values = scores.to_numpy(zero_copy_only=False)
    group = np.zeros(len(rows), np.int64)
    if column is not None:
        first: dict[Any, int] = {}
        queries = table.values([column], 0, table.rows)[0]
        group = np.array([first.setdefault(queries[p], len(first)) for p in rows.tolist()], np.int64)
    # Best first within each query; of equal scores the row that comes first; rows without a score last.
    order = np.lexsort((np.arange(len(rows)), np.where(np.isnan(values), np.inf, -values), group))
    rank = np.zeros(len(rows), np.int32)
    rank[order] = places(group[order]) + 1
    chosen = order if sort else np.arange(len(rows))
    if k is not None:
        chosen = chosen[(rank[chosen] <= k) & ~np.isnan(values[chosen])]
    beside = {
        "row": pa.array(rows),
        "rank": pa.array(rank, mask=np.isnan(values)),
        "error": columns.error(),
        "n_tokens": columns.prompt_tokens(),
    }
    out = {name: scores, **{names[word]: array for word, array in beside.items() if word in names}}
    taken = {word: array.take(pa.array(chosen)) for word, array in out.items()}
    info = {**run.info, "columns": list(out)}
    return table.with_columns(taken, keep=output.keep, rows=rows[chosen], info=info, replace=[name])
