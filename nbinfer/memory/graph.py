"""How large a compute buffer gets: ggml's graph allocator, re-enacted on the sizes alone.

llama.cpp lays the results of a graph's operations out in one buffer per device, reusing the room of what is
no longer needed. How large that buffer gets depends on the order of the operations and on a best-fit search,
not on what they compute. The same steps on a list of sizes give the same number in a millisecond.

Sources: ``ggml-alloc.c`` (placement, reuse in place) and ``ggml-backend.cpp`` (which device runs what, what
is copied between devices).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from nbinfer.memory.layout import CPU
from nbinfer.memory.shape import CPU_ALIGNMENT, GPU_ALIGNMENT, gpu_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_OFFLOAD_ROWS = 32
_PIPELINE_COPIES = 4


class Result:
    """What an operation, an input or a stored tensor holds: a size, a device, and who still needs it.

    An operation is its result: it has sources, and those whose room it may take. What few have stands here
    for all.
    """

    sources: tuple[Result, ...] = ()
    reuse: Sequence[Result] = ()

    of: Result | None = None
    """Whose memory it is, where it is a view."""
    kind: tuple[str, int] | None = None
    extra = 0
    kept = held = fetched = counted = False
    children = views = address = 0

    def __init__(self, size: int, device: int | None = None) -> None:
        self.size = size
        self.device = device


class View(Result):
    """A part of another result, or the whole in another shape."""

    def __init__(self, of: Result, size: int | None = None) -> None:
        self.of = of = of.of or of
        self.size = of.size if size is None else size
        self.device = of.device


class Graph:
    """A graph under construction: operations in the order in which they run.

    Parameters
    ----------
    gpus
        How many GPUs there are; they come before the CPU.
    offload
        Whether a GPU fetches weights from main memory for large batches.
    pipeline
        Whether inputs are held several times so that GPUs can work on different batches.
    """

    def __init__(self, gpus: int, *, offload: bool = True, pipeline: bool = False) -> None:
        self.gpus = gpus
        self._offload = offload and gpus > 0
        self._pipeline = pipeline
        self._operations: list[Result] = []
        self._inputs: list[Result] = []

    def input(self, size: int) -> Result:
        """Return something that is filled from outside, in main memory."""
        made = Result(size, CPU)
        self._inputs.append(made)
        return made

    def weight(self, size: int, device: int, *, kind: str = "", row: int = 0) -> Result:
        """Return a weight; ``kind`` and ``row`` are its type and the length of its rows."""
        made = Result(size, device)
        made.fetched = True
        made.kind = (kind, row) if kind else None
        return made

    def cache(self, size: int, device: int) -> Result:
        """Return memory that is kept from one graph to the next."""
        return Result(size, device)

    def op(
        self,
        size: int,
        *sources: Result,
        reuse: Sequence[Result] = (),
        weight: Result | None = None,
        rows: int = _OFFLOAD_ROWS,
        extra: int = 0,
        chooses: bool = True,
        device: int | None = None,
    ) -> Result:
        """Append an operation and return its result.

        Parameters
        ----------
        size
            Bytes of the result.
        reuse
            Sources whose room the result may take when nobody else needs them, in order.
        weight
            The weight it multiplies with; it decides the device.
        rows
            Rows of the batch: a GPU fetches a weight from main memory from 32 on.
        extra
            Bytes that only a GPU needs behind the result.
        chooses
            False where the weight is too small to decide the device.
        device
            Where it must run, when only one can.
        """
        if weight is not None:
            if chooses:
                device = weight.device
                if device == CPU and self._offload and rows >= _OFFLOAD_ROWS:
                    device = 0
            if weight.device != device:  # else it is read where it lies
                sources = (*sources, weight)
        made = Result(size, device)
        made.sources = sources
        if reuse:
            made.reuse = reuse
        if extra:
            made.extra = extra
        self._operations.append(made)
        return made

    def look_up(self, size: int, table: Result, indices: Result) -> Result:
        """Append a row lookup, which runs where the table is."""
        made = Result(size, table.device)
        made.sources = (indices,)
        self._operations.append(made)
        return made

    def write(self, cache: Result, *sources: Result) -> None:
        """Append an operation that writes into a cache, where the cache is."""
        made = View(cache)
        made.device, made.sources = cache.device, sources
        self._operations.append(made)

    # -- devices -----------------------------------------------------------------------------------------

    def assign(self) -> None:
        """Give the remaining operations to a neighbour's device: GPUs spread first, down, then up."""
        operations = self._operations
        if not self.gpus:
            for operation in operations:
                operation.device = CPU
            return
        for spread_cpu in (False, True):
            for order in (operations, operations[::-1]):
                current: int | None = None
                for operation in order:
                    if operation.device is not None:
                        current = operation.device
                        if current == CPU and not spread_cpu:
                            current = None
                    elif current is not None:
                        operation.device = current

    def _copies(self) -> dict[int, list[tuple[Result, Result]]]:
        """Return what is copied to a device before an operation, by its number: at the start of its split.

        A split ends where the device changes, or where another weight has to be fetched: the room of the
        previous one is free again then.
        """
        starts: dict[int, list[tuple[Result, Result]]] = {}
        if not self.gpus:
            return starts
        made: dict[tuple[int, int], Result] = {}
        split: list[tuple[Result, Result]] = []
        device: int | None = None
        for index, operation in enumerate(self._operations):
            here = operation.device
            if here is None:
                here = operation.device = CPU
            away = [s for s in operation.sources if (s.of or s).device not in (here, None)]
            if here != device or (split and any(source.fetched for source in away)):
                device = here
                split = starts[index] = []
            if not away:
                continue
            for source in away:
                key = (id(source), here)
                if key not in made:
                    made[key] = self._copy(source, here)
                    split.append((source, made[key]))
            operation.reuse = tuple(made.get((id(s), here), s) for s in operation.reuse)
            operation.sources = tuple(made[id(s), here] if s in away else s for s in operation.sources)
        return starts

    @staticmethod
    def _copy(source: Result, device: int) -> Result:
        copy = Result(source.size, device)
        if source.kind is not None and device != CPU:
            copy.size = gpu_bytes(source.kind[0], source.size, source.kind[1])
        return copy

    # -- sizes -------------------------------------------------------------------------------------------

    def sizes(self) -> dict[int, int]:
        """Return the bytes of each device's buffer; the CPU's is ``CPU``."""
        self.assign()
        starts = self._copies()
        room = {device: _Room(GPU_ALIGNMENT) for device in range(self.gpus)}
        room[CPU] = _Room(CPU_ALIGNMENT)
        self._place_inputs(starts, room)
        self._count(starts)
        for index, operation in enumerate(self._operations):
            for source, copy in starts.get(index, ()):
                self._release(source, room)
                if not copy.held:
                    self._place(copy, room)
            reuse = operation.reuse
            if operation.of is None and not (reuse and self._take_over(operation, reuse, room)):
                self._place(operation, room)
            for source in operation.sources:
                self._release(source, room)
        return {device: space.most for device, space in room.items()}

    def _place_inputs(self, starts: dict[int, list[tuple[Result, Result]]], room: dict[int, _Room]) -> None:
        """Place what is there before the first operation; in a pipeline, once for each batch in it."""
        for made in self._inputs:
            made.kept = made.kept or self._pipeline
            self._place(made, room)
            if self._pipeline:
                for _ in range(_PIPELINE_COPIES - 1):
                    room[CPU].take(made.size)
        if not self._pipeline:
            return
        for copies in starts.values():
            for _, copy in copies:
                copy.kept = True
                self._place(copy, room)
                for _ in range(_PIPELINE_COPIES - 1):
                    room[copy.device or 0].take(copy.size)

    def _count(self, starts: dict[int, list[tuple[Result, Result]]]) -> None:
        """Count who needs what; a view needs what it is of, once."""
        needed = [source for operation in self._operations for source in operation.sources]
        needed += [source for copies in starts.values() for source, _ in copies]
        for source in needed:
            source.children += 1
            if source.of is not None and not source.counted:
                source.counted = True
                source.of.views += 1

    @staticmethod
    def _place(result: Result, room: dict[int, _Room]) -> None:
        device = CPU if result.device is None else result.device
        if device != CPU and result.extra:
            result.size, result.extra = result.size + result.extra, 0
        result.address = room[device].take(result.size)
        result.held = True

    @staticmethod
    def _take_over(result: Result, parents: Iterable[Result], room: dict[int, _Room]) -> bool:
        """Put the result where a parent is that nobody else needs; a view's room is never taken over."""
        for parent in parents:
            if parent.of is not None or not parent.held or parent.kept:
                continue
            if parent.children != 1 or parent.views:
                continue
            space = room[CPU if parent.device is None else parent.device]
            result.address, result.device, result.held = parent.address, parent.device, True
            parent.held = False
            space.give_back_end(parent.address, parent.size, result.size)
            return True
        return False

    @staticmethod
    def _release(source: Result, room: dict[int, _Room]) -> None:
        source.children -= 1
        if source.children or source.views:
            return
        root = source.of
        if root is None:
            root = source
        else:
            root.views -= 1
            if root.views or root.children:
                return
        if root.held and not root.kept:
            room[CPU if root.device is None else root.device].free(root.address, root.size)
            root.held = False


_ENDLESS = 1 << 62


class _Room:
    """One buffer: free blocks by address, the last one endless; ``most`` is how far it was ever used."""

    __slots__ = ("_alignment", "_offsets", "_sizes", "most")

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._offsets = [0]
        self._sizes = [_ENDLESS]
        self.most = 0

    def take(self, size: int) -> int:
        """Return the address of ``size`` bytes: the smallest hole that fits, else the end."""
        size = -(-size // self._alignment) * self._alignment
        best, best_size = -1, _ENDLESS
        for index in range(len(self._sizes) - 1):
            if size <= self._sizes[index] <= best_size:
                best, best_size = index, self._sizes[index]
        if best < 0:
            best = len(self._sizes) - 1
        address = self._offsets[best]
        self._offsets[best] += size
        self._sizes[best] -= size
        if not self._sizes[best]:
            del self._offsets[best], self._sizes[best]
        self.most = max(self.most, address + size)
        return address

    def free(self, address: int, size: int) -> None:
        """Give ``size`` bytes back, joined with the first free block that they touch, and its neighbour.

        Also for nothing at all: ggml keeps empty blocks, and they keep their neighbours apart.
        """
        size = -(-size // self._alignment) * self._alignment
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

    def give_back_end(self, address: int, had: int, needs: int) -> None:
        """Free what a smaller result leaves of the room that it took over."""
        had = -(-had // self._alignment) * self._alignment
        needs = -(-needs // self._alignment) * self._alignment
        if had > needs:
            self.free(address + needs, had - needs)
