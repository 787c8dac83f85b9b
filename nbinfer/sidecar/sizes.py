"""How many bytes there are, and how many a model in a process of its own takes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import NbinferError
from nbinfer.contract.memory import RequiredMemory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nbinfer.contract.config import ModelConfig
    from nbinfer.contract.modes import Mode

RUNNER_BYTES = 192 * 2**20
"""RAM of a runner's process before it loads anything: the interpreter, the server, the engine's library."""
RAM_SHARE = 0.9
"""Share of the memory free at the sidecar's start that its models may take; the rest is for others."""
VRAM_SHARE = 0.95


def default_budget() -> RequiredMemory:
    """Return the budget of a sidecar that is given none: most of what is free now, on each device."""
    import psutil

    return RequiredMemory(int(psutil.virtual_memory().available * RAM_SHARE), _free_vram())


def _free_vram() -> tuple[int, ...]:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return tuple(
                int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(i)).free * VRAM_SHARE)
                for i in range(pynvml.nvmlDeviceGetCount())
            )
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001 - without a driver there is no GPU to plan for
        return ()


def runner_size(path: Path, mode: Mode, config: ModelConfig, options: Mapping[str, Any]) -> RequiredMemory:
    """Return what a runner of a model will take, without loading it.

    The estimate of the model, by formulas, with the pages of its file and the process itself; for a file that
    allows none, a bound from its size.
    """
    from nbinfer.memory import estimate, estimate_images
    from nbinfer.memory.defaults import ESTIMATED
    from nbinfer.models import resolve

    given = {name: options[name] for name in ESTIMATED if options.get(name) is not None}
    if config.context_size is not None:
        # A flag comes before it, as where it is loaded.
        given.setdefault("context_size", config.context_size)
    if config.speculative is not None and config.speculative.draft_model is not None:
        given["draft"] = config.speculative.draft_model
    try:
        found = resolve(path)
        if found.format == "safetensors":
            return _under_vllm(found.header, {**options, **given})
        if found.format == "diffusers":
            asked = {name: options[name] for name in ("batch", "dtype", "device") if name in options}
            # The libraries that the process itself is made of are in it.
            return estimate_images(found.path, **asked).required
        made = estimate(path, mode=mode, exact=False, **given)
    except NbinferError:
        return bound(path, options, gpus=len(_free_vram()))
    return made.required + RequiredMemory(RUNNER_BYTES + made.ram.at_hand)


def _under_vllm(header: Any, options: Mapping[str, Any]) -> RequiredMemory:
    """Return what vLLM's server takes, and the runner before it."""
    from nbinfer.engines.vllm.build import installed
    from nbinfer.memory.vllm import CPU_PROCESSES, estimate_load

    build = installed()
    made = estimate_load(header, **{**options, **({} if build is None else {"device": build.device})})
    # The server is a process of its own, and so is its engine.
    more = CPU_PROCESSES[1] - sum(CPU_PROCESSES) // 2 if made.device == "cpu" else 0
    return made.required + RequiredMemory(RUNNER_BYTES + more)


def bound(path: Path, options: Mapping[str, Any], *, gpus: int) -> RequiredMemory:
    """Return a bound from the size of a model's files.

    The weights, a quarter of them for the KV cache and the work buffers, and the process. With GPUs, the
    weights count on the first one.
    """
    files = path.rglob("*") if path.is_dir() else path.parent.glob(_parts(path))
    weights = sum(file.stat().st_size for file in files if file.is_file())
    needed = weights + weights // 4
    if gpus and options.get("gpu_layers") != 0:
        return RequiredMemory(RUNNER_BYTES + weights // 4, (needed,) + (0,) * (gpus - 1))
    return RequiredMemory(RUNNER_BYTES + needed)


def _parts(path: Path) -> str:
    """Return the pattern of a split model's files; a single file is its own."""
    import glob
    import re

    found = re.fullmatch(r"(.*-)00001(-of-\d{5}\.gguf)", path.name)
    return glob.escape(path.name) if found is None else f"{glob.escape(found[1])}*{glob.escape(found[2])}"
