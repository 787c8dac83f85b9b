"""What the subcommands of ``%nbinfer`` do: each is one call of the Python API."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nbinfer import session
from nbinfer.contract.errors import ModelNotFound
from nbinfer.magics.options import command_help, nbinfer_help
from nbinfer.magics.parser import find_command
from nbinfer.tables import table

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.magics.magics import NbInferMagics
    from nbinfer.magics.options import Command
    from nbinfer.magics.parser import Given

_SHOW_AFTER = 0.5
"""Seconds of loading after which it says how far it is."""


def run(command: Command, given: Given, magics: NbInferMagics) -> Any:
    """Run a parsed subcommand and return its value."""
    handlers: dict[str, Callable[[Command, Given, NbInferMagics], Any]] = {
        "load": _load,
        "unload": _unload,
        "ps": lambda *_: session.ps(),
        "status": lambda *_: session.status(),
        "models": lambda *_: session.models(),
        "estimate": _estimate,
        "pull": _pull,
        "panel": _panel,
        "alias": _alias,
        "config": lambda _command, _given, magics: _frame("config", magics.settings.rows()),
        "doctor": lambda *_: session.doctor(),
        "reset": _reset,
    }
    return handlers[command.name](command, given, magics)


def help_text(command: Command, given: Given) -> str:
    """Return the help of a subcommand; of ``help`` itself, that of the one it names, or of all."""
    if command.name != "help" or given.values.get("help"):
        return command_help(command)
    return command_help(find_command(given.words[0])) if given.words else nbinfer_help()


def _keywords(command: Command, given: Given) -> dict[str, Any]:
    found = {o.keyword: given.values[o.name] for o in command.options if o.keyword and o.name in given.values}
    if "speculative" in found:
        found["speculative"] = {"draft_model": found["speculative"]} if found["speculative"] else {}
    return {**found, **dict(given.values.get("params", ()))}


def _frame(kind: str, rows: list[dict[str, Any]]) -> Any:
    return table(kind, rows, list(rows[0]) if rows else [])


def _load(command: Command, given: Given, _magics: NbInferMagics) -> session.Model:
    progress = _LoadProgress(given.words[0])
    try:
        return session.load(given.words[0], progress=progress, **_keywords(command, given))
    finally:
        progress.close()


class _LoadProgress:
    """One output line for a load that takes a while."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = time.monotonic()
        self._next = self._began + _SHOW_AFTER
        self._handle: Any = None

    def __call__(self, fraction: float) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SHOW_AFTER
            self._show(f"loading {self._name}: {fraction:.0%}")

    def close(self) -> None:
        if self._handle is not None:
            self._show(f"loading {self._name} took {time.monotonic() - self._began:.1f} s")

    def _show(self, text: str) -> None:
        from IPython.display import display

        from nbinfer.display import mimebundle

        data, _ = mimebundle(text)
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(data, raw=True)


def _unload(_command: Command, given: Given, _magics: NbInferMagics) -> None:
    session.unload(given.words[0] if given.words else None)


def _estimate(command: Command, given: Given, _magics: NbInferMagics) -> Any:
    from nbinfer.memory import estimate

    return estimate(given.words[0], **_keywords(command, given))


def _pull(command: Command, given: Given, _magics: NbInferMagics) -> Any:
    return session.pull(given.words[0], **_keywords(command, given))


def _panel(_command: Command, given: Given, _magics: NbInferMagics) -> Any:
    from nbinfer.widgets import panel

    return panel(*given.words)


def _alias(_command: Command, given: Given, _magics: NbInferMagics) -> Any:
    aliases = session.session.aliases
    removed = given.values.get("remove")
    if removed is not None:
        if aliases.pop(removed, None) is None:
            raise ModelNotFound(
                f"there is no alias {removed!r}. Aliases: {', '.join(sorted(aliases)) or 'none'}."
            )
        return None
    if len(given.words) == 1:
        name = given.words[0]
        if name not in aliases:
            raise ModelNotFound(f"there is no alias {name!r}.\nMake one: %nbinfer alias {name} REF.")
        return aliases[name]
    if given.words:
        name, ref = given.words
        aliases[name] = ref
        return None
    return table(
        "aliases",
        [{"alias": k, "stands for": v} for k, v in sorted(aliases.items())],
        ["alias", "stands for"],
    )


def _reset(_command: Command, given: Given, magics: NbInferMagics) -> None:
    magics.chats.forget(given.words[0] if given.words else None)
