"""The exact answer: llama.cpp is asked, in a child process that plans the load and allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import NotSupported
from nbinfer.gguf.types import tensor_type_numbers
from nbinfer.memory.layout import CPU
from nbinfer.memory.settings import expert_patterns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.gguf import Header
    from nbinfer.memory.machine import Machine
    from nbinfer.memory.settings import Settings


class CannotEstimate(NotSupported):
    """The formulas do not know this kind of model, and llama.cpp was not asked or does not either."""


@dataclass(frozen=True, slots=True)
class Measured:
    """llama.cpp's answer by device number: weights, cache with state, compute; and rearranged weights."""

    held: Mapping[int, tuple[int, int, int]]
    repacked: int


def ask(
    header: Header, settings: Settings, here: Machine, *, exact: bool | None
) -> tuple[Measured | None, str]:
    """Ask llama.cpp what a load would take; None and a reason when it cannot answer and formulas will do.

    Parameters
    ----------
    exact
        True: formulas will not do. False: nothing is asked.

    Raises
    ------
    ProbeUnavailable, ProbeFailed
        It cannot be asked, and ``exact`` is True.
    CannotEstimate
        It refuses the model.
    """
    if exact is False:
        return None, ""
    from nbinfer.gguf.strip import data_size, stripped
    from nbinfer.memory.probe.client import (
        PretendGPU,
        ProbeFailed,
        ProbeRefused,
        ProbeUnavailable,
        shared_probe,
    )

    bare = header.__dict__.get("_memory_bare")
    if bare is None:
        bare = header.__dict__["_memory_bare"] = stripped(header)
    devices = [
        PretendGPU(name=f"CUDA{i}", total=gpu.total, free=gpu.free, integrated=gpu.unified)
        for i, gpu in enumerate(here.gpus)
    ]
    model: dict[str, Any] = {"n_gpu_layers": settings.gpu_layers}
    if settings.tensor_split is not None:
        model["tensor_split"] = list(settings.tensor_split)
    if settings.experts_on_cpu:
        model["experts_on_cpu"] = list(expert_patterns(settings.experts_on_cpu))
    try:
        answer = shared_probe().measure(
            bare,
            len(bare) + data_size(header),
            devices=devices,
            model=model,
            context=_context(settings, here),
        )
    except (ProbeUnavailable, ProbeFailed) as problem:
        if exact:
            raise
        return None, str(problem)
    except ProbeRefused as refusal:
        raise CannotEstimate(str(refusal)) from refusal
    held = {CPU: answer.on("CPU")} | {i: answer.on(f"CUDA{i}") for i in range(len(devices))}
    repacked = sum(row.model for row in answer.rows if row.copied)
    return Measured({i: (row.model, row.context, row.compute) for i, row in held.items()}, repacked), ""


def _context(settings: Settings, here: Machine) -> dict[str, Any]:
    flash = {None: -1, False: 0, True: 1}[settings.flash_attention]
    kind = tensor_type_numbers()[settings.kv_type.upper()]
    context: dict[str, Any] = {
        "n_ctx": settings.context_size,
        "n_batch": settings.batch_size,
        "n_ubatch": settings.micro_batch,
        "n_seq_max": settings.parallel,
        "kv_unified": settings.kv_unified,
        "swa_full": settings.swa_full,
        "flash_attn_type": flash,
        "type_k": kind,
        "type_v": kind,
        "embeddings": settings.pooled,
        "op_offload": settings.op_offload and bool(here.gpus),
    }
    if settings.n_outputs_max is not None:
        context["n_outputs_max"] = settings.n_outputs_max
    return context
