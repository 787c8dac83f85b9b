"""The settings of a load that memory depends on, and the numbers that llama.cpp makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbinfer.contract.errors import ConfigError, NotSupported
from nbinfer.memory.shape import block_elements, padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbinfer.memory.shape import Shape

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_CELLS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is loaded.

    Attributes
    ----------
    context_size
        Tokens of context, shared by all sequences when ``kv_unified``.
    parallel
        Sequences at once.
    kv_type
        Type of the cache, as ``f16`` or ``q8_0``.
    gpu_layers
        Blocks on the GPU, the output counted as one more; -1 is all.
    flash_attention
        None lets llama.cpp decide.
    batch_size, micro_batch
        Tokens of one call, and of one computed graph.
    mmap
        Map the file instead of reading it.
    tensor_split
        Shares of the GPUs; None is by free memory.
    experts_on_cpu
        True keeps all experts in main memory, a number those of so many first blocks.
    swa_full
        Keep the whole context also where only a window is attended to.
    kv_unified
        One cache for all sequences instead of an equal part each.
    n_outputs_max
        Rows of logits at once; None is one for each token of a batch.
    pooled
        For embeddings and reranking.
    repack
        Whether weights on the CPU may be rearranged (copied) for it.
    op_offload
        Whether a GPU fetches weights from main memory for large batches.
    """

    context_size: int
    parallel: int = 1
    kv_type: str = "f16"
    gpu_layers: int = -1
    flash_attention: bool | None = None
    batch_size: int = 2048
    micro_batch: int = 512
    mmap: bool = True
    tensor_split: tuple[float, ...] | None = None
    experts_on_cpu: bool | int = False
    swa_full: bool = False
    kv_unified: bool = True
    n_outputs_max: int | None = None
    pooled: bool = False
    repack: bool = True
    op_offload: bool = True

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise ConfigError(f"kv_type={self.kv_type!r} is unknown: use one of {', '.join(KV_TYPES)}.")
        for name in ("context_size", "parallel", "batch_size", "micro_batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r}: it is a whole number, 1 or more.")
        if self.n_outputs_max is not None and self.n_outputs_max < self.parallel:
            # llama.cpp ends the process on this.
            raise ConfigError(
                f"n_outputs_max={self.n_outputs_max} is less than parallel={self.parallel}: "
                "each sequence needs a row."
            )

    @property
    def quantised_cache(self) -> bool:
        """Whether the cache's type is one of blocks."""
        return block_elements(self.kv_type.upper()) > 1

    def check(self, shape: Shape) -> None:
        """Refuse what llama.cpp refuses for this model.

        Raises
        ------
        NotSupported
            The combination cannot run.
        """
        if self.quantised_cache and self.flash_attention is False and shape.has_cache:
            raise NotSupported(
                f"kv_type={self.kv_type!r} needs flash attention: leave flash_attention unset, or use f16."
            )
        if self.quantised_cache:
            block = block_elements(self.kv_type.upper())
            odd = [b for b in shape.blocks if b.key_row and (b.key_size % block or b.value_size % block)]
            if odd:
                raise NotSupported(
                    f"kv_type={self.kv_type!r} packs {block} numbers, and this model's heads have "
                    f"{odd[0].key_size}: use kv_type='f16'."
                )


@dataclass(frozen=True, slots=True)
class Numbers:
    """What llama.cpp makes of the settings (its constructor of a context).

    ``cells`` of the cache per stream, ``streams`` of them; ``window_cells`` where only a window is kept;
    ``tokens`` of the largest graph and the ``outputs`` in it. ``context_size`` is the total, which may be
    more than was asked for.
    """

    context_size: int
    cells: int
    window_cells: int
    streams: int
    batch_size: int
    tokens: int
    outputs: int

    @classmethod
    def of(cls, shape: Shape, settings: Settings) -> Numbers:
        """Return the numbers for a model."""
        parallel = settings.parallel
        size = settings.context_size
        batch = min(size, settings.batch_size) if shape.causal else settings.batch_size
        micro = min(batch, settings.micro_batch)
        size = padded(size, _CELLS)
        if settings.kv_unified:
            cells, streams = size, 1
        else:
            cells, streams = padded(size // parallel, _CELLS), parallel
            size = cells * parallel
        window = cells
        if shape.window and not settings.swa_full:
            kept = shape.window * (parallel if settings.kv_unified else 1) + micro
            window = padded(min(cells, kept), _CELLS)
        tokens = min(size, micro)
        outputs = min(tokens, settings.n_outputs_max or batch)
        return cls(
            context_size=size,
            cells=cells,
            window_cells=window,
            streams=streams,
            batch_size=batch,
            # Every sequence gets equally many.
            tokens=padded(tokens, parallel),
            outputs=outputs,
        )


def expert_patterns(experts_on_cpu: bool | int) -> tuple[str, ...]:  # noqa: FBT001 - a setting's value
    """Return the regular expressions of the tensors that stay in main memory."""
    if experts_on_cpu is True:
        return (r"\.ffn_(up|down|gate|gate_up)_(ch|)exps",)
    return tuple(
        rf"blk\.{index}\.ffn_(up|down|gate|gate_up)_(ch|)exps" for index in range(int(experts_on_cpu))
    )


def experts_stay(experts_on_cpu: bool | int, block: int) -> bool:  # noqa: FBT001 - a setting's value
    """Whether the experts of one block stay in main memory."""
    return experts_on_cpu is True or (experts_on_cpu is not False and block < int(experts_on_cpu))


def split_layers(count: int, gpu_layers: int, shares: Sequence[float]) -> list[int]:
    """Return the GPU of each layer, -1 for none; the last entry is the output's.

    ``count`` counts all blocks; ``shares`` are those of the GPUs, of any scale. llama.cpp compares 32-bit
    floats, and so does this: the boundary depends on it.
    """
    import numpy as np

    if not shares:
        return [-1] * (count + 1)
    wanted = count + 1 if gpu_layers < 0 else gpu_layers
    first, acting = max(count + 1 - wanted, 0), min(wanted, count + 1)
    bounds = np.cumsum(np.asarray(shares, np.float32), dtype=np.float32)
    bounds = bounds / bounds[-1]
    placed = []
    for index in range(count + 1):
        if index < first or index - first >= acting:
            placed.append(-1)
            continue
        at = np.float32(index - first) / np.float32(acting)
        placed.append(int(np.searchsorted(bounds, at, side="right")))
    return placed
