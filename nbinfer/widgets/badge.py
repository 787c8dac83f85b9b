"""The state of the small badge: one model, or one backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer import session
from nbinfer.contract.errors import ModelNotFound, NbinferError
from nbinfer.widgets import looks, words
from nbinfer.widgets.watched import Watched

if TYPE_CHECKING:
    from nbinfer.session import Model
    from nbinfer.widgets.state import Row


def watch(model: Model | str) -> Watched:
    """Return the state of a badge for a loaded model or a backend.

    Raises
    ------
    ModelNotFound
        Neither is called that.
    """
    name = model if isinstance(model, str) else model.name
    if isinstance(model, str) and session.session.find(model) is None and _backend(model) is None:
        known = [m.name for m in session.loaded()] + [row["name"] for row in looks.backends()["rows"]]
        raise ModelNotFound(f"neither a loaded model nor a backend is called {name!r}: {', '.join(known)}.")

    def look() -> Row:
        return {"badge": _backend(name) or of_model(name)}

    watched = Watched(look(), look)
    watched.look()
    return watched


def _backend(name: str) -> Row | None:
    for row in looks.backends()["rows"]:
        if row["name"] == name and session.session.find(name) is None:
            return {"name": name, "word": row["word"], "kind": row["kind"], "detail": row["detail"]}
    return None


def of_model(name: str) -> Row:
    """Return what a model is doing, in a word."""
    model = session.session.find(name)
    if model is None:
        return {"name": name, "word": "not loaded", "kind": "off", "detail": ""}
    try:
        now = model.engine.load()
    except NbinferError as error:
        return {"name": name, "word": "gone", "kind": "error", "detail": words.short(str(error))}
    if now.running or now.waiting:
        detail = f"{now.running} running, {now.waiting} waiting"
        return {"name": name, "word": "working", "kind": "busy", "detail": detail}
    context = f"{now.context_used:,} of {words.tokens(model.info.context_size)}"
    return {"name": name, "word": "ready", "kind": "ok", "detail": context}
