"""Which command-line flags of an engine a configuration may carry."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

from nbinfer.contract.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# Words of a flag's name that mean a place in the file system or on the network. These hold even where a
# backend's own list has the flag by mistake.
_PLACES = frozenset(
    {"path", "paths", "file", "files", "dir", "directory", "host", "port", "uds", "socket", "url"}
)
_PLACE_ENDINGS = ("file", "path", "dir", "-url", "-host", "-port")


def check_flag_items(flags: object) -> tuple[str, ...]:
    """Check what holds for every backend: the shape of the list, and no paths, addresses or remote code.

    Parameters
    ----------
    flags
        A list or tuple of strings: flags, each value its own item or joined with ``=``.

    Returns
    -------
    tuple of str
        The same items.

    Raises
    ------
    ConfigError
        With the item that was refused, and why.
    """
    if isinstance(flags, str):
        raise ConfigError(
            f'runtime-flags={flags!r} is refused: it is a list of strings, such as ["--threads", "4"].'
        )
    if not isinstance(flags, list | tuple):
        raise ConfigError(f"runtime-flags={flags!r:.60} is refused: it is a list of strings.")
    value_may_follow = False
    for item in flags:
        if not isinstance(item, str):
            raise ConfigError(f'runtime-flags holds {item!r:.60}: every item is a string, "-1" for a number.')
        if _is_flag(item):
            name, joined, value = item.partition("=")
            _check_name(name)
            if joined:
                _check_value(item, value, joined=True)
            value_may_follow = not joined
        elif value_may_follow:
            _check_value(item, item, joined=False)
            value_may_follow = False
        else:
            # A stray value would be a positional argument, and engines take a model's path there.
            raise ConfigError(f"runtime-flags holds the value {item!r:.60} without a flag before it.")
    return tuple(flags)


def check_flags(
    flags: object, allowlist: Collection[str], *, backend: str = "this backend"
) -> tuple[str, ...]:
    """Check runtime flags against the allowlist of the backend that will really run the model.

    Parameters
    ----------
    flags
        A list or tuple of strings: flags, each value its own item or joined with ``=``. Negative numbers are
        values.
    allowlist
        The spellings that the backend accepts, ``--threads`` and ``-t`` each.
    backend
        Its name, for the message.

    Returns
    -------
    tuple of str
        The same items.

    Raises
    ------
    ConfigError
        A flag is not on the list, or breaks a rule of every backend.
    """
    items = check_flag_items(flags)
    for item in items:
        name = item.partition("=")[0]
        if _is_flag(item) and name not in allowlist:
            near = get_close_matches(name, allowlist, n=3)
            advice = f"; did you mean {' or '.join(near)}?" if near else "."
            if not allowlist:
                advice = ": it takes no flags; use the named options instead."
            raise ConfigError(f"runtime-flags: {name!r:.60} is not a flag that {backend} accepts{advice}")
    return items


def _is_flag(item: str) -> bool:
    return item.startswith("-") and _NEGATIVE_NUMBER.fullmatch(item) is None


def _check_name(name: str) -> None:
    words = name.lower().replace("_", "-").strip("-")
    if not words:
        raise ConfigError(f"runtime-flags holds {name!r}, which is not a flag.")
    if "remote-code" in words or "remotecode" in words:
        raise ConfigError(f"runtime-flags: {name!r:.60} is refused: code from a model's files is never run.")
    if _PLACES.intersection(words.split("-")) or words.endswith(_PLACE_ENDINGS):
        raise ConfigError(
            f"runtime-flags: {name!r:.60} is refused: no flag may name a path, a host, a port or a log file."
        )


def _check_value(item: str, value: str, *, joined: bool) -> None:
    if "/" in value or "\\" in value or value in (".", "..") or value.startswith("~"):
        raise ConfigError(
            f"runtime-flags: {item!r:.60} is refused: a value may not name a path. "
            "Grammars, schemas and templates go in as Python objects.",
        )
    if not value.isprintable():
        raise ConfigError(f"runtime-flags: {item!r:.60} is refused: a value is one line of printable text.")
    if joined and _is_flag(value):
        raise ConfigError(f"runtime-flags: {item!r:.60} is refused: the value after '=' looks like a flag.")
