"""Reading a magic's line: words, options, and where the prompt begins.

Not argparse: a value may begin with a dash, a prompt on the same line must reach the model to the character,
and an error has to be one line that helps. The table of options says everything else.
"""

from __future__ import annotations

import difflib
import json
import keyword
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from nbinfer.magics.options import COMMANDS, INFER, Command, Option

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NUMBER = re.compile(r"-\.?\d")
_ESCAPE = re.compile(r"\\([nt\\])")
_ESCAPED = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a line, quotes removed; ``start`` and ``end`` are where it stands in the line."""

    text: str
    start: int
    end: int
    quoted: bool = False


@dataclass(slots=True)
class Given:
    """What a line asks for.

    ``values`` maps an option's name to its converted value; options that were not given are absent.
    ``words`` are the other words, ``rest`` is the prompt of a line magic.
    """

    values: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    rest: str = ""


def next_word(line: str, at: int) -> Word | None:
    """Return the next word from ``at`` on; None at the end.

    A quotation mark at the start of a word, or after ``=``, opens a quotation that ends with the same mark
    before a space; elsewhere it is a letter. A backslash is a letter too, and ``{{ … }}`` is never cut apart.

    Raises
    ------
    UsageError
        A quotation is not closed.
    """
    while at < len(line) and line[at].isspace():
        at += 1
    if at == len(line):
        return None
    start, pieces, quoted = at, [], False
    while at < len(line) and not line[at].isspace():
        if line[at] in "\"'" and (at == start or line[at - 1] == "="):
            end = _closing(line, at)
            if end is None:
                raise UsageError(
                    f"The quotation that opens at column {at + 1} is never closed: {line[at : at + 20]}…"
                )
            pieces.append(line[at + 1 : end])
            quoted = quoted or at == start
            at = end + 1
        elif line.startswith("{{", at) and "}}" in line[at:]:
            end = line.index("}}", at) + 2
            pieces.append(line[at:end])
            at = end
        else:
            pieces.append(line[at])
            at += 1
    return Word("".join(pieces), start, at, quoted)


def _closing(line: str, at: int) -> int | None:
    mark, i = line[at], at + 1
    while i < len(line):
        if line.startswith("{{", i) and "}}" in line[i:]:
            i = line.index("}}", i) + 2
            continue
        if line[i] == mark and (i + 1 == len(line) or line[i + 1].isspace()):
            return i
        i += 1
    return None


def parse(
    line: str,
    options: Sequence[Option],
    *,
    what: str,
    prompt: bool = False,
    expand: Callable[[str], str] | None = None,
) -> Given:
    """Read a line.

    Parameters
    ----------
    what
        What the line belongs to (``%infer``), for messages.
    prompt
        Whether the line ends in a prompt: from the first word on that is no option, or after ``--``, the rest
        is taken as it is.
    expand
        Applied to each value before it is converted, unless ``--raw`` is given.

    Raises
    ------
    UsageError
        An unknown option, a missing or malformed value; the message names the nearest option.
    """
    given, found, at = Given(), [], 0
    while (word := next_word(line, at)) is not None:
        at = word.end
        if word.text == "--" and not word.quoted:
            if prompt:
                given.rest = line[at:].removeprefix(" ")
                break
            continue
        if not _is_option(word):
            if prompt:
                given.rest = line[word.start :]
                break
            given.words.append(word.text)
            continue
        option, text = _split(word, options, what, prompt=prompt)
        if option.kind != "flag" and text is None:
            text, at = _value_after(line, at, option, prompt=prompt)
        found.append((option, text))
    raw = any(option.name == "raw" for option, _ in found)
    change = (lambda text: text) if raw or expand is None else expand
    given.words = [change(text) for text in given.words]
    for option, text in found:
        _store(given, option, option.value if text is None else convert(option, change(text)))
    _check_params(given, options)
    return given


def _is_option(word: Word) -> bool:
    return len(word.text) > 1 and word.text[0] == "-" and not word.quoted and not _NUMBER.match(word.text)


def _split(word: Word, options: Sequence[Option], what: str, *, prompt: bool) -> tuple[Option, str | None]:
    """Return the option that a word names, and the value that is part of the word."""
    name, equals, value = word.text.partition("=")
    by_flag = {flag: option for option in options for flag in option.flags}
    if name in by_flag:
        option = by_flag[name]
        if equals and option.kind == "flag":
            raise UsageError(f"{name} takes no value.")
        return option, value if equals else None
    short = by_flag.get(word.text[:2])
    if short is not None and not word.text.startswith("--") and short.kind != "flag":
        return short, word.text[2:]  # -n64
    near = difflib.get_close_matches(name, by_flag, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    tail = "\nA prompt that begins with a dash goes after --." if prompt else ""
    raise UsageError(f"{what} has no option {name}. {hint}All options: {what} --help.{tail}")


def _value_after(line: str, at: int, option: Option, *, prompt: bool) -> tuple[str, int]:
    if option.optional:
        # On a line that ends in a prompt, the next word may be its first: there, only --chat=NAME names one.
        word = None if prompt else next_word(line, at)
        return ("", at) if word is None or _is_option(word) else (word.text, word.end)
    word = next_word(line, at)
    if word is None:
        raise UsageError(f"{option.flags[-1]} needs a value: {option.flags[-1]} {option.metavar}.")
    return word.text, word.end


def _check_params(given: Given, options: Sequence[Option]) -> None:
    """Refuse a -p that says again, or otherwise, what another option or another -p has said."""
    said = {o.keyword: o.flags[-1] for o in options if o.keyword and o.name in given.values}
    for key, _ in given.values.get("params", ()):
        if key in said:
            raise UsageError(f"{key} is given twice: by {said[key]} and by --param {key}; give one of them.")
        said[key] = "--param"


def _store(given: Given, option: Option, value: Any) -> None:
    if option.repeat:
        given.values.setdefault(option.name, []).append(value)
    elif option.name in given.values:
        raise UsageError(f"{option.flags[-1]} is given twice, or against its opposite.")
    else:
        given.values[option.name] = value


def convert(option: Option, text: str) -> Any:
    """Return an option's value.

    Raises
    ------
    UsageError
        The text is not what the option takes.
    """
    flag = option.flags[-1]
    if option.choices and text not in option.choices:
        near = difflib.get_close_matches(text, option.choices, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"{flag} is one of {', '.join(option.choices)}; not {text!r}.{hint}")
    if option.kind in ("int", "float"):
        try:
            return int(text) if option.kind == "int" else float(text)
        except ValueError:
            kind = "a whole number" if option.kind == "int" else "a number"
            raise UsageError(f"{flag} takes {kind}; not {text!r}.") from None
    if option.kind == "name" and (not text.isidentifier() or keyword.iskeyword(text)):
        raise UsageError(f"{flag} takes the name of a variable; {text!r} is none.")
    if option.kind == "escaped":
        return _ESCAPE.sub(lambda match: _ESCAPED[match[1]], text)
    if option.kind == "pair":
        return _pair(flag, text)
    if option.kind == "list":
        return [part.strip() for part in text.split(",")] if "," in text else text
    return text


def _pair(flag: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{flag} takes KEY=JSON, as in {flag} top_k=20; not {text!r}.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def parse_infer(line: str, *, cell: bool, expand: Callable[[str], str] | None = None) -> Given:
    """Read the line of ``%%infer`` (``cell``) or of ``%infer``; the cell's one word, if any, is the model."""
    what = "%%infer" if cell else "%infer"
    given = parse(line, INFER, what=what, prompt=not cell, expand=expand)
    if len(given.words) > 1:
        raise UsageError(
            f"%%infer takes one MODEL and options; not {' '.join(given.words)!r}. "
            'Put "…" around a value that holds spaces; the prompt is the body.'
        )
    if given.words:
        if "model" in given.values:
            raise UsageError(f"the model is given twice: {given.words[0]!r} and {given.values['model']!r}.")
        given.values["model"] = given.words[0]
    _check_combination(given)
    return given


def _check_combination(given: Given) -> None:
    values = given.values
    if "system" in values and "system_var" in values:
        raise UsageError("--system and --system-var are two ways to say one thing; give one of them.")
    if values.get("extract") and values.get("view", "code") != "code":
        raise UsageError(f"--extract is -f code; it does not go with -f {values['view']}.")
    if values.get("new") and "chat" not in values:
        raise UsageError("--new begins a conversation anew; name it with --chat.")
    _check_images(values)
    if "over" in values:
        wrong = [option.flags[-1] for option in INFER if not option.rows and option.name in values]
        if wrong:
            raise UsageError(f"{wrong[0]} does not go with --over, where each row is asked on its own.")


# What goes with --image-out and with an answer in words alike.
_ANY_OUTPUT = ("model", "out", "over", "quiet", "no_stream", "raw", "help", "image_out", "params")


def _check_images(values: dict[str, Any]) -> None:
    """Check that options of images come with ``--image-out``, and no others."""
    asked = [option for option in INFER if option.name in values and option.name not in _ANY_OUTPUT]
    if "image_out" in values:
        wrong = [option.flags[-1] for option in asked if option.images is None]
        if wrong:
            raise UsageError(f"{wrong[0]} is for answers in words; it does not go with --image-out.")
        return
    wrong = [option.flags[-1] for option in asked if option.images is not None and option.keyword is None]
    if wrong:
        raise UsageError(f"{wrong[0]} is for images: add --image-out.")


def find_command(name: str) -> Command:
    """Return a subcommand of ``%nbinfer``.

    Raises
    ------
    UsageError
        There is none of that name; the message names the nearest.
    """
    names = [command.name for command in COMMANDS]
    if name in names:
        return COMMANDS[names.index(name)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"%nbinfer has no command {name!r}.{hint}\nCommands: {', '.join(names)}.")


def parse_command(command: Command, line: str, *, expand: Callable[[str], str] | None = None) -> Given:
    """Read the rest of a ``%nbinfer`` line; ``expand`` is applied to each word and value.

    Raises
    ------
    UsageError
        Too many words, too few, or a wrong option.
    """
    given = parse(line, command.options, what=f"%nbinfer {command.name}", expand=expand)
    needed = sum(not word.startswith("[") for word in command.words)
    if not given.values.get("help") and not needed <= len(given.words) <= len(command.words):
        usage = " ".join((command.name, *command.words))
        raise UsageError(
            f"%nbinfer {usage}: got {len(given.words)} words.\nOptions: %nbinfer {command.name} --help."
        )
    return given
