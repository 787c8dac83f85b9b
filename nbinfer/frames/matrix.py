"""Columns of vectors: to a matrix, where it can be without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def vectors(column: Any) -> NDArray[np.float32]:
    """Return a column of vectors as a float32 matrix of shape (rows, dimensions).

    The matrix is a view of the column's own memory (read-only) when the column holds no null and is in one
    piece; otherwise a copy, in which rows without a vector are NaN.

    Parameters
    ----------
    column
        The ``embedding`` column of :func:`nbinfer.embed` in any family, an array that already is a matrix,
        or a list of equally long vectors.

    Raises
    ------
    RequestError
        The column does not hold vectors, or vectors of several lengths.
    """
    if isinstance(column, np.ndarray) and column.ndim == 2:  # noqa: PLR2004 - a matrix
        return np.asarray(column, dtype=np.float32)
    if hasattr(column, "columns"):
        raise RequestError("vectors() takes a column, not a frame: vectors(frame['embedding']).")
    arrow = _arrow(column)
    if arrow is None:
        return _stack(column)
    return _matrix(arrow)


def _arrow(column: Any) -> Any:
    """Return the column as an Arrow array of fixed-size float32 lists; None when it is something else."""
    import pyarrow as pa

    if hasattr(column, "to_arrow"):  # polars
        column = column.to_arrow()
    elif hasattr(column, "array") and hasattr(column.array, "__arrow_array__"):  # pandas
        column = column.array.__arrow_array__()
    elif hasattr(column, "__arrow_array__"):
        column = column.__arrow_array__()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not isinstance(column, pa.Array):
        return None
    if isinstance(column, pa.ChunkedArray):  # combining an empty one gives no array
        column = pa.concat_arrays(column.chunks)
    if pa.types.is_fixed_size_list(column.type):
        return (
            column
            if pa.types.is_float32(column.type.value_type)
            else column.cast(pa.list_(pa.float32(), column.type.list_size))
        )
    return None


def _matrix(array: Any) -> NDArray[np.float32]:
    size = array.type.list_size
    flat = array.values.slice(array.offset * size, len(array) * size)
    if not array.null_count and not flat.null_count:
        found: NDArray[np.float32] = flat.to_numpy(zero_copy_only=True).reshape(len(array), size)
        return found
    out = np.array(flat.to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(array), size)
    out[array.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return out


def _stack(column: Any) -> NDArray[np.float32]:
    items = column.to_pylist() if hasattr(column, "to_pylist") else list(column)
    rows = [None if _missing(item) else _vector(item) for item in items]
    sizes = {row.shape for row in rows if row is not None}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1:
        what = "holds no vector" if not sizes else f"holds vectors of several shapes: {sorted(sizes)[:3]}"
        raise RequestError(f"the column {what}; vectors() takes the embedding column of embed().")
    out = np.full((len(rows), *next(iter(sizes))), np.nan, np.float32)
    for i, row in enumerate(rows):
        if row is not None:
            out[i] = row
    return out


def _vector(item: Any) -> NDArray[np.float32]:
    try:
        return np.asarray(item, dtype=np.float32)
    except (TypeError, ValueError):
        raise RequestError(
            f"the column holds {type(item).__name__}; vectors() takes the embedding column of embed()."
        ) from None


def _missing(item: Any) -> bool:
    return item is None or isinstance(item, float) or type(item).__name__ == "NAType"
