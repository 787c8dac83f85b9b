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
    from nbinfer.backends.estimates import estimate_load
    from nbinfer.memory.images import ImageEstimate
    from nbinfer.memory.vllm import CPU_PROCESSES, VllmEstimate
    from nbinfer.models import resolve

    # A flag comes before what the configuration says, as where it is loaded.
    asked = {"context_size": config.context_size} | {k: v for k, v in options.items() if v is not None}
    draft = None if config.speculative is None else config.speculative.draft_model
    try:
        made = estimate_load(resolve(path), mode, asked, draft=draft, exact=False)
    except NbinferError:
        return bound(path, options, gpus=len(_free_vram()))
    if isinstance(made, ImageEstimate):
        # The libraries that the process itself is made of are in it.
        return made.required
    if isinstance(made, VllmEstimate):
        # vLLM's server, behind the runner, is a process of its own, and so is its engine.
        more = CPU_PROCESSES[1] - sum(CPU_PROCESSES) // 2 if made.device == "cpu" else 0
        return made.required + RequiredMemory(RUNNER_BYTES + more)
    return made.required + RequiredMemory(RUNNER_BYTES + made.ram.at_hand)


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
