"""How much of a disk some folders take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def disk_usage(paths: Iterable[Path]) -> int:
    """Return the bytes of all files in and under ``paths``, each file once.

    Hard links to one file, and symbolic links to it (a store of shared blobs), count as that file. What
    cannot be read, or is gone, counts as nothing.
    """
    sizes: dict[tuple[int, int], int] = {}
    for path in paths:
        for file in _files(path):
            try:
                found = file.stat()
            except OSError:
                continue
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def _files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        yield path
        return
    # Folders behind symbolic links are not entered: they may lead back here.
    for folder, _, names in os.walk(path):
        for name in names:
            yield Path(folder, name)
