"""``join``: rows of two frames that belong together by meaning."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nbinfer.contract.errors import RequestError
from nbinfer.frames.judge import filter as keep_rows
from nbinfer.frames.neighbours import places
from nbinfer.frames.plan import choice
from nbinfer.frames.progress import announce
from nbinfer.frames.ranking import rerank as rank_documents
from nbinfer.frames.rules import Rules
from nbinfer.frames.searching import Embedder, Side, Wanted, nearest, side_of
from nbinfer.frames.tables import Table, column_label, read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbinfer.frames.neighbours import Metric
    from nbinfer.frames.progress import Sink

_CANDIDATES = 4
"""How many candidates for each match a reranking model is given."""


def join(
    left: Any,
    right: Any,
    *,
    left_on: Any,
    right_on: Any,
    k: int = 1,
    min_score: float | None = None,
    metric: Metric = "cosine",
    rerank: Any = None,
    predicate: str | None = None,
    threshold: float = 0.5,
    how: Literal["inner", "left"] = "inner",
    suffix: str = "_right",
    model: Any = None,
    client: Any = None,
    endpoints: Any = None,
    chat_model: Any = None,
    progress: bool | Sink | None = None,
) -> Any:
    """Join two frames on what their texts mean.

    Nearest neighbours first; with ``rerank`` a reranking model orders four times as many candidates; with
    ``predicate`` a chat model decides about each pair. What that will cost is said before it starts.

    Parameters
    ----------
    left, right
        Frames of one family.
    left_on, right_on
        Their columns of texts, or of vectors made by :func:`nbinfer.embed`.
    k
        Matches per left row, at most.
    min_score, metric
        As for :func:`nbinfer.similar`: the least similarity of a match.
    rerank
        True or a reranking model: order the candidates by it. Both columns must then be text.
    predicate
        A yes-or-no question about a pair, with the fields ``{left}`` and ``{right}``, the texts of the two.
    threshold
        The least probability of yes.
    how
        "inner": matches only; "left": left rows without a match stay, with nulls.
    suffix
        What the right frame's columns get where the left one has the same name.
    model
        The embedding model; None: the default, else the only one loaded.
    client, endpoints
        Where texts are embedded, as for :func:`nbinfer.complete`. The models of ``rerank`` and ``predicate``
        compute where they are loaded.
    chat_model
        The model that answers ``predicate``.

    Returns
    -------
    DataFrame
        Both frames' columns, and ``score``: the similarity, or the reranking model's score. Left rows in
        their order, best match first; a pandas index is the left one's.

    Raises
    ------
    RequestError
        The call itself is wrong: an unknown column, frames of two families, a name that is taken.
    """
    choice("how", how, ("inner", "left"))
    embedder = Embedder(Rules(model, client, endpoints, progress=progress))
    wanted = Wanted(k, metric, min_score)
    first, second = read(left), read(right)
    if first.only or second.only or first.family != second.family:
        raise RequestError(
            f"join takes two frames of one family; these are {first.family} {first.kind} and "
            f"{second.family} {second.kind}.",
        )
    lefts, rights = (
        side_of(first, left_on, asked_by="left_on"),
        side_of(second, right_on, asked_by="right_on"),
    )
    names = _right_names(first, second, suffix)
    ordered = rerank not in (None, False)
    width = _CANDIDATES * k if ordered else k
    if progress is not False:
        calls = [f"{first.rows} + {second.rows} embeddings"]
        if ordered:
            calls.append(f"up to {first.rows * min(width, second.rows)} reranked pairs")
        if predicate is not None:
            calls.append(f"up to {first.rows * min(k, second.rows)} questions")
        announce(f"nbinfer.join: {', '.join(calls)}, less what is known already")
    at, to, _, scores = nearest(lefts, rights, replace(wanted, k=width), embedder)
    if ordered:
        pairs = _pairs(lefts, rights, at, to)
        at, to, scores = _reranked(pairs, at, to, k, model=rerank, progress=progress)
    if predicate is not None:
        pairs = _pairs(lefts, rights, at, to)
        decided = keep_rows(
            pairs, predicate, threshold=threshold, mask=True, model=chat_model, progress=progress
        )
        stays = np.flatnonzero(decided.fillna(False).to_numpy(dtype=bool))
        at, to, scores = at[stays], to[stays], scores[stays]
    if how == "left":
        at, to, scores = _with_the_lone(at, to, scores, rows=first.rows)
    return _beside(first, second, names, at, to, scores)


def _right_names(left: Table, right: Table, suffix: str) -> dict[str, str]:
    names = {name: name if name not in left.names else f"{name}{suffix}" for name in right.names}
    out = [*left.names, *names.values(), "score"]
    twice = sorted({name for name in out if out.count(name) > 1})
    if twice:
        raise RequestError(
            f"the joined frame would have {', '.join(map(repr, twice))} twice.\n"
            "Rename the column, or choose another suffix.",
        )
    return names


def _pairs(left: Side, right: Side, at: NDArray[np.int64], to: NDArray[np.int64]) -> Any:
    """Return the texts of the pairs as a frame with the columns ``left`` and ``right``."""
    import pandas as pd

    def texts(side: Side, rows: NDArray[np.int64]) -> Any:
        column = read(side.column)
        (every,) = column.values(column.names, 0, column.rows)
        return pd.Series([every[row] for row in rows.tolist()], dtype=object)

    return pd.DataFrame({"left": texts(left, at), "right": texts(right, to)})


def _reranked(
    pairs: Any,
    lefts: NDArray[np.int64],
    rights: NDArray[np.int64],
    k: int,
    *,
    model: Any,
    progress: Any,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Order the pairs of each left row by a reranking model; the first ``k`` stay."""
    ranked = rank_documents(
        "left",
        pairs,
        on="right",
        sort=False,
        keep=False,
        model=None if model is True else model,
        progress=progress,
    )
    scores = ranked["score"].to_numpy(dtype=np.float32, na_value=np.nan)
    order = np.lexsort((rights, -scores, lefts))
    order = order[~np.isnan(scores[order])]
    lefts, rights, scores = lefts[order], rights[order], scores[order]
    best = places(lefts) < k
    return lefts[best], rights[best], scores[best]


def _with_the_lone(
    at: NDArray[np.int64], to: NDArray[np.int64], scores: NDArray[np.float32], *, rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Add the left rows without a match, in their places; they go to row -1."""
    lone = np.setdiff1d(np.arange(rows), at)
    at = np.concatenate([at, lone])
    to = np.concatenate([to, np.full(len(lone), -1)])
    scores = np.concatenate([scores, np.full(len(lone), np.nan, np.float32)])
    order = np.argsort(at, kind="stable")
    return at[order], to[order], scores[order]


def _beside(
    left: Table,
    right: Table,
    names: dict[str, str],
    lefts: NDArray[np.int64],
    rights: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> Any:
    missing = rights < 0
    if left.family == "pandas":
        out = left.native.take(lefts)
        other = right.native.reset_index(drop=True).reindex(np.where(missing, right.rows, rights))
        for column, name in zip(right.native.columns, names.values(), strict=True):
            out[column_label(out, name)] = other[column].array
        out[column_label(out, "score")] = scores
        return out
    if left.family == "polars":
        import polars as pl

        places = pl.Series(rights).set(pl.Series(missing), None)
        other = right.native.select(pl.all().gather(places)).rename(names)
        return left.native[lefts].hstack(other).with_columns(score=pl.Series(scores).fill_nan(None))
    import pyarrow as pa

    out = left.native.take(pa.array(lefts))
    other = right.native.take(pa.array(rights, mask=missing)).rename_columns(list(names.values()))
    for name in other.column_names:
        out = out.append_column(name, other[name])
    return out.append_column("score", pa.array(scores, mask=np.isnan(scores)))
