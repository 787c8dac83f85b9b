"""Frames in and frames out: pandas, polars, pyarrow, lists; the same family comes back.

Values are read through narwhals, with missing values masked by ``is_null`` (a pandas ``str`` column gives
``nan`` for them). New columns are built once, as Arrow arrays, and turned into the family's own types here.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nbinfer.contract.errors import RequestError
from nbinfer.frames.prompts import TEXT, UnknownColumn, make_prompt, unknown_column

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nbinfer.frames.prompts import Prompt

META_KEY = "nbinfer"
"""The key of the provenance in ``DataFrame.attrs`` and in Arrow's schema metadata."""


@dataclass(frozen=True)
class Table:
    """Rows of one of the families that nbinfer reads.

    ``native`` is what was given (a list became a pandas Series); ``kind`` says whether results stand beside
    the input's columns (``frame``) or alone.
    """

    native: Any
    family: Literal["pandas", "polars", "pyarrow"]
    kind: Literal["frame", "series", "list"]
    names: tuple[str, ...]
    rows: int

    @property
    def only(self) -> bool:
        """Whether there is one unnamed or named column: a list or a Series."""
        return self.kind != "frame"

    # -- reading ------------------------------------------------------------------------------------------

    def column(self, name: Any) -> Any:
        """Return the family's own column called ``name``.

        Raises
        ------
        RequestError
            There is no such column.
        """
        if self.only:
            return self.native
        if self.family == "pandas":
            found = [c for c in self.native.columns if c == name] if not isinstance(name, str) else []
            found = found or [c for c in self.native.columns if _column_name(c) == str(name)]
            if not found:
                raise unknown_column(str(name), self.names, asked_by="the call")
            return self.native[found[0]]
        if name not in self.names:
            raise unknown_column(str(name), self.names, asked_by="the call")
        return self.native[name]

    def prompt(
        self, prompt: Any, on: Any, *, call: str, default: str | None = None, fixed: bool = False
    ) -> Prompt:
        """Return the prompt that a call's ``prompt`` and ``on`` ask for, over these columns.

        Parameters
        ----------
        call
            The operator's name, for errors.
        default, fixed
            As for :func:`~nbinfer.frames.prompts.make_prompt`.

        Raises
        ------
        RequestError
            Neither or both given, or a column is unknown.
        """
        try:
            return make_prompt(
                prompt, on, self.names, only=self.only, default=default, call=call, fixed=fixed
            )
        except UnknownColumn as error:
            if self.family == "pandas" and self.kind == "frame" and error.name in self.native.index.names:
                raise RequestError(
                    f"{call}: {error.name!r} is the frame's index, which is no column: "
                    "pass frame.reset_index()."
                ) from None
            raise

    def values(self, names: Sequence[str], start: int, stop: int) -> list[list[Any]]:
        """Return the columns' values of some rows as Python objects, missing ones (NaN included) as None."""
        import narwhals.stable.v2 as nw

        out = []
        for name in names:
            column = nw.from_native(self.column(name), series_only=True)[start:stop]
            values = column.to_list()
            if column.is_null().any():
                values = [
                    None if null else v for v, null in zip(values, column.is_null().to_list(), strict=True)
                ]
            if column.dtype.is_float() or column.dtype == nw.Object:
                # Polars keeps NaN apart from null; as text it is never meant.
                values = [None if isinstance(v, float) and v != v else v for v in values]  # noqa: PLR0124
            out.append(values)
        return out

    def label(self, row: int) -> str:
        """Name a row for a message: its position, and its index label where there is one."""
        if self.family == "pandas" and self.kind != "list":
            return f"row {row} (index {self.native.index[row]!r})"
        return f"row {row}"

    def provenance(self) -> dict[str, Any] | None:
        """Return what an earlier call left in ``attrs`` or the schema's metadata; None when nothing did."""
        if self.family == "pandas":
            found = self.native.attrs.get(META_KEY)
            return dict(found) if isinstance(found, Mapping) else None
        if self.family == "pyarrow" and self.kind == "frame":
            raw = (self.native.schema.metadata or {}).get(META_KEY.encode())
            return json.loads(raw) if raw else None
        if self.family == "polars" and self.kind == "frame":
            return _polars_made.info(self.native)
        return None

    # -- writing ------------------------------------------------------------------------------------------

    def earlier(self, value_names: Iterable[str]) -> set[str]:
        """Return the columns that earlier calls with a value column of these names left: ours to replace."""
        entry = self.provenance() or {}
        return _columns_of([entry, *entry.get("earlier", [])], set(value_names)) & set(self.names)

    def free_names(
        self,
        value_names: Sequence[str],
        side_names: Sequence[str],
        *,
        prefix: str,
        keep: bool,
        can_drop: bool = True,
    ) -> dict[str, str]:
        """Choose names for the side columns so that none of the input's is overwritten.

        What an earlier call of ours left under the same names is replaced, so that a cell can run again. The
        side columns (``error``, …) all take the prefix ``<prefix>_`` as soon as one of them is taken, by
        the frame or by a value column, so that a call's columns stay recognisable as a group.

        Raises
        ------
        RequestError
            A value column's name is taken, or a prefixed one is.
        """
        _unique(value_names)
        own = self.earlier(value_names)
        taken = set(self.names) - own if keep and self.kind == "frame" else set()
        clash = [name for name in value_names if name in taken]
        alone = ", or pass keep=False" if can_drop else ""
        if clash:
            # The call's option names one of its columns; others have the names of fields or labels.
            other = f"choose another name (name='{prefix}2'), " if clash[0] == prefix else ""
            advice = f"{other}rename the column or drop it{alone}."
            raise RequestError(
                f"the frame already has a column {clash[0]!r}, and nothing of yours is overwritten.\n"
                f"{advice[0].upper()}{advice[1:]}",
            )
        if (taken | set(value_names)).isdisjoint(side_names):
            return {name: name for name in side_names}
        prefixed = {name: f"{prefix}_{name}" for name in side_names}
        clash = sorted((taken | set(value_names)) & set(prefixed.values()))
        if clash:
            raise RequestError(
                f"the frame already has {', '.join(map(repr, clash))}, and nothing of yours is overwritten.\n"
                f"Choose another name than {prefix!r} (name=…), or drop them{alone}.",
            )
        return prefixed

    def take(self, rows: NDArray[np.int64]) -> Any:
        """Return some of the rows, in the family (and, for a list, the list) that came in."""
        if self.kind == "list":
            return [self.native.iloc[row] for row in rows.tolist()]
        if self.family == "pandas":
            return self.native.take(rows)
        if self.family == "polars":
            return self.native[rows]
        import pyarrow as pa

        return self.native.take(pa.array(rows))

    def series(self, values: NDArray[Any], missing: NDArray[np.bool_], *, name: str) -> Any:
        """Return one value per row as the family's own series, with the index that came in."""
        import pyarrow as pa

        array = pa.array(values, mask=missing)
        if self.family == "pandas":
            import pandas as pd

            return pd.Series(to_pandas(array), index=self.native.index, name=name)
        return _to_polars(array).alias(name) if self.family == "polars" else array

    def with_columns(
        self,
        columns: Mapping[str, Any],
        *,
        keep: bool = True,
        rows: NDArray[np.int64] | None = None,
        info: Mapping[str, Any] | None = None,
        replace: Iterable[str] = (),
    ) -> Any:
        """Return the rows with new columns, in the family that came in.

        Parameters
        ----------
        columns
            Arrow arrays by name, in order.
        keep
            Whether a frame's own columns stay; a list's or Series' values never do.
        rows
            Positions of the input rows that the new columns belong to; None: all, in order.
        info
            Provenance, plain JSON.
        replace
            The value columns: what earlier calls left under their names goes.
        """
        keep = keep and self.kind == "frame"
        old = self.earlier(replace) if keep else set()
        if self.family == "pandas":
            return _pandas_frame(self, columns, keep=keep, rows=rows, info=info, old=old)
        if self.family == "polars":
            import polars as pl

            new = [_to_polars(array).alias(name) for name, array in columns.items()]
            out = pl.DataFrame(new)
            if keep:
                own = self.native.drop(sorted(old))
                out = (own if rows is None else own[rows]).with_columns(new)
            if info is not None:
                _polars_made.remember(out, chain(info, self.provenance(), old))
            return out
        import pyarrow as pa

        if keep:
            table = self.native.drop_columns(sorted(old))
            table = table if rows is None else table.take(pa.array(rows))
            for name, array in columns.items():
                table = table.append_column(name, array)
        else:
            table = pa.table(dict(columns))
        if info is not None:
            metadata = dict(table.schema.metadata or {})
            metadata[META_KEY.encode()] = json.dumps(chain(info, self.provenance(), old)).encode()
            table = table.replace_schema_metadata(metadata)
        return table


class _Made:
    """What made a frame that has no place to say it: known for as long as that very frame is there."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], dict[str, Any]]] = {}

    def remember(self, frame: Any, info: dict[str, Any]) -> None:
        key = id(frame)
        self._known[key] = (weakref.ref(frame, lambda _: self._known.pop(key, None)), info)

    def info(self, frame: Any) -> dict[str, Any] | None:
        reference, info = self._known.get(id(frame), (None, None))
        return dict(info) if info is not None and reference is not None and reference() is frame else None


_polars_made = _Made()


def chain(
    info: Mapping[str, Any], earlier: Mapping[str, Any] | None, old: Iterable[str] = ()
) -> dict[str, Any]:
    """Put this call's provenance on top, with that of the calls before it under ``earlier``.

    Calls whose columns (``old``) this one replaced are forgotten.
    """
    if not earlier:
        return dict(info)
    older = dict(earlier)
    calls = [*older.pop("earlier", []), older]
    left = [call for call in calls if set(old).isdisjoint(call.get("columns", ()))]
    return {**info, "earlier": left} if left else dict(info)


def _columns_of(calls: Sequence[Mapping[str, Any]], values: set[str]) -> set[str]:
    """Return the columns of the calls that made one of ``values``."""
    found: set[str] = set()
    for call in calls:
        columns = set(call.get("columns", ()))
        if columns & values:
            found |= columns
    return found


def read(data: Any) -> Table:
    """Take a list, tuple, Series or DataFrame (pandas, polars, pyarrow).

    Raises
    ------
    RequestError
        The data is something else, lazy, or has columns of one name.
    """
    if isinstance(data, str | bytes | Mapping):
        rather = "pandas.DataFrame(data)" if isinstance(data, Mapping) else "infer(), for one prompt"
        raise RequestError(
            f"data is one {type(data).__name__}; it is a list, Series or DataFrame. Try {rather}."
        )
    if isinstance(data, list | tuple):
        import pandas as pd

        items = pd.Series(list(data), dtype=object)
        return Table(items, "pandas", "list", (TEXT,), len(items))
    # The families, and classes made of theirs, are told apart without importing those that are not in use.
    modules = [kind.__module__.partition(".")[0] for kind in type(data).__mro__]
    module = next((each for each in modules if each in ("pandas", "polars", "pyarrow", "numpy")), "")
    if module == "pandas" and "pandas" in sys.modules:
        return _read_pandas(data)
    if module == "polars":
        return _read_polars(data)
    if module == "pyarrow":
        return _read_arrow(data)
    if module == "numpy" and getattr(data, "ndim", 0) == 1:
        return read(data.tolist())
    raise RequestError(
        f"data is {type(data).__module__}.{type(data).__name__}; it is a list, or a Series or DataFrame of "
        "pandas, polars or pyarrow.",
    )


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
    if twice:
        raise RequestError(f"column names repeat: {', '.join(map(repr, twice))}. Rename them first.")
    return tuple(names)


def _series_name(name: Any) -> tuple[str, ...]:
    return (TEXT,) if name is None or name == "" else (str(name),)


def _read_pandas(data: Any) -> Table:
    import pandas as pd

    # A run may outlive the cell: what is done to the caller's own frame meanwhile must not reach its rows.
    if isinstance(data, pd.DataFrame):
        names = _unique([_column_name(c) for c in data.columns])
        return Table(data.copy(deep=False), "pandas", "frame", names, len(data))
    if isinstance(data, pd.MultiIndex):
        raise RequestError("data is an index of several levels: pass index.to_frame(index=False).")
    if isinstance(data, pd.Index | pd.api.extensions.ExtensionArray):
        data = pd.Series(data)
    if not isinstance(data, pd.Series):
        raise RequestError(
            f"data is a pandas {type(data).__name__}; it is a DataFrame, a Series, an index or an array."
        )
    return Table(data.copy(deep=False), "pandas", "series", _series_name(data.name), len(data))


def column_label(frame: Any, name: str) -> Any:
    """Return the label of a new column in a pandas frame: where columns have levels, the first one's."""
    levels = frame.columns.nlevels
    return name if levels == 1 else (name, *[""] * (levels - 1))


def _column_name(label: Any) -> str:
    """Return what a pandas column is called; where columns have levels, empty ones are no part of it."""
    if isinstance(label, tuple):
        said = [part for part in label if part != ""]
        label = said[0] if len(said) == 1 else label
    return str(label)


def _read_polars(data: Any) -> Table:
    import polars as pl

    if isinstance(data, pl.DataFrame):
        own = data.clone()
        made = _polars_made.info(data)
        if made is not None:
            _polars_made.remember(own, made)
        return Table(own, "polars", "frame", tuple(data.columns), data.height)
    if isinstance(data, pl.Series):
        return Table(data, "polars", "series", _series_name(data.name), len(data))
    raise RequestError(f"data is a polars {type(data).__name__}: call .collect() on it first.")


def _read_arrow(data: Any) -> Table:
    import pyarrow as pa

    if isinstance(data, pa.RecordBatch):
        data = pa.Table.from_batches([data])
    if isinstance(data, pa.Table):
        return Table(data, "pyarrow", "frame", _unique(data.column_names), data.num_rows)
    if isinstance(data, pa.Array):
        data = pa.chunked_array([data])
    if isinstance(data, pa.ChunkedArray):
        return Table(data, "pyarrow", "series", (TEXT,), len(data))
    raise RequestError(
        f"data is a pyarrow {type(data).__name__}; it is a Table, an array or a chunked array."
    )


# -- Arrow to each family's own types ----------------------------------------------------------------------


def _pandas_frame(
    table: Table,
    columns: Mapping[str, Any],
    *,
    keep: bool,
    rows: NDArray[np.int64] | None,
    info: Mapping[str, Any] | None,
    old: set[str],
) -> Any:
    import pandas as pd

    native = table.native
    if old:
        native = native.loc[:, [_column_name(column) not in old for column in native.columns]]
    if rows is None:
        index = native.index
        out = native.copy(deep=False) if keep else pd.DataFrame(index=index)
    else:
        index = native.index.take(rows)
        out = native.take(rows) if keep else pd.DataFrame(index=index)
    # One concat, not one assignment per column: positions, not labels, so duplicate labels are safe.
    new = pd.DataFrame(
        {name: pd.Series(to_pandas(array), index=index) for name, array in columns.items()}, index=index
    )
    attrs = dict(table.native.attrs)
    if keep and len(out.columns):
        for position, name in enumerate(new.columns, start=len(out.columns)):
            out.insert(position, column_label(out, name), new[name].array)
    else:
        out = new
    out.attrs = attrs if info is None else {**attrs, META_KEY: chain(info, table.provenance(), old)}
    return out


def to_pandas(array: Any) -> Any:
    """Turn an Arrow array into the pandas array of the matching type.

    Text becomes ``str``, integers ``Int32`` and ``Int64``, float64 ``Float64``, booleans ``boolean``,
    dictionaries ``category``, timestamps ``datetime64``, float32 plain NumPy (NaN for missing), int16 (which
    only counts samples and is never missing) plain NumPy too, and everything nested stays Arrow.
    """
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return string_dtype().__from_arrow__(array)
    if pa.types.is_dictionary(kind):
        codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return pd.Categorical.from_codes(codes.tolist(), categories=array.dictionary.to_pylist())
    if pa.types.is_float32(kind):
        return np.array(array.to_numpy(zero_copy_only=False), dtype=np.float32)
    nullable = {
        pa.int32(): "Int32",
        pa.int64(): "Int64",
        pa.float64(): "Float64",
        pa.bool_(): "boolean",
    }
    if pa.types.is_int16(kind):
        return array.to_numpy(zero_copy_only=False)
    if kind in nullable:
        dtype: Any = pd.api.types.pandas_dtype(nullable[kind])
        return dtype.__from_arrow__(array)
    if pa.types.is_timestamp(kind):
        return array.to_pandas().array
    return pd.arrays.ArrowExtensionArray(pa.chunked_array([array]))


def string_dtype() -> Any:
    """Return pandas' own default text type: ``str`` in pandas 3, ``string`` before."""
    import numpy as np
    import pandas as pd

    if int(pd.__version__.partition(".")[0]) >= 3:  # noqa: PLR2004 - pandas 3 made it the default
        return pd.StringDtype(na_value=np.nan)
    return pd.StringDtype("pyarrow")


def _to_polars(array: Any) -> Any:
    import polars as pl
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        return pl.Series(
            array.cast(pa.large_string()).to_pylist(), dtype=pl.Enum(array.dictionary.to_pylist())
        )
    return pl.from_arrow(array)
