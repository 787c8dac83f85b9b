"""Completion inside the magics: options, models, variables, paths, and names in ``{{ … }}``.

It looks only at what is in memory and at one folder, so that a key press never waits.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nbinfer import session
from nbinfer.contract.modes import Mode
from nbinfer.magics import template
from nbinfer.magics.options import COMMANDS, INFER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from nbinfer.magics.magics import NbInferMagics
    from nbinfer.magics.options import Completes, Option

_LINE = re.compile(r"^[ \t]*(?:[\w.]+[ \t]*=[ \t]*)?(%%?)(infer|nbinfer)(?=\s)(.*)$", re.DOTALL)
_DOTTED = re.compile(r"(?:[^\W\d]\w*\.)*(?:[^\W\d]\w*)?\Z")
_MOST_PATHS = 200


@dataclass(frozen=True, slots=True)
class Found:
    """What can stand in place of ``fragment``, the last part of the text before the cursor."""

    fragment: str
    items: tuple[tuple[str, str], ...]
    """(text, type): ``param``, ``model``, ``path``, ``function``, ``instance``…"""


def make_matcher(magics: NbInferMagics) -> Callable[[Any], Any] | None:
    """Return a matcher for IPython's completer; None where it has no such interface."""
    try:
        from IPython.core.completer import SimpleCompletion, context_matcher
    except ImportError:  # an older IPython than we support, as some hosted notebooks have
        return None

    @context_matcher(identifier="nbinfer.magics")  # type: ignore[misc]
    def nbinfer_matcher(context: Any) -> dict[str, Any]:
        lines = context.full_text.split("\n")
        before = "\n".join(
            [*lines[: context.cursor_line], lines[context.cursor_line][: context.cursor_position]]
        )
        found = complete(before, magics)
        if found is None or not found.items:
            return {"completions": []}
        return {
            "completions": [SimpleCompletion(text, type=kind) for text, kind in found.items],
            "matched_fragment": found.fragment,
            "suppress": True,
        }

    matcher: Callable[[Any], Any] = nbinfer_matcher
    return matcher


def complete(before: str, magics: NbInferMagics) -> Found | None:
    """Return completions for the text of a cell up to the cursor; None where it is not ours to say."""
    in_cell = before.lstrip().startswith("%%infer")
    text = before if in_cell else before.rpartition("\n")[2]
    match = _LINE.match(text)
    if match is None:
        return None
    _, magic, rest = match.groups()
    opening = rest.rfind("{{")
    if opening >= 0 and "}}" not in rest[opening:]:
        return _expression(rest[opening + 2 :], magics)
    if magic == "infer":
        if "\n" in rest:
            return None  # prose
        return _infer_line(rest.lstrip(), magics, cell=in_cell)
    return _nbinfer_line(rest.lstrip(), magics)


def _starting(prefix: str, items: Iterable[tuple[str, str]]) -> Found:
    return Found(prefix, tuple(item for item in items if item[0].startswith(prefix)))


def _last_words(text: str) -> tuple[list[str], str]:
    """Return the finished words, and the one that is being written."""
    words = text.split()
    return (words, "") if not text or text[-1].isspace() else (words[:-1], words[-1])


def _infer_line(text: str, magics: NbInferMagics, *, cell: bool) -> Found | None:
    words, prefix = _last_words(text)
    found = _option_or_value(INFER, words, prefix, magics)
    if found is not None:
        return found
    if cell and not words:
        return _starting(prefix, _values("model", prefix, magics))
    return None


def _nbinfer_line(text: str, magics: NbInferMagics) -> Found | None:
    words, prefix = _last_words(text)
    if not words:
        return _starting(prefix, [(command.name, "keyword") for command in COMMANDS])
    command = next((command for command in COMMANDS if command.name == words[0]), None)
    if command is None:
        return None
    found = _option_or_value(command.options, words[1:], prefix, magics)
    if found is not None:
        return found
    if command.name == "help":
        return _starting(prefix, [(command.name, "keyword") for command in COMMANDS])
    items = _values(command.completes, prefix, magics)
    if command.name in ("load", "estimate"):
        items = [*((name, "model") for name in sorted(_known_refs())), *items]
    return _starting(prefix, items) if items else None


def _known_refs() -> set[str]:
    from nbinfer.models.demo import DEMO_MODELS

    return {*DEMO_MODELS, *session.session.aliases}


def _option_or_value(
    options: Sequence[Option], words: list[str], prefix: str, magics: NbInferMagics
) -> Found | None:
    by_flag = {flag: option for option in options for flag in option.flags}
    if prefix.startswith("-") and "=" not in prefix:
        return _starting(
            prefix, [(flag, "param") for flag in sorted(by_flag) if flag.startswith("--") or prefix == "-"]
        )
    flag, equals, value = prefix.partition("=")
    if not equals:
        flag, value = (words[-1] if words else ""), prefix
    option = by_flag.get(flag)
    if option is None or option.kind == "flag":
        return None
    if option.choices:
        return _starting(value, [(choice, "keyword") for choice in option.choices])
    return _starting(value, _values(option.completes, value, magics))


def _values(kind: Completes, prefix: str, magics: NbInferMagics) -> list[tuple[str, str]]:
    if kind == "model":
        names = {m.name for m in session.loaded()} | set(session.session.aliases)
        return [(name, "model") for name in sorted(names)]
    if kind == "mode":
        return [(mode.value, "keyword") for mode in Mode]
    if kind == "variable":
        return [(name, "instance") for name in sorted(magics.names) if name[0] != "_" or prefix[:1] == "_"]
    if kind == "path":
        return _paths(prefix)
    return []


def _paths(prefix: str) -> list[tuple[str, str]]:
    folder, slash, name = prefix.rpartition("/")
    where = Path(folder + slash if slash else ".").expanduser()
    try:
        entries = sorted(os.scandir(where), key=lambda entry: entry.name)
    except OSError:
        return []
    hidden = name.startswith(".")
    shown = [entry for entry in entries if entry.name.startswith(name) and (hidden or entry.name[0] != ".")]
    ends = [(entry, "/" if entry.is_dir() else "") for entry in shown[:_MOST_PATHS]]
    return [(f"{folder}{slash}{entry.name}{end}", "path") for entry, end in ends]


def _expression(text: str, magics: NbInferMagics) -> Found | None:
    match = _DOTTED.search(text)
    name = match[0] if match else ""
    before = text[: len(text) - len(name)].rstrip()
    if before.endswith("|") and "." not in name:
        return _starting(name, [(item, "function") for item in template.filters()])
    if "." in name:
        return _attributes(name, magics)
    names = [(n, "instance") for n in sorted(magics.names) if n[0] != "_" or name[:1] == "_"]
    return _starting(name, [*names, *((n, "function") for n in template.FUNCTIONS)])


def _attributes(name: str, magics: NbInferMagics) -> Found | None:
    """Return attributes of a value; only of what can be had without running code of the value's."""
    first, *middle = name.split(".")
    missing = object()
    value = magics.names.get(first, missing)
    for attribute in middle[:-1]:
        value = getattr(value, "__dict__", {}).get(attribute, missing)
    if value is missing or isinstance(value, ModuleType):  # an expression may not look into a module
        return None
    frame = type(value).__name__ == "DataFrame"
    columns = [str(c) for c in value.columns if str(c).isidentifier()] if frame else []
    names = sorted({*columns, *(n for n in dir(value) if n[0] != "_")})
    stem = name.rpartition(".")[0]
    return _starting(name, [(f"{stem}.{n}", "property") for n in names])
