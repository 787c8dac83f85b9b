"""``demo-hf``: the chat model ``demo`` in Hugging Face's form, for engines that take safetensors.

It is made on first use from the GGUF file that ships, so that the weights are stored once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer.models.cache import cache_dir, made_once
from nbinfer.models.llama_hf import convert_llama

if TYPE_CHECKING:
    from pathlib import Path

NAME = "demo-hf"
# Part of the folder's name: raise it when the model or the converter's output changes.
_RECIPE = 1
_LOCK_SECONDS = 60.0


def demo_hf_folder() -> Path:
    """Return where the model lies, or will; makes nothing."""
    return cache_dir("models") / f"{NAME}-{_RECIPE}"


def demo_hf_path(source: Path) -> Path:
    """Return the folder of ``demo-hf`` (float32, 4 MB), made on first use in a third of a second.

    Parameters
    ----------
    source
        The GGUF file of ``demo``.

    Raises
    ------
    ModelLoadError
        The cache folder cannot be written.
    """
    return made_once(
        demo_hf_folder(), lambda part: convert_llama(source, part), name=NAME, timeout=_LOCK_SECONDS
    )
