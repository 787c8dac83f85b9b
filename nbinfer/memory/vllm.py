"""What vLLM will take: a share of the GPU that it fixes itself, and how many tokens of cache that leaves.

vLLM takes ``gpu_memory_utilization`` of a GPU whatever the model is. The questions are whether the weights
and one sequence fit into that share, and how long a context it can then hold. On a CPU it takes the bytes of
cache that it is told to, the weights, and what its processes need. Sizes come from the headers
of the safetensors files and from ``config.json``; the cache's per-layer rules are those of vLLM's
``kv_cache_interface.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from nbinfer.contract.errors import ConfigError, NotSupported
from nbinfer.contract.memory import RequiredMemory
from nbinfer.contract.units import human_bytes, parse_bytes
from nbinfer.memory.defaults import CONTEXT
from nbinfer.memory.machine import machine
from nbinfer.memory.shown import Advice, Device, Shown, Verdict

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from nbinfer.gguf.safetensors import SafetensorsHeader
    from nbinfer.memory.machine import Machine

DEFAULT_UTILIZATION = 0.9
# Activations at start, what torch and NCCL keep, and CUDA graphs, as published for small to large models.
_OVERHEAD = (400 << 20, 1400 << 20)
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float": 4, "half": 2}
_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_CACHE_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "float16": 2, "bfloat16": 2}
CPU_BLOCK = 32
"""Tokens of one block of the KV cache on a CPU, as nbinfer sets it; on GPUs it is 16."""
_GPU_BLOCK = 16
CPU_PROCESSES = (600 << 20, 1400 << 20)
"""Bytes of vLLM's own code and libraries on a CPU: in the kernel, and behind its server."""
_CPU_CACHE = (64 << 20, 4 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmDevice(Device):
    """Bytes on one device: weights, KV cache, and least and most of what is known only roughly."""

    PARTS = ("weights", "cache")

    weights: int
    cache: int


@dataclass(frozen=True, kw_only=True, repr=False)
class VllmEstimate(Shown[VllmDevice]):
    """One GPU's share of a model under vLLM, or what it takes of main memory; sizes in bytes.

    Attributes
    ----------
    budget
        What vLLM will take: utilisation x total; on a CPU, all parts together.
    utilization
        The share of the GPU; 0 on a CPU.
    weights
        On each GPU, after the type they are loaded in.
    overhead
        Least and most of activations, graphs and libraries.
    cache_per_token
        Of all layers, on each GPU.
    cache_tokens
        Tokens of cache that the budget leaves, with the middle of the overhead; as vLLM counts them.
    longest_context
        The longest context that fits, no more than the trained one.
    least
        What one sequence of ``max_model_len`` tokens needs.
    cache
        Of the budget, what is left for the cache, with the middle of the overhead.
    header, options
        What was estimated.
    """

    model: str
    utilization: float
    budget: int
    free: int
    weights: int
    overhead: tuple[int, int]
    cache_per_token: int
    cache_tokens: int
    longest_context: int
    max_model_len: int
    least: int
    cache: int
    tensor_parallel: int
    total: int
    device: Literal["gpu", "cpu"] = "gpu"
    header: SafetensorsHeader = field(repr=False, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    note: str = ""
    exact: bool = False

    @property
    def required(self) -> RequiredMemory:
        """Bytes to set aside: of RAM, and of each GPU."""
        if self.device == "cpu":
            return RequiredMemory(self.budget)
        return RequiredMemory(CPU_PROCESSES[1], (self.budget,) * self.tensor_parallel)

    @property
    def devices(self) -> tuple[VllmDevice, ...]:
        """The GPUs that hold the model, which are alike; or main memory."""
        names = ["main memory"] if self.device == "cpu" else [f"GPU {i}" for i in range(self.tensor_parallel)]
        return tuple(
            VllmDevice(
                name=name,
                kind="ram" if self.device == "cpu" else "gpu",
                weights=self.weights,
                cache=self.cache,
                overhead=self.overhead,
                available=self.free,
                total=self.total,
            )
            for name in names
        )

    @property
    def verdict(self) -> Verdict:
        """``tight`` when it depends on the overhead."""
        if self.budget > self.free or self.least > self.budget:
            return "does not fit"
        if self.device == "cpu":
            return "fits" if self.budget + self.overhead[1] - self.overhead[0] <= self.free else "tight"
        most = self.least + self.overhead[1] - self.overhead[0]
        return "fits" if most <= self.budget else "tight"

    @property
    def reason(self) -> str:
        """The verdict in words, with the setting that fits."""
        if self.budget > self.free and self.device == "cpu":
            asked, free = human_bytes(self.budget), human_bytes(self.free)
            return f"does not fit: vLLM needs {asked} of main memory and {free} are free"
        if self.budget > self.free:
            fitting = int(100 * self.utilization * self.free / self.budget) / 100
            asked, free = human_bytes(self.budget), human_bytes(self.free)
            return (
                f"does not fit: vLLM asks for {asked} and {free} is free; "
                f"gpu_memory_utilization={fitting:.2f} would start"
            )
        if self.least > self.budget:
            if self.longest_context < 1:
                return f"does not fit: the weights alone take {human_bytes(self.weights)}"
            return (
                f"does not fit: {self.max_model_len:,} tokens need {human_bytes(self.least)} of "
                f"{human_bytes(self.budget)}; context_size={self.longest_context} fits"
            )
        return f"{self.verdict}: room for {self.cache_tokens:,} tokens of cache"

    @property
    def asked(self) -> str:
        """The settings in words."""
        words = [
            f"vLLM, context {self.max_model_len:,}",
            f"{human_bytes(self.cache_per_token)} of cache a token",
        ]
        if self.device == "gpu":
            words.append(f"takes {self.utilization:.0%} of the GPU whatever the model")
        return ", ".join([*words, "by formula"])

    def advice(self) -> tuple[Advice, ...]:
        """Return the changes that make it fit. Empty when it fits."""
        found: list[Advice] = []
        if self.verdict != "does not fit":
            return ()
        tries: list[tuple[str, dict[str, Any]]] = []
        if self.device == "cpu":
            # A little less than there is, in whole MiB: what is free changes by the minute.
            room = int(0.9 * (self.free - (self.budget - self.cache))) >> 20 << 20
            if room > self.cache_per_token * CPU_BLOCK:
                tries.append((f"{human_bytes(room)} of cache", {"kv_cache_bytes": room}))
        else:
            share = int(100 * self.free / max(self.total, 1)) / 100
            if 0 < share < self.utilization:
                tries.append((f"{share:.0%} of the GPU", {"gpu_memory_utilization": share}))
        if 0 < self.longest_context < self.max_model_len:
            size = self.longest_context
            tries.append((f"context {size:,}", {"context_size": size}))
            tries += [
                (f"{words}, context {size:,}", {**one, "context_size": size}) for words, one in tries[:1]
            ]
        for words, changes in tries:
            if self.again(**changes).verdict != "does not fit":
                found.append(Advice(words, changes))
                break
        return tuple(found)

    def again(self, **changes: Any) -> VllmEstimate:
        """Estimate the same model with some options changed."""
        return estimate_vllm(self.header, **{**self.options, **changes})

    def _own_values(self) -> dict[str, Any]:
        return {
            "context_size": self.max_model_len,
            "longest_context": self.longest_context,
            "cache_tokens": self.cache_tokens,
            "cache_per_token": self.cache_per_token,
        }


def estimate_vllm(
    ref: str | os.PathLike[str] | SafetensorsHeader,
    *,
    context_size: int | None = None,
    gpu_memory_utilization: float = DEFAULT_UTILIZATION,
    tensor_parallel: int = 1,
    kv_type: str = "auto",
    dtype: str = "auto",
    gpus: Sequence[str | int] | None = None,
    device: Literal["gpu", "cpu"] | None = None,
    kv_cache_bytes: str | int | None = None,
) -> VllmEstimate:
    """Say what vLLM will take for a safetensors model, and the longest context that fits; loads nothing.

    Parameters
    ----------
    ref
        The model's folder or reference, or its header.
    context_size
        vLLM's ``max_model_len``; None and -1 are the trained maximum.
    gpu_memory_utilization
        The share of each GPU that vLLM takes, 0 to 1.
    tensor_parallel
        GPUs that share the model.
    kv_type
        ``auto`` (the model's own type) or ``fp8``.
    dtype
        The type weights are loaded in; ``auto`` is the configuration's, with float32 loaded as bfloat16.
    gpus
        GPUs to plan for, by their memory; None is this machine's.
    device
        Where vLLM computes; None is a GPU where there is one, or one to plan for.
    kv_cache_bytes
        Size of the KV cache on a CPU; None is what nbinfer takes: four contexts, at least 64 MiB and at most
        4 GiB.

    Raises
    ------
    NotSupported
        The model is not one of safetensors, there are too few GPUs, or its configuration lacks what is
        needed.
    ConfigError
        A setting is out of range.
    """
    header = _header(ref)
    if not 0 < gpu_memory_utilization <= 1:
        raise ConfigError(f"gpu_memory_utilization={gpu_memory_utilization!r}: it is between 0 and 1.")
    if tensor_parallel < 1:
        raise ConfigError(f"tensor_parallel={tensor_parallel!r}: it is at least 1.")
    options = {
        "context_size": context_size,
        "gpu_memory_utilization": gpu_memory_utilization,
        "tensor_parallel": tensor_parallel,
        "kv_type": kv_type,
        "dtype": dtype,
        "gpus": gpus,
        "device": device,
        "kv_cache_bytes": kv_cache_bytes,
    }
    here = machine() if not gpus or device == "cpu" else None
    if device is None:
        device = "gpu" if gpus or (gpus is None and here is not None and here.gpus) else "cpu"
    item = _loaded_bytes(header, dtype)
    weights = _weights(header, item) // tensor_parallel
    per_token = _cache_per_token(header, _cache_item(kv_type, item), tensor_parallel)
    trained = header.context_length or 4096
    wanted = trained if context_size in (None, -1) else int(context_size or trained)
    name = header.source.rstrip("/").rsplit("/", 1)[-1] or header.architecture
    if device == "cpu":
        assert here is not None  # noqa: S101 - asked for above
        given = None if kv_cache_bytes is None else parse_bytes(kv_cache_bytes)
        return _on_cpu(name, weights, per_token, wanted, trained, given, here, header, options)
    total, free = _smallest_gpu(gpus, tensor_parallel)
    budget = int(gpu_memory_utilization * total)
    room = budget - weights - sum(_OVERHEAD) // 2
    tokens = _tokens(max(0, room), per_token, _GPU_BLOCK, wanted) if per_token else trained
    least = weights + _OVERHEAD[0] + per_token * wanted
    most_room = budget - weights - _OVERHEAD[0]
    longest = min(trained, max(0, most_room // per_token)) if per_token else trained
    return VllmEstimate(
        model=name,
        utilization=gpu_memory_utilization,
        budget=budget,
        free=free,
        weights=weights,
        overhead=_OVERHEAD,
        cache_per_token=per_token,
        cache_tokens=tokens,
        longest_context=longest,
        max_model_len=wanted,
        least=least,
        cache=max(0, room),
        tensor_parallel=tensor_parallel,
        total=total,
        header=header,
        options=options,
    )


def estimate_load(header: SafetensorsHeader, *, name: str = "", **asked: Any) -> VllmEstimate:
    """Return the estimate of a load, by the options of ``nb.load``; those that take no memory count nothing.

    The context is what a load takes: as asked, else what the model was trained for, up to 4,096 tokens.
    """
    names = (
        "gpu_memory_utilization",
        "tensor_parallel",
        "kv_type",
        "dtype",
        "gpus",
        "device",
        "kv_cache_bytes",
    )
    given = {key: asked[key] for key in names if asked.get(key) is not None}
    size = asked.get("context_size")
    trained = header.context_length or CONTEXT
    given["context_size"] = min(trained, CONTEXT) if size is None else size
    made = estimate_vllm(header, **given)
    return replace(made, model=name) if name else made


def _on_cpu(
    name: str,
    weights: int,
    per_token: int,
    wanted: int,
    trained: int,
    given: int | None,
    here: Machine,
    header: SafetensorsHeader,
    options: Mapping[str, Any],
) -> VllmEstimate:
    free = here.ram.available
    one = per_token * -(-wanted // CPU_BLOCK) * CPU_BLOCK
    cache = cpu_cache(one, free) if given is None else given
    block = per_token * CPU_BLOCK
    parts = weights + sum(CPU_PROCESSES) // 2
    fitting = max(0, free - parts) // block * CPU_BLOCK if block else trained
    return VllmEstimate(
        model=name,
        utilization=0.0,
        budget=parts + cache,
        free=free,
        weights=weights,
        overhead=CPU_PROCESSES,
        cache_per_token=per_token,
        cache_tokens=_tokens(cache, per_token, CPU_BLOCK, wanted) if block else trained,
        longest_context=min(trained, fitting),
        max_model_len=wanted,
        least=parts + one,
        cache=cache,
        tensor_parallel=1,
        total=here.ram.total,
        device="cpu",
        header=header,
        options=options,
    )


def _tokens(cache: int, per_token: int, block: int, context: int) -> int:
    """Return the size of a cache in tokens, as vLLM counts them: of whole contexts, each in whole blocks."""
    blocks = cache // (per_token * block)
    return blocks * context // -(-context // block)


def cpu_cache(one: int, free: int) -> int:
    """Return the bytes of KV cache that nbinfer gives vLLM on a CPU.

    Parameters
    ----------
    one
        Bytes of one whole context.
    free
        Bytes of main memory that are free.
    """
    least, most = _CPU_CACHE
    return max(one, min(max(4 * one, least), most, free // 2))


def cache_bytes(header: SafetensorsHeader, *, tokens: int, kv_type: str = "auto", dtype: str = "auto") -> int:
    """Return the bytes of KV cache that one sequence of ``tokens`` needs on a CPU, in whole blocks.

    Raises
    ------
    NotSupported, ConfigError
        The configuration lacks what is needed, or ``dtype`` is unknown.
    """
    item = _cache_item(kv_type, _loaded_bytes(header, dtype))
    return _cache_per_token(header, item, 1) * -(-tokens // CPU_BLOCK) * CPU_BLOCK


def _header(ref: str | os.PathLike[str] | SafetensorsHeader) -> SafetensorsHeader:
    from nbinfer.gguf.safetensors import SafetensorsHeader

    if isinstance(ref, SafetensorsHeader):
        return ref
    from nbinfer.models import peek

    header = peek(ref).header
    if not isinstance(header, SafetensorsHeader):
        raise NotSupported(f"{ref} is a GGUF model: nb.estimate answers for it.")
    return header


def _smallest_gpu(gpus: Sequence[str | int] | None, tensor_parallel: int) -> tuple[int, int]:
    """(total, free) of the GPU that holds the others back."""
    if gpus is not None:
        sizes = [(size, size) for size in map(parse_bytes, gpus)]
    else:
        sizes = [(gpu.total, gpu.free) for gpu in machine().gpus]
    if len(sizes) < tensor_parallel:
        raise NotSupported(
            f"{tensor_parallel} GPU(s) are needed and {len(sizes)} found; plan for one that is not here with "
            'gpus=["24GiB"].'
        )
    return min(sizes[:tensor_parallel])


def _loaded_bytes(header: SafetensorsHeader, dtype: str) -> int:
    """Bytes of one element as loaded."""
    name = header.get("torch_dtype") or header.get("dtype") if dtype == "auto" else dtype
    name = str(name or "bfloat16").removeprefix("torch.")
    if name not in _DTYPE_BYTES:
        raise ConfigError(f"dtype={name!r} is unknown: use one of {', '.join(_DTYPE_BYTES)}.")
    size = _DTYPE_BYTES[name]
    return 2 if dtype == "auto" else size


def _cache_item(kv_type: str, item: int) -> int:
    """Bytes of one number of the cache; ``auto``, and llama.cpp's usual ``f16``, are the model's own type."""
    return _CACHE_BYTES.get(kv_type, item)


def _weights(header: SafetensorsHeader, item: int) -> int:
    """Bytes of the weights as loaded: floating-point tensors change their type, packed ones stay."""
    tied = bool(header.get("tie_word_embeddings"))
    names = {tensor.name for tensor in header.tensors}
    total = 0
    for tensor in header.tensors:
        if tied and tensor.name == "lm_head.weight" and any("embed_tokens" in name for name in names):
            continue
        stored = _STORED_BYTES.get(tensor.type)
        total += tensor.n_bytes if stored is None else tensor.n_elements * item
    return total


def _cache_per_token(header: SafetensorsHeader, item: int, tensor_parallel: int) -> int:
    """Bytes of cache that one token adds on one GPU.

    Layers of a hybrid model are padded to one page size, so that layers with a window cost as much as full
    ones; layers without attention keep a state instead.
    """
    layers = header.n_layers
    heads = _positive(header.get("num_attention_heads"))
    if layers is None or heads is None:
        raise NotSupported(f"{header.source}: config.json does not say the number of layers and heads.")
    attending = _attending(header, layers)
    latent = _positive(header.get("kv_lora_rank"))
    if latent is not None:
        return attending * (latent + (_positive(header.get("qk_rope_head_dim")) or 0)) * item
    kv_heads = 1 if header.get("multi_query") else _positive(header.get("num_key_value_heads")) or heads
    size = _positive(header.get("head_dim")) or (_positive(header.get("hidden_size")) or 0) // heads
    return attending * 2 * max(1, kv_heads // tensor_parallel) * size * item


def _attending(header: SafetensorsHeader, layers: int) -> int:
    kinds = header.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)
    interval = _positive(header.get("full_attention_interval"))
    return layers // interval if interval else layers


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
