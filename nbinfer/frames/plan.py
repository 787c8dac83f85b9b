"""From rows to jobs: what is to be asked, and what is known already.

The plan renders every row, masks missing values, looks the journal up, and keeps one job per different
question.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from nbinfer.contract.errors import NotSupported, RequestError
from nbinfer.frames import outcomes as oc
from nbinfer.frames.journal import Journal, Keys, open_journal
from nbinfer.frames.outcomes import Outcomes
from nbinfer.frames.prompts import NullField, Trimmed
from nbinfer.frames.work import weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from nbinfer.frames.prompts import Prompt
    from nbinfer.frames.tables import Table
    from nbinfer.frames.work import FrameModel, Work

CacheMode: TypeAlias = bool | Literal["refresh"]
OnError: TypeAlias = Literal["null", "raise", "stop"]
Nulls: TypeAlias = Literal["skip", "empty", "error"]
TooLong: TypeAlias = Literal["error", "head", "tail", "middle"]

Expand: TypeAlias = "Callable[[Any], list[tuple[Any, int]]]"
"""From what a row's prompt rendered to the row's questions, each with the number of its sample."""

_CHUNK = 4096


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse an option that is not one of ``allowed``.

    Raises
    ------
    RequestError
        It is not.
    """
    if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
        raise RequestError(f"{name}={value!r}: it is one of {', '.join(map(repr, allowed))}.")


@dataclass
class Plan:
    """What is to be done: rows, the jobs behind them, and what is known of each job.

    ``contents`` and ``keys`` are there for jobs that still have to run (and, afterwards, for failed ones).
    """

    table: Table
    work: Work
    model: FrameModel
    source: str
    row_job: NDArray[np.int64]
    outcomes: Outcomes
    contents: dict[int, Any]
    keys: dict[int, bytes]
    per_row: int = 1
    seed: int | None = 0
    journal: Journal | None = None
    truncated: NDArray[np.bool_] | None = None
    """Which input rows were cut to fit; None when none may be."""
    failure: tuple[int, Exception] | None = None
    """The first job that the plan found failed (no prompt can be made, or a kept answer is not valid)."""
    rows_of: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.rows_of = np.bincount(self.row_job, minlength=len(self.outcomes))

    def first_row(self, job: int) -> int:
        """Return the first input row that asks this job."""
        return int(np.argmax(self.row_job == job)) // self.per_row


def describe(error: BaseException) -> str:
    """Return an error as ``Class: message``, in one line, as the ``error`` column holds it."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def kind(error: str) -> str:
    """Return the class out of an ``error`` column's text."""
    return error.partition(":")[0]


def once(content: Any) -> list[tuple[Any, int]]:
    """Ask what the row says, once."""
    return [(content, 0)]


def make_plan(
    table: Table,
    prompt: Prompt,
    work: Work,
    model: FrameModel,
    *,
    expand: Expand = once,
    per_row: int = 1,
    seed: int | None = 0,
    draws: bool = False,
    nulls: Nulls = "skip",
    cache: CacheMode = True,
    too_long: TooLong = "error",
) -> Plan:
    """Render every row and find out which jobs have to run.

    Parameters
    ----------
    expand
        Turns what the prompt rendered into the row's questions; raises for a row that has none.
    per_row
        How many questions that are.
    seed
        None: nothing is repeatable, so that neither journal nor duplicates are used.
    draws
        Whether answers are drawn at random, so that rows that ask the same get an answer each: the second
        row's first sample is the question's sample number ``per_row``, and so on.
    too_long
        "error", or what stays of the longest value of a row that does not fit.

    Raises
    ------
    NotSupported
        Rows are to be cut, and the engine cannot count tokens.
    """
    if too_long != "error":
        engine = model.engine
        prompt = Trimmed(
            prompt, lambda content: all(work.fits(engine, c) for c, _ in expand(content)), too_long
        )
    planner = _Planner(
        prompt,
        work,
        Keys({**work.constants(model), "run_seed": seed}),
        expand,
        per_row,
        seed,
        nulls,
        draws=draws,
    )
    journal = open_journal() if cache is not False and seed is not None and weights(model) else None
    for start in range(0, table.rows, _CHUNK):
        stop = min(start + _CHUNK, table.rows)
        columns = table.values(prompt.columns, start, stop)
        rows = zip(*columns, strict=True) if columns else iter([()] * (stop - start))
        fresh = planner.add_rows(start, rows)
        if journal is not None and cache is True:
            planner.look_up(journal, fresh)
    return Plan(
        table,
        work,
        model,
        prompt.source,
        np.array(planner.row_job, np.int64),
        planner.outcomes,
        planner.contents,
        planner.keys,
        per_row=per_row,
        seed=seed,
        journal=journal,
        truncated=None if too_long == "error" else planner.truncated(table.rows),
        failure=planner.failure,
    )


class _Planner:
    """Turns rows into jobs, one per different question."""

    def __init__(
        self,
        prompt: Prompt,
        work: Work,
        keys_of: Keys,
        expand: Expand,
        per_row: int,
        seed: int | None,
        nulls: Nulls,
        *,
        draws: bool,
    ) -> None:
        self._draws = draws
        self.outcomes = Outcomes()
        self.row_job: array[int] = array("q")
        self.contents: dict[int, Any] = {}
        self.keys: dict[int, bytes] = {}
        self._prompt = prompt
        self._work = work
        self._keys_of = keys_of
        self._expand = expand
        self._per_row = per_row
        self._seed = seed
        self._nulls = nulls
        self._seen: dict[bytes, int] = {}
        self._skipped: int | None = None
        self._cut: list[int] = []
        self._times: dict[bytes, int] = {}
        self.failure: tuple[int, Exception] | None = None

    def truncated(self, rows: int) -> NDArray[np.bool_]:
        """Return which of the rows were cut to fit."""
        out = np.zeros(rows, bool)
        out[self._cut] = True
        return out

    def add_rows(self, start: int, rows: Iterator[Sequence[Any]]) -> dict[bytes, int]:
        """Add rows; return the keys that were not there before, with their jobs."""
        fresh: dict[bytes, int] = {}
        failed: dict[int, str] = {}
        before = following = len(self.outcomes)
        for row, values in enumerate(rows, start=start):
            try:
                questions = self._questions(row, values)
            except NotSupported:
                raise
            except Exception as error:  # noqa: BLE001 - a row that cannot be rendered is that row's error
                failed[following] = describe(error)
                self._note_failure(following, error)
                self.row_job.extend([following] * self._per_row)
                following += 1
                continue
            if not questions:
                if self._skipped is None:
                    self._skipped = following
                    following += 1
                self.row_job.extend([self._skipped] * self._per_row)
            for key, question in questions:
                job = self._seen.get(key)
                if job is None:
                    job = self._seen[key] = fresh[key] = following
                    following += 1
                    self.contents[job] = question
                    self.keys[job] = key
                self.row_job.append(job)
        self.outcomes.grow(following - before)
        for job, error_text in failed.items():
            self.outcomes.fail(job, error_text, source=oc.NONE)
        if self._skipped is not None:
            self.outcomes.finish[self._skipped] = oc.SKIPPED
        return fresh

    def _note_failure(self, job: int, error: Exception) -> None:
        if self.failure is None or job < self.failure[0]:
            self.failure = (job, error)

    def _questions(self, row: int, values: Sequence[Any]) -> list[tuple[bytes, Any]]:
        """Return the row's questions and their keys; none when the row is skipped."""
        content = _content(self._prompt, values, self._nulls)
        if content is None:
            return []
        if isinstance(self._prompt, Trimmed) and self._prompt.cut:
            self._cut.append(row)
        key = self._keys_of.key
        if self._seed is None:
            # Without a seed no two answers are the same question: the row becomes part of it.
            return [(key([row, asked], sample), asked) for asked, sample in self._expand(content)]
        if not self._draws:
            return [(key(asked, sample), asked) for asked, sample in self._expand(content)]
        questions = []
        for asked, sample in self._expand(content):
            first = key(asked, sample)
            times = self._times[first] = self._times.get(first, -1) + 1
            questions.append((key(asked, sample + times * self._per_row) if times else first, asked))
        return questions

    def look_up(self, journal: Journal, fresh: Mapping[bytes, int]) -> None:
        """Take over what the journal has."""
        for key, record in journal.get_many(list(fresh), self._work).items():
            job = fresh[key]
            parsed, error = self._work.accept(record)
            self.outcomes.set(job, record, oc.CACHE, parsed, None if error is None else describe(error))
            if error is not None:
                self._note_failure(job, error)
            else:
                # Not needed again; a million cached rows must not keep a million prompts.
                del self.contents[job], self.keys[job]


def _content(prompt: Prompt, values: Sequence[Any], nulls: Nulls) -> Any:
    if not prompt.takes_null:
        missing = [name for name, value in zip(prompt.columns, values, strict=True) if value is None]
        if missing:
            if nulls == "skip":
                return None
            if nulls == "error":
                raise NullField(f"column {', '.join(map(repr, missing))} is null in this row.")
            values = ["" if v is None else v for v in values]
    return prompt.render(values)
