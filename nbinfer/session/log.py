"""The log of requests: begun, stopped, and asked again from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nbinfer.contract.errors import ModelNotFound, RequestError
from nbinfer.session.asking import Prepared
from nbinfer.session.calls import get, loaded, loaded_words
from nbinfer.session.held import session
from nbinfer.session.streams import TextStream

if TYPE_CHECKING:
    from nbinfer.contract.results import Result
    from nbinfer.request_log import Entry, History
    from nbinfer.session.model import Model


def history(
    record: bool | None = None,  # noqa: FBT001 - the one thing that it switches
    *,
    path: str | Path | None = None,
    limit: int | None = None,
) -> History:
    """Return the log of requests; or begin, or stop, to write it.

    Nothing is written before ``record=True``, and then only what this kernel asks: cells, :func:`infer`,
    :func:`stream`, chats. Rows of a DataFrame are not in it; they have a journal of their own. The log
    keeps the exact prompt, the parameters with the seed, the engine and the digest of the weights, so that
    ``nb.history().replay(number)`` asks the same again. Only its user can read the file; ``.clear()``
    removes it.

    Parameters
    ----------
    record
        True begins to record, False stops; None changes nothing.
    path
        Another file than the usual one in the user's folder for the state of programs.
    limit
        Requests that are kept, 1,000 unless it says otherwise; the oldest go.

    Raises
    ------
    ConfigError
        ``limit`` is not a number of requests.
    """
    from nbinfer.request_log import LIMIT, History, default_path

    now = session.history
    file = Path(path).expanduser() if path is not None else now.path if now is not None else default_path()
    kept = limit if limit is not None else now.limit if now is not None else LIMIT
    recording = now is not None if record is None else bool(record)
    found = History(file, limit=kept, ask=_ask_again, recording=recording)
    if record is not None:
        session.history = found if record else None
    return found


def _ask_again(entry: Entry, model: Model | str | None) -> Result:
    """Ask what an entry asked; see :meth:`nbinfer.request_log.History.replay`."""
    chosen = get(model) if model is not None else session.find(entry.model)
    if chosen is None:
        raise ModelNotFound(
            f"{entry.model} is not loaded. {loaded_words(loaded())}\n"
            f"Load it with nb.load({entry.ref!r}), or ask another: replay({entry.number}, model=…)."
        )
    if model is None and entry.digest and chosen.digest != entry.digest:
        raise RequestError(
            f"{chosen.name} has other weights ({chosen.digest[:12]}) than those that answered "
            f"({entry.digest[:12]}).\nTo ask it all the same: replay({entry.number}, model={chosen.name!r})."
        )
    request, schema, choices = entry.again(), None, None
    if request.constraint is not None and request.constraint.kind == "json_schema":
        from nbinfer.contract.schemas import Schema

        schema = Schema(request.constraint.value)
    elif request.constraint is not None and request.constraint.kind == "choices":
        choices = tuple(request.constraint.value)
    return TextStream(chosen.submit(request), Prepared(request, schema, choices), chosen).result()
