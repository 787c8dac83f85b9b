"""The instant answer: memory by formula.

Weights, cache and state follow llama.cpp's own placement and come out to the byte. Compute buffers come from
its graph and its allocator, re-enacted on sizes: mostly to the byte as well. Each formula names its source
in llama.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer.memory.compute import add_compute
from nbinfer.memory.layout import CPU, Layout, flash_runs
from nbinfer.memory.settings import Numbers, experts_stay, repacked_types, split_layers
from nbinfer.memory.shape import CPU_ALIGNMENT, gpu_bytes, padded, row_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbinfer.gguf import TensorInfo
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
    repack = repacked_types() if settings.repack and not gpus else {}
    stayed: list[TensorInfo] = []

    def place(part: Part, device: int, *, experts_here: bool) -> None:
        held = made.on(device)
        host = made.on(CPU)
        if device == CPU:
            held.weights += part.host
            held.repacked += _repacked(part, repack, experts=False)
            stayed.extend(t for n, t in part.tensors.items() if experts_here or not _is_expert(n))
        else:
            held.weights += part.device
        if not experts_here or device == CPU:
            host.weights += part.experts_host
            host.repacked += _repacked(part, repack, experts=True)
            if device != CPU:
                stayed.extend(t for n, t in part.tensors.items() if _is_expert(n))
        else:
            held.weights += part.experts_device

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
        _add_tied(made, shape.tied, repack, always=shape.tied_twice)
    if settings.mmap:
        made.mapped = _span(shape, [tensor for tensor in stayed if not rearranges(tensor, repack)])


def rearranges(tensor: TensorInfo, repack: dict[str, int]) -> bool:
    """Whether ggml-cpu copies a tensor into another layout; what it copies does not stay mapped."""
    name = tensor.name.split(".", 2)[-1] if tensor.name.startswith("blk.") else tensor.name
    dimensions = len(tensor.shape)
    return (
        tensor.type in repack
        and dimensions == (3 if _is_expert(name) else 2)
        and not tensor.name.startswith("token_embd")
        and tensor.shape[1] % repack[tensor.type] == 0
    )


def _is_expert(name: str) -> bool:
    return name.startswith(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps"))


def _add_tied(made: Layout, tied: TensorInfo, repack: dict[str, int], *, always: bool) -> None:
    """Count the embedding a second time where it serves as output from another kind of buffer."""
    device = made.placed[-1]
    if device != CPU:
        made.on(device).weights += gpu_bytes(tied.type, tied.n_bytes, tied.shape[0])
        return
    size = padded(tied.n_bytes, CPU_ALIGNMENT)
    rearranged = tied.type in repack and tied.shape[1] % repack[tied.type] == 0
    if rearranged or always:
        made.on(CPU).weights += size
        made.on(CPU).repacked += size if rearranged else 0


def _repacked(part: Part, repack: dict[str, int], *, experts: bool) -> int:
    """Return the bytes that ggml-cpu copies into another layout (``ggml_repack_get_optimal_repack_type``)."""
    if not repack:
        return 0
    return sum(
        size
        for size, kind, rows, dimensions, expert in part.matrices
        if expert is experts
        and kind in repack
        and rows % repack[kind] == 0
        and dimensions == (3 if expert else 2)
    )


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
