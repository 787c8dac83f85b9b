"""What a row says to the model: templates, columns taken as they are, callables, Jinja.

A prompt knows which columns it needs before any row is read, so a misspelt field is an error before work
starts, and a row with a missing value never reaches the model as the text "nan" or "None".
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Protocol, TypeAlias

from nbinfer.contract.errors import RequestError
from nbinfer.contract.requests import ROLES

Content: TypeAlias = str | tuple[dict[str, Any], ...]
"""What a row asks: text for one user message, or a whole conversation."""

TEXT = "text"
"""The field under which the items of a list or Series go."""

# A template that is mostly text *after* the first field repeats that text for every row: the engine can
# only share what comes before the first difference.
_LINT_CHARS = 200
_SHOWN = 20


_CONVERSIONS: dict[str, Callable[[Any], str]] = {"s": str, "r": repr, "a": ascii}


class NullField(RequestError):  # noqa: N818 - what happened, as the error column names it
    """A column that the prompt needs is null in this row."""


class Prompt(Protocol):
    """Turns the values of one row into what is asked of the model."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read, in the order in which :meth:`render` takes them."""
        ...

    @property
    def takes_null(self) -> bool:
        """Whether missing values are passed on (as None) instead of following the ``nulls`` rule."""
        ...

    @property
    def source(self) -> str:
        """The prompt as text, for provenance."""
        ...

    def render(self, values: Sequence[Any]) -> Content | None:
        """Return what is asked for this row; None skips it."""
        ...


def as_content(value: Any) -> Content:
    """Take one cell as what is asked: text, a number or date as text, or a list of messages.

    Raises
    ------
    RequestError
        The value is neither, for instance bytes or a dict.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview | Mapping | set | frozenset):
        raise RequestError(f"a row holds {type(value).__name__}; a prompt is text or a list of messages.")
    if hasattr(value, "tolist") and getattr(value, "ndim", None):
        value = value.tolist()
    if isinstance(value, list | tuple):
        messages = []
        for message in value:
            if not isinstance(message, Mapping) or message.get("role") not in ROLES:
                raise RequestError(
                    'a row holds a list that is not a conversation; a message is {"role": …, "content": …} '
                    f"with a role of {', '.join(ROLES)}.",
                )
            # Arrow structs give every message every key; the absent ones come back as None.
            messages.append({key: part for key, part in message.items() if part is not None})
        if not messages:
            raise RequestError("a row holds an empty list of messages.")
        return tuple(messages)
    _refuse_unlike_text(value, "a row")
    return str(value)


def _refuse_unlike_text(value: Any, where: str) -> None:
    """Refuse what only has a text for programmers: ``<PIL.Image… at 0x…>`` says nothing to a model."""
    kind: Any = type(value)
    picture = hasattr(value, "_repr_png_") or getattr(value, "ndim", 0) > 1
    own_text = kind.__str__ is not object.__str__ or kind.__format__ is not object.__format__
    if picture or not (own_text or kind.__module__ == "builtins" or is_dataclass(value)):
        raise RequestError(
            f"{where} holds {kind.__name__}; a prompt takes text. For pictures: images='column'."
        )


def list_columns(columns: Sequence[str]) -> str:
    """Return the columns' names for a message, the first twenty of very many."""
    shown = ", ".join(repr(c) for c in columns[:_SHOWN])
    return shown + (f", … ({len(columns)} in all)" if len(columns) > _SHOWN else "") if columns else "none"


class UnknownColumn(RequestError):  # noqa: N818 - what happened
    """A column that is not there; ``name`` is what was asked for."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def unknown_column(name: str, columns: Sequence[str], *, asked_by: str) -> UnknownColumn:
    """Return the error for a column that is not there, with those that are."""
    import difflib

    alike = {column.casefold(): column for column in columns}
    near = difflib.get_close_matches(name.casefold(), alike, n=1)
    hint = f" Did you mean {alike[near[0]]!r}?" if near else ""
    return UnknownColumn(
        f"{asked_by} names {name!r}, which is no column.{hint}\nColumns: {list_columns(columns)}.", name
    )


class Template:
    r"""A ``str.format`` template whose fields are columns: ``"Summarise: {title}\n{body}"``.

    A field is the whole text between the braces, so ``{first name}`` and ``{a.b}`` name columns; nothing of
    a value is looked up or called. Conversions and formats work (``{price:.2f}``). ``{{`` is one brace.

    Raises
    ------
    RequestError
        No field at all, an unknown field, or braces that do not pair.
    """

    takes_null = False

    def __init__(self, text: str, columns: Sequence[str], *, only: bool = False, fixed: bool = False) -> None:
        self.source = text
        known = set(columns)
        names: list[str] = []
        self._pieces: list[tuple[str, int, str | None, str]] = []
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise RequestError(
                f"the template does not parse: {error}.\n"
                "A field is {column}; a literal brace is doubled: {{ or }}.",
            ) from None
        for literal, name, spec, conversion in parsed:
            if name is None:
                self._pieces.append((literal, -1, None, ""))
                continue
            # A list or Series has one column only: {} and {text} can mean nothing else.
            field = columns[0] if only and name in {"", TEXT} else name
            if field not in known:
                unknown = unknown_column(field, columns, asked_by="the template")
                if field.isidentifier():
                    raise unknown
                raise UnknownColumn(
                    f"{unknown}\nA brace that is meant literally is doubled: {{{{ or }}}}.", field
                )
            if "{" in (spec or ""):
                raise RequestError(
                    f"the template's field {field!r} has a field in its format; that is not supported."
                )
            if field not in names:
                names.append(field)
            self._pieces.append((literal, names.index(field), conversion, spec or ""))
        if not names and not fixed:
            raise RequestError(
                "the template has no field, so every row would ask the same.\n"
                f"Name a column in braces, or use on='column'. Columns: {list_columns(columns)}.",
            )
        self.columns = tuple(names)

    @property
    def advice(self) -> str | None:
        """One sentence when the template's order keeps rows from sharing their prefix; else None."""
        seen = after = before = 0
        for literal, column, _, _ in self._pieces:
            if seen:
                after += len(literal)
            else:
                before += len(literal)
            seen += column >= 0
        if after >= _LINT_CHARS and before < after:
            return (
                f"{after} characters of the template come after its first field and are computed again for "
                "every row; with the fixed text first and the fields last they are computed once."
            )
        return None

    def render(self, values: Sequence[Any]) -> str:
        """Fill the fields with this row's values."""
        out = []
        for literal, column, conversion, spec in self._pieces:
            out.append(literal)
            if column < 0:
                continue
            value = values[column]
            if conversion is None and not spec and isinstance(value, str):
                out.append(value)
                continue
            if isinstance(value, bytes | bytearray | memoryview):
                raise RequestError(f"column {self.columns[column]!r} holds bytes; a template takes text.")
            if not conversion:
                _refuse_unlike_text(value, f"column {self.columns[column]!r}")
            else:
                value = _CONVERSIONS[conversion](value)
            out.append(format(value, spec))
        return "".join(out)


class Column:
    """One column as it is: text, or a list of messages."""

    takes_null = False

    def __init__(self, name: str) -> None:
        self.columns = (name,)
        self.source = f"{{{name}}}"

    def render(self, values: Sequence[Any]) -> Content:
        """Return the cell as what is asked."""
        return as_content(values[0])


class Call:
    """A function of the row; it gets a dict of a frame's row, or the item itself, nulls as None."""

    takes_null = True

    def __init__(self, function: Callable[[Any], Any], columns: Sequence[str], *, only: bool = False) -> None:
        self._function = function
        self._only = only
        self.columns = tuple(columns)
        self.source = f"<function {getattr(function, '__qualname__', type(function).__name__)}>"

    def render(self, values: Sequence[Any]) -> Content | None:
        """Call the function; None skips the row."""
        argument = values[0] if self._only else dict(zip(self.columns, values, strict=True))
        value = self._function(argument)
        return None if value is None else as_content(value)


class Jinja:
    """A Jinja template over the row's columns, for loops and conditions: ``nb.jinja("…")``.

    It runs in Jinja's sandbox. A name that is no column is an error before work starts. Missing values are
    passed as None, for the template to test.
    """

    takes_null = True

    def __init__(self, text: str) -> None:
        from jinja2 import StrictUndefined, TemplateSyntaxError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source = text
        env = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            self._names = meta.find_undeclared_variables(env.parse(text))
        except TemplateSyntaxError as error:
            raise RequestError(
                f"the Jinja template does not parse: {error.message} (line {error.lineno})."
            ) from None
        self._template = env.from_string(text)
        self.columns: tuple[str, ...] = ()
        self._fields: tuple[str, ...] = ()

    def bind(self, columns: Sequence[str], *, only: bool = False) -> Jinja:
        """Return this template tied to the columns of a frame."""
        if not self._names:
            raise RequestError(
                "the Jinja template has no variable, so every row would ask the same.\n"
                f"Columns: {list_columns(columns)}.",
            )
        bound = Jinja(self.source)
        fields = sorted(self._names)
        resolved = [columns[0] if only and field == TEXT else field for field in fields]
        for field in resolved:
            if field not in columns:
                raise unknown_column(field, columns, asked_by="the Jinja template")
        bound.columns, bound._fields = tuple(resolved), tuple(fields)
        return bound

    def render(self, values: Sequence[Any]) -> str:
        """Run the template on this row's values."""
        return self._template.render(dict(zip(self._fields, values, strict=True)))


class WithImages:
    """A prompt beside each row's own images.

    Parameters
    ----------
    prompt
        What is asked about them; text, not a conversation.
    column
        Holds a path, bytes, a PIL image, or a list of them; null (where nulls are not skipped): no image.
    """

    def __init__(self, prompt: Prompt, column: str) -> None:
        self._prompt = prompt
        self.columns = (*prompt.columns, column)
        self.takes_null = prompt.takes_null
        self.source = prompt.source

    def render(self, values: Sequence[Any]) -> Content | None:
        """Return one user message: the images, then the text."""
        from nbinfer.session import with_images

        text, images = self._prompt.render(values[:-1]), values[-1]
        if text is None or images is None or images == "":
            return text
        if not isinstance(text, str):
            raise RequestError("this row's prompt is a conversation: put the images into its messages.")
        return ({"role": "user", "content": with_images(text, images)},)


class Trimmed:
    """A prompt whose longest value is cut until the whole fits.

    Only the row's own text is cut, never the template around it.

    Parameters
    ----------
    prompt
        A :class:`Template` or :class:`Column`.
    fits
        Whether what a prompt rendered fits the model.
    policy
        What stays: the "head", the "tail", or both ends ("middle" is cut out).

    Attributes
    ----------
    cut
        Whether the last row rendered was cut.
    """

    takes_null = False

    def __init__(self, prompt: Prompt, fits: Callable[[Any], bool], policy: str) -> None:
        if prompt.takes_null:
            raise RequestError(
                f"too_long={policy!r} cuts a column's text, and a function or Jinja template hides which.\n"
                "Use a template such as 'Summarise: {text}' or on='column'.",
            )
        self._prompt = prompt
        self._fits = fits
        self._policy = policy
        self.columns = prompt.columns
        self.source = prompt.source
        self.cut = False

    def render(self, values: Sequence[Any]) -> Content | None:
        """Return what is asked, cut to the longest that fits."""
        content = self._prompt.render(values)
        self.cut = False
        texts = [i for i, value in enumerate(values) if isinstance(value, str)]
        if content is None or not texts or self._fits(content):
            return content
        longest = max(texts, key=lambda i: len(values[i]))
        text: str = values[longest]

        def shortened(length: int) -> Content | None:
            kept = _keep(text, length, self._policy)
            return self._prompt.render([kept if i == longest else v for i, v in enumerate(values)])

        # The longest that fits, to the character: fewer characters never have more tokens by much.
        fits, too_many = 0, len(text)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self._fits(shortened(middle)):
                fits = middle
            else:
                too_many = middle
        # Where nothing of the text fits, the rest is too long by itself: that is the row's error.
        if fits == 0:
            return content
        self.cut = True
        return shortened(fits)


def _keep(text: str, length: int, policy: str) -> str:
    if policy == "head":
        return text[:length]
    if policy == "tail":
        return text[len(text) - length :]
    head = (length + 1) // 2
    return text[:head] + " … " + text[len(text) - (length - head) :]


def jinja(text: str) -> Jinja:
    """Make a Jinja prompt for :func:`nbinfer.complete` and its siblings.

    Raises
    ------
    RequestError
        The template does not parse.
    """
    return Jinja(text)


def make_prompt(
    prompt: Any,
    on: Any,
    columns: Sequence[str],
    *,
    only: bool,
    default: str | None = None,
    call: str = "complete",
    fixed: bool = False,
) -> Prompt:
    """Return the prompt that ``prompt`` and ``on`` ask for.

    Parameters
    ----------
    prompt
        A template, a callable, a :class:`Jinja`, or None.
    on
        The column to take as it is (or, with ``default``, to put into it); None when ``prompt`` says it all.
    columns
        The frame's columns; for a list or Series the one name it goes by.
    only
        Whether the data is a list or Series.
    default
        The operator's own template around one text, with the field ``{text}``.
    fixed
        Whether a template may be the same for every row, because something beside it differs.

    Raises
    ------
    RequestError
        Neither or both given, or a column is unknown.
    """
    if prompt is not None and on is not None:
        raise RequestError(f"{call}: give a prompt template or on='column', not both.")
    if isinstance(prompt, Jinja):
        return prompt.bind(columns, only=only)
    if isinstance(prompt, str):
        return Template(prompt, columns, only=only, fixed=fixed)
    if callable(prompt):
        return Call(prompt, columns, only=only)
    if prompt is not None:
        raise RequestError(
            f"{call}: prompt is {type(prompt).__name__}; it is a template, a callable, or nb.jinja(…)."
        )
    if on is None and not only:
        example = columns[0] if columns else "column"
        raise RequestError(
            f"{call}: which column? Give a template such as 'Summarise: {{{example}}}', or on={example!r}.\n"
            f"Columns: {list_columns(columns)}.",
        )
    name = columns[0] if only and on is None else on
    name = name if isinstance(name, str) else str(name)
    if name not in columns:
        raise unknown_column(name, columns, asked_by="on")
    if default is None:
        return Column(name)
    wrapped = Template(default, [name], only=True)
    wrapped.source = default
    return wrapped
