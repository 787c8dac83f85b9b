"""Where the bytes of a header come from: a file on disk, bytes in memory, or a server."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from io import FileIO

_WINDOW = 256 * 1024


class SourceError(Exception):
    """Bytes cannot be had; whoever parses them says it in the words of its format.

    ``missing`` is True when there is no such file at all.
    """

    def __init__(self, problem: str, *, missing: bool = False) -> None:
        super().__init__(problem)
        self.missing = missing


class Source(Protocol):
    """Random access to a file of known size."""

    @property
    def name(self) -> str:
        """What to call the file in messages."""
        ...

    @property
    def size(self) -> int:
        """Size of the whole file in bytes."""
        ...

    def read(self, offset: int, n: int) -> bytes:
        """Return at least the ``n`` bytes at ``offset``, which lie inside the file; more when it is cheap.

        Raises
        ------
        SourceError
            The bytes cannot be had.
        """
        ...


class MemorySource:
    """Bytes that are already here, perhaps the start of a larger file."""

    def __init__(self, data: bytes, size: int | None = None, name: str = "<bytes>") -> None:
        self.name = name
        self.size = len(data) if size is None else size
        self._data = data

    def read(self, offset: int, n: int) -> bytes:
        """Return the bytes from ``offset`` on."""
        data = self._data[offset:] if offset else self._data
        if len(data) < n:
            raise SourceError(
                f"{self.name}: only the first {len(self._data):,} of {self.size:,} bytes are here."
            )
        return data


class FileSource:
    """A file on disk, read with plain reads.

    Not mapped into memory: when another program cuts a mapped file short, touching it kills the process.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._file: FileIO | None = None
        try:
            # Checked before opening: opening a named pipe would wait for a writer.
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise SourceError(f"{self.name} is not a file.")
            self._file = self.path.open("rb", buffering=0)
            self.stat = os.fstat(self._file.fileno())
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            self.close()
            reason = getattr(error, "strerror", None) or error
            missing = isinstance(error, FileNotFoundError)
            raise SourceError(f"{self.name} cannot be opened: {reason}.", missing=missing) from error
        self.size = self.stat.st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, offset: int, n: int) -> bytes:
        """Read a window at ``offset``."""
        if self._file is None:
            raise SourceError(f"{self.name} is closed.")
        wanted = max(n, _WINDOW)
        pieces: list[bytes] = []
        got = 0
        try:
            self._file.seek(offset)
            while got < n:  # a read may return less than it was asked for
                piece = self._file.read(wanted - got)
                if not piece:
                    break
                pieces.append(piece)
                got += len(piece)
        except OSError as error:
            raise SourceError(f"{self.name} cannot be read at byte {offset:,}: {error.strerror}.") from error
        if got < n:
            raise SourceError(
                f"{self.name} ended at byte {offset + got:,} of {self.size:,}: it was cut while it was read.",
            )
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
