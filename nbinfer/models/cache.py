"""Where nbinfer keeps files that it can make again: converted models, and models for measurements."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nbinfer.contract.errors import ModelLoadError
from nbinfer.contract.settings import configured

if TYPE_CHECKING:
    from collections.abc import Callable

CACHE_VARIABLE = "NBINFER_CACHE"


def cache_dir(*parts: str) -> Path:
    """Return the cache folder, or a folder inside it; creates nothing.

    The setting ``cache`` (in the environment: ``NBINFER_CACHE``) names the folder; without it, it is the
    user's cache folder of the platform (``~/.cache/nbinfer`` on Linux).
    """
    folder = configured("cache").value
    if folder:
        return Path(folder).expanduser().joinpath(*parts)
    import platformdirs

    return Path(platformdirs.user_cache_dir("nbinfer", appauthor=False)).joinpath(*parts)


def made_once(
    folder: Path, make: Callable[[Path], object], *, name: str, timeout: float, proof: str = "."
) -> Path:
    """Return a folder of the cache, made when it is not there; one of several processes makes it.

    Parameters
    ----------
    folder
        Where it is to lie. It gets this name when it is whole.
    make
        Writes it to the place that it is called with.
    name
        What it holds, for the error.
    timeout
        Seconds to wait for another process that makes it.
    proof
        What has to be in the folder for it to count as there.

    Raises
    ------
    ModelLoadError
        The cache folder cannot be written.
    """
    if (folder / proof).exists():
        return folder
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock"), timeout=timeout):
            # Another process may have made it while this one waited.
            if not (folder / proof).exists():
                part = folder.with_name(f".{folder.name}.part")
                shutil.rmtree(part, ignore_errors=True)
                make(part)
                shutil.rmtree(folder, ignore_errors=True)
                part.replace(folder)
    except (OSError, Timeout) as problem:
        raise ModelLoadError(
            f"{name} cannot be written to {folder.parent}: {problem}.\n"
            f"Make room, or set {CACHE_VARIABLE} to another folder."
        ) from problem
    return folder
