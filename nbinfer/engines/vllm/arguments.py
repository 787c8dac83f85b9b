"""What a model is loaded with, in vLLM's own words: the same in this process and in its server.

``engine`` holds fields of vLLM's ``EngineArgs``; its server takes each as a flag of the same name. What only
the server has, parsers of tool calls and of thoughts, is beside it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.contract.config import ModelConfig, SpeculativeConfig, check_hf_overrides
from nbinfer.contract.errors import ConfigError, DoesNotFit, ModelNotFound, NotSupported
from nbinfer.contract.modes import Mode
from nbinfer.contract.units import parse_bytes
from nbinfer.memory.defaults import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from nbinfer.engines.vllm.build import Device
    from nbinfer.gguf.safetensors import SafetensorsHeader

KV_TYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
DTYPES = ("auto", "float16", "bfloat16", "float32")
ALWAYS = "always"
"""Name of an adapter that was given without one, and is always on."""
OPTIONS = (
    "context_size",
    "parallel",
    "kv_type",
    "dtype",
    "quantization",
    "gpu_memory_utilization",
    "kv_cache_bytes",
    "tensor_parallel",
    "enforce_eager",
    "hf_overrides",
    "speculative",
    "lora",
    "reasoning_parser",
    "tool_call_parser",
    "chat_template",
    "threads",
)
"""The options of ``nb.load`` for a vLLM model."""
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_GUESSED_TOKENS = 4
_CPU_SEQUENCES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmArguments:
    """What to load a model with.

    Attributes
    ----------
    engine
        Fields of vLLM's ``EngineArgs``, JSON-able.
    adapters
        Folders of LoRA adapters by name; :data:`ALWAYS` is on for every request.
    reasoning_parser, tool_call_parser
        Names of vLLM's parsers; empty: none was asked for.
    chat_template
        A Jinja template that replaces the model's own; empty: the model's own.
    threads
        CPU threads; None: as many as there are cores.
    """

    engine: Mapping[str, Any]
    adapters: Mapping[str, Path] = field(default_factory=dict)
    reasoning_parser: str = ""
    tool_call_parser: str = ""
    chat_template: str = ""
    threads: int | None = None


def arguments(
    path: Path,
    *,
    mode: Mode,
    device: Device,
    config: ModelConfig | None = None,
    options: Mapping[str, Any] | None = None,
) -> VllmArguments:
    """Translate what was asked for into vLLM's words.

    Parameters
    ----------
    path
        The folder of the model.
    mode
        What it is loaded for.
    device
        What the installed vLLM was built for.
    config
        The contract's configuration.
    options
        The options of ``nb.load``, by name; each comes before its place in the configuration.

    Raises
    ------
    ConfigError
        There is no such option, or a value is refused.
    NotSupported
        vLLM cannot do this.
    DoesNotFit
        The smallest KV cache for this context is more than there is.
    """
    from nbinfer.gguf.safetensors import read_safetensors

    asked = {**_configured(config), **{k: v for k, v in (options or {}).items() if v is not None}}
    check_names(mode, asked)
    header = read_safetensors(path)
    engine = _model(path, mode, asked, header)
    engine |= _running(asked, device)
    engine |= _memory(asked, header, device, engine)
    if mode is Mode.COMPLETION:
        # Otherwise an answer that must be JSON may be white space without end.
        engine["structured_outputs_config"] = {"backend": "guidance", "disable_any_whitespace": True}
        engine |= _speculative(asked.get("speculative"))
    adapters = _adapters(asked.get("lora"))
    if adapters:
        engine |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": _rank(adapters)}
    return VllmArguments(
        engine=engine,
        adapters=adapters,
        reasoning_parser=_word("reasoning_parser", asked.get("reasoning_parser", "")),
        tool_call_parser=_word("tool_call_parser", asked.get("tool_call_parser", "")),
        chat_template=_template(asked.get("chat_template", "")),
        threads=_count("threads", asked["threads"]) if "threads" in asked else None,
    )


def check_names(mode: Mode, options: Collection[str]) -> None:
    """Refuse a mode that vLLM does not serve here, and an option that it does not have.

    Raises
    ------
    ConfigError
        There is no such option.
    NotSupported
        It is the mode of image models.
    """
    for name in options:
        if name not in OPTIONS:
            raise ConfigError(_unknown(name))
    if mode is Mode.IMAGE_GENERATION:
        raise NotSupported("vllm does not generate images; it serves completion, embedding and reranking.")


def environment(device: Device, given: VllmArguments) -> dict[str, str]:
    """Return the environment that vLLM needs before it is imported; what the user has set comes before it.

    Nothing is fetched and nothing reported.
    """
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        # vLLM would bind every model to the same cores; several at once then share one.
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        wanted["OMP_NUM_THREADS"] = str(given.threads or _cores())
        if given.engine.get("enforce_eager"):
            # Eager mode compiles too, at the first request, where this is not set.
            wanted["TORCHDYNAMO_DISABLE"] = "1"
    own = {"OMP_NUM_THREADS"} if given.threads is not None else set()
    return {name: value for name, value in wanted.items() if name in own or name not in os.environ}


def _cores() -> int:
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores, usable))


def _configured(config: ModelConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    own = config.vllm
    asked = {
        "context_size": config.context_size,
        "speculative": config.speculative,
        "hf_overrides": None if own is None else own.hf_overrides,
        "gpu_memory_utilization": None if own is None else own.gpu_memory_utilization,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _unknown(name: str) -> str:
    advice = {
        "gpu_layers": "vllm keeps all layers on the GPU; use the llamacpp backend, or tensor_parallel.",
        "runtime_flags": "flags are for a server's command line: use where='sidecar', or options by name.",
        "projector": "a vision model of safetensors has its image encoder in its own files.",
    }.get(name)
    if advice is None:
        near = get_close_matches(name, OPTIONS, n=1)
        advice = (f"Did you mean {near[0]}?" if near else "") + f"\nOptions: {', '.join(OPTIONS)}."
    return f"vllm has no option {name!r:.60}. {advice}"


def _model(path: Path, mode: Mode, asked: Mapping[str, Any], header: SafetensorsHeader) -> dict[str, Any]:
    overrides = asked.get("hf_overrides")
    out: dict[str, Any] = {
        "model": str(path),
        "runner": "generate" if mode is Mode.COMPLETION else "pooling",
        "trust_remote_code": False,
        "max_model_len": _context(asked.get("context_size"), header, overrides, _cut_at(path)),
        "dtype": _one_of("dtype", asked.get("dtype", "auto"), DTYPES),
        "kv_cache_dtype": _one_of("kv_type", asked.get("kv_type", "auto"), KV_TYPES),
    }
    if overrides is not None:
        out["hf_overrides"] = check_hf_overrides(overrides)
    if "quantization" in asked:
        out["quantization"] = _word("quantization", asked["quantization"])
    return out


def _running(asked: Mapping[str, Any], device: Device) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if "parallel" in asked or device == "cpu":
        out["max_num_seqs"] = _count("parallel", asked.get("parallel", _CPU_SEQUENCES))
    if "enforce_eager" in asked:
        out["enforce_eager"] = _yes("enforce_eager", asked["enforce_eager"])
    elif device == "cpu":
        # Compiling takes a minute and a C++ compiler; eager mode does without both.
        out["enforce_eager"] = True
    return out


# -- single settings ------------------------------------------------------------------------------------


def _cut_at(path: Path) -> int | None:
    """Return the tokens at which a model of sentence-transformers cuts a text; None where it does not."""
    try:
        found = json.loads((path / "sentence_bert_config.json").read_bytes()).get("max_seq_length")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _context(asked: Any, header: SafetensorsHeader, overrides: Any, cut_at: int | None) -> int:
    trained = header.context_length
    if cut_at is not None:
        trained = min(trained or cut_at, cut_at)
    if isinstance(overrides, dict) and isinstance(overrides.get("max_position_embeddings"), int):
        trained = overrides["max_position_embeddings"]
    if asked is None:
        return min(trained or CONTEXT, CONTEXT)
    size = _whole("context_size", asked, least=-1)
    if size in (0, -1):
        if size == 0:
            raise ConfigError("context_size=0 is refused: it is a whole number of tokens above 0, or -1.")
        return trained or CONTEXT
    if trained is not None and size > trained:
        raise ConfigError(
            f"context_size={size:,}: the model was trained for {trained:,} tokens.\n"
            f"Use context_size={trained} or less, or hf_overrides with a rope_scaling that its makers "
            "describe and max_position_embeddings."
        )
    return size


def _memory(
    asked: Mapping[str, Any], header: SafetensorsHeader, device: Device, engine: Mapping[str, Any]
) -> dict[str, Any]:
    """Return how much memory vLLM may take, and on how many GPUs."""
    out: dict[str, Any] = {}
    if "kv_cache_bytes" in asked:
        out["kv_cache_memory_bytes"] = parse_bytes(asked["kv_cache_bytes"])
    if device == "cpu":
        if "gpu_memory_utilization" in asked:
            raise ConfigError(
                "gpu_memory_utilization is for GPUs; this vllm was built for CPUs: kv_cache_bytes."
            )
        # Without a number, vLLM asks for most of the machine's memory, and gives up where that is not free.
        out.setdefault("kv_cache_memory_bytes", _cpu_cache(header, engine))
    elif "gpu_memory_utilization" in asked:
        share = asked["gpu_memory_utilization"]
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization={share!r:.60}: it is a number above 0, up to 1.")
        out["gpu_memory_utilization"] = float(share)
    if "tensor_parallel" in asked:
        out["tensor_parallel_size"] = _count("tensor_parallel", asked["tensor_parallel"])
    elif device == "gpu":
        out["tensor_parallel_size"] = _gpus_to_use(header, engine, out.get("gpu_memory_utilization"))
    return out


def _cpu_cache(header: SafetensorsHeader, engine: Mapping[str, Any]) -> int:
    """Return the bytes of a KV cache on a CPU: four full contexts, within reason, and one at least."""
    from nbinfer.memory.machine import main_memory
    from nbinfer.memory.vllm import cache_bytes, cpu_cache

    one = cache_bytes(
        header, tokens=engine["max_model_len"], kv_type=engine["kv_cache_dtype"], dtype=engine["dtype"]
    )
    free = main_memory().available
    if one > free:
        raise DoesNotFit(
            f"one context of {engine['max_model_len']:,} tokens needs {one / 2**30:.2f} GiB of KV cache; "
            f"{free / 2**30:.2f} GiB are free.\nUse a smaller context_size."
        )
    return cpu_cache(one, free)


def _gpus_to_use(header: SafetensorsHeader, engine: Mapping[str, Any], share: float | None) -> int:
    """Return the fewest GPUs that hold the model, of those that are here."""
    from nbinfer.memory.machine import machine
    from nbinfer.memory.vllm import DEFAULT_UTILIZATION, estimate_vllm

    heads = header.get("num_attention_heads")
    possible = [n for n in range(1, len(machine().gpus) + 1) if not isinstance(heads, int) or heads % n == 0]
    for n in possible:
        try:
            made = estimate_vllm(
                header,
                context_size=engine["max_model_len"],
                gpu_memory_utilization=share or DEFAULT_UTILIZATION,
                tensor_parallel=n,
                kv_type=engine["kv_cache_dtype"],
                dtype=engine["dtype"],
            )
        except (NotSupported, ConfigError):
            return 1
        if made.least <= made.budget:
            return n
    return possible[-1] if possible else 1


def _speculative(asked: Any) -> dict[str, Any]:
    """Guesses of a small model, or of phrases in the prompt."""
    if asked is None:
        return {}
    if isinstance(asked, SpeculativeConfig):
        draft, tokens, rate = asked.draft_model, asked.num_tokens, asked.min_acceptance_rate
    else:
        draft, tokens, rate = asked.draft_path, asked.num_tokens, asked.min_acceptance_rate
    if rate is not None:
        raise NotSupported("vllm has no min_acceptance_rate: leave it out.")
    count = tokens or _GUESSED_TOKENS
    if draft is None:
        return {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": count,
                "prompt_lookup_min": 2,
                "prompt_lookup_max": 4,
            }
        }
    return {"speculative_config": {"model": os.fspath(draft), "num_speculative_tokens": count}}


def _adapters(lora: Any) -> dict[str, Path]:
    if lora is None:
        return {}
    named = lora if isinstance(lora, dict) else {ALWAYS: lora}
    folders = {str(name): Path(path).expanduser() for name, path in named.items()}
    for name, folder in folders.items():
        if not (folder / "adapter_config.json").is_file():
            raise ModelNotFound(
                f"lora: {folder} holds no adapter_config.json: vllm takes the folder of a PEFT adapter."
            )
        if not name or "=" in name or not name.isprintable():
            raise ConfigError(f"lora={name!r:.60}: an adapter's name is plain text without '='.")
    return folders


def _rank(adapters: Mapping[str, Path]) -> int:
    """Return the smallest rank that vLLM offers for these adapters."""
    needed = 1
    for folder in adapters.values():
        try:
            rank = json.loads((folder / "adapter_config.json").read_bytes()).get("r")
        except (OSError, ValueError, AttributeError):
            rank = None
        if not isinstance(rank, int):
            raise ConfigError(f"lora: {folder / 'adapter_config.json'} does not say its rank, r.")
        needed = max(needed, rank)
    fitting = [rank for rank in _LORA_RANKS if rank >= needed]
    if not fitting:
        raise NotSupported(f"lora: vllm takes ranks up to {_LORA_RANKS[-1]}; this adapter has {needed}.")
    return fitting[0]


def _template(asked: Any) -> str:
    if not isinstance(asked, str):
        raise ConfigError("chat_template is the text of a Jinja template.")
    return asked


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    # llama.cpp's words for the two that both have.
    value = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}.get(value, value)
    if value not in allowed:
        raise ConfigError(f"{name}={value!r:.60}: vllm takes {', '.join(allowed)}.")
    return str(value)


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str) or not all(c.isalnum() or c in "-_." for c in value):
        raise ConfigError(f"{name}={value!r:.60}: it is the name of one of vllm's own, such as hermes.")
    return value


def _yes(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r:.60}: it is True or False.")
    return value


def _count(name: str, value: Any) -> int:
    return _whole(name, value, least=1)


def _whole(name: str, value: Any, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r:.60}: it is a whole number, {least} or more.")
    return int(value)
