"""The instant answer: memory by formula.

Weights, cache and state follow llama.cpp's own placement and come out to the byte. Compute buffers come from
its graph and its allocator, re-enacted on sizes: mostly to the byte as well. Each formula names its source
in llama.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer.memory.compute import add_compute
from nbinfer.memory.layout import CPU, Layout, flash_runs
from nbinfer.memory.rearranged import NOTHING, rearranging
from nbinfer.memory.settings import Numbers, experts_stay, split_layers
from nbinfer.memory.shape import CPU_ALIGNMENT, gpu_bytes, is_expert, padded, row_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbinfer.gguf import TensorInfo
    from nbinfer.memory.rearranged import Rearranging
    from nbinfer.memory.settings import Settings
    from nbinfer.memory.shape import Part, Shape


def layout(shape: Shape, settings: Settings, shares: Sequence[float] = ()) -> Layout:
    """Return the memory of a model by formula.

    Parameters
    ----------
    shares
        One number for each GPU: its part of the layers, usually its free memory. Empty: no GPU.
    """
    split = settings.tensor_split if settings.tensor_split and shares else shares
    placed = split_layers(shape.n_layers, settings.gpu_layers, split)
    made = Layout(Numbers.of(shape, settings), placed, flash_runs(shape, settings, placed))
    for device in range(len(shares)):
        made.on(device)
    _add_weights(made, shape, settings, gpus=len(shares))
    _add_cache(made, shape, settings)
    _add_state(made, shape, settings)
    add_compute(made, shape, settings, gpus=len(shares))
    made.output = _output(made.numbers, shape, settings)
    return made


def _output(numbers: Numbers, shape: Shape, settings: Settings) -> int:
    """Return the bytes of the rows that are handed out (``llama_context::output_reserve``).

    For embeddings every token of the longest text gets a row of logits beside its vector, also in models
    without logits: the room is taken, and cleared.
    """
    if settings.pooled:
        return 4 * numbers.batch_size * (shape.vocabulary + shape.outputs)
    return 4 * max(settings.parallel, settings.n_outputs_max or 0) * shape.vocabulary


def _add_weights(made: Layout, shape: Shape, settings: Settings, *, gpus: int) -> None:
    """Place the tensors (``load_tensors`` and ``create_tensor``).

    With a GPU the host's weights lie in pinned memory and are never rearranged.
    """
    how = rearranging() if settings.repack and not gpus else NOTHING
    stayed: list[TensorInfo] = []

    def place(part: Part, device: int, *, experts_here: bool) -> None:
        if device == CPU:
            keep(part, part.host, experts=False)
        else:
            made.on(device).weights += part.device
        if device == CPU or not experts_here:
            keep(part, part.experts_host, experts=True)
        else:
            made.on(device).weights += part.experts_device

    def keep(part: Part, size: int, *, experts: bool) -> None:
        """Put a part's experts, or the rest of it, in main memory."""
        copies, host = part.copies(how, experts=experts), made.on(CPU)
        host.weights += size + copies.added
        host.repacked += copies.n_bytes
        stayed.extend(
            tensor
            for name, tensor in part.tensors.items()
            if is_expert(name) is experts and tensor.name not in copies.names
        )

    place(shape.input, CPU, experts_here=True)
    for block in shape.blocks:
        stays = experts_stay(settings.experts_on_cpu, block.index)
        place(block.part, made.placed[block.index], experts_here=not stays)
    place(shape.output, made.placed[-1], experts_here=True)
    for device in {made.placed[block.index] for block in shape.blocks}:
        # One copy on each device that has a block.
        made.on(device).weights += shape.rope.host if device == CPU else shape.rope.device
        if device == CPU:
            stayed.extend(shape.rope.tensors.values())
    if shape.tied is not None:
        _add_tied(made, shape.tied, how, always=shape.tied_twice)
    if settings.mmap:
        made.mapped = _span(shape, stayed)


def _add_tied(made: Layout, tied: TensorInfo, how: Rearranging, *, always: bool) -> None:
    """Count the embedding a second time where it serves as output from another kind of buffer."""
    device = made.placed[-1]
    if device != CPU:
        made.on(device).weights += gpu_bytes(tied.type, tied.n_bytes, tied.shape[0])
        return
    copied = how.copied(tied)
    if copied or always:
        made.on(CPU).weights += padded(copied or tied.n_bytes, CPU_ALIGNMENT)
        made.on(CPU).repacked += padded(copied, CPU_ALIGNMENT)


def _span(shape: Shape, tensors: Sequence[TensorInfo]) -> int:
    """Return the bytes of the file, from the first to the last tensor used, that stay mapped."""
    spans: dict[int, tuple[int, int]] = {}
    for tensor in tensors:
        part, offset, size = shape.file_order[tensor.name]
        first, last = spans.get(part, (offset, offset + size))
        spans[part] = min(first, offset), max(last, offset + size)
    return sum(last - first for first, last in spans.values())


def _add_cache(made: Layout, shape: Shape, settings: Settings) -> None:
    """Add keys and values (``llama_kv_cache``): a row for each cell, block and stream."""
    kind = settings.kv_type.upper()
    transposed = settings.flash_attention is False
    widest = shape.value_row_max if transposed and shape.value_rows_vary else 0
    for block in shape.blocks:
        if not block.key_row:
            continue
        cells = made.numbers.window_cells if block.sliding else made.numbers.cells
        device = made.placed[block.index]
        for row in (block.key_row, (widest or block.value_row) if block.value_row else 0):
            if not row:
                continue
            size = row_bytes(kind, row) * cells * made.numbers.streams
            made.on(device).cache += (
                padded(size, CPU_ALIGNMENT) if device == CPU else gpu_bytes(kind, size, row)
            )


def _add_state(made: Layout, shape: Shape, settings: Settings) -> None:
    """Add recurrent state (``llama_memory_recurrent``): 32-bit floats, a row for each sequence."""
    for block in shape.blocks:
        device = made.placed[block.index]
        alignment = CPU_ALIGNMENT if device == CPU else 128
        for elements in block.state:
            made.on(device).state += padded(4 * elements * settings.parallel, alignment)
