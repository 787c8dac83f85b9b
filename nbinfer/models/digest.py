"""The identity of a model's weights: the SHA-256 of its files, computed once per file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nbinfer.models.cache import cache_dir

if TYPE_CHECKING:
    from collections.abc import Sequence

# Stores that name a file after its SHA-256: blobs/<hex>, blobs/sha256-<hex>, blobs/sha256/<hex>.
_BLOB = re.compile(r"(?:^|/)blobs/(?:sha256[-/])?([0-9a-f]{64})$")
# A file that was written this recently may be written again without its time changing.
_SETTLED_NS = 2 * 10**9


def weights_digest(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Return the SHA-256 (64 hex digits) of a model's files; of several, that of their digests in order.

    A file in a content-addressed store has its digest in its name, which the program that stored it has
    checked. Any other file is read once (about 1 s per GB); the answer is kept in the cache folder, beside
    the file's size, time and inode, and holds until one of them changes.

    Raises
    ------
    OSError
        A file cannot be read.
    """
    digests = [file_digest(path) for path in paths]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of one file, from its name, from the cache, or by reading it."""
    real = Path(os.path.realpath(path))
    blob = _BLOB.search(real.as_posix())
    if blob is not None:
        return blob[1]
    identity = _identity(real)
    record = cache_dir("digests") / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    known = _recall(record, identity)
    if known is not None:
        return known
    with real.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _identity(real) == identity and time.time_ns() - real.stat().st_mtime_ns > _SETTLED_NS:
        _remember(record, {**identity, "sha256": digest})
    return digest


def _identity(path: Path) -> dict[str, str | int]:
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _recall(record: Path, identity: dict[str, str | int]) -> str | None:
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or any(known.get(key) != value for key, value in identity.items()):
        return None
    digest = known.get("sha256")
    return digest if isinstance(digest, str) else None


def _remember(record: Path, entry: dict[str, str | int]) -> None:
    """Write a record, whole or not at all; a cache folder that cannot be written only costs time."""
    part = record.with_name(f"{record.name}.{os.getpid()}.part")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(entry), encoding="utf-8")
        part.replace(record)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
