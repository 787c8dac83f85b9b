r"""``{{ expression }}`` in a prompt: values of the notebook, as text that a model can read.

Prompts hold JSON, code and LaTeX, so single braces, ``$``, ``{%`` and ``{#`` are text. Only ``{{ … }}`` is
read, in one pass: what a value holds is never read again. ``\mathbf{{x}}`` and ``e^{{x}}`` may be LaTeX or a
value, and are an error, because neither reading may change a prompt silently.

An expression is Jinja's (``df.head(3)``, ``names | join(", ")``), run in a sandbox: a prompt may be pasted
from anywhere, so it gets the notebook's variables and what they can do, but no eval, open or import, no
module and no shell.
"""

from __future__ import annotations

import builtins
import difflib
import inspect
import json
import math
import re
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from nbinfer.contract.rendering import printable
from nbinfer.contract.results import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jinja2.environment import TemplateExpression

    from nbinfer.magics.sandbox import Sandbox

TABLE_ROWS = 20
"""Rows of a table that are written out; the rest is counted."""

_LONGEST = 80  # characters of an expression in a message
_ENDS = 8  # how many }} an expression may hold before its own
_LATEX = re.compile(r"(\\[A-Za-z]{2,})\*?(?:\[[^]]*\]|\{[^{}]*\})*\Z|([\^_])\Z")
_LATEX_BEFORE = 200  # characters in which a command with its first arguments is looked for
_HINT = "Text that holds {{ as it is goes with --raw."

_COMPUTE = "Compute it in a cell of its own, and name the variable here."

# What IPython itself puts into a notebook, less what was typed and what came out (In, Out, _, _i, …).
_SHELL = ("get_ipython", "open", "exit", "quit", "_dh")

# What a prompt needs of Python itself.
FUNCTIONS = (
    *("abs", "all", "any", "bool", "chr", "dict", "divmod", "enumerate", "float", "format", "int", "len"),
    *("list", "max", "min", "ord", "repr", "reversed", "round", "set", "sorted", "str", "sum", "tuple"),
    *("type", "zip"),
)


def expand(text: str, names: Mapping[str, Any], *, quote: Callable[[str], str] | None = None) -> str:
    """Return ``text`` with each ``{{ expression }}`` replaced.

    Parameters
    ----------
    names
        The notebook's variables.
    quote
        Applied to each value after it is turned into text.

    Raises
    ------
    UsageError
        An expression is malformed, fails, may be LaTeX, or names what there is not; the message says which
        and what is near.
    """
    if "{{" not in text:
        return text
    pieces, at = [], 0
    while (start := text.find("{{", at)) >= 0:
        expression, end = _read(text, start)
        _check_latex(text, start, end)
        value = as_text(_evaluate(expression, names))
        pieces += [text[at:start], quote(value) if quote else value]
        at = end
    return "".join([*pieces, text[at:]])


def names_of(namespace: Mapping[str, Any], hidden: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names that an expression may use: the notebook's, and ``last_error``.

    Parameters
    ----------
    namespace
        What the shell runs cells in.
    hidden
        What was in there before the first cell. A variable of the person's may have such a name.
    """
    last = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    names = {} if last is None else {"last_error": last}
    for name, value in namespace.items():
        of_the_shell = name in _SHELL and hidden.get(name) is value
        of_python = len(name) > len("____") and name.startswith("__") and name.endswith("__")
        if not of_the_shell and not of_python:
            names[name] = value
    return names


@lru_cache(maxsize=1)
def _environment() -> Sandbox:
    from jinja2 import StrictUndefined

    from nbinfer.magics.sandbox import Sandbox

    environment = Sandbox(undefined=StrictUndefined)
    capped = {"range": environment.globals["range"]}  # the sandbox's own, with an end
    environment.globals = capped | {name: getattr(builtins, name) for name in FUNCTIONS}
    environment.filters["read"] = _read_file
    return environment


def filters() -> list[str]:
    """Return the names that may follow ``|``."""
    return sorted(_environment().filters)


def _read(text: str, start: int) -> tuple[str, int]:
    """Return the expression that opens at ``start``, and where the text goes on.

    An expression may hold }} itself, in a dict or a string: the first end that makes it whole counts.
    """
    from jinja2 import TemplateSyntaxError

    problem, end = "", start + 2
    for _ in range(_ENDS):
        end = text.find("}}", end)
        if end < 0:
            break
        expression = text[start + 2 : end].strip()
        end += 1  # "}}}" holds two
        if not expression:
            problem = problem or "there is nothing in it"
            continue
        try:
            _compile(expression)
        except TemplateSyntaxError as error:
            problem = problem or str(error.message)
        else:
            return expression, end + 1
    shown = _short(text[start:].split("}}", 1)[0]) + (" }}" if problem else "")
    problem = problem.rstrip(".") or "it is never closed"
    raise UsageError(f"{shown} on line {_line(text, start)} of the prompt: {problem}.\n{_HINT}")


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _check_latex(text: str, start: int, end: int) -> None:
    """Refuse what is LaTeX as likely as an expression: nothing may be changed that was meant as it is."""
    match = _LATEX.search(text[max(0, start - _LATEX_BEFORE) : start])
    if match is None:
        return
    if match[2] and text[start + 2].isspace():
        return  # file_{{ number }}: nobody writes LaTeX with spaces in there
    raise UsageError(
        f"{_short(text[start:end])} on line {_line(text, start)} of the prompt, right after {match[0]}: "
        f"LaTeX or a value?\nLaTeX goes with --raw; a value goes after a space."
    )


@lru_cache(maxsize=256)
def _compile(expression: str) -> TemplateExpression:
    return _environment().compile_expression(expression, undefined_to_none=False)


def _short(expression: str) -> str:
    expression = " ".join(expression.split())
    return expression if len(expression) <= _LONGEST else expression[:_LONGEST] + "…"


def _evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    from jinja2 import StrictUndefined, UndefinedError, meta
    from jinja2.exceptions import SecurityError, TemplateRuntimeError

    environment = _environment()
    used = meta.find_undeclared_variables(environment.parse("{{" + expression + "}}"))
    shown = "{{ " + _short(expression) + " }}"
    known = {*names, *environment.globals}
    for name in sorted(used):
        if name not in known:
            public = [n for n in known if not n.startswith("_")]
            near = difflib.get_close_matches(name, public, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"{shown}: there is no variable {name!r}.{hint}\n{_HINT}")
    try:
        value = _compile(expression)({name: names[name] for name in used if name in names})
        if isinstance(value, StrictUndefined):
            value._fail_with_undefined_error()  # noqa: SLF001 - the one way to Jinja's own message
    except UsageError:
        raise
    except SecurityError as error:
        raise UsageError(f"{shown}: {str(error).rstrip('.')}.\n{_COMPUTE}") from None
    except (UndefinedError, TemplateRuntimeError) as error:
        raise UsageError(f"{shown}: {str(error).rstrip('.')}.\n{_HINT}") from None
    except Exception as error:
        raise UsageError(f"{shown} failed: {type(error).__name__}: {printable(str(error))}") from error
    return value


def _read_file(path: object) -> str:
    """Filter: the text of a file."""
    if not isinstance(path, str | Path):
        raise UsageError(f"| read takes a path; not {type(path).__name__}.")
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"| read: {path}: {reason}.") from None


# -- values as text -----------------------------------------------------------------------------------------


def as_text(value: Any) -> str:
    """Return a value as a model can read it: tables as Markdown, structures as JSON, errors with traces."""
    if isinstance(value, str):
        return value
    if isinstance(value, Result):
        return value.text
    if isinstance(value, BaseException):
        return "".join(traceback.format_exception(value)).rstrip("\n")
    table = _table(value)
    if table is not None:
        return table
    if isinstance(value, type) or inspect.isroutine(value):
        try:
            return inspect.getsource(value).rstrip("\n")
        except (OSError, TypeError):
            return repr(value)
    if (
        isinstance(value, dict | list | tuple | set)
        or is_dataclass(value)
        or hasattr(value, "model_dump_json")
    ):
        with suppress(TypeError, ValueError):  # a key that is a tuple, a structure that holds itself
            return json.dumps(value, default=_jsonable, indent=2, ensure_ascii=False)
    return str(value)


def _jsonable(value: Any) -> Any:
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return list(value)
    if hasattr(value, "tolist"):  # numpy
        return value.tolist()
    return str(value)


def _table(value: Any) -> str | None:
    """Return a DataFrame or Series of any family as a Markdown table; None for anything else."""
    # A frame's library is imported by whoever made the frame; without one there is nothing to do.
    if not {"pandas", "polars", "pyarrow"} & set(sys.modules):
        return None
    import narwhals as nw

    frame = nw.from_native(value, allow_series=True, eager_only=True, pass_through=True)
    if isinstance(frame, nw.Series):
        native = frame.to_native()
        # Not narwhals' own to_frame: it loses the labels. A Series without a name is a column all the same.
        native = native.to_frame(native.name or "value") if hasattr(native, "to_frame") else frame.to_frame()
        frame = nw.from_native(native, eager_only=True, pass_through=True)
    if not isinstance(frame, nw.DataFrame):
        return None
    top = frame.head(TABLE_ROWS)
    native = top.to_native()
    if (
        hasattr(native, "index")
        and hasattr(native, "reset_index")
        and type(native.index).__name__ != "RangeIndex"
    ):
        native = native.reset_index()  # labels are part of what a pandas table says
        top = nw.from_native(native, eager_only=True)
    lines = [_row(top.columns), _row(["---"] * len(top.columns)), *(_row(row) for row in top.iter_rows())]
    more = len(frame) - len(top)
    if more > 0:
        lines.append(f"… {more:,} more rows")
    return "\n".join(lines)


def _row(cells: Any) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' own words for nothing
        return ""
    return re.sub(r"\s*\n\s*", " ", str(value)).replace("|", r"\|")
