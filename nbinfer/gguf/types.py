"""Numbers of the GGUF format: tensor types, value types, file types.

They come from the ``gguf`` package, which tracks llama.cpp, so that a new quantisation needs no change here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

UINT32 = 4
STRING = 8
ARRAY = 9

# How each scalar is stored, by the value type's name (little-endian, `struct` codes).
_CODES = {
    "UINT8": "B",
    "INT8": "b",
    "UINT16": "H",
    "INT16": "h",
    "UINT32": "I",
    "INT32": "i",
    "FLOAT32": "f",
    "BOOL": "?",
    "UINT64": "Q",
    "INT64": "q",
    "FLOAT64": "d",
}


@dataclass(frozen=True, slots=True)
class TensorType:
    """One tensor type: ``block`` elements are stored in ``n_bytes`` bytes."""

    name: str
    block: int
    n_bytes: int


# Where version 0.19 of the package differs from ggml: two half-precision numbers in a Q8_1 block, not two
# of single precision, and a type that it does not know yet.
_AS_IN_GGML = {9: TensorType("Q8_1", 32, 36), 42: TensorType("Q2_0", 64, 18)}


@cache
def tensor_types() -> Mapping[int, TensorType]:
    """Tensor types by their number in the file."""
    from gguf.constants import GGML_QUANT_SIZES

    kinds = {int(kind): TensorType(kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    return MappingProxyType(kinds | _AS_IN_GGML)


@cache
def tensor_type_numbers() -> Mapping[str, int]:
    """Numbers of the tensor types by name."""
    return MappingProxyType({kind.name: number for number, kind in tensor_types().items()})


@cache
def value_types() -> Mapping[int, tuple[str, str]]:
    """``(name, struct code)`` of the scalar value types by their number; strings and arrays have no code."""
    from gguf.constants import GGUFValueType

    return MappingProxyType({int(t): (t.name.lower(), _CODES.get(t.name, "")) for t in GGUFValueType})


@cache
def file_type_label(number: int) -> str | None:
    """Return the common name of a ``general.file_type``, such as ``Q4_K_M``; None when unknown."""
    from gguf.constants import LlamaFileType

    guessed = int(LlamaFileType.GUESSED)
    try:
        return LlamaFileType(number & ~guessed).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return None


@cache
def pooling_name(number: int) -> str | None:
    """Return the name of a ``pooling_type`` in lower case; None when unknown."""
    from gguf.constants import PoolingType

    return next((kind.name.lower() for kind in PoolingType if kind == number), None)
