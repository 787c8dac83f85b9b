"""Which weights llama.cpp copies out of the file into an order that the processor computes faster in.

Rules of ggml's CPU backend: AMX's tiles first (``ggml/src/ggml-cpu/amx``), then groups of interleaved rows
(``ggml/src/ggml-cpu/repack.cpp``). What is copied does not stay mapped.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from nbinfer.processor import flags, has_amx
from nbinfer.processor.amx import BATCHED, computes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.gguf import TensorInfo

# Interleaved rows: type -> the multiple that the number of rows must have.
_AVX2 = {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8}
_AVX512 = _AVX2 | {"Q2_K": 8}
_NEON = {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "IQ4_NL": 4, "MXFP4": 4, "Q8_0": 4}
# AMX's tiles: type -> the multiple that a row's length must have, and the bytes added to each such piece.
_TILES = {
    "Q4_0": (32, 0),
    "Q4_1": (32, 0),
    "Q8_0": (32, 4),
    "Q4_K": (256, 4),
    "Q5_K": (256, 4),
    "Q6_K": (256, 0),
    "IQ4_XS": (256, 2),
    "F16": (16, 0),
}
_TILE_ROWS = 32
# Beside tiles these are copied unchanged.
_BATCHED = re.compile(BATCHED)
_MATRIX, _EXPERTS = 2, 3  # dimensions


@dataclass(frozen=True, slots=True)
class Rearranging:
    """What a processor, and the build of llama.cpp for it, rearranges.

    Attributes
    ----------
    rows
        Tensor types of which rows are interleaved, and the multiple that their number must have.
    tiles
        Whether weights are put in AMX's tiles where they can be.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    tiles: bool = False

    def copied(self, tensor: TensorInfo, *, expert: bool = False) -> int:
        """Return the bytes of the copy of a matrix that is multiplied with; 0: it stays in the file."""
        if self.tiles and _BATCHED.search(tensor.name):
            return tensor.n_bytes
        dimensions = len(tensor.shape)
        if dimensions != (_EXPERTS if expert else _MATRIX):
            return 0
        columns, rows = tensor.shape[:2]
        if self.tiles and not expert and tensor.type in _TILES and rows % _TILE_ROWS == 0:
            piece, added = _TILES[tensor.type]
            if columns % piece == 0:
                return tensor.n_bytes + rows * columns // piece * added
        multiple = self.rows.get(tensor.type)
        return tensor.n_bytes if multiple and rows % multiple == 0 else 0


NOTHING = Rearranging()


def rearranging() -> Rearranging:
    """Return what is rearranged on this machine.

    Read from the processor's flags: llama.cpp is built for the machine it is installed on. Whether AMX is
    used depends on the build as well, which is tried once, in a process of its own (0.1 s).
    """
    return _rearranging(tiles=has_amx() and _amx_computes())


@cache
def _rearranging(*, tiles: bool) -> Rearranging:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return Rearranging(_NEON)
    known = flags()
    rows = _AVX512 if "avx512f" in known else _AVX2 if "avx2" in known else {}
    return Rearranging(rows, tiles)


def _amx_computes() -> bool:
    from nbinfer.memory.probe import ProbeUnavailable, library_folder
    from nbinfer.memory.probe.abi import library_path

    try:
        return computes(str(library_path(library_folder())))
    except (ProbeUnavailable, FileNotFoundError):
        return False
