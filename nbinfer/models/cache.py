"""Where nbinfer keeps files that it can make again: converted models, and models for measurements."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "NBINFER_CACHE"


def cache_dir(*parts: str) -> Path:
    """Return the cache folder, or a folder inside it; creates nothing.

    The environment variable ``NBINFER_CACHE`` names the folder; without it, it is the user's cache folder
    of the platform (``~/.cache/nbinfer`` on Linux).
    """
    configured = os.environ.get(CACHE_VARIABLE)
    if configured:
        return Path(configured).expanduser().joinpath(*parts)
    import platformdirs

    return Path(platformdirs.user_cache_dir("nbinfer", appauthor=False)).joinpath(*parts)
