"""Parsed headers kept on disk, for files that are slow to reach.

A local header is read in milliseconds, about as fast as a summary of it could be; only headers from a server,
which take megabytes of download, are kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nbinfer.gguf.header import ArraySummary, Header, TensorInfo

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = 1
_FIELDS = ("source", "version", "alignment", "data_offset", "file_size")


def remember(folder: Path, identity: str, header: Header) -> None:
    """Keep a header; a folder that cannot be written only costs time later."""
    plain = header._plain_entries  # noqa: SLF001 - of the same room
    summary = {
        "format": _FORMAT,
        "identity": identity,
        **{name: getattr(header, name) for name in _FIELDS},
        "files": header.files,
        "metadata": [[key, _encoded(value)] for key, value in header.metadata.items()],
        "tensors": header.tensors,
        "plain": None if plain is None else base64.b85encode(plain).decode(),
        "n_plain": header._n_plain_entries,  # noqa: SLF001
    }
    path = _path(folder, identity)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(summary), encoding="utf-8")
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def recall(folder: Path, identity: str) -> Header | None:
    """Return the header that was kept under ``identity``, or None."""
    try:
        summary = json.loads(_path(folder, identity).read_text(encoding="utf-8"))
        if summary["format"] != _FORMAT or summary["identity"] != identity:
            return None
        plain = summary["plain"]
        return Header(
            **{name: summary[name] for name in _FIELDS},
            files=tuple(summary["files"]),
            metadata={key: _decoded(value) for key, value in summary["metadata"]},
            tensors=tuple(TensorInfo(name, tuple(shape), *rest) for name, shape, *rest in summary["tensors"]),
            _plain_entries=None if plain is None else base64.b85decode(plain),
            _n_plain_entries=summary["n_plain"],
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _path(folder: Path, identity: str) -> Path:
    return folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"


def _encoded(value: Any) -> Any:
    if isinstance(value, ArraySummary):
        return {"array": value}
    return {"values": value} if isinstance(value, tuple) else value


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return ArraySummary(*value["array"]) if "array" in value else tuple(value["values"])
