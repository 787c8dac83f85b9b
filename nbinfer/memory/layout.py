"""Where the parts of a model lie, and how many bytes each takes there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nbinfer.memory.probe.cuda import has_flash_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbinfer.memory.settings import Numbers, Settings
    from nbinfer.memory.shape import Block, Shape

CPU = -1
# Types of the cache that CUDA's flash attention reads; iq4_nl is not one of them.
_KERNEL_TYPES = frozenset(("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"))


@dataclass(slots=True)
class Held:
    """Bytes on one device. ``repacked`` are weights copied and rearranged; they are part of ``weights``."""

    weights: int = 0
    cache: int = 0
    state: int = 0
    compute: int = 0
    repacked: int = 0

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.cache + self.state + self.compute


@dataclass(slots=True)
class Layout:
    """What is where. ``placed`` is the GPU of each block and, last, of the output; -1 is main memory.

    ``flash`` is whether flash attention runs; ``output`` and ``mapped`` are bytes of main memory: the result
    rows, and what stays mapped of the file. ``rough`` says that compute is a rule of thumb, for blocks of an
    unknown kind.
    """

    numbers: Numbers
    placed: list[int]
    flash: bool
    held: dict[int, Held] = field(default_factory=dict)
    output: int = 0
    mapped: int = 0
    rough: bool = False

    def on(self, device: int) -> Held:
        """Return what a device holds, by number; ``CPU`` for main memory."""
        return self.held.setdefault(device, Held())


def flash_runs(shape: Shape, settings: Settings, placed: Sequence[int]) -> bool:
    """Whether flash attention runs: as asked, else unless a GPU lacks a kernel for the model's heads.

    A processor runs every shape. The rules are those of ``llama_init_from_model`` and
    ``llama_context::resolve_fused_ops``.
    """
    if settings.flash_attention is not None or settings.quantised_cache:
        return settings.flash_attention is not False
    return all(
        placed[block.index] == CPU or has_kernel(shape, settings, block)
        for block in shape.blocks
        if block.kv_heads and (block.key_row or not shape.has_cache)
    )


def has_kernel(shape: Shape, settings: Settings, block: Block) -> bool:
    """Whether a GPU has a flash attention kernel for the heads of a block and the type of the cache."""
    if shape.has_cache and settings.kv_type not in _KERNEL_TYPES:
        return False
    value_size = shape.latent_size or block.value_size
    ratio = block.heads // max(block.kv_heads, 1)
    return has_flash_kernel(block.key_size, value_size, ratio, plain=shape.has_cache)
