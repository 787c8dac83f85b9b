"""GGUF headers of well-known shapes, written without their weights.

Dimensions are those that the models' own configurations publish; quantisation mixes follow the rules by which
llama-quantize picks a type for each tensor. The files are sparse: header, then a hole of the right size.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Type = gguf.GGMLQuantizationType
_BLOCK = re.compile(r"blk\.(\d+)\.")
_KEPT = (
    "ffn_gate_inp",
    "conv1d",
    "shortconv.conv",
    "position_embd",
    "token_types",
    "time_mix_w",
    "time_mix_lerp",
)


@dataclass
class Model:
    """A model by its metadata and its tensors, ``(name, shape in GGUF order)``."""

    name: str
    architecture: str
    vocabulary: int
    mix: str
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    token_types: int = 0

    def add(self, name: str, *shape: int) -> None:
        self.tensors.append((name, shape))

    def block(self, index: int, **shapes: tuple[int, ...] | int) -> None:
        for name, shape in shapes.items():
            dims = (shape,) if isinstance(shape, int) else shape
            suffix = "" if name in ("ssm_a", "ssm_d") else ".weight"
            if name == "exp_probs_b":
                suffix = ".bias"
            elif name.endswith("_b") and name not in ("attn_q_b", "attn_k_b", "attn_v_b"):
                name, suffix = name[:-2], ".bias"  # noqa: PLW2901
            self.add(f"blk.{index}.{name.replace('__', '.')}{suffix}", *dims)


def write(model: Model, path: Path, *, tokenizer: bool = False) -> Path:
    """Write the header of ``model``, with a tokenizer of the right length when asked, and return ``path``."""
    writer = gguf.GGUFWriter(path, model.architecture, use_temp_file=False)
    for key, value in model.metadata.items():
        name = key if key.startswith(("general.", "tokenizer.")) else f"{model.architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    if model.token_types:
        writer.add_token_type_count(model.token_types)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{i}" for i in range(model.vocabulary)])
        writer.add_token_types([1] * model.vocabulary)
        writer.add_token_merges([f"t{i} t{i + 1}" for i in range(0, model.vocabulary - 1, 2)])
    else:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(model.vocabulary)
    choose = _MIXES[model.mix]
    size = 0
    for name, shape in model.tensors:
        kind = choose(model, name, shape)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[0] % block:
            kind, block, block_bytes = Type.F16, 1, 2
        n_bytes = int(np.prod(shape)) // block * block_bytes
        # `raw_dtype` with a dtype other than uint8 means that the shape counts elements, slowest first.
        writer.add_tensor_info(name, list(reversed(shape)), np.dtype(np.float32), n_bytes, kind)
        size += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        header = -(-file.seek(0, 2) // 32) * 32
        file.truncate(header + size)
    return path


# -- quantisation mixes --------------------------------------------------------------------------------------


def _plain(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor stays unquantised in every mix."""
    return (
        len(shape) < 2
        or not name.endswith(".weight")
        or "_norm" in name
        or any(part in name for part in _KEPT)
    )


def _uniform(kind: Type) -> Callable[[Model, str, tuple[int, ...]], Type]:
    def choose(model: Model, name: str, shape: tuple[int, ...]) -> Type:
        return Type.F32 if _plain(name, shape) else kind

    return choose


def _is_output(model: Model, name: str) -> bool:
    tied = all(other != "output.weight" for other, _ in model.tensors)
    return name == "output.weight" or (tied and name == "token_embd.weight")


def _q4_0(model: Model, name: str, shape: tuple[int, ...]) -> Type:
    if _plain(name, shape):
        return Type.F32
    return Type.Q6_K if _is_output(model, name) else Type.Q4_0


def _more_bits(index: int, count: int) -> bool:
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _q4_k_m(model: Model, name: str, shape: tuple[int, ...]) -> Type:
    if _plain(name, shape):
        return Type.F32
    if _is_output(model, name):
        return Type.Q6_K if shape[0] % 256 == 0 else Type.Q8_0
    if "attn_qkv" in name:
        return Type.Q5_K if shape[0] % 256 == 0 else Type.Q5_1
    values = ("attn_v.weight", "attn_kv_b.weight", "attn_v_b.weight", "attn_qkv.weight")
    experts = int(model.metadata.get("expert_count", 0))
    kind = Type.Q4_K
    if name.endswith(values):
        index, count = _position(model, name, values)
        kind = Type.Q6_K if _more_bits(index, count) else kind
        kind = Type.Q8_0 if experts == 8 else kind
    elif "ffn_down" in name:
        index, count = _position(
            model, name, ("ffn_down.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight")
        )
        count = int(model.metadata["block_count"])
        if experts > 1:
            found = _BLOCK.match(name)
            index = int(found[1]) if found else index
        kind = Type.Q6_K if _more_bits(index, count) else kind
    elif name.endswith("attn_k.weight") and experts == 8:
        kind = Type.Q8_0
    if shape[0] % 256:
        kind = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}.get(kind, kind)
    return kind


def _position(model: Model, name: str, suffixes: tuple[str, ...]) -> tuple[int, int]:
    names = [other for other, _ in model.tensors if other.endswith(suffixes)]
    return names.index(name), len(names)


def _q4_k(model: Model, name: str, shape: tuple[int, ...]) -> Type:
    if _plain(name, shape):
        return Type.F32
    return Type.Q6_K if _is_output(model, name) else Type.Q4_K


def _q4_k_mla(model: Model, name: str, shape: tuple[int, ...]) -> Type:
    """More bits for what is small or narrow: the low-rank matrices and the dense first block."""
    if _plain(name, shape):
        return Type.F32
    if _is_output(model, name):
        return Type.Q6_K
    if "attn_kv_a" in name or "attn_k_b" in name or "attn_v_b" in name or name.startswith("blk.0.ffn"):
        return Type.Q8_0
    if "ffn_down" in name:
        return Type.Q6_K if shape[0] % 256 == 0 else Type.Q8_0
    return Type.Q4_K


def _mxfp4(model: Model, name: str, shape: tuple[int, ...]) -> Type:
    if _plain(name, shape) or ("exps" in name and name.endswith(".bias")):
        return Type.F32
    return Type.MXFP4 if "_exps" in name else Type.Q8_0


_MIXES: dict[str, Callable[[Model, str, tuple[int, ...]], Type]] = {
    "f16": _uniform(Type.F16),
    "q8_0": _uniform(Type.Q8_0),
    "q4_0": _q4_0,
    "q4_0_only": _uniform(Type.Q4_0),
    "q4_k": _q4_k,
    "q4_k_mla": _q4_k_mla,
    "q4_k_m": _q4_k_m,
    "mxfp4": _mxfp4,
}


# -- shapes --------------------------------------------------------------------------------------------------


def _start(
    name: str,
    architecture: str,
    mix: str,
    *,
    vocabulary: int,
    blocks: int,
    width: int,
    context: int,
    tied: bool = False,
    norm: str = "output_norm",
    **metadata: Any,
) -> Model:
    model = Model(name, architecture, vocabulary, mix)
    model.metadata = {
        "block_count": blocks,
        "embedding_length": width,
        "context_length": context,
        "attention.layer_norm_rms_epsilon": 1e-6,
        **metadata,
    }
    model.add("token_embd.weight", width, vocabulary)
    if norm:
        model.add(f"{norm}.weight", width)
    if not tied:
        model.add("output.weight", width, vocabulary)
    return model


def _keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Metadata whose names are no Python names."""
    return keys


def _heads(heads: int, kv_heads: int, size: int) -> dict[str, Any]:
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
    }


def _attention(width: int, heads: int, kv_heads: int, size: int) -> dict[str, tuple[int, ...]]:
    return {
        "attn_q": (width, heads * size),
        "attn_k": (width, kv_heads * size),
        "attn_v": (width, kv_heads * size),
        "attn_output": (heads * size, width),
    }


def _gated(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {"ffn_gate": (width, inner), "ffn_up": (width, inner), "ffn_down": (inner, width)}


def _experts(width: int, inner: int, count: int) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_inp": (width, count),
        "ffn_gate_exps": (width, inner, count),
        "ffn_down_exps": (inner, width, count),
        "ffn_up_exps": (width, inner, count),
    }


def _shared(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_shexp": (width, inner),
        "ffn_up_shexp": (width, inner),
        "ffn_down_shexp": (inner, width),
    }


def llama(
    name: str = "llama-3.1-8b",
    *,
    blocks: int = 32,
    width: int = 4096,
    heads: int = 32,
    kv_heads: int = 8,
    size: int = 128,
    inner: int = 14336,
    vocabulary: int = 128256,
    context: int = 131072,
    tied: bool = False,
    rope: bool = False,
    experts: int = 0,
    used: int = 0,
    architecture: str = "llama",
    mix: str = "q4_k_m",
    **more: Any,
) -> Model:
    model = _start(
        name,
        architecture,
        mix,
        vocabulary=vocabulary,
        blocks=blocks,
        width=width,
        context=context,
        tied=tied,
        **_heads(heads, kv_heads, size),
        feed_forward_length=inner,
        **more,
    )
    if experts:
        model.metadata |= {"expert_count": experts, "expert_used_count": used}
    if rope:
        model.add("rope_freqs.weight", size // 2)
    for index in range(blocks):
        ffn = _experts(width, inner, experts) if experts else _gated(width, inner)
        model.block(index, attn_norm=width, **_attention(width, heads, kv_heads, size), ffn_norm=width, **ffn)
    return model


def llama_3_2_1b() -> Model:
    return llama(
        "llama-3.2-1b",
        blocks=16,
        width=2048,
        heads=32,
        kv_heads=8,
        size=64,
        inner=8192,
        tied=True,
        mix="q8_0",
        rope=True,
    )


def mixtral() -> Model:
    return llama("mixtral-8x7b", vocabulary=32000, context=32768, rope=False, experts=8, used=2)


def granite() -> Model:
    return llama(
        "granite-3-2b",
        architecture="granite",
        blocks=40,
        width=2048,
        heads=32,
        kv_heads=8,
        size=64,
        inner=8192,
        vocabulary=49155,
        tied=True,
        rope=False,
        logit_scale=8.0,
    )


def granite_moe() -> Model:
    return llama(
        "granite-3.0-3b-a800m",
        architecture="granitemoe",
        blocks=32,
        width=1536,
        heads=24,
        kv_heads=8,
        size=64,
        inner=512,
        vocabulary=49155,
        context=4096,
        tied=True,
        rope=False,
        experts=40,
        used=8,
        logit_scale=6.0,
    )


def qwen2() -> Model:
    blocks, width, heads, kv_heads, size, inner = 28, 3584, 28, 4, 128, 18944
    model = _start(
        "qwen2.5-7b",
        "qwen2",
        "q4_k_m",
        vocabulary=152064,
        blocks=blocks,
        width=width,
        context=32768,
        **_heads(heads, kv_heads, size),
        feed_forward_length=inner,
    )
    for index in range(blocks):
        model.block(
            index,
            attn_norm=width,
            **_attention(width, heads, kv_heads, size),
            ffn_norm=width,
            **_gated(width, inner),
        )
        for part, length in (("q", width), ("k", kv_heads * size), ("v", kv_heads * size)):
            model.add(f"blk.{index}.attn_{part}.bias", length)
    return model


def qwen3(mix: str = "q8_0") -> Model:
    blocks, width, heads, kv_heads, size, inner = 28, 1024, 16, 8, 128, 3072
    model = _start(
        "qwen3-0.6b",
        "qwen3",
        mix,
        vocabulary=151936,
        blocks=blocks,
        width=width,
        context=40960,
        tied=True,
        **_heads(heads, kv_heads, size),
        feed_forward_length=inner,
    )
    for index in range(blocks):
        model.block(
            index,
            attn_norm=width,
            **_attention(width, heads, kv_heads, size),
            attn_q_norm=size,
            attn_k_norm=size,
            ffn_norm=width,
            **_gated(width, inner),
        )
    return model


def qwen3_moe() -> Model:
    blocks, width, heads, kv_heads, size, inner, experts = 48, 2048, 32, 4, 128, 768, 128
    model = _start(
        "qwen3-30b-a3b",
        "qwen3moe",
        "q4_k_m",
        vocabulary=151936,
        blocks=blocks,
        width=width,
        context=40960,
        **_heads(heads, kv_heads, size),
        feed_forward_length=6144,
        expert_feed_forward_length=inner,
        expert_count=experts,
        expert_used_count=8,
    )
    for index in range(blocks):
        model.block(
            index,
            attn_norm=width,
            **_attention(width, heads, kv_heads, size),
            attn_q_norm=size,
            attn_k_norm=size,
            ffn_norm=width,
            **_experts(width, inner, experts),
        )
    return model


def olmoe() -> Model:
    blocks, width, heads, size, inner, experts = 16, 2048, 16, 128, 1024, 64
    model = _start(
        "olmoe-1b-7b",
        "olmoe",
        "q4_k_m",
        vocabulary=50304,
        blocks=blocks,
        width=width,
        context=4096,
        **_heads(heads, heads, size),
        feed_forward_length=inner,
        expert_count=experts,
        expert_used_count=8,
    )
    for index in range(blocks):
        model.block(
            index,
            attn_norm=width,
            **_attention(width, heads, heads, size),
            attn_q_norm=width,
            attn_k_norm=width,
            ffn_norm=width,
            **_experts(width, inner, experts),
        )
    return model


def gemma2() -> Model:
    blocks, width, heads, kv_heads, size, inner = 26, 2304, 8, 4, 256, 9216
    model = _start(
        "gemma-2-2b",
        "gemma2",
        "q4_k_m",
        vocabulary=256000,
        blocks=blocks,
        width=width,
        context=8192,
        tied=True,
        **_heads(heads, kv_heads, size),
        feed_forward_length=inner,
        **_keys(
            {
                "attention.sliding_window": 4096,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            }
        ),
    )
    for index in range(blocks):
        model.block(
            index,
            attn_norm=width,
            **_attention(width, heads, kv_heads, size),
            post_attention_norm=width,
            ffn_norm=width,
            **_gated(width, inner),
            post_ffw_norm=width,
        )
    return model


def gemma3(mix: str = "q4_0_only") -> Model:
    blocks, width, heads, kv_heads, size, inner = 34, 2560, 8, 4, 256, 10240
    model = _start(
        "gemma-3-4b",
        "gemma3",
        mix,
        vocabulary=262208,
        blocks=blocks,
        width=width,
        context=131072,
        tied=True,
        **_heads(heads, kv_heads, size),
        feed_forward_length=inner,
        **_keys({"attention.sliding_window": 1024}),
    )
    for index in range(blocks):
        model.block(
            index,
            attn_norm=width,
            **_attention(width, heads, kv_heads, size),
            attn_q_norm=size,
            attn_k_norm=size,
            post_attention_norm=width,
            ffn_norm=width,
            **_gated(width, inner),
            post_ffw_norm=width,
        )
    return model


def gpt_oss() -> Model:
    blocks, width, heads, kv_heads, size, inner, experts = 24, 2880, 64, 8, 64, 2880, 32
    model = _start(
        "gpt-oss-20b",
        "gpt-oss",
        "mxfp4",
        vocabulary=201088,
        blocks=blocks,
        width=width,
        context=131072,
        **_heads(heads, kv_heads, size),
        feed_forward_length=inner,
        expert_feed_forward_length=inner,
        expert_count=experts,
        expert_used_count=4,
        **_keys({"attention.sliding_window": 128}),
    )
    for index in range(blocks):
        model.block(
            index,
            attn_norm=width,
            **_attention(width, heads, kv_heads, size),
            post_attention_norm=width,
            attn_sinks=heads,
            **_experts(width, inner, experts),
        )
        for part, *shape in (
            ("attn_q", heads * size),
            ("attn_k", kv_heads * size),
            ("attn_v", kv_heads * size),
            ("attn_output", width),
            ("ffn_gate_inp", experts),
            ("ffn_gate_exps", inner, experts),
            ("ffn_down_exps", width, experts),
            ("ffn_up_exps", inner, experts),
        ):
            model.add(f"blk.{index}.{part}.bias", *shape)
    return model


def deepseek2() -> Model:
    blocks, width, heads, inner, experts = 27, 2048, 16, 1408, 64
    rank, rope, nope, value = 512, 64, 128, 128
    model = _start(
        "deepseek-v2-lite",
        "deepseek2",
        "q4_k_mla",
        vocabulary=102400,
        blocks=blocks,
        width=width,
        context=163840,
        feed_forward_length=10944,
        expert_feed_forward_length=inner,
        expert_count=experts,
        expert_used_count=6,
        expert_shared_count=2,
        leading_dense_block_count=1,
        **_keys(
            {
                "attention.head_count": heads,
                "attention.head_count_kv": 1,
                "attention.key_length": rank + rope,
                "attention.value_length": rank,
                "attention.key_length_mla": nope + rope,
                "attention.value_length_mla": value,
                "attention.kv_lora_rank": rank,
                "rope.dimension_count": rope,
            }
        ),
    )
    for index in range(blocks):
        ffn = (
            _gated(width, 10944)
            if index == 0
            else _experts(width, inner, experts) | _shared(width, 2 * inner)
        )
        model.block(
            index,
            attn_norm=width,
            attn_kv_a_norm=rank,
            attn_q=(width, heads * (nope + rope)),
            attn_kv_a_mqa=(width, rank + rope),
            attn_k_b=(nope, rank, heads),
            attn_v_b=(rank, value, heads),
            attn_output=(heads * value, width),
            ffn_norm=width,
            **ffn,
        )
    return model


def _delta_net(width: int, state: int, groups: int, rank: int, kernel: int) -> dict[str, Any]:
    keys, values = state * groups, state * rank
    return {
        "attn_qkv": (width, 2 * keys + values),
        "attn_gate": (width, values),
        "ssm_conv1d": (kernel, 2 * keys + values),
        "ssm_dt_b": rank,
        "ssm_a": rank,
        "ssm_norm": state,
        "ssm_out": (values, width),
    }


def qwen3_next() -> Model:
    blocks, width, heads, kv_heads, size, inner, experts = 48, 2048, 16, 2, 256, 512, 512
    state, groups, rank, kernel = 128, 16, 32, 4
    model = _start(
        "qwen3-next-80b-a3b",
        "qwen3next",
        "q4_k",
        vocabulary=151936,
        blocks=blocks,
        width=width,
        context=262144,
        **(_heads(heads, kv_heads, size) | {"rope.dimension_count": 64}),
        feed_forward_length=5120,
        expert_feed_forward_length=inner,
        expert_shared_feed_forward_length=inner,
        expert_count=experts,
        expert_used_count=10,
        **_keys(
            {
                "ssm.conv_kernel": kernel,
                "ssm.inner_size": state * rank,
                "ssm.state_size": state,
                "ssm.time_step_rank": rank,
                "ssm.group_count": groups,
            }
        ),
    )
    for index in range(blocks):
        if (index + 1) % 4:
            mixer = _delta_net(width, state, groups, rank, kernel) | {"ssm_ba": (width, 2 * rank)}
        else:
            mixer = _attention(width, heads, kv_heads, size) | {
                "attn_q": (width, 2 * heads * size),
                "attn_q_norm": (size,),
                "attn_k_norm": (size,),
            }
        model.block(
            index,
            attn_norm=width,
            **mixer,
            post_attention_norm=width,
            **_experts(width, inner, experts),
            ffn_gate_inp_shexp=width,
            **_shared(width, inner),
        )
    return model


def qwen35() -> Model:
    """A dense hybrid with one multi-token-prediction block behind its trunk."""
    trunk, width, heads, kv_heads, size, inner = 32, 2560, 16, 4, 256, 9216
    state, groups, rank, kernel = 128, 16, 32, 4
    model = _start(
        "qwen3.5-4b",
        "qwen35",
        "q4_k_m",
        vocabulary=248320,
        blocks=trunk + 1,
        width=width,
        context=262144,
        tied=True,
        **(_heads(heads, kv_heads, size) | {"rope.dimension_count": 64}),
        feed_forward_length=inner,
        nextn_predict_layers=1,
        **_keys(
            {
                "rope.dimension_sections": [11, 11, 10, 0],
                "ssm.conv_kernel": kernel,
                "ssm.inner_size": state * rank,
                "ssm.state_size": state,
                "ssm.time_step_rank": rank,
                "ssm.group_count": groups,
            }
        ),
    )
    for index in range(trunk + 1):
        if index < trunk and (index + 1) % 4:
            mixer = _delta_net(width, state, groups, rank, kernel)
            mixer |= {"ssm_beta": (width, rank), "ssm_alpha": (width, rank)}
        else:
            mixer = _attention(width, heads, kv_heads, size) | {
                "attn_q": (width, 2 * heads * size),
                "attn_q_norm": (size,),
                "attn_k_norm": (size,),
            }
        model.block(index, attn_norm=width, **mixer, post_attention_norm=width, **_gated(width, inner))
    model.block(
        trunk,
        nextn__eh_proj=(2 * width, width),
        nextn__enorm=width,
        nextn__hnorm=width,
        nextn__shared_head_norm=width,
    )
    return model


def glm4_moe() -> Model:
    """GLM-4.5-Air's shape, with its multi-token-prediction block."""
    trunk, width, heads, kv_heads, size, inner, experts = 46, 4096, 96, 8, 128, 1408, 128
    model = _start(
        "glm-4.5-air",
        "glm4moe",
        "q4_k_m",
        vocabulary=151552,
        blocks=trunk + 1,
        width=width,
        context=131072,
        **(_heads(heads, kv_heads, size) | {"rope.dimension_count": 64}),
        feed_forward_length=10944,
        expert_feed_forward_length=inner,
        expert_count=experts,
        expert_used_count=8,
        expert_shared_count=1,
        leading_dense_block_count=1,
        nextn_predict_layers=1,
    )
    for index in range(trunk + 1):
        ffn: dict[str, Any] = _gated(width, 10944)
        if index:
            ffn = _experts(width, inner, experts) | _shared(width, inner) | {"exp_probs_b": experts}
        model.block(
            index, attn_norm=width, **_attention(width, heads, kv_heads, size), post_attention_norm=width
        )
        model.block(index, **ffn)
        for part, length in (("q", heads * size), ("k", kv_heads * size), ("v", kv_heads * size)):
            model.add(f"blk.{index}.attn_{part}.bias", length)
    model.block(
        trunk,
        nextn__eh_proj=(2 * width, width),
        nextn__enorm=width,
        nextn__hnorm=width,
        nextn__shared_head_norm=width,
    )
    return model


def mamba() -> Model:
    blocks, width, state, kernel, rank = 64, 2560, 16, 4, 160
    model = _start(
        "mamba-2.8b",
        "mamba",
        "f16",
        vocabulary=50280,
        blocks=blocks,
        width=width,
        context=1048576,
        tied=True,
        feed_forward_length=0,
        **_keys(
            {
                "attention.head_count": 0,
                "ssm.conv_kernel": kernel,
                "ssm.inner_size": 2 * width,
                "ssm.state_size": state,
                "ssm.time_step_rank": rank,
            }
        ),
    )
    for index in range(blocks):
        model.block(
            index,
            attn_norm=width,
            ssm_in=(width, 4 * width),
            ssm_conv1d=(kernel, 2 * width),
            ssm_conv1d_b=2 * width,
            ssm_x=(2 * width, rank + 2 * state),
            ssm_dt=(rank, 2 * width),
            ssm_dt_b=2 * width,
            ssm_a=(state, 2 * width),
            ssm_d=2 * width,
            ssm_out=(2 * width, width),
        )
    return model


def _mamba2(width: int, inner: int, state: int, groups: int, heads: int, kernel: int) -> dict[str, Any]:
    return {
        "ssm_in": (width, 2 * inner + 2 * groups * state + heads),
        "ssm_conv1d": (kernel, inner + 2 * groups * state),
        "ssm_conv1d_b": inner + 2 * groups * state,
        "ssm_dt_b": heads,
        "ssm_a": (1, heads),
        "ssm_d": (1, heads),
        "ssm_norm": (inner // groups, groups),
        "ssm_out": (inner, width),
    }


def _ssm_keys(inner: int, state: int, groups: int, heads: int, kernel: int) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
    }


def mamba2() -> Model:
    blocks, width, inner, state, groups, heads, kernel = 48, 2048, 4096, 128, 1, 64, 4
    model = _start(
        "mamba2-1.3b",
        "mamba2",
        "q8_0",
        vocabulary=50288,
        blocks=blocks,
        width=width,
        context=1048576,
        tied=True,
        feed_forward_length=0,
        **_keys({"attention.head_count": 0} | _ssm_keys(inner, state, groups, heads, kernel)),
    )
    for index in range(blocks):
        model.block(index, attn_norm=width, **_mamba2(width, inner, state, groups, heads, kernel))
    return model


def granite_hybrid() -> Model:
    blocks, width, heads, kv_heads, size, inner = 40, 2048, 32, 8, 64, 8192
    ssm = (4096, 128, 1, 64, 4)
    attention = (5, 15, 25, 35)
    model = _start(
        "granite-4.0-h-micro",
        "granitehybrid",
        "q4_k_m",
        vocabulary=100352,
        blocks=blocks,
        width=width,
        context=131072,
        tied=True,
        feed_forward_length=inner,
        **_ssm_keys(*ssm),
        **_keys(
            {
                "attention.head_count": heads,
                "attention.head_count_kv": [kv_heads if index in attention else 0 for index in range(blocks)],
                "rope.dimension_count": size,
            }
        ),
    )
    for index in range(blocks):
        mixer: dict[str, Any] = _mamba2(width, *ssm)
        if index in attention:
            mixer = _attention(width, heads, kv_heads, size)
        model.block(index, attn_norm=width, **mixer, ffn_norm=width, **_gated(width, inner))
    return model


def falcon_h1() -> Model:
    """Attention and state space side by side in every block."""
    blocks, width, heads, kv_heads, size, inner = 36, 1024, 8, 2, 64, 2048
    ssm = (1536, 128, 1, 24, 4)
    model = _start(
        "falcon-h1-0.5b",
        "falcon-h1",
        "q8_0",
        vocabulary=32784,
        blocks=blocks,
        width=width,
        context=16384,
        **_heads(heads, kv_heads, size),
        feed_forward_length=inner,
        **_ssm_keys(*ssm),
    )
    for index in range(blocks):
        mixer = _mamba2(width, *ssm)
        del mixer["ssm_norm"]
        model.block(
            index,
            attn_norm=width,
            **mixer,
            **_attention(width, heads, kv_heads, size),
            **_gated(width, inner),
        )
        # The loader names this one without its suffix.
        model.add(f"blk.{index}.ffn_norm", width)
    return model


def lfm2() -> Model:
    blocks, width, heads, kv_heads, size, inner, cache = 16, 2048, 32, 8, 64, 8192, 3
    attention = (2, 5, 8, 10, 12, 14)
    model = _start(
        "lfm2-1.2b",
        "lfm2",
        "q4_k_m",
        vocabulary=65536,
        blocks=blocks,
        width=width,
        context=128000,
        tied=True,
        norm="token_embd_norm",
        feed_forward_length=inner,
        **_keys(
            {
                "attention.head_count": heads,
                "shortconv.l_cache": cache,
                "attention.head_count_kv": [kv_heads if index in attention else 0 for index in range(blocks)],
                "rope.dimension_count": size,
            }
        ),
    )
    for index in range(blocks):
        if index in attention:
            mixer: dict[str, Any] = _attention(width, heads, kv_heads, size)
            mixer |= {"attn_q_norm": size, "attn_k_norm": size}
        else:
            mixer = {
                "shortconv__conv": (cache, width),
                "shortconv__in_proj": (width, 3 * width),
                "shortconv__out_proj": (width, width),
            }
        model.block(index, attn_norm=width, **mixer, ffn_norm=width, **_gated(width, inner))
    return model


def phi3() -> Model:
    """Fused projections, and a sliding window in the metadata that llama.cpp ignores."""
    blocks, width, heads, size, inner = 32, 3072, 32, 96, 8192
    model = _start(
        "phi-3-mini",
        "phi3",
        "q4_k_m",
        vocabulary=32064,
        blocks=blocks,
        width=width,
        context=4096,
        feed_forward_length=inner,
        **_keys(
            {
                "attention.head_count": heads,
                "attention.head_count_kv": heads,
                "rope.dimension_count": size,
                "attention.sliding_window": 2047,
                "rope.scaling.original_context_length": 4096,
            }
        ),
    )
    model.add("rope_factors_long.weight", size // 2)
    model.add("rope_factors_short.weight", size // 2)
    for index in range(blocks):
        model.block(
            index,
            attn_norm=width,
            attn_qkv=(width, 3 * width),
            attn_output=(width, width),
            ffn_norm=width,
            ffn_up=(width, 2 * inner),
            ffn_down=(inner, width),
        )
    return model


def cohere2() -> Model:
    blocks, width, heads, kv_heads, size, inner = 32, 4096, 32, 8, 128, 14336
    model = _start(
        "command-r7b",
        "cohere2",
        "q4_k_m",
        vocabulary=256000,
        blocks=blocks,
        width=width,
        context=8192,
        tied=True,
        **_heads(heads, kv_heads, size),
        feed_forward_length=inner,
        logit_scale=0.25,
        **_keys({"attention.sliding_window": 4096, "attention.layer_norm_epsilon": 1e-5}),
    )
    for index in range(blocks):
        model.block(
            index, attn_norm=width, **_attention(width, heads, kv_heads, size), **_gated(width, inner)
        )
    return model


def gemma4() -> Model:
    """Layers that share the keys and values of earlier ones, and two head sizes."""
    blocks, width, heads, kv_heads, inner, per_layer = 35, 1536, 8, 1, 6144, 256
    full, sliding, shared = 512, 256, 20
    pattern = [index % 5 != 4 for index in range(blocks)]
    model = _start(
        "gemma-4-e2b",
        "gemma4",
        "q4_k_m",
        vocabulary=262144,
        blocks=blocks,
        width=width,
        context=131072,
        tied=True,
        feed_forward_length=inner,
        embedding_length_per_layer_input=per_layer,
        **_keys(
            {
                "attention.head_count": heads,
                "attention.head_count_kv": kv_heads,
                "attention.key_length": full,
                "attention.value_length": full,
                "attention.key_length_swa": sliding,
                "attention.value_length_swa": sliding,
                "attention.sliding_window": 512,
                "attention.sliding_window_pattern": pattern,
                "attention.shared_kv_layers": shared,
                "rope.dimension_count": full,
                "rope.dimension_count_swa": sliding,
            }
        ),
    )
    model.add("per_layer_token_embd.weight", per_layer * blocks, 262144)
    model.add("per_layer_model_proj.weight", width, per_layer * blocks)
    model.add("per_layer_proj_norm.weight", per_layer)
    model.add("rope_freqs.weight", full // 2)
    for index in range(blocks):
        size = sliding if pattern[index] else full
        model.block(
            index,
            attn_norm=width,
            **_attention(width, heads, kv_heads, size),
            attn_q_norm=size,
            attn_k_norm=size,
            post_attention_norm=width,
            ffn_norm=width,
            **_gated(width, inner),
            post_ffw_norm=width,
            inp_gate=(width, per_layer),
            proj=(per_layer, width),
            post_norm=width,
        )
    return model


def bert(name: str = "bge-m3") -> Model:
    blocks, width, heads, inner, context, vocabulary = 24, 1024, 16, 4096, 8192, 250002
    model = _start(
        name,
        "bert",
        "f16",
        vocabulary=vocabulary,
        blocks=blocks,
        width=width,
        context=context,
        tied=True,
        norm="",
        feed_forward_length=inner,
        **_keys(
            {
                "attention.head_count": heads,
                "attention.layer_norm_epsilon": 1e-5,
                "attention.causal": False,
                "pooling_type": 2,
            }
        ),
    )
    model.token_types = 1
    model.add("token_types.weight", width, 1)
    model.add("position_embd.weight", width, context)
    model.add("token_embd_norm.weight", width)
    model.add("token_embd_norm.bias", width)
    for index in range(blocks):
        model.block(
            index,
            attn_q=(width, width),
            attn_k=(width, width),
            attn_v=(width, width),
            attn_output=(width, width),
            attn_output_norm=width,
            ffn_up=(width, inner),
            ffn_down=(inner, width),
            layer_output_norm=width,
        )
        for part, length in (
            ("attn_q", width),
            ("attn_k", width),
            ("attn_v", width),
            ("attn_output", width),
            ("attn_output_norm", width),
            ("ffn_up", inner),
            ("ffn_down", width),
            ("layer_output_norm", width),
        ):
            model.add(f"blk.{index}.{part}.bias", length)
    return model


def modern_bert() -> Model:
    blocks, width, heads, inner = 22, 768, 12, 1152
    model = _start(
        "modern-bert-base",
        "modern-bert",
        "f16",
        vocabulary=50368,
        blocks=blocks,
        width=width,
        context=8192,
        tied=True,
        feed_forward_length=inner,
        **_keys(
            {
                "attention.head_count": heads,
                "attention.layer_norm_epsilon": 1e-5,
                "attention.causal": False,
                "attention.sliding_window": 128,
                "rope.dimension_count": 64,
                "pooling_type": 1,
            }
        ),
    )
    model.add("token_embd_norm.weight", width)
    for index in range(blocks):
        if index:
            model.block(index, attn_norm=width)
        model.block(
            index,
            attn_qkv=(width, 3 * width),
            attn_output=(width, width),
            ffn_norm=width,
            ffn_up=(width, 2 * inner),
            ffn_down=(inner, width),
        )
    return model


ALL: dict[str, Callable[[], Model]] = {
    "llama-3.1-8b": llama,
    "llama-3.2-1b": llama_3_2_1b,
    "mixtral-8x7b": mixtral,
    "granite-3-2b": granite,
    "granite-3.0-3b-a800m": granite_moe,
    "qwen2.5-7b": qwen2,
    "qwen3-0.6b": qwen3,
    "qwen3-0.6b-q4_0": functools.partial(qwen3, "q4_0"),
    "qwen3-30b-a3b": qwen3_moe,
    "olmoe-1b-7b": olmoe,
    "gemma-2-2b": gemma2,
    "gemma-3-4b": gemma3,
    "gpt-oss-20b": gpt_oss,
    "deepseek-v2-lite": deepseek2,
    "qwen3-next-80b-a3b": qwen3_next,
    "qwen3.5-4b": qwen35,
    "glm-4.5-air": glm4_moe,
    "mamba-2.8b": mamba,
    "mamba2-1.3b": mamba2,
    "granite-4.0-h-micro": granite_hybrid,
    "falcon-h1-0.5b": falcon_h1,
    "lfm2-1.2b": lfm2,
    "phi-3-mini": phi3,
    "command-r7b": cohere2,
    "gemma-4-e2b": gemma4,
    "bge-m3": bert,
    "modern-bert-base": modern_bert,
}
