"""What ggml's CUDA kernels take, as far as memory depends on it.

Written from ``ggml-cuda`` (``fattn.cu``), for cards of the Turing generation or later.
"""

from __future__ import annotations

# Head sizes with a kernel for any attention, keys and values being as long as each other…
_EQUAL_HEADS = frozenset((40, 64, 72, 80, 96, 112, 128, 256))
# …or, only with grouped queries: key size -> (value size, what the query heads per key head divide by).
_GROUPED_HEADS = {192: (128, 8), 320: (256, 32), 512: (512, 1), 576: (512, 1)}


def has_flash_kernel(key_size: int, value_size: int, ratio: int, *, plain: bool = True) -> bool:
    """Whether flash attention runs for these heads.

    Parameters
    ----------
    key_size, value_size
        Components of one head.
    ratio
        Query heads for each key head.
    plain
        Whether there is a mask, no bias by distance, and a whole number of 256 keys.
    """
    if key_size in _EQUAL_HEADS:
        return key_size == value_size
    if key_size in _GROUPED_HEADS:
        expected, multiple = _GROUPED_HEADS[key_size]
        return value_size == expected and plain and ratio > 1 and ratio % multiple == 0
    return False
