"""Image pipelines on diffusers: one thread, one pipeline, images one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nbinfer.engines.diffusers.generate import ImageEngine


def open_engine(
    path: Path,
    *,
    name: str = "",
    digest: str = "",
    device: str | None = None,
    dtype: str | None = None,
    batch: int = 1,
    threads: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> ImageEngine:
    """Load an image pipeline into this process.

    Parameters
    ----------
    path
        A folder with ``model_index.json``, or a DDUF file.
    name
        What results call it.
    digest
        Identifies the weights, where that is known.
    device
        ``cuda``, ``cuda:1``, ``mps`` or ``cpu``; None takes the best that is here.
    dtype
        ``float32``, ``float16`` or ``bfloat16``; None is float32 on a CPU, bfloat16 on NVIDIA's
        GPUs that have it, else float16.
    batch
        Images of one request that are computed at once; more need more memory, and on a GPU less time.
    threads
        Threads of torch on a CPU, for this whole process; None leaves them as they are.
    on_progress
        Called with the fraction loaded.

    Raises
    ------
    ModelLoadError
        The files cannot be loaded.
    SafetensorsParseError
        A file is missing or wrong, weights are pickles, or the pipeline brings code of its own.
    NotSupported
        It is no pipeline that makes images from text, or the device is not here.
    ConfigError
        An option is out of range.
    """
    from nbinfer.contract.errors import ConfigError
    from nbinfer.engines.diffusers.generate import ImageEngine
    from nbinfer.engines.diffusers.loading import load

    _at_least_one("batch", batch, ConfigError)
    if threads is not None:
        _at_least_one("threads", threads, ConfigError)
        import torch

        torch.set_num_threads(threads)
    loaded = load(path, device=device, dtype=dtype, on_progress=on_progress)
    return ImageEngine(loaded, name=name or path.stem, digest=digest, batch=batch)


def _at_least_one(name: str, value: Any, error: type[Exception]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise error(f"{name}={value!r:.60}: it is a whole number, at least 1.")
