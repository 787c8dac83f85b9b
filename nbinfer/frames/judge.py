"""``classify`` and ``filter``: the model's own probabilities of a few answers, without generating any.

Every answer is scored behind the prompt, which is computed once, so a label costs a few tokens and comes with
a probability. Nothing falls back to a default: a row that fails has no label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nbinfer.contract.errors import EngineError, NotSupported, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import ScoreRequest
from nbinfer.frames.operators import completion_work
from nbinfer.frames.outcomes import Record
from nbinfer.frames.plan import choice, once
from nbinfer.frames.rules import Rules
from nbinfer.frames.tables import read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nbinfer.contract.results import ScoreResult
    from nbinfer.engines.protocol import Engine, EngineInfo
    from nbinfer.frames.outcomes import Columns
    from nbinfer.frames.output import Output
    from nbinfer.frames.plan import CacheMode, Nulls, OnError, TooLong
    from nbinfer.frames.progress import Sink
    from nbinfer.frames.prompts import Prompt
    from nbinfer.frames.run import Run
    from nbinfer.frames.tables import Table
    from nbinfer.frames.work import CompletionWork, FrameModel

Method = Literal["logits", "generate"]

_OPTIONS = ("raw", "system", "think")
"""What of a completion's options changes how answers are scored."""

# A chat model says "Yes" or "yes": both count.
YES, NO = ("Yes", "yes"), ("No", "no")


@dataclass(frozen=True)
class ScoreWork:
    """The log-probability of each answer for each row, shape (answers,).

    ``base`` holds the system prompt and whether the text is sent raw.
    """

    op: str
    base: CompletionWork
    answers: tuple[str, ...]

    mode = Mode.COMPLETION
    batch = 1

    def constants(self, model: FrameModel) -> dict[str, Any]:
        """Return what all rows share and results depend on, as JSON."""
        shared = self.base.constants(model)
        keep = ("backend", "weights", "adapters", "projector", "kv_type", "exact", "system", "raw", "think")
        return {"op": "score", "answers": list(self.answers), **{name: shared[name] for name in keep}}

    def window(self, info: EngineInfo) -> int:
        """Return how many requests to keep with the engine at once."""
        return self.base.window(info)

    def order(self, content: Any) -> Any:
        """Return the sort key that brings contents with a common beginning together."""
        return self.base.order(content)

    def fits(self, engine: Engine, content: Any) -> bool:
        """Whether a content fits the model, with room for an answer."""
        return self.base.fits(engine, content)

    def request(self, contents: Sequence[Any], seeds: Sequence[int | None]) -> ScoreRequest:
        """Return the request for these contents."""
        question = self.base.request(contents, seeds)
        return ScoreRequest(
            answers=self.answers,
            messages=question.messages,
            prompt=question.prompt,
            think=question.think,
            priority="batch",
        )

    def records(self, result: ScoreResult, contents: Sequence[Any]) -> list[Record]:
        """Return one record per content."""
        del contents
        if result.logprobs.shape != (len(self.answers),):
            raise EngineError(f"the engine scored {result.logprobs.size} of {len(self.answers)} answers.")
        return [
            Record(
                np.asarray(result.logprobs, np.float64),
                prompt_tokens=result.prompt_tokens,
                cached_tokens=result.cached_tokens,
            ),
        ]

    def accept(self, record: Record) -> tuple[Any, Exception | None]:
        """Return the answers' shares, and why there are none (or None)."""
        if np.isnan(record.value).any() or not np.isfinite(record.value).any():
            return None, EngineError("the model gives none of the answers a probability.")
        weights = np.exp(record.value - record.value.max())
        return weights / weights.sum(), None

    def lasting(self, record: Record) -> bool:
        """Whether the same question will always have this answer; it will."""
        del record
        return True

    def encode(self, value: Any) -> bytes:
        """Return a value as the bytes that the journal keeps."""
        return np.asarray(value, "<f8").tobytes()

    def decode(self, data: bytes) -> Any:
        """Return the value behind such bytes."""
        return np.frombuffer(data, "<f8")


def _label_texts(labels: Any, *, least: int) -> dict[str, str]:
    """Return the labels with their descriptions (empty where there is none), in their order.

    Raises
    ------
    RequestError
        Fewer than ``least``, repeated, or not text.
    """
    found: dict[Any, str]
    if isinstance(labels, type) and issubclass(labels, Enum):
        found = {str(member.value): "" for member in labels}
        count = len(list(labels))
    elif isinstance(labels, Mapping):
        found = {label: str(text or "") for label, text in labels.items()}
        count = len(found)
    elif isinstance(labels, Iterable) and not isinstance(labels, str | bytes):
        every = list(labels)
        found = dict.fromkeys(every, "")
        count = len(every)
    else:
        raise RequestError(
            f"labels is {type(labels).__name__}: it is a list of texts, a dict of label to description, "
            "or an Enum.",
        )
    unfit = [label for label in found if not isinstance(label, str) or not label]
    if unfit:
        raise RequestError(f"labels holds {unfit[0]!r}, which is not a text of at least one character.")
    if count < least or len(found) != count:
        raise RequestError(f"labels needs at least {least} different texts.")
    return found


def _lines(labels: Mapping[str, str]) -> str:
    lines = (f"- {label}: {text}" if text else f"- {label}" for label, text in labels.items())
    return "\n".join(lines).replace("{", "{{").replace("}", "}}")


def classify(
    data: Any,
    labels: Any,
    prompt: Any = None,
    *,
    on: Any = None,
    multi: bool = False,
    probs: bool = False,
    threshold: float = 0.5,
    method: Method | None = None,
    name: str = "label",
    model: Any = None,
    client: Any = None,
    endpoints: Any = None,
    cache: CacheMode = True,
    on_error: OnError = "null",
    nulls: Nulls = "skip",
    too_long: TooLong = "error",
    keep: bool = True,
    progress: bool | Sink | None = None,
    **options: Any,
) -> Any:
    """Give each row one of the labels, or with ``multi`` any number of them, with probabilities.

    Parameters
    ----------
    labels
        Texts (a list, an array, ``series.unique()``), a dict of label to description, or an Enum (its
        values).
    prompt
        As for :func:`complete`. Without one, and with ``on`` or a list or Series, the prompt names the labels
        and their descriptions.
    multi
        Ask for each label by itself whether it applies.
    probs
        Add ``p_<label>``, float32: the label's share among the labels, or with ``multi`` the probability
        that it applies.
    threshold
        With ``multi``: the least probability of a label that applies.
    method
        "logits" scores the labels without generating; "generate" lets the model write one, without
        probabilities; None: the first, where the engine can.
    name
        The labels' column.
    data, on, model, client, endpoints, cache, on_error, nulls, too_long, keep, progress, **options
        As for :func:`complete`; options are ``system``, ``raw``, ``think``.

    Returns
    -------
    DataFrame
        ``label`` (a category of the labels; with ``multi`` a list of text), ``confidence`` float32 (the share
        of the label; with ``multi`` the probability of the least certain decision), ``p_<label>``, ``error``.

    Raises
    ------
    RequestError
        The call itself is wrong.
    """
    choice("method", method, (None, "logits", "generate"))
    rules = Rules(model, client, endpoints, cache, on_error, nulls, too_long, keep, progress)
    _refuse_idle("classify", options)
    table = read(data)
    _check_share("threshold", threshold)
    texts = _label_texts(labels, least=1 if multi else 2)
    if method == "generate" and (multi or probs):
        raise RequestError(
            "method='generate' gives one label and no probabilities; leave out multi and probs."
        )
    values = [name, *([f"p_{label}" for label in texts] if probs else ())]
    output = rules.output(table, values, ("confidence", "error"), name=name)
    default = _classify_prompt(texts, multi=multi)
    asked = table.prompt(prompt, on, default=default, call="classify")
    call = _Call(rules, table, asked, output, texts, name, options, probs=probs)
    loaded = rules.model_for(Mode.COMPLETION)
    if multi:
        return rules.result(_each_by_itself(call, loaded, threshold))
    if method != "generate":
        try:
            return rules.result(_scored(call, loaded))
        except NotSupported:
            if method is not None or probs:
                raise
    return rules.result(_written(call, loaded))


@dataclass(frozen=True)
class _Call:
    """One call of :func:`classify`, found to be right; ``texts`` are the labels with their descriptions."""

    rules: Rules
    table: Table
    prompt: Prompt
    output: Output
    texts: Mapping[str, str]
    name: str
    options: Mapping[str, Any]
    probs: bool

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.texts)

    def params(self, **own: Any) -> dict[str, Any]:
        """Return what the provenance says of the call."""
        return {"labels": list(self.texts), "name": self.name, **self.options, **own}

    def shares(self, columns: Sequence[Any]) -> dict[str, Any]:
        """Return the columns ``p_<label>``, where they are wanted, from one array per label."""
        if not self.probs:
            return {}
        return {f"p_{label}": column for label, column in zip(self.labels, columns, strict=True)}


def _scored(call: _Call, model: FrameModel) -> Run:
    """Compare the labels' probabilities; the largest is the row's."""
    work = ScoreWork("classify", completion_work("classify", call.options, seed=0), call.labels)

    def build(run: Run, columns: Columns) -> Any:
        shares = _stacked(columns, len(call.labels))
        best = [None if np.isnan(row).any() else call.labels[int(row.argmax())] for row in shares]
        values = {call.name: columns.categories(best, call.labels)}
        values |= call.shares([columns.numbers(column) for column in shares.T])
        beside = {"confidence": columns.numbers(shares.max(axis=1)), "error": columns.error()}
        return call.output.frame(run, columns, values, beside)

    params = call.params(multi=False, method="logits")
    return call.rules.batch(call.table, call.prompt, work, model, build, params=params)


def _written(call: _Call, model: FrameModel) -> Run:
    """Let the model write one of the labels; nothing is known of how sure it is."""
    work = completion_work("classify", {**call.options, "choices": call.labels, "max_tokens": None}, seed=0)

    def build(run: Run, columns: Columns) -> Any:
        errors = columns.outcomes.errors
        written = [None if job in errors else text for job, text in enumerate(columns.outcomes.value)]
        unknown = columns.numbers(np.full(len(written), np.nan))
        beside = {"confidence": unknown, "error": columns.error()}
        values = {call.name: columns.categories(written, call.labels)}
        return call.output.frame(run, columns, values, beside)

    params = call.params(multi=False, method="generate")
    return call.rules.batch(call.table, call.prompt, work, model, build, params=params)


def _each_by_itself(call: _Call, model: FrameModel, threshold: float) -> Run:
    """Ask for each label whether it applies."""
    import pyarrow as pa

    labels = call.labels
    work = ScoreWork("classify", completion_work("classify", call.options, seed=0), (*YES, *NO))
    questions = [
        f"\n\nDoes the label “{label}”{f' ({text})' if text else ''} apply to it? Answer Yes or No."
        for label, text in call.texts.items()
    ]

    def expand(content: Any) -> list[tuple[Any, int]]:
        # The row first and the label last: a row's questions share everything but their end.
        return [(_with_ending(content, question), 0) for question in questions]

    def build(run: Run, columns: Columns) -> Any:
        yes = columns.numbers(_share_of_yes(columns)).to_numpy(zero_copy_only=False)
        table_of = yes.reshape(-1, len(labels))
        whole = ~np.isnan(table_of).any(axis=1)
        chosen = [
            [label for label, p in zip(labels, row, strict=True) if p >= threshold] if ok else None
            for row, ok in zip(table_of, whole, strict=True)
        ]
        values = {call.name: pa.array(chosen, pa.list_(pa.string()))}
        values |= call.shares([_float32(column) for column in table_of.T])
        certain = np.where(whole, np.maximum(table_of, 1 - table_of).min(axis=1), np.nan)
        errors = columns.error().to_pylist()
        first = [
            next((e for e in errors[i : i + len(labels)] if e is not None), None)
            for i in range(0, len(errors), len(labels))
        ]
        beside = {"confidence": _float32(certain), "error": pa.array(first, pa.large_string())}
        return call.output.frame(run, columns.by_row(len(labels)), values, beside)

    return call.rules.batch(
        call.table,
        call.prompt,
        work,
        model,
        build,
        params=call.params(multi=True, threshold=threshold),
        expand=expand,
        per_row=len(labels),
    )


def _classify_prompt(labels: Mapping[str, str], *, multi: bool) -> str:
    if multi:
        return "Text: {text}"
    return (
        "Classify the text. Answer with one of these labels and nothing else:\n"
        f"{_lines(labels)}\n\nText: {{text}}"
    )


def _with_ending(content: Any, ending: str) -> Any:
    """Put a question behind what a row says."""
    if isinstance(content, str):
        return content + ending
    last = content[-1]
    if last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise RequestError("the conversation of this row does not end with a user's text.")
    return (*content[:-1], {**last, "content": last["content"] + ending})


def _refuse_idle(call: str, options: Mapping[str, Any]) -> None:
    """Refuse options that change nothing where answers are scored.

    Raises
    ------
    RequestError
        There is one.
    """
    idle = [name for name in options if name not in _OPTIONS]
    if idle:
        raise RequestError(
            f"{call}: {', '.join(idle)} is unknown, or has no effect where answers are compared.\n"
            f"Options: {', '.join(_OPTIONS)}.",
        )


def _check_share(name: str, value: float) -> None:
    """Refuse a number that is no probability.

    Raises
    ------
    RequestError
        It is not between 0 and 1.
    """
    if not 0 <= value <= 1:
        raise RequestError(f"{name}={value!r}: it is a probability, 0 to 1.")


def _stacked(columns: Columns, width: int) -> NDArray[np.float64]:
    """Return the jobs' shares, shape (jobs, width); NaN for jobs without any."""
    out = np.full((len(columns.outcomes), width), np.nan)
    for job, shares in columns.outcomes.parsed.items():
        out[job] = shares
    return out


def _share_of_yes(columns: Columns) -> NDArray[np.float64]:
    """Return the probability of yes against no, shape (jobs,); NaN for jobs without one."""
    shares = _stacked(columns, len(YES) + len(NO))
    out: NDArray[np.float64] = shares[:, : len(YES)].sum(axis=1)
    return out


def _float32(values: NDArray[np.float64]) -> Any:
    import pyarrow as pa

    narrow = values.astype(np.float32)
    return pa.array(narrow, mask=np.isnan(narrow))


def filter(  # noqa: A001 - the operator's common name; the built-in is not used here
    data: Any,
    prompt: Any = None,
    *,
    on: Any = None,
    threshold: float = 0.5,
    keep_null: bool = False,
    mask: bool = False,
    name: str = "p",
    model: Any = None,
    client: Any = None,
    endpoints: Any = None,
    cache: CacheMode = True,
    on_error: OnError = "null",
    nulls: Nulls = "skip",
    too_long: TooLong = "error",
    progress: bool | Sink | None = None,
    **options: Any,
) -> Any:
    """Keep the rows for which the model answers a question with yes.

    Parameters
    ----------
    prompt
        The question about the row, ``"Is this about delivery? {text}"``: a template, a function of the row or
        :func:`nbinfer.jinja`.
    threshold
        The least probability of yes, among yes and no.
    keep_null
        Keep rows without an answer (a missing value, or an error) as well. They are never taken for a yes
        or a no.
    mask
        Return the decisions instead: one boolean per row, null without an answer.
    name
        The column of the probability, float32, that a frame gets.
    data, on, model, client, endpoints, cache, on_error, nulls, too_long, progress, **options
        As for :func:`complete`; options are ``system``, ``raw``, ``think``.

    Returns
    -------
    DataFrame, Series or list
        The rows that stay, in the family that came in; with ``mask`` a boolean Series (pandas for a list).

    Raises
    ------
    RequestError
        The call itself is wrong.
    """
    rules = Rules(model, client, endpoints, cache, on_error, nulls, too_long, keep=True, progress=progress)
    _refuse_idle("filter", options)
    table = read(data)
    _check_share("threshold", threshold)
    output = rules.output(table, [name], ("error",), name=name, can_drop=False)
    asked = table.prompt(prompt, on, call="filter")
    loaded = rules.model_for(Mode.COMPLETION)
    work = ScoreWork("filter", completion_work("filter", options, seed=0), (*YES, *NO))

    def build(run: Run, columns: Columns) -> Any:
        values = {name: columns.numbers(_share_of_yes(columns))}
        return output.frame(run, columns, values, {"error": columns.error()})

    run = rules.batch(
        table,
        asked,
        work,
        loaded,
        build,
        params={**options, "threshold": threshold},
        expand=lambda content: once(_with_ending(content, "\n\nAnswer Yes or No.")),
    )
    rules.result(run)
    columns = run.columns()
    yes = columns.numbers(_share_of_yes(columns))
    shares = yes.to_numpy(zero_copy_only=False)
    missing = np.isnan(shares)
    with np.errstate(invalid="ignore"):
        stays = shares >= threshold
    if mask:
        return table.series(stays, missing, name=name)
    rows = np.flatnonzero(stays | (missing & keep_null))
    if table.only:
        return table.take(rows)
    info = {**run.info, "columns": [name]}
    return table.with_columns({name: yes.take(rows)}, rows=rows, info=info, replace=[name])
