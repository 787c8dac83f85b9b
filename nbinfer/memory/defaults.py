"""What a load takes when nothing else is asked for.

The engine and the estimate both read it here, so that the number shown is the number taken.
"""

from __future__ import annotations

CONTEXT = 4096
"""Tokens of context, or what the model was trained for when that is less."""

POOLED_CONTEXT = 2048
"""The same for embeddings and ranking. llama.cpp takes a row of logits for each token of the longest text,
also where nobody reads them: at a vocabulary of 250,000 these are 2 GB."""

PARALLEL = 17
"""Sequences at once: sixteen batch rows, four of llama.cpp's blocks of four, and a cell. A model with a
recurrent state, which is paid for per sequence, takes one."""

POOLED_PARALLEL = 32
"""Texts in one batch of embeddings or of pairs to rank."""

BATCH, MICRO_BATCH = 2048, 512
"""Tokens of one decode call, and of one computed graph."""

LEAST_BATCH = 256
"""A batch is not larger than the context, but holds at least this."""

ESTIMATED = (
    "context_size",
    "parallel",
    "kv_type",
    "gpu_layers",
    "flash_attention",
    "batch_size",
    "micro_batch",
    "mmap",
    "tensor_split",
    "experts_on_cpu",
    "projector",
    "prefix_cache",
    "prefix_cache_folder",
)
"""The options of a load that change what it takes; ``estimate`` has them by the same names."""

IMAGES_ESTIMATED = ("batch", "dtype", "device")
"""The same of an image pipeline, for ``estimate_images``."""

PLAIN_ATTENTION_CONTEXT = 16_384
"""Up to here a CPU does without flash attention, which is slower there and adds in half precision.

Measured on 0.5B at one thread: a step of 16 sequences 0.15 s instead of 0.21 s, a token behind 3,000 others
0.07 s instead of 0.13 s, and the same text from batches of any shape. Beyond, its table of scores (heads x
cells x micro-batch floats) would take too much memory.
"""

PLAIN_MICRO_BATCH = 128
"""Tokens of one computed graph without flash attention."""


def flash_attention(
    *, asked: bool | None, on_gpu: bool, kv_type: str | None, context_size: int, pooled: bool = False
) -> bool | None:
    """Whether to use flash attention: as asked; off on a CPU at usual sizes; else None, llama.cpp decides.

    Encoders (``pooled``) are fastest on a CPU with it, in packs of 64 tokens and more.
    """
    quantised = kv_type not in (None, "f32", "f16", "bf16")  # llama.cpp needs it for such a cache
    if (
        asked is None
        and not on_gpu
        and not quantised
        and not pooled
        and context_size <= PLAIN_ATTENTION_CONTEXT
    ):
        return False
    return asked
