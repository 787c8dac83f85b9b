"""``demo-hf``: the chat model ``demo`` in Hugging Face's form, for engines that take safetensors.

It is made on first use from the GGUF file that ships, so that the weights are stored once.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from nbinfer.contract.errors import ModelLoadError
from nbinfer.models.cache import CACHE_VARIABLE, cache_dir
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
    folder = demo_hf_folder()
    if folder.is_dir():
        return folder
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock"), timeout=_LOCK_SECONDS):
            # Another process may have made it while this one waited; it is whole once it has its name.
            if not folder.is_dir():
                part = folder.with_name(f".{folder.name}.part")
                shutil.rmtree(part, ignore_errors=True)
                convert_llama(source, part)
                part.replace(folder)
    except (OSError, Timeout) as problem:
        raise ModelLoadError(
            f"{NAME} cannot be written to {folder.parent}: {problem}.\n"
            f"Make room, or set {CACHE_VARIABLE} to another folder."
        ) from problem
    return folder
