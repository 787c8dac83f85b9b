"""From a run's columns to the frame that comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from nbinfer.frames.outcomes import Columns
    from nbinfer.frames.run import Run
    from nbinfer.frames.tables import Table

SIDE = ("error", "finish_reason", "prompt_tokens", "cached_tokens", "completion_tokens", "seconds", "source")
"""What is said of an answer beside it; methods of :class:`~nbinfer.frames.outcomes.Columns`."""


@dataclass(frozen=True)
class Output:
    """The columns that a call adds to its rows.

    ``names`` says what each column beside the values is called in this frame; ``per_row`` how many rows come
    back for each that came in.
    """

    table: Table
    names: Mapping[str, str]
    keep: bool
    per_row: int = 1

    def frame(self, run: Run, columns: Columns, values: Mapping[str, Any], beside: Mapping[str, Any]) -> Any:
        """Put a run's columns beside the rows they belong to, with their provenance.

        Parameters
        ----------
        values, beside
            Arrow arrays, by the columns' names and by the keys of ``names``.
        """
        import pyarrow as pa

        rows = self._rows(columns)
        if run.truncated is not None and "truncated" in self.names:
            beside = {**beside, "truncated": pa.array(run.truncated if rows is None else run.truncated[rows])}
        named = {**values, **{self.names[column]: array for column, array in beside.items()}}
        info = {**run.info, "columns": list(named)}
        return self.table.with_columns(named, keep=self.keep, rows=rows, info=info, replace=values)

    def _rows(self, columns: Columns) -> NDArray[np.int64] | None:
        """Return the input row behind each output row; None when they are the same."""
        if columns.rows is not None:
            return columns.rows // self.per_row
        return None if self.per_row == 1 else np.repeat(np.arange(self.table.rows), self.per_row)


def side_columns(columns: Columns, names: Sequence[str] = SIDE) -> dict[str, Any]:
    """Return the bookkeeping columns called ``names``, as Arrow arrays."""
    return {name: getattr(columns, name)() for name in names}


def sample_column(columns: Columns, n: int) -> dict[str, Any]:
    """Return the column that numbers the ``n`` answers of each row from 0; none where there is one."""
    import pyarrow as pa

    if n == 1:
        return {}
    position = np.arange(len(columns.row_job)) if columns.rows is None else columns.rows
    return {"sample": pa.array((position % n).astype(np.int16))}


def logprob_columns(columns: Columns) -> dict[str, Any]:
    """Return the answers' mean log-probability and every token's, as Arrow arrays."""
    import pyarrow as pa

    kind = pa.list_(
        pa.struct(
            [
                ("token", pa.string()),
                ("logprob", pa.float32()),
                ("top", pa.list_(pa.struct([("token", pa.string()), ("logprob", pa.float32())]))),
            ],
        ),
    )
    means: list[float | None] = []
    every: list[Any] = []
    for job in range(len(columns.outcomes)):
        tokens = columns.outcomes.extra.get(job, {}).get("logprobs")
        if tokens is None or job in columns.outcomes.errors:
            means.append(None)
            every.append(None)
            continue
        means.append(float(np.mean([logprob for _, logprob, _ in tokens])) if tokens else None)
        every.append(
            [
                {"token": token, "logprob": logprob, "top": [{"token": t, "logprob": p} for t, p in top]}
                for token, logprob, top in tokens
            ],
        )
    return {
        "mean_logprob": columns.values(pa.float32(), means),
        "logprobs": columns.values(kind, every),
    }
