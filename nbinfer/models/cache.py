"""Where nbinfer keeps files that it can make again: converted models, and models for measurements."""

from __future__ import annotations

from pathlib import Path

from nbinfer.contract.settings import configured

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
