"""AMX for vLLM: Linux gives it to processes that ask, and vLLM's kernels use it without asking.

A bfloat16 model on a processor with AMX ends the process at its first token otherwise (SIGILL, vLLM 0.32.0).
This file imports nothing of nbinfer: the processes of vLLM's own server run it too.
"""

from __future__ import annotations


def ask_for_amx() -> None:
    """Ask for AMX, once for the process; where it is refused, have vLLM choose its other kernels."""
    import torch

    # Private, and the only names there are: vLLM asks the same ones which kernels it may choose.
    cpu = torch.cpu
    if cpu._is_amx_tile_supported() and not cpu._init_amx():  # noqa: SLF001
        cpu._is_amx_tile_supported = lambda: False  # noqa: SLF001
