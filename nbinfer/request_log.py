"""The log of requests: what was asked of which weights, and what came back, so that it can be asked again.

Nothing is written before a notebook asks for it. The file belongs to its user alone.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import sqlite3
import warnings
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.contract import rendering
from nbinfer.contract.errors import ConfigError, RequestError
from nbinfer.contract.requests import CompletionRequest, Constraint, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import pandas as pd

    from nbinfer.contract.results import Result

LIMIT = 1000
MAX_BYTES = 256 * 2**20
"""What the requests of a log may take together; pictures are part of them."""
UNREADABLE = "unreadable"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    bytes INTEGER NOT NULL,
    entry TEXT NOT NULL
);
"""
_TOO_OLD = "DELETE FROM requests WHERE number <= (SELECT max(number) FROM requests) - ?"
_TOO_MANY_BYTES = """
DELETE FROM requests WHERE number IN (
    SELECT number FROM (SELECT number, sum(bytes) OVER (ORDER BY number DESC) AS kept FROM requests)
    WHERE kept > ?
)
"""


class HistoryWarning(UserWarning):
    """A request could not be recorded; its answer is what it is."""


class NoSuchEntry(RequestError, IndexError):  # noqa: N818 - what it says
    """The history holds no request of that number: it was never there, or it was among the oldest."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One request and its answer.

    Attributes
    ----------
    number
        What :meth:`History.replay` takes.
    at
        When it was answered, in UTC.
    model, ref, where
        The model's name, what it was loaded by, and in which place.
    engine, digest
        What answered: backend and version, and the SHA-256 of the weights.
    request
        What was asked.
    prompt
        The text that reached the model, chat template applied; empty where a server does not say.
    params
        What was asked for, with the seed that was drawn.
    text, reasoning, finish_reason, tool_calls, usage, timings
        The answer, as in a result.
    error
        Why there is none. Where the entry itself cannot be read, ``finish_reason`` is ``unreadable`` and this
        says why.
    """

    number: int = 0
    at: datetime
    model: str
    ref: str
    where: str
    engine: str
    digest: str
    request: CompletionRequest
    prompt: str
    params: Mapping[str, Any]
    text: str
    reasoning: str | None = None
    finish_reason: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    usage: Mapping[str, Any]
    timings: Mapping[str, Any]
    error: str | None = None

    def again(self) -> CompletionRequest:
        """Return the request with the seed that was drawn for it."""
        seed = self.params.get("seed")
        if seed is None:
            return self.request
        return dataclasses.replace(
            self.request, sampling=dataclasses.replace(self.request.sampling, seed=int(seed))
        )


class History:
    """The recorded requests, oldest first. Shown as a table; :meth:`frame` is that table as data.

    Parameters
    ----------
    path
        Its file, which need not be there.
    limit
        Requests that are kept; the oldest go.
    ask
        Answers an entry's request again, with the model of that name or the one given.
    """

    def __init__(
        self,
        path: Path,
        *,
        limit: int = LIMIT,
        ask: Callable[[Entry, Any], Result] | None = None,
        recording: bool = False,
    ) -> None:
        if type(limit) is not int or limit < 1:
            raise ConfigError(f"limit={limit!r:.40} is refused: it is a number of requests, 1 or more.")
        self.path = path
        self.limit = limit
        self.recording = recording
        self._ask = ask

    # -- reading ----------------------------------------------------------------------------------------

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        if not self.path.exists():
            return []
        with closing(self._open()) as db:
            return db.execute(query, values).fetchall()

    def __len__(self) -> int:
        found = self._rows("SELECT count(*) FROM requests")
        return int(found[0][0]) if found else 0

    def __iter__(self) -> Iterator[Entry]:
        for number, text in self._rows("SELECT number, entry FROM requests ORDER BY number"):
            yield _read(number, text)

    def __getitem__(self, number: int) -> Entry:
        """Return an entry by its number, or counted from the end: -1 is the newest.

        Raises
        ------
        NoSuchEntry
            There is none.
        """
        if number < 0:
            query = "SELECT number, entry FROM requests ORDER BY number DESC LIMIT 1 OFFSET ?"
            found = self._rows(query, -number - 1)
        else:
            found = self._rows("SELECT number, entry FROM requests WHERE number = ?", number)
        if not found:
            raise NoSuchEntry(f"there is no request {number} in the history, which holds {len(self)}.")
        return _read(*found[0])

    def frame(self) -> pd.DataFrame:
        """Return the table: a row per request, its number as the index."""
        from nbinfer.tables import table

        rows = [
            {
                "number": entry.number,
                "at": entry.at,
                "model": entry.model,
                "where": entry.where,
                "engine": entry.engine,
                "digest": entry.digest,
                "prompt": entry.prompt,
                "text": entry.text,
                "finish_reason": entry.finish_reason,
                "seed": entry.params.get("seed"),
                "params": dict(entry.params),
                "tokens": entry.usage.get("completion_tokens"),
                "error": entry.error,
            }
            for entry in self
        ]
        columns = ["number", "at", "model", "where", "engine", "digest", "prompt", "text", "finish_reason"]
        return table("history", rows, [*columns, "seed", "params", "tokens", "error"]).set_index("number")

    def replay(self, number: int = -1, *, model: Any = None) -> Result:
        """Ask a recorded request again, with the same parameters and the seed that was drawn.

        Parameters
        ----------
        number
            The entry's number, or counted from the end.
        model
            A loaded model, or its name, to ask instead of the one that answered.

        Raises
        ------
        NoSuchEntry
            There is no entry of that number.
        ModelNotFound
            The model is not loaded; the message says how to load it.
        RequestError
            A model of that name has other weights, and ``model`` does not say that this is meant; or the
            entry cannot be read.
        """
        if self._ask is None:
            raise RequestError("this history is not of a session: use nb.history().")
        entry = self[number]
        if entry.finish_reason == UNREADABLE:
            raise RequestError(f"request {entry.number} cannot be asked again: {entry.error}")
        return self._ask(entry, model)

    def __repr__(self) -> str:
        state = "recording" if self.recording else "not recording: nb.history(record=True) begins"
        return f"<History of {len(self)} requests, {state}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        del include, exclude
        frame = self.frame()
        if frame.empty:
            return {"text/plain": repr(self)}
        columns = ["number", "at", "model", "where", "prompt", "text", "finish_reason", "seed", "tokens"]
        shown = frame.reset_index()[columns].copy()
        shown["at"] = shown["at"].dt.strftime("%Y-%m-%d %H:%M:%S")
        for column in ("prompt", "text"):
            shown[column] = shown[column].str.slice(0, 80)
        return rendering.mimebundle(shown)

    # -- writing ----------------------------------------------------------------------------------------

    def add(self, entry: Entry) -> None:
        """Append an entry, and let the oldest go when there are too many; a failure is only a warning."""
        try:
            text = _write(entry)
            size = len(text.encode())
            with closing(self._open()) as db, db:
                db.execute("INSERT INTO requests (bytes, entry) VALUES (?, ?)", (size, text))
                db.execute(_TOO_OLD, (self.limit,))
                db.execute(_TOO_MANY_BYTES, (max(size, MAX_BYTES),))
        except Exception as error:  # noqa: BLE001 - whatever it is, the answer is there and counts more
            warnings.warn(f"{self.path}: the request was not recorded: {error}", HistoryWarning, stacklevel=3)

    def clear(self) -> None:
        """Forget everything: the file goes."""
        for name in (self.path.name, f"{self.path.name}-journal"):
            self.path.with_name(name).unlink(missing_ok=True)

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made here, for this user only, before SQLite would make it for everybody; its journal takes the
        # file's mode. Only where there is none: closing a file drops SQLite's locks on it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        if self.path.stat().st_mode & 0o077:
            self.path.chmod(0o600)
        db = sqlite3.connect(self.path, timeout=10)
        try:
            # What is dropped must not lie about in free pages.
            db.execute("PRAGMA secure_delete = ON")
            db.executescript(_SCHEMA)
        except BaseException:
            db.close()
            raise
        return db


def default_path() -> Path:
    """Return where the log lies unless told otherwise: in the user's folder for the state of programs."""
    import platformdirs

    return Path(platformdirs.user_state_dir("nbinfer", appauthor=False)) / "history.sqlite"


# -- entries as text ------------------------------------------------------------------------------------


def _write(entry: Entry) -> str:
    request = {field.name: getattr(entry.request, field.name) for field in dataclasses.fields(entry.request)}
    request["sampling"] = asdict(entry.request.sampling)
    if entry.request.constraint is not None:
        request["constraint"] = asdict(entry.request.constraint)
    request["images"] = [base64.b64encode(image).decode() for image in entry.request.images]
    values = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    del values["number"]
    values |= {"at": entry.at.isoformat(), "request": request}
    return json.dumps(values, default=_plain, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """Return what JSON has no word for: a mapping or sequence of another type as one of its own."""
    return dict(value) if hasattr(value, "keys") else list(value)


def _read(number: int, text: str) -> Entry:
    """Return an entry, whichever version wrote it; one that cannot be read says so as its error."""
    try:
        return _parse(number, json.loads(text))
    except Exception as error:  # noqa: BLE001 - one entry must not hide the others
        why = f"{type(error).__name__}: {error!s:.200}"
    return _parse(number, {"finish_reason": UNREADABLE, "error": f"this entry cannot be read: {why}"})


def _parse(number: int, values: Mapping[str, Any]) -> Entry:
    request = _known(CompletionRequest, values.get("request") or {"prompt": ""})
    sampling = _known(Sampling, request.get("sampling") or {})
    if "logit_bias" in sampling:
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
    request["sampling"] = Sampling(**sampling)
    constraint = request.get("constraint")
    if constraint is not None:
        request["constraint"] = Constraint(constraint["kind"], constraint["value"])
    request["images"] = tuple(base64.b64decode(image) for image in request.get("images") or ())
    for name in ("messages", "stop", "tools"):
        if request.get(name) is not None:
            request[name] = tuple(request[name])
    if isinstance(request.get("prompt"), list):
        request["prompt"] = tuple(request["prompt"])
    found = _known(Entry, values)
    texts = ("model", "ref", "where", "engine", "digest", "prompt", "text", "finish_reason")
    found |= {name: str(values.get(name) or "") for name in texts}
    found |= {name: dict(values.get(name) or {}) for name in ("params", "usage", "timings")}
    at = values.get("at")
    return Entry(
        **found
        | {
            "number": number,
            "at": datetime.fromtimestamp(0, UTC)
            if at is None
            else datetime.fromisoformat(at).astimezone(UTC),
            "request": CompletionRequest(**request),
            "tool_calls": tuple(values.get("tool_calls") or ()),
        }
    )


def _known(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that this version knows; one written by another may have more, or fewer."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)
