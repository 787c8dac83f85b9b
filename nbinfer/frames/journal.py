"""The results journal: what was computed once is never computed again.

One SQLite file in write-ahead mode, one commit per finished row, so that an interrupted or killed job goes on
where it was when its cell runs again. The key says what was asked and of which weights; code, batch size and
the order of columns are not in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nbinfer.contract.errors import NbinferError
from nbinfer.contract.settings import configured
from nbinfer.frames.outcomes import Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from nbinfer.frames.pictures import Pictures

IMAGES = "generate_images"
"""The operator whose values are files of their own."""

KEY_VERSION = 2
"""Part of every key; raised when what a key covers changes."""

DEFAULT_LIMIT = 2 * 2**30

_FILE = "frames-1.sqlite"
_COLUMNS = "data, finish_reason, prompt_tokens, cached_tokens, completion_tokens, seconds, extra"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key BLOB PRIMARY KEY,
    op TEXT NOT NULL,
    model TEXT NOT NULL,
    data BLOB NOT NULL,
    finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER,
    cached_tokens INTEGER,
    completion_tokens INTEGER,
    seconds REAL,
    extra TEXT,
    used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_by_use ON entries (used);
"""
# "Used" is kept to the day: the order of eviction needs no more, and a hit seldom has to write.
_DAY = 86_400
_LOOKUP = 500
# execute() would take the first of its many steps only.
_VACUUM = "PRAGMA incremental_vacuum"
_ROW_BYTES = 200


class JournalError(NbinferError, OSError):
    """The journal cannot be written, as a rule because the disk is full. Finished rows are kept in memory."""


class JournalWarning(UserWarning):
    """The journal works, but not as it should: for instance in memory, because its folder is read-only."""


class ValueGone(NbinferError, LookupError):  # noqa: N818 - a state, not a failure
    """An entry's value lies outside the journal, and is not there any more: the entry does not count."""


class Codec(Protocol):
    """How an operator's values become bytes and back."""

    def encode(self, value: Any) -> bytes:
        """Return the value as bytes."""
        ...

    def decode(self, data: bytes) -> Any:
        """Return the value behind the bytes.

        Raises
        ------
        ValueGone
            They name something that is not there any more.
        """
        ...


class Keys:
    """Makes the keys of one run.

    Parameters
    ----------
    constants
        Everything that all rows share, JSON-able: operator, weights' digest, sampling, schema….
    """

    def __init__(self, constants: Mapping[str, Any]) -> None:
        self._base = hashlib.sha256(canonical({"key": KEY_VERSION, **constants}) + b"\0")

    def key(self, content: Any, sample: int = 0) -> bytes:
        """Return the 32 bytes that stand for this content asked this way."""
        digest = self._base.copy()
        if isinstance(content, str):
            # The tag keeps a text from ever meaning the same as a conversation.
            digest.update(b"%d s" % sample + content.encode("utf-8", "surrogatepass"))
        else:
            digest.update(b"%d j" % sample + canonical(content))
        return digest.digest()


def canonical(value: Any) -> bytes:
    """Return JSON that is the same in every process: sorted keys, no spaces, ASCII.

    Raises
    ------
    TypeError, ValueError
        The value is not JSON: an object, or NaN.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class Journal:
    """Results by key, in a file or, where there can be none, in memory.

    Safe to use from several threads; several processes may share the file.

    Parameters
    ----------
    path
        The file; None: in memory.
    limit
        Bytes the file may take; beyond it, entries unused for longest go first.
    """

    def __init__(self, path: Path | None, *, limit: int = DEFAULT_LIMIT) -> None:
        self.path = path
        self.limit = limit
        self._lock = threading.RLock()
        self._unsaved: dict[bytes, tuple[Any, ...]] = {}
        self._written = 0
        self._db = self._connect()

    def _connect(self) -> sqlite3.Connection:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(
            ":memory:" if self.path is None else self.path,
            timeout=30,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            # Incremental, so that entries that go give their pages back.
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")
            db.execute("PRAGMA journal_mode=WAL")
            # Survives the death of the process; a power cut may cost the last rows, never the file.
            db.execute("PRAGMA synchronous=NORMAL")
            db.executescript(_SCHEMA)
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        """Close the file; the journal is not used after it."""
        with self._lock:
            self._db.close()

    # -- reading ------------------------------------------------------------------------------------------

    def get_many(self, keys: Sequence[bytes], codec: Codec) -> dict[bytes, Record]:
        """Return the records that are there, by key."""
        found: dict[bytes, Record] = {}
        today = _today()
        with self._lock:
            for key in keys if self._unsaved else ():
                if key in self._unsaved:
                    found[key] = _record(self._unsaved[key], codec)
            for start in range(0, len(keys), _LOOKUP):
                part = keys[start : start + _LOOKUP]
                marks = ",".join("?" * len(part))
                stale = []
                for row in self._db.execute(
                    f"SELECT {_COLUMNS}, key, used FROM entries WHERE key IN ({marks})",  # noqa: S608 - marks
                    part,
                ):
                    with contextlib.suppress(ValueGone):
                        found[row[-2]] = _record(row, codec)
                    if row[-1] < today:
                        stale.append(row[-2])
                if stale:
                    # Only the order of eviction depends on it: a disk that is full may still be read.
                    with contextlib.suppress(sqlite3.OperationalError):
                        marks = ",".join("?" * len(stale))
                        self._db.execute(
                            f"UPDATE entries SET used=? WHERE key IN ({marks})",  # noqa: S608 - only marks
                            (today, *stale),
                        )
        return found

    # -- writing ------------------------------------------------------------------------------------------

    def put(self, key: bytes, record: Record, codec: Codec, *, op: str, model: str) -> None:
        """Store one record and commit it.

        Raises
        ------
        JournalError
            It cannot be written. The record is kept in memory, and found there by :meth:`get_many`.
        """
        extra = None if record.extra is None else json.dumps(record.extra)
        row = (
            codec.encode(record.value),
            record.finish_reason,
            record.prompt_tokens,
            record.cached_tokens,
            record.completion_tokens,
            record.seconds,
            extra,
        )
        with self._lock:
            try:
                self._db.execute(
                    f"INSERT OR REPLACE INTO entries (key, op, model, {_COLUMNS}, used) "  # noqa: S608
                    "VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                    (key, op, model, *row, _today()),
                )
                # The size is looked at after every twentieth of the limit, and overshoots by no more.
                self._written += len(row[0]) + _ROW_BYTES
                if self._written > self.limit // 20:
                    self._written = 0
                    self._shrink(self.limit)
            except sqlite3.Error as error:
                self._unsaved[key] = row
                raise JournalError(
                    f"the results journal cannot be written: {error}.\nFile: {self.path}\n"
                    "Finished rows are in nb.last_run().frame(); running the cell again goes on from them.\n"
                    "Make room (nb.cache.clear() helps), or pass cache=False to go on without a journal.",
                ) from error

    def _bytes(self) -> int:
        pragma = {
            name: self._db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "page_size", "freelist_count")
        }
        return int((pragma["page_count"] - pragma["freelist_count"]) * pragma["page_size"])

    def _shrink(self, limit: int) -> None:
        """Drop what was unused for longest until the entries take 9/10 of ``limit`` or less."""
        if self._bytes() <= limit:
            return
        while self._bytes() > limit * 0.9:
            gone = self._db.execute(
                "DELETE FROM entries WHERE key IN (SELECT key FROM entries ORDER BY used, key LIMIT "
                "(SELECT max(1, count(*) / 20) FROM entries))",
            ).rowcount
            if not gone:
                break
        self._db.executescript(_VACUUM)

    def clear(self, *, op: str | None = None, model: str | None = None) -> int:
        """Remove entries, all or those of an operator or model; return how many."""
        where, values = _where(op=op, model=model)
        with self._lock:
            gone = self._db.execute(f"DELETE FROM entries{where}", values).rowcount  # noqa: S608 - constants
            if self.path is not None and model is None and op in (None, IMAGES):
                _pictures(self.path).clear()
            if not where:
                gone += len(self._unsaved)
                self._unsaved.clear()
            self._db.executescript(_VACUUM)
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return gone

    def info(self) -> CacheInfo:
        """Return what the journal holds."""
        with self._lock:
            rows = self._db.execute("SELECT op, count(*) FROM entries GROUP BY op ORDER BY op").fetchall()
            images, image_bytes = (0, 0) if self.path is None else _pictures(self.path).held()
            return CacheInfo(
                images=images,
                image_bytes=image_bytes,
                path=None if self.path is None else str(self.path),
                entries=sum(count for _, count in rows) + len(self._unsaved),
                bytes=self._bytes(),
                limit=self.limit,
                by_op=dict(rows),
            )


def _pictures(journal: Path) -> Pictures:
    from nbinfer.frames.pictures import open_pictures

    return open_pictures(journal)


def _where(**columns: str | None) -> tuple[str, list[str]]:
    given = {name: value for name, value in columns.items() if value is not None}
    return (" WHERE " + " AND ".join(f"{name}=?" for name in given) if given else ""), list(given.values())


def _record(row: Sequence[Any], codec: Codec) -> Record:
    extra = json.loads(row[6]) if row[6] else None
    return Record(codec.decode(row[0]), row[1], row[2], row[3], row[4], row[5], extra)


def _today() -> int:
    return int(time.time()) // _DAY


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What the results journal holds; ``path`` is None where it lives in memory. Sizes in bytes.

    Images are files of their own, beside it.
    """

    path: str | None
    entries: int
    bytes: int
    limit: int
    by_op: Mapping[str, int]
    images: int = 0
    image_bytes: int = 0

    def __str__(self) -> str:
        per_op = ", ".join(f"{op} {count}" for op, count in self.by_op.items())
        return (
            f"{self.entries} results{f' ({per_op})' if per_op else ''}, {self.bytes / 2**20:.1f} of "
            f"{self.limit / 2**20:.0f} MiB, {self.path or 'in memory'}"
            + (f"; {self.images} images, {self.image_bytes / 2**20:.1f} MiB" if self.images else "")
        )


_open: dict[Path, tuple[int, Journal]] = {}
_open_lock = threading.Lock()


def journal_path() -> Path:
    """Return where the journal of this user lives."""
    from nbinfer.models.cache import cache_dir

    return cache_dir("results", _FILE)


def _limit() -> int:
    return int(configured("journal_bytes").value or DEFAULT_LIMIT)


def open_journal() -> Journal:
    """Return the journal; the same one for the whole process.

    Where its file cannot be made or written, a warning says so and the journal lives in memory: an
    interrupted cell still goes on when it is run again, until the kernel ends.
    """
    path, limit = journal_path(), _limit()
    with _open_lock:
        known = _open.get(path)
        # A connection must not be used across a fork.
        if known is not None and known[0] == os.getpid():
            known[1].limit = limit
            return known[1]
        journal = _open_or_memory(path, limit)
        _open[path] = (os.getpid(), journal)
        return journal


def _open_or_memory(path: Path, limit: int) -> Journal:
    problem: Exception
    try:
        return _open_writable(path, limit)
    except sqlite3.DatabaseError as error:
        problem = error
        # "Not a database", "malformed": the results in it are lost, and new ones must not be.
        if not isinstance(error, sqlite3.OperationalError):
            aside = path.with_suffix(f".damaged-{int(time.time())}")
            with contextlib.suppress(OSError):
                path.replace(aside)
                journal = _open_writable(path, limit)
                _warn(f"the results journal was damaged ({error}) and starts anew; the old file is {aside}.")
                return journal
    except OSError as error:
        problem = error
    _warn(
        f"the results journal {path} cannot be used ({problem}); "
        "results are kept in memory until the kernel ends."
    )
    return Journal(None, limit=limit)


def _open_writable(path: Path, limit: int) -> Journal:
    journal = Journal(path, limit=limit)
    try:
        # A read-only file opens well and fails at the first row; find out now.
        journal._db.execute("BEGIN IMMEDIATE")  # noqa: SLF001 - this module's own
        journal._db.execute("ROLLBACK")  # noqa: SLF001
    except BaseException:
        journal.close()
        raise
    return journal


def _warn(text: str) -> None:
    warnings.warn(text, JournalWarning, stacklevel=2)


class Cache:
    """``nb.cache``: what the results journal holds, and how to empty it."""

    def info(self) -> CacheInfo:
        """Return how many results are kept, their size in bytes, and where."""
        return open_journal().info()

    def clear(self, *, op: str | None = None, model: str | None = None) -> int:
        """Remove results, all or those of an operator (``complete``, …) or model; return how many."""
        return open_journal().clear(op=op, model=model)

    def __repr__(self) -> str:
        return f"nbinfer.cache: {self.info()}"


cache = Cache()


def close_all() -> None:
    """Close every journal of this process: for tests, and before a folder goes away."""
    with _open_lock:
        for pid, journal in _open.values():
            if pid == os.getpid():
                journal.close()
        _open.clear()
