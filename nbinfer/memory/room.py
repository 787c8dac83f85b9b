"""How large a compute buffer gets: ggml's graph allocator, re-enacted on the sizes alone.

Which result is placed after which, and when its room is free again, stands in a schedule; where it is placed
is a best-fit search over the holes between the others. The same steps on a list of sizes give the same number
of bytes as ``ggml-alloc.c`` does.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbinfer.memory.layout import CPU
from nbinfer.memory.shape import CPU_ALIGNMENT, GPU_ALIGNMENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

TAKE, FREE = -1, -2


@dataclass(frozen=True, slots=True)
class Schedule:
    """When what is placed and given back, on each device, and how large it is.

    Attributes
    ----------
    events
        Of each device, in order: ``(piece, TAKE)``, ``(piece, FREE)``, or ``(piece, other)`` where a piece
        takes over the room of another one.
    sizes
        Bytes of each piece, without what grows with the cache.
    growing
        ``(piece, bytes per cell, whether of the cells of a window)`` of those that do.
    """

    events: Mapping[int, Sequence[tuple[int, int]]]
    sizes: Sequence[int]
    growing: Sequence[tuple[int, int, bool]]

    def buffers(self, cells: int = 0, window_cells: int = 0) -> dict[int, int]:
        """Return the bytes of each device's buffer; the CPU's is ``CPU``.

        Parameters
        ----------
        cells, window_cells
            Cells of the cache, and of that of blocks with a window.
        """
        sizes = list(self.sizes)
        for piece, per_cell, windowed in self.growing:
            sizes[piece] += per_cell * (window_cells if windowed else cells)
        return {
            device: _most(events, sizes, CPU_ALIGNMENT if device == CPU else GPU_ALIGNMENT)
            for device, events in self.events.items()
        }


def _most(events: Iterable[tuple[int, int]], sizes: Sequence[int], alignment: int) -> int:
    """Return how many bytes of a buffer are ever used."""
    room = _Room()
    padded = [-(-size // alignment) * alignment for size in sizes]
    addresses = [0] * len(padded)
    for piece, other in events:
        size = padded[piece]
        if other == TAKE:
            addresses[piece] = room.take(size)
        elif other == FREE:
            room.free(addresses[piece], size)
        else:
            addresses[piece] = address = addresses[other]
            if padded[other] > size:
                # What a smaller result leaves of the room that it took over.
                room.free(address + size, padded[other] - size)
    return room.most


_ENDLESS = 1 << 62


class _Room:
    """One buffer: free blocks by address, the last one endless; ``most`` is how far it was ever used."""

    __slots__ = ("_offsets", "_sizes", "most")

    def __init__(self) -> None:
        self._offsets = [0]
        self._sizes = [_ENDLESS]
        self.most = 0

    def take(self, size: int) -> int:
        """Return the address of ``size`` bytes: the smallest hole that fits, else the end."""
        best, best_size = -1, _ENDLESS
        for index, hole in enumerate(self._sizes):
            if size <= hole <= best_size:
                best, best_size = index, hole
        address = self._offsets[best]
        end = address + size
        if size == best_size:
            del self._offsets[best], self._sizes[best]
        else:
            self._offsets[best] = end
            self._sizes[best] = best_size - size
        self.most = max(self.most, end)
        return address

    def free(self, address: int, size: int) -> None:
        """Give ``size`` bytes back, joined with the first free block that they touch, and its neighbour.

        Also for nothing at all: ggml keeps empty blocks, and they keep their neighbours apart.
        """
        offsets, sizes = self._offsets, self._sizes
        for index, offset in enumerate(offsets):
            if offset + sizes[index] == address:
                sizes[index] += size
                if index + 1 < len(offsets) and offset + sizes[index] == offsets[index + 1]:
                    sizes[index] += sizes[index + 1]
                    del offsets[index + 1], sizes[index + 1]
                return
            if address + size == offset:
                offsets[index] = address
                sizes[index] += size
                if index and offsets[index - 1] + sizes[index - 1] == address:
                    sizes[index - 1] += sizes[index]
                    del offsets[index], sizes[index]
                return
        index = bisect_left(offsets, address)
        offsets.insert(index, address)
        sizes.insert(index, size)
