"""The operators: a model over the rows of a list, Series or DataFrame.

Every one of them gives back the rows that came in, in their order, with their index; a row that fails is a
row with its ``error`` filled; and a cell that was interrupted goes on where it was when it is run again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from nbinfer.contract.errors import RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.units import plain_number
from nbinfer.frames.output import SIDE, logprob_columns, sample_column, side_columns
from nbinfer.frames.plan import choice
from nbinfer.frames.prompts import Template, WithImages, unknown_column
from nbinfer.frames.rules import IN_BACKGROUND, Rules
from nbinfer.frames.tables import Table, read
from nbinfer.frames.work import CompletionWork, EmbeddingWork

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbinfer.frames.outcomes import Columns
    from nbinfer.frames.plan import CacheMode, Nulls, OnError, TooLong
    from nbinfer.frames.progress import Sink
    from nbinfer.frames.prompts import Prompt
    from nbinfer.frames.run import Run


def complete(
    data: Any,
    prompt: Any = None,
    *,
    on: Any = None,
    name: str = "completion",
    model: Any = None,
    client: Any = None,
    endpoints: Any = None,
    n: int = 1,
    schema: Any = None,
    choices: Any = None,
    images: Any = None,
    logprobs: int = 0,
    cache: CacheMode = True,
    on_error: OnError = "null",
    nulls: Nulls = "skip",
    too_long: TooLong = "error",
    keep: bool = True,
    progress: bool | Sink | None = None,
    max_tokens: int | None = 256,
    temperature: float = 0.0,
    seed: int | None = 0,
    **options: Any,
) -> Any:
    """Ask the model once per row.

    Parameters
    ----------
    data
        A list of prompts (or conversations), a Series, or a DataFrame of pandas, polars or pyarrow.
    prompt
        A template whose fields are columns, ``"Summarise: {title}"``; a function of the row; or
        :func:`nbinfer.jinja`. For a list or Series the field is ``{text}``. The fixed text goes first: what
        rows have in common at their start is computed once.
    on
        The column to send as it is, instead of ``prompt``.
    name
        The answers' column.
    model
        A loaded model or its name; None: the default, else the only one loaded.
    client
        A ``dask.distributed.Client``: the rows are computed by its workers, each of which loads ``model``.
    endpoints
        Servers of one model, OpenAI's API or nbinfer's: addresses, dicts (``base_url``, ``model``,
        ``api_key``, ``socket``, ``concurrency``, ``weights``), loaded models. The rows are spread over them,
        and ``model`` is the model's name there.
    n
        Answers per row, each with its own seed: the frame gets ``n`` rows per row and a column ``sample``.
    schema, choices
        A rule for the answers, as for ``infer``; an answer cut short by ``max_tokens`` is then an error.
    images
        The column of each row's images (a path, bytes, a PIL image, or a list of them); the prompt may then
        be the same for every row. Or a list of images that all rows share.
    logprobs
        k > 0 adds ``mean_logprob`` and ``logprobs`` with the k most likely tokens at each place.
    cache
        True: use the results journal and add to it; "refresh": compute again and replace; False: leave it
        alone.
    on_error
        "null": a failed row is a row with ``error`` filled; "raise": the first failure ends the call;
        "stop": the first failure ends it quietly.
    nulls
        A row with a missing value: "skip" it (null, ``finish_reason`` "skipped"), send "empty" text, or
        make it an "error".
    too_long
        A row that does not fit the model: "error", or cut the longest of its values in the prompt and keep
        the "head", the "tail" or both ends ("middle" is cut out), with room for the answer; the column
        ``truncated`` then says which rows were cut.
    keep
        Whether a frame's own columns stay. Columns that an earlier call left under the same name are
        replaced, so that ``df = nb.complete(df, …)`` can run again. Frames of pandas and pyarrow carry that
        along; of polars, only the very frame that came back is known.
    progress
        None chooses by where it runs; True or False; or an object with ``update`` and ``close``.
    max_tokens, temperature, seed
        As for ``infer``. Equal rows share one answer at temperature 0; above it each has its own, and is
        given it again. ``seed=None`` with a temperature above 0 repeats nothing and keeps nothing.
    **options
        Further options of ``infer``: ``system``, ``top_p``, ``stop``, ``regex``, ``raw``…

    Returns
    -------
    DataFrame
        In the family that came in (pandas for a list): the answers, ``error``, ``finish_reason``,
        ``prompt_tokens``, ``cached_tokens``, ``completion_tokens``, ``seconds`` and ``source``
        (run, cache, duplicate).

    Raises
    ------
    RequestError
        The call itself is wrong: an unknown column, a name that is taken, a wrong option.
    KeyboardInterrupt
        As it came: finished rows are kept, and in ``last_run().frame()``.
    """
    rules = Rules(model, client, endpoints, cache, on_error, nulls, too_long, keep, progress)
    table = read(data)
    n, seed, logprobs = (plain_number(number) for number in (n, seed, logprobs))
    if isinstance(n, bool) or n < 1:
        raise RequestError(f"n={n!r}: it is the number of answers per row, at least 1.")
    if n > 1 and temperature == 0:
        raise RequestError(
            f"n={n} with temperature=0 would give {n} times the same answer; set temperature=0.7 or so."
        )
    side = (*(("sample",) if n > 1 else ()), *SIDE, *(("mean_logprob", "logprobs") if logprobs else ()))
    output = rules.output(table, [name], side, name=name, per_row=n)
    own = isinstance(images, str)
    asked = table.prompt(prompt, on, call="complete", fixed=own)
    if own:
        asked = _with_images(asked, images, table, too_long, options)
    advice = asked.advice if isinstance(asked, Template) and table.rows >= _ADVISE_ROWS else None
    params = plain_options(
        {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "schema": schema,
            "choices": choices,
            "images": None if own else images,
            "logprobs": logprobs or None,
            **options,
        },
    )
    check_options(complete, options)
    loaded = rules.model_for(Mode.COMPLETION)
    work = completion_work("complete", params, seed=seed)

    def build(run: Run, columns: Columns) -> Any:
        import pyarrow as pa

        beside = sample_column(columns, n) | side_columns(columns)
        if logprobs:
            beside |= logprob_columns(columns)
        return output.frame(run, columns, {name: columns.values(pa.large_string())}, beside)

    run = rules.batch(
        table,
        asked,
        work,
        loaded,
        build,
        params={**params, "n": n, "name": name, "images": images},
        expand=lambda content: [(content, sample) for sample in range(n)],
        per_row=n,
        seed=0 if work.greedy else seed,
        draws=not work.greedy,
        advice=advice,
    )
    return rules.result(run)


def _with_images(
    prompt: Prompt, column: str, table: Table, too_long: str, options: Mapping[str, Any]
) -> WithImages:
    if column not in table.names:
        raise unknown_column(column, table.names, asked_by="images")
    if too_long != "error" or options.get("raw"):
        option = "raw=True" if options.get("raw") else f"too_long={too_long!r}"
        raise RequestError(f"{option} does not go with a column of images.")
    return WithImages(prompt, column)


# Fewer rows are over before the advice is read.
_ADVISE_ROWS = 32


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with numbers of NumPy as Python's own, and ``choices`` of any container as a list."""
    out = {name: plain_number(value) for name, value in options.items()}
    choices = out.get("choices")
    if isinstance(choices, Iterable) and not isinstance(choices, str | bytes):
        out["choices"] = list(choices)
    return out


def check_options(operator: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that neither the operator nor ``infer`` has.

    Raises
    ------
    RequestError
        There is one; the message names what may have been meant, of both.
    """
    import difflib
    import inspect

    from nbinfer.session.asking import OPTIONS

    unknown = next((name for name in options if name not in OPTIONS), None)
    if unknown is None:
        return
    call = operator.__name__
    arguments = inspect.signature(operator).parameters.values()
    own = [each.name for each in arguments if each.kind is each.KEYWORD_ONLY]
    near = difflib.get_close_matches(unknown, [*own, *OPTIONS], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    if unknown == "inplace":
        hint = f" Nothing is changed in place: frame = nb.{call}(frame, …)."
    others = ", ".join(sorted({*OPTIONS} - {*own}))
    raise RequestError(
        f"{call}: unknown option {unknown!r}.{hint}\nIts own: {', '.join(own)}.\nOf the model: {others}."
    )


def completion_work(
    op: str,
    params: Mapping[str, Any],
    *,
    seed: int | None,
    parse: Callable[[str], Any] | None = None,
) -> CompletionWork:
    """Check the options once, by making the request that every row's request is a copy of.

    Raises
    ------
    RequestError
        An option is unknown, out of range or contradicts another.
    """
    from nbinfer.session import prepare

    prepared = prepare("", seed=seed, **params)
    if parse is None and prepared.schema is not None:
        parse = prepared.schema.parse
    return CompletionWork(op, prepared.request, parse)


# What well-known embedding models want before a query and a document, by a part of their name.
_PREFIXES: tuple[tuple[str, str, str], ...] = (
    ("nomic-embed", "search_query: ", "search_document: "),
    ("e5-", "query: ", "passage: "),
    ("bge-", "Represent this sentence for searching relevant passages: ", ""),
    ("mxbai-embed", "Represent this sentence for searching relevant passages: ", ""),
    ("snowflake-arctic-embed", "Represent this sentence for searching relevant passages: ", ""),
)


def kind_prefix(model_name: str, kind: Literal["query", "document"] | None) -> str:
    """Return what to put before a text of this kind for this model; empty for models that want nothing."""
    if kind is None:
        return ""
    lower = model_name.lower()
    for part, query, document in _PREFIXES:
        # bge-m3 is trained without an instruction.
        if part in lower and "bge-m3" not in lower:
            return query if kind == "query" else document
    return ""


def _text(content: Any) -> list[tuple[Any, int]]:
    if not isinstance(content, str):
        raise RequestError("a row holds a conversation; an embedding is of text.")
    return [(content, 0)]


def embed(
    data: Any,
    prompt: Any = None,
    *,
    on: Any = None,
    name: str = "embedding",
    model: Any = None,
    client: Any = None,
    endpoints: Any = None,
    kind: Literal["query", "document"] | None = None,
    normalize: bool = True,
    dims: int | None = None,
    cache: CacheMode = True,
    on_error: OnError = "null",
    nulls: Nulls = "skip",
    too_long: TooLong = "error",
    keep: bool = True,
    progress: bool | Sink | None = None,
) -> Any:
    """Compute one vector per row.

    Parameters
    ----------
    data, prompt, on, name, model, client, endpoints, cache, on_error, nulls, too_long, keep, progress
        As for :func:`complete`.
    kind
        "query" or "document" adds the prefix that some models were trained with; the provenance records it.
    normalize
        Whether vectors have length 1, so that their dot product is the cosine.
    dims
        Keep the first so many components (models trained for it), then normalise again.

    Returns
    -------
    DataFrame
        ``embedding`` (a fixed-size list of float32; null for failed and skipped rows), ``n_tokens``,
        ``error``. :func:`vectors` gives the matrix. Saved with ``to_parquet``, such columns are read with
        ``pd.read_parquet(path, dtype_backend="pyarrow")``: pandas does not read them by default.

    Raises
    ------
    RequestError
        The call itself is wrong: an unknown column, a name that is taken, a wrong option.
    """
    rules = Rules(model, client, endpoints, cache, on_error, nulls, too_long, keep, progress)
    table = read(data)
    choice("kind", kind, (None, "query", "document"))
    dims = plain_number(dims)
    output = rules.output(table, [name], ("n_tokens", "error"), name=name)
    asked = table.prompt(prompt, on, call="embed")
    loaded = rules.model_for(Mode.EMBEDDING)
    size = loaded.info.dimensions
    if dims is not None and (dims < 1 or (size is not None and dims > size)):
        raise RequestError(f"dims={dims!r}: {loaded.name} has vectors of {size} components.")
    work = EmbeddingWork(normalize, dims, kind_prefix(loaded.info.model, kind))

    def build(run: Run, columns: Columns) -> Any:
        beside = {"n_tokens": columns.prompt_tokens(), "error": columns.error()}
        return output.frame(run, columns, {name: columns.vectors(dims or size)}, beside)

    params = {"normalize": normalize, "dims": dims, "kind": kind, "prefix": work.prefix, "name": name}
    return rules.result(rules.batch(table, asked, work, loaded, build, params=params, expand=_text))


def submit(data: Any, prompt: Any = None, *, operation: str = "complete", **options: Any) -> Run:
    """Start a batch in the background and return at once.

    Parameters
    ----------
    data, prompt, **options
        As for the operator.
    operation
        Its name: ``complete``, ``embed``, ``extract`` (with ``schema=``) or ``classify`` (with ``labels=``).

    Returns
    -------
    Run
        ``.frame()`` at any time, ``.wait()``, ``.cancel()``, ``.retry_failed()``; iterating gives frames of
        rows as they finish.
    """
    from nbinfer.frames.judge import classify
    from nbinfer.frames.typed import extract

    operators: dict[str, Callable[..., Run]] = {
        "complete": complete,
        "embed": embed,
        "extract": extract,
        "classify": classify,
    }
    choice("operation", operation, tuple(operators))
    return operators[operation](data, prompt=prompt, **{**options, "progress": IN_BACKGROUND})
