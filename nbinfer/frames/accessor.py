"""``df.infer.complete(…)``: the operators as methods of frames and Series, for those who ask for it.

Nothing is registered by importing nbinfer: the name would collide with other packages' accessors.
"""

from __future__ import annotations

import sys
from functools import wraps
from importlib import import_module
from typing import Any

NAME = "infer"
_OPERATORS = ("complete", "embed", "extract", "classify", "filter", "submit", "similar")


class Infer:
    """The operators of nbinfer on one frame or Series."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        if name not in _OPERATORS:
            raise AttributeError(
                f"'{NAME}' has no operator {name!r}; it has {', '.join(_OPERATORS)} and rerank."
            )
        operator = getattr(import_module("nbinfer.frames"), name)

        @wraps(operator)
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "similar":  # the frame is the corpus
                return operator(arguments[0], self._data, *arguments[1:], **options)
            return operator(self._data, *arguments, **options)

        return call

    def rerank(self, query: Any, **options: Any) -> Any:
        """Score this frame's rows against a query; see :func:`nbinfer.rerank`."""
        return import_module("nbinfer.frames").rerank(query, self._data, **options)

    def __dir__(self) -> list[str]:
        return sorted({*_OPERATORS, "rerank"})


def enable_accessor() -> None:
    """Give pandas' frames and Series, and polars' where it is imported, the attribute ``infer``.

    ``df.infer.complete("Summarise: {text}")`` is then ``nb.complete(df, "Summarise: {text}")``. Calling it
    again changes nothing.
    """
    import pandas as pd

    for kind, register in (
        (pd.DataFrame, pd.api.extensions.register_dataframe_accessor),
        (pd.Series, pd.api.extensions.register_series_accessor),
    ):
        if not hasattr(kind, NAME):
            register(NAME)(Infer)
    if "polars" in sys.modules:
        import polars as pl

        if not hasattr(pl.DataFrame, NAME):
            pl.api.register_dataframe_namespace(NAME)(Infer)
        if not hasattr(pl.Series, NAME):
            pl.api.register_series_namespace(NAME)(Infer)
