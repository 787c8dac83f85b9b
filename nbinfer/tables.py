"""DataFrames that know what they show, so that a notebook can draw them with badges."""

from __future__ import annotations

from typing import Any

import pandas as pd

from nbinfer.contract import rendering


class InfoTable(pd.DataFrame):
    """A DataFrame of statuses, loaded models or files; everything derived from it is a plain DataFrame.

    ``attrs["nbinfer_table"]`` names what it shows: ``status``, ``ps`` or ``models``.
    """

    @property
    def _constructor(self) -> Any:
        return pd.DataFrame

    @property
    def kind(self) -> str:
        """What the table shows."""
        return str(self.attrs.get("nbinfer_table", ""))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        del include, exclude
        return rendering.mimebundle(self)


class ImageFrame(pd.DataFrame):
    """A DataFrame with images in it, which a notebook shows as thumbnails; so do its parts and copies."""

    @property
    def _constructor(self) -> Any:
        return ImageFrame

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        del include, exclude
        return rendering.mimebundle(self)


def table(kind: str, rows: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    """Build an :class:`InfoTable` with these columns, also when there are no rows."""
    frame = InfoTable(pd.DataFrame(rows, columns=columns))
    frame.attrs["nbinfer_table"] = kind
    return frame
