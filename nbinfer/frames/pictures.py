"""Images of the results journal: PNG files named by their digest, beside the journal's own file.

The journal's entry of an image is its digest. A file that is gone, or is not what its name says, is an entry
that is not there: the image is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import TYPE_CHECKING

from nbinfer.contract.errors import ConfigError
from nbinfer.frames.journal import JournalError, ValueGone, journal_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE_VARIABLE = "NBINFER_IMAGES_BYTES"
DEFAULT_LIMIT = 4 * 2**30
_CHECK_EVERY = 64


class Pictures:
    """PNG files by digest, in a folder that keeps to a limit: those unused for longest go first.

    Parameters
    ----------
    folder
        Where; made when the first image comes.
    limit
        Bytes that all files may take.
    """

    def __init__(self, folder: Path, *, limit: int = DEFAULT_LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        self._added = 0

    def path(self, digest: str) -> Path:
        """Return where the image of a digest lies, if it is there."""
        return self.folder / digest[:2] / f"{digest}.png"

    def put(self, png: bytes) -> str:
        """Keep an image; returns its digest, 64 hex digits of SHA-256.

        Raises
        ------
        JournalError
            It cannot be written.
        """
        digest = hashlib.sha256(png).hexdigest()
        path = self.path(digest)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(png)
                part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise JournalError(
                f"an image cannot be kept: {error}.\nFinished rows are in nb.last_run().frame().\n"
                "Make room (nb.cache.clear() helps), or pass cache=False to go on without a journal."
            ) from error
        self._added += 1
        if self._added % _CHECK_EVERY == 0:
            self._shrink()
        return digest

    def get(self, digest: str) -> bytes:
        """Return an image.

        Raises
        ------
        ValueGone
            It is not there any more, or is not what its name says.
        """
        path = self.path(digest)
        try:
            png = path.read_bytes()
            os.utime(path)
        except OSError as error:
            raise ValueGone(f"the image {digest[:12]}… is gone: {error}") from None
        if hashlib.sha256(png).hexdigest() != digest:
            # It would stand in the way of the right one.
            with contextlib.suppress(OSError):
                path.unlink()
            raise ValueGone(f"the image {digest[:12]}… was changed.")
        return png

    def clear(self) -> int:
        """Remove all images; returns how many."""
        gone = 0
        for path, _ in self._files():
            with contextlib.suppress(OSError):
                path.unlink()
                gone += 1
        return gone

    def held(self) -> tuple[int, int]:
        """Return how many images there are, and their bytes."""
        sizes = [status.st_size for _, status in self._files()]
        return len(sizes), sum(sizes)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("??/*.png"):
            with contextlib.suppress(OSError):
                yield path, path.stat()

    def _shrink(self) -> None:
        files = sorted(self._files(), key=lambda each: each[1].st_mtime)
        size = sum(status.st_size for _, status in files)
        if size <= self.limit:
            return
        for path, status in files:
            with contextlib.suppress(OSError):
                path.unlink()
                size -= status.st_size
            if size <= self.limit * 0.9:
                break


def open_pictures(journal: Path | None = None) -> Pictures:
    """Return the images beside a journal's file; None: beside this user's.

    Raises
    ------
    ConfigError
        ``NBINFER_IMAGES_BYTES`` is no number of bytes.
    """
    text = os.environ.get(SIZE_VARIABLE, str(DEFAULT_LIMIT))
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{SIZE_VARIABLE}={text!r}: it is a number of bytes, at least 1.")
    return Pictures((journal or journal_path()).with_name("images"), limit=int(text))
