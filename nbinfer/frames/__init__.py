"""A model over the rows of a frame.

Columns come out typed, one bad row is one bad row, and interrupted work goes on when it is run again.

The names are looked up when they are first used, so that importing this room costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbinfer.frames.accessor import enable_accessor
    from nbinfer.frames.cluster import release
    from nbinfer.frames.images import generate_images, save_images
    from nbinfer.frames.joining import join
    from nbinfer.frames.journal import cache
    from nbinfer.frames.judge import classify, filter  # noqa: A004 - the operator's common name
    from nbinfer.frames.matrix import vectors
    from nbinfer.frames.operators import complete, embed, submit
    from nbinfer.frames.prompts import jinja
    from nbinfer.frames.ranking import rerank
    from nbinfer.frames.run import Run, last_run
    from nbinfer.frames.searching import similar
    from nbinfer.frames.typed import extract

_WHERE = {
    "complete": "operators",
    "embed": "operators",
    "submit": "operators",
    "vectors": "matrix",
    "similar": "searching",
    "jinja": "prompts",
    "cache": "journal",
    "last_run": "run",
    "Run": "run",
    "extract": "typed",
    "classify": "judge",
    "filter": "judge",
    "rerank": "ranking",
    "join": "joining",
    "release": "cluster",
    "enable_accessor": "accessor",
    "generate_images": "images",
    "save_images": "images",
}

__all__ = [
    "Run",
    "cache",
    "classify",
    "complete",
    "embed",
    "enable_accessor",
    "extract",
    "filter",
    "generate_images",
    "jinja",
    "join",
    "last_run",
    "release",
    "rerank",
    "save_images",
    "similar",
    "submit",
    "vectors",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
