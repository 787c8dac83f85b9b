"""Compute buffers by formula: the graph of a model is laid out in sizes, and llama.cpp's allocator followed.

What is placed when depends on a model and how it is spread, not on the context; so that is worked out once,
and kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer.memory.builder import Builder
from nbinfer.memory.layout import CPU

if TYPE_CHECKING:
    from nbinfer.memory.layout import Layout
    from nbinfer.memory.room import Schedule
    from nbinfer.memory.settings import Settings
    from nbinfer.memory.shape import Shape

# Schedules kept of a model, 20 to 400 kB each: another context does not need another one.
_PLANS = 8
_FLOAT = 4


def add_compute(made: Layout, shape: Shape, settings: Settings, *, gpus: int) -> None:
    """Add the compute buffers to a layout.

    The cache, the weights and whether flash attention runs are taken from it.
    """
    try:
        sizes = _laid_out(made, shape, settings, gpus=gpus)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        # Blocks of a kind that is not known here.
        made.rough = True
        sizes = _roughly(made, shape, gpus=gpus)
    for device, size in sizes.items():
        made.on(device).compute += size


def _laid_out(made: Layout, shape: Shape, settings: Settings, *, gpus: int) -> dict[int, int]:
    numbers = made.numbers
    key = _structure(made, settings, gpus=gpus)
    found = next((plan for plan in shape.plans if plan[0] == key), None)
    if found is None:
        found = (key, *_planned(made, shape, settings, gpus=gpus))
        shape.plans = (found, *shape.plans[: _PLANS - 1])
    _, made.flash, schedule = found
    return schedule.buffers(numbers.cells, numbers.window_cells)


def _structure(made: Layout, settings: Settings, *, gpus: int) -> tuple[object, ...]:
    """Return what a graph and its sizes depend on, but for the cells of the cache."""
    numbers, experts = made.numbers, settings.experts_on_cpu
    return (
        gpus,
        tuple(made.placed),
        made.flash,
        numbers.tokens,
        numbers.outputs,
        numbers.streams,
        settings.parallel,
        settings.kv_type,
        settings.flash_attention,
        settings.op_offload,
        settings.pooled,
        # All of them, and those of one block, are equal as numbers.
        (experts is True, experts),
    )


def _planned(made: Layout, shape: Shape, settings: Settings, *, gpus: int) -> tuple[bool, Schedule]:
    """Return whether flash attention runs, and the schedule of the graph."""
    if made.flash and settings.flash_attention is None and not settings.quantised_cache and gpus:
        made.flash = CPU not in made.placed or _flash_stays(made, shape, settings, gpus=gpus)
    pipeline = gpus > 1 and not settings.experts_on_cpu and CPU not in made.placed
    builder = Builder(made, shape, settings, gpus=gpus, pipeline=pipeline)
    builder.build()
    return made.flash, builder.graph.schedule(made.numbers.cells, made.numbers.window_cells)


def _roughly(made: Layout, shape: Shape, *, gpus: int) -> dict[int, int]:
    """Return what models of known kinds take: some results as wide as the widest matrix, and logits."""
    numbers = made.numbers
    widest = max(
        (
            tensor.shape[1]
            for block in shape.blocks
            for tensor in block.part.tensors.values()
            if tensor.shape[1:]
        ),
        default=0,
    )
    blocks = _FLOAT * numbers.tokens * (2 * shape.width + 3 * widest)
    sizes = dict.fromkeys({*made.placed, *range(gpus)}, blocks)
    last = made.placed[-1]
    sizes[last] = max(
        sizes[last], _FLOAT * (numbers.outputs * shape.vocabulary + numbers.tokens * shape.width)
    )
    sizes[CPU] = sizes.get(CPU, 0) + 2 * _FLOAT * numbers.tokens * shape.width
    return sizes


def _flash_stays(made: Layout, shape: Shape, settings: Settings, *, gpus: int) -> bool:
    """Whether flash attention would run on the device of its block everywhere.

    llama.cpp looks at a graph of one token per sequence, and turns it off when one of them strays.
    """
    builder = Builder(made, shape, settings, gpus=gpus, tokens=settings.parallel)
    builder.build()
    builder.graph.assign()
    return all(result.device == device for device, result in builder.attended)
