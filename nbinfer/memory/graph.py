"""A graph of operations, as sizes: which device runs what, and when the room of a result is needed.

llama.cpp lays the results of a graph's operations out in one buffer per device, reusing the room of what is
no longer needed. When that is depends on the operations and their order alone, not on any size: a graph
becomes a :class:`Schedule`, and that, with sizes, the bytes of the buffers.

Sources: ``ggml-alloc.c`` (counting who needs what, reuse in place) and ``ggml-backend.cpp`` (which device
runs what, what is copied between devices).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer.memory.layout import CPU
from nbinfer.memory.room import FREE, TAKE, Schedule
from nbinfer.memory.shape import gpu_bytes

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
    per_cell = 0
    """The part of its size that grows with the cache, in bytes for each cell of it."""
    windowed = False
    """Whether those are cells of the cache of blocks with a window."""
    extra = extra_per_cell = 0
    """What a GPU needs behind it."""
    kept = held = fetched = counted = False
    children = views = piece = 0

    def __init__(self, size: int, device: int | None = None) -> None:
        self.size = size
        self.device = device


class View(Result):
    """A part of another result, or the whole in another shape."""

    def __init__(self, of: Result, size: int | None = None) -> None:
        self.of = of = of.of or of
        self.device = of.device
        if size is None:
            self.size = of.size
            if of.per_cell:
                self.per_cell, self.windowed = of.per_cell, of.windowed
        else:
            self.size = size


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
        if source.per_cell:
            copy.per_cell, copy.windowed = source.per_cell, source.windowed
        if source.kind is not None and device != CPU:
            copy.size = gpu_bytes(source.kind[0], source.size, source.kind[1])
        return copy

    # -- the order of events -----------------------------------------------------------------------------

    def schedule(self, cells: int = 0, window_cells: int = 0) -> Schedule:
        """Return when what is placed and given back; the graph is used up by it.

        Parameters
        ----------
        cells, window_cells
            Cells of the cache that the sizes were made for.
        """
        self.assign()
        starts = self._copies()
        made = _Events(self.gpus, cells, window_cells)
        self._place_inputs(starts, made)
        self._count(starts)
        for index, operation in enumerate(self._operations):
            for source, copy in starts.get(index, ()):
                made.release(source)
                if not copy.held:
                    made.place(copy)
            reuse = operation.reuse
            if operation.of is None and not (reuse and made.take_over(operation, reuse)):
                made.place(operation)
            for source in operation.sources:
                made.release(source)
        return made.schedule()

    def _place_inputs(self, starts: dict[int, list[tuple[Result, Result]]], made: _Events) -> None:
        """Place what is there before the first operation; in a pipeline, once for each batch in it."""
        times = _PIPELINE_COPIES if self._pipeline else 1
        for given in self._inputs:
            given.kept = given.kept or self._pipeline
            made.place(given, times=times)
        if not self._pipeline:
            return
        for copies in starts.values():
            for _, copy in copies:
                copy.kept = True
                made.place(copy, times=times)

    def _count(self, starts: dict[int, list[tuple[Result, Result]]]) -> None:
        """Count who needs what; a view needs what it is of, once."""
        needed = [source for operation in self._operations for source in operation.sources]
        needed += [source for copies in starts.values() for source, _ in copies]
        for source in needed:
            source.children += 1
            if source.of is not None and not source.counted:
                source.counted = True
                source.of.views += 1


class _Events:
    """A schedule under construction."""

    def __init__(self, gpus: int, cells: int, window_cells: int) -> None:
        self._cells, self._window_cells = cells, window_cells
        self._events: dict[int, list[tuple[int, int]]] = {device: [] for device in (*range(gpus), CPU)}
        self._sizes: list[int] = []
        self._growing: list[tuple[int, int, bool]] = []

    def schedule(self) -> Schedule:
        """Return what was recorded."""
        events = {device: tuple(listed) for device, listed in self._events.items()}
        return Schedule(events, tuple(self._sizes), tuple(self._growing))

    def _piece(self, result: Result) -> int:
        """Number the room of a result."""
        number = len(self._sizes)
        size = result.size
        if result.per_cell:
            size -= result.per_cell * (self._window_cells if result.windowed else self._cells)
            self._growing.append((number, result.per_cell, result.windowed))
        self._sizes.append(size)
        return number

    def place(self, result: Result, *, times: int = 1) -> None:
        """Find room for a result; ``times`` for an input that is there so many times."""
        device = CPU if result.device is None else result.device
        if device != CPU and result.extra:
            result.size += result.extra
            result.per_cell += result.extra_per_cell
            result.extra = 0
        result.piece = self._piece(result)
        events = self._events[device]
        events.append((result.piece, TAKE))
        for _ in range(times - 1):
            events.append((self._piece(result), TAKE))
        result.held = True

    def take_over(self, result: Result, parents: Iterable[Result]) -> bool:
        """Put the result where a parent is that nobody else needs; a view's room is never taken over."""
        for parent in parents:
            if parent.of is not None or not parent.held or parent.kept:
                continue
            if parent.children != 1 or parent.views:
                continue
            result.device, result.held = parent.device, True
            parent.held = False
            grown = (result.per_cell, result.windowed)
            if result.size == parent.size and grown == (parent.per_cell, parent.windowed):
                result.piece = parent.piece
            else:
                result.piece = self._piece(result)
                device = CPU if parent.device is None else parent.device
                self._events[device].append((result.piece, parent.piece))
            return True
        return False

    def release(self, source: Result) -> None:
        """Note that one of those who need it does not any more; the last one gives its room back."""
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
            self._events[CPU if root.device is None else root.device].append((root.piece, FREE))
            root.held = False
