"""The results of a batch, column by column: small, snapshot-able at any time, and Arrow in one step."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FINISH = ("stop", "length", "error", "skipped", "cancelled")
SOURCE = ("run", "cache", "duplicate")

STOP, LENGTH, ERROR, SKIPPED, CANCELLED = range(5)
PENDING = NONE = -1
RUN, CACHE, DUPLICATE = range(3)


class Record(NamedTuple):
    """What the engine gave for one job, as the journal keeps it.

    ``value`` is text, a float32 vector or a score; tokens are counts, ``seconds`` from the first prompt token
    to the last one; ``extra`` holds what only some calls ask for (log-probabilities, reasoning), as JSON.
    """

    value: Any
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float | None = None
    extra: Mapping[str, Any] | None = None


_NAN = float("nan")


class Outcomes:
    """One slot per job; a job is asked once and may stand behind many rows."""

    def __init__(self) -> None:
        self.value: list[Any] = []
        self.parsed: dict[int, Any] = {}
        self.errors: dict[int, str] = {}
        self.extra: dict[int, Mapping[str, Any]] = {}
        self.finish = array("b")
        self.source = array("b")
        self.prompt = array("i")
        self.cached = array("i")
        self.completion = array("i")
        self.seconds = array("f")

    def __len__(self) -> int:
        return len(self.value)

    def grow(self, jobs: int) -> None:
        """Append jobs that nothing is known of yet."""
        self.value.extend([None] * jobs)
        self.finish.extend([PENDING] * jobs)
        self.source.extend([NONE] * jobs)
        for counts in (self.prompt, self.cached, self.completion):
            counts.extend([NONE] * jobs)
        self.seconds.extend([_NAN] * jobs)

    def set(self, job: int, record: Record, source: int, parsed: Any, error: str | None) -> None:
        """Store what a job gave; with ``error`` the text stays as the raw value of a failed row."""
        self.value[job] = record.value
        if parsed is not None:
            self.parsed[job] = parsed
        if error is not None:
            self.errors[job] = error
        if record.extra:
            self.extra[job] = record.extra
        self.source[job] = source
        _, _, prompt, cached, completion, seconds, _ = record
        self.prompt[job] = NONE if prompt is None else prompt
        self.cached[job] = NONE if cached is None else cached
        self.completion[job] = NONE if completion is None else completion
        self.seconds[job] = _NAN if seconds is None else seconds
        # Last: a job counts as finished when its finish reason is there.
        if record.finish_reason == "length":
            self.finish[job] = LENGTH
        else:
            self.finish[job] = STOP if error is None else ERROR

    def fail(
        self,
        job: int,
        error: str,
        *,
        prompt_tokens: int | None = None,
        raw: str | None = None,
        source: int = RUN,
    ) -> None:
        """Store why a job gave nothing, or nothing but ``raw`` text."""
        self.errors[job] = error
        self.value[job] = raw
        self.source[job] = source
        self.prompt[job] = NONE if prompt_tokens is None else prompt_tokens
        self.finish[job] = ERROR

    def reset(self, job: int) -> None:
        """Forget a job's failure, so that it can be asked again."""
        self.value[job] = None
        self.errors.pop(job, None)
        self.parsed.pop(job, None)
        self.extra.pop(job, None)
        self.finish[job] = PENDING

    def cancel_pending(self) -> None:
        """Mark the jobs that were not reached."""
        for job, finish in enumerate(self.finish):
            if finish == PENDING:
                self.finish[job] = CANCELLED

    def copy(self) -> Outcomes:
        """Copy the columns; the values in them are shared."""
        out = Outcomes()
        out.value = self.value.copy()
        out.parsed = self.parsed.copy()
        out.errors = self.errors.copy()
        out.extra = self.extra.copy()
        for name in ("finish", "source", "prompt", "cached", "completion", "seconds"):
            setattr(out, name, getattr(self, name)[:])
        return out


class Columns:
    """Arrow arrays of a batch's rows.

    Parameters
    ----------
    outcomes
        The jobs' results.
    row_job
        The job behind each row, shape (rows,).
    rows
        Positions of the rows wanted; None: all.
    """

    def __init__(
        self,
        outcomes: Outcomes,
        row_job: NDArray[np.int64],
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.outcomes = outcomes
        self.rows = rows
        self._all = row_job
        self.row_job = row_job if rows is None else row_job[rows]

    def _scatter(self, array_: Any) -> Any:
        import pyarrow as pa

        if len(self.row_job) == len(array_) and np.array_equal(self.row_job, np.arange(len(array_))):
            return array_
        return array_.take(pa.array(self.row_job))

    def _numbers(self, values: array[Any], dtype: Any) -> NDArray[Any]:
        return np.array(values, dtype=dtype)[self.row_job] if len(values) else np.zeros(0, dtype)

    def values(self, arrow_type: Any, items: list[Any] | None = None) -> Any:
        """Return the jobs' values (or ``items``, one per job), null for failed ones."""
        import pyarrow as pa

        items = self.outcomes.value if items is None else items
        errors = self.outcomes.errors
        if errors and items is self.outcomes.value:
            items = [None if job in errors else value for job, value in enumerate(items)]
        return self._scatter(pa.array(items, arrow_type))

    def categories(self, items: list[str | None], names: tuple[str, ...]) -> Any:
        """Return texts, one per job, as a category of exactly these names."""
        code = {name: i for i, name in enumerate(names)}
        codes = np.array([NONE if item is None else code[item] for item in items], np.int16)
        return category(codes[self.row_job] if len(codes) else codes, names)

    def numbers(self, values: NDArray[np.float64]) -> Any:
        """Return numbers, one per job, as float32; NaN is null."""
        import pyarrow as pa

        rows = values[self.row_job].astype(np.float32) if len(values) else np.zeros(0, np.float32)
        return pa.array(rows, mask=np.isnan(rows))

    def by_row(self, per_row: int) -> Columns:
        """Return the same rows with one place per input row, where a row asks ``per_row`` questions."""
        places = None if self.rows is None else self.rows[::per_row] // per_row
        return Columns(self.outcomes, self._all, places)

    def raw(self) -> Any:
        """Return the text as the model wrote it, failed rows included."""
        import pyarrow as pa

        return self._scatter(pa.array(self.outcomes.value, pa.large_string()))

    def error(self) -> Any:
        """Return ``Class: message`` of the rows that failed, else null."""
        import pyarrow as pa

        errors = self.outcomes.errors
        return self._scatter(
            pa.array([errors.get(job) for job in range(len(self.outcomes))], pa.large_string())
        )

    def finish_reason(self) -> Any:
        """Return the finish reasons as a dictionary array; null for rows not reached yet."""
        return category(self._numbers(self.outcomes.finish, np.int8), FINISH)

    def source(self) -> Any:
        """Return where each row's result comes from: ``run``, ``cache`` or ``duplicate`` of a row above.

        Null for rows that asked nothing: skipped, or without a prompt that could be made.
        """
        return category(self.source_codes(), SOURCE)

    def source_codes(self) -> NDArray[np.int8]:
        """Return the codes behind :meth:`source`, -1 for none."""
        codes = (
            np.array(self.outcomes.source, np.int8)[self._all] if len(self.outcomes) else np.zeros(0, np.int8)
        )
        first = np.zeros(len(codes), bool)
        first[np.unique(self._all, return_index=True)[1]] = True
        codes[~first & (codes >= 0)] = DUPLICATE
        return codes if self.rows is None else codes[self.rows]

    def prompt_tokens(self) -> Any:
        """Return the prompts' token counts."""
        return _nullable(self._numbers(self.outcomes.prompt, np.int32))

    def cached_tokens(self) -> Any:
        """Return how many prompt tokens the engine did not have to compute."""
        return _nullable(self._numbers(self.outcomes.cached, np.int32))

    def completion_tokens(self) -> Any:
        """Return the answers' token counts."""
        return _nullable(self._numbers(self.outcomes.completion, np.int32))

    def seconds(self) -> Any:
        """Return the seconds that each answer took when it was computed."""
        import pyarrow as pa

        values = self._numbers(self.outcomes.seconds, np.float32)
        return pa.array(values, mask=np.isnan(values))

    def vectors(self, size: int | None) -> Any:
        """Return the jobs' float32 vectors as a fixed-size list; null for rows without one.

        ``size`` is the number of components where the engine knows it, so that a frame in which every row
        failed has the same type as any other. The slots behind null rows hold NaN, never zeros, so that even
        a reader that overlooks the validity mask cannot take them for vectors.
        """
        found = [
            job
            for job, v in enumerate(self.outcomes.value)
            if v is not None and job not in self.outcomes.errors
        ]
        size = len(self.outcomes.value[found[0]]) if found else size or 0
        matrix = np.full((len(self.outcomes), size), np.nan, np.float32)
        missing = np.ones(len(self.outcomes), bool)
        for job in found:
            matrix[job] = self.outcomes.value[job]
            missing[job] = False
        if not np.array_equal(self.row_job, np.arange(len(matrix))):
            matrix, missing = matrix[self.row_job], missing[self.row_job]
        return fixed_size_list(matrix, missing)


def fixed_size_list(matrix: NDArray[np.float32], missing: NDArray[np.bool_] | None = None) -> Any:
    """Wrap float32 vectors of shape (rows, dimensions) as an Arrow fixed-size list, without a copy."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(matrix, dtype=np.float32).reshape(-1))
    mask = pa.array(missing) if missing is not None and missing.any() else None
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1], mask=mask)


def category(codes: NDArray[Any], names: tuple[str, ...]) -> Any:
    """Return a dictionary array; code -1 is null."""
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(names, pa.string()))


def _nullable(values: NDArray[np.int32]) -> Any:
    import pyarrow as pa

    return pa.array(values, mask=values < 0)
