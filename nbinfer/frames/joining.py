"""``join``: rows of two frames that belong together by meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nbinfer.contract.errors import RequestError
from nbinfer.frames.judge import filter as keep_rows
from nbinfer.frames.neighbours import neighbours
from nbinfer.frames.plan import choice
from nbinfer.frames.progress import announce
from nbinfer.frames.prompts import unknown_column
from nbinfer.frames.ranking import rerank as rank_documents
from nbinfer.frames.tables import Table, read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbinfer.frames.neighbours import Metric
    from nbinfer.frames.progress import Sink


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
    model, chat_model
        The embedding model, and the one that answers ``predicate``.

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
    first, second = read(left), read(right)
    if first.only or second.only or first.family != second.family:
        raise RequestError(
            f"join takes two frames of one family; these are {first.family} {first.kind} and "
            f"{second.family} {second.kind}.",
        )
    for table, column, word in ((first, left_on, "left_on"), (second, right_on, "right_on")):
        if str(column) not in table.names:
            raise unknown_column(str(column), table.names, asked_by=word)
    names = _right_names(first, second, suffix)
    width = k * 4 if rerank not in (None, False) else k
    calls = [f"{first.rows} + {second.rows} embeddings"]
    if rerank not in (None, False):
        calls.append(f"up to {first.rows * min(width, second.rows)} reranked pairs")
    if predicate is not None:
        calls.append(f"up to {first.rows * min(k, second.rows)} questions")
    if progress is not False:
        announce(f"nbinfer.join: {', '.join(calls)}, less what is known already")
    lefts, rights, _, scores = neighbours(
        first.column(left_on),
        second.column(right_on),
        k=width,
        metric=metric,
        min_score=min_score,
        model=model,
        left_made=first.provenance(),
        right_made=second.provenance(),
        names=(str(left_on), str(right_on)),
        progress=progress,
    )
    if rerank not in (None, False):
        lefts, rights, scores = _reranked(
            first, second, left_on, right_on, lefts, rights, k, model=rerank, progress=progress
        )
    if predicate is not None:
        pairs = _pairs(first, second, left_on, right_on, lefts, rights)
        decided = keep_rows(
            pairs, predicate, threshold=threshold, mask=True, model=chat_model, progress=progress
        )
        stays = np.flatnonzero(decided.fillna(False).to_numpy(dtype=bool))
        lefts, rights, scores = lefts[stays], rights[stays], scores[stays]
    if how == "left":
        lone = np.setdiff1d(np.arange(first.rows), lefts)
        lefts = np.concatenate([lefts, lone])
        rights = np.concatenate([rights, np.full(len(lone), -1)])
        scores = np.concatenate([scores, np.full(len(lone), np.nan, np.float32)])
        order = np.argsort(lefts, kind="stable")
        lefts, rights, scores = lefts[order], rights[order], scores[order]
    return _beside(first, second, names, lefts, rights, scores)


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


def _pairs(
    left: Table,
    right: Table,
    left_on: Any,
    right_on: Any,
    lefts: NDArray[np.int64],
    rights: NDArray[np.int64],
) -> Any:
    """Return the texts of the pairs as a frame with the columns ``left`` and ``right``."""
    import pandas as pd

    texts = [t.values([str(on)], 0, t.rows)[0] for t, on in ((left, left_on), (right, right_on))]
    return pd.DataFrame(
        {
            "left": pd.Series([texts[0][i] for i in lefts.tolist()], dtype=object),
            "right": pd.Series([texts[1][i] for i in rights.tolist()], dtype=object),
        },
    )


def _reranked(
    left: Table,
    right: Table,
    left_on: Any,
    right_on: Any,
    lefts: NDArray[np.int64],
    rights: NDArray[np.int64],
    k: int,
    *,
    model: Any,
    progress: Any,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    pairs = _pairs(left, right, left_on, right_on, lefts, rights)
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
    # The first k of each left row.
    starts = np.flatnonzero(np.r_[True, np.diff(lefts) != 0]) if len(lefts) else lefts
    place = np.arange(len(lefts)) - np.repeat(starts, np.diff(np.r_[starts, len(lefts)]))
    best = place < k
    return lefts[best], rights[best], scores[best]


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
            out[name] = other[column].array
        out["score"] = scores
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
