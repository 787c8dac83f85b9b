"""Models of a few thousand random weights, one for each kind of memory: they load and write noise, fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from nbinfer.models import resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Tensors = dict[str, tuple[int, ...]]

WIDTH, INNER, HEADS, SIZE = 64, 128, 2, 32
WINDOW = 128
CONTEXT = 2048

_ATTENTION: Tensors = {
    "attn_norm.weight": (WIDTH,),
    "attn_q.weight": (WIDTH, HEADS * SIZE),
    "attn_k.weight": (WIDTH, SIZE),
    "attn_v.weight": (WIDTH, SIZE),
    "attn_output.weight": (HEADS * SIZE, WIDTH),
    "attn_q_norm.weight": (SIZE,),
    "attn_k_norm.weight": (SIZE,),
    "ffn_norm.weight": (WIDTH,),
    "ffn_gate.weight": (WIDTH, INNER),
    "ffn_up.weight": (WIDTH, INNER),
    "ffn_down.weight": (INNER, WIDTH),
}
_ATTENTION_KEYS = {
    "attention.head_count": HEADS,
    "attention.head_count_kv": 1,
    "attention.key_length": SIZE,
    "attention.value_length": SIZE,
    "rope.dimension_count": SIZE,
    "feed_forward_length": INNER,
}


def _window(blocks: int) -> tuple[str, dict[str, Any], list[Tensors]]:
    """Five of six blocks of Gemma 3 look back over a window only."""
    keys = {**_ATTENTION_KEYS, "attention.sliding_window": WINDOW}
    more: Tensors = {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
    return "gemma3", keys, [{**_ATTENTION, **more}] * blocks


def _mixture(blocks: int) -> tuple[str, dict[str, Any], list[Tensors]]:
    """Llama with two of four experts for each token."""
    plain = {name: shape for name, shape in _ATTENTION.items() if "_norm." not in name and "ffn" not in name}
    block: Tensors = {
        **plain,
        "attn_norm.weight": (WIDTH,),
        "ffn_norm.weight": (WIDTH,),
        "ffn_gate_inp.weight": (WIDTH, 4),
        "ffn_gate_exps.weight": (WIDTH, INNER, 4),
        "ffn_up_exps.weight": (WIDTH, INNER, 4),
        "ffn_down_exps.weight": (INNER, WIDTH, 4),
    }
    return "llama", {**_ATTENTION_KEYS, "expert_count": 4, "expert_used_count": 2}, [block] * blocks


def _recurrent(blocks: int) -> tuple[str, dict[str, Any], list[Tensors]]:
    inner, state, rank, kernel = 2 * WIDTH, 16, 4, 4
    keys = {
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
        "attention.head_count": 0,
        "feed_forward_length": 0,
    }
    block: Tensors = {
        "attn_norm.weight": (WIDTH,),
        "ssm_in.weight": (WIDTH, 2 * inner),
        "ssm_conv1d.weight": (kernel, inner),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (inner, rank + 2 * state),
        "ssm_dt.weight": (rank, inner),
        "ssm_dt.bias": (inner,),
        "ssm_a": (state, inner),
        "ssm_d": (inner,),
        "ssm_out.weight": (inner, WIDTH),
    }
    return "mamba", keys, [block] * blocks


def _hybrid(blocks: int) -> tuple[str, dict[str, Any], list[Tensors]]:
    """LFM2: short convolutions, with attention in every second block."""
    feed = {name: shape for name, shape in _ATTENTION.items() if name.startswith("ffn")}
    convolution: Tensors = {
        "attn_norm.weight": (WIDTH,),
        "shortconv.conv.weight": (3, WIDTH),
        "shortconv.in_proj.weight": (WIDTH, 3 * WIDTH),
        "shortconv.out_proj.weight": (WIDTH, WIDTH),
        **feed,
    }
    keys = {
        **_ATTENTION_KEYS,
        "shortconv.l_cache": 3,
        "attention.head_count_kv": [i % 2 for i in range(blocks)],
    }
    return "lfm2", keys, [_ATTENTION if i % 2 else convolution for i in range(blocks)]


KINDS: dict[str, Callable[[int], tuple[str, dict[str, Any], list[Tensors]]]] = {
    "window": _window,
    "recurrent": _recurrent,
    "hybrid": _hybrid,
}
_SHAPES = {**KINDS, "mixture": _mixture}


def write_tiny(path: Path, kind: str, *, blocks: int = 6, seed: int = 0) -> Path:
    """Write a model of a kind, with the demo model's tokenizer and template, and return ``path``."""
    architecture, keys, shapes = _SHAPES[kind](blocks)
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, architecture)
    n_vocab = _copy_tokenizer(writer)
    keys |= {
        "block_count": blocks,
        "embedding_length": WIDTH,
        "context_length": CONTEXT,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    for key, value in keys.items():
        name = f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    norm = "token_embd_norm" if architecture == "lfm2" else "output_norm"
    whole: Tensors = {"token_embd.weight": (WIDTH, n_vocab), f"{norm}.weight": (WIDTH,)}
    for index, block in enumerate(shapes):
        whole |= {f"blk.{index}.{name}": shape for name, shape in block.items()}
    for name, shape in whole.items():
        writer.add_tensor(name, _values(name, shape, random))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray[Any, Any]:
    # The file names the fastest dimension first, numpy last.
    form = tuple(reversed(shape))
    if name.endswith("norm.weight"):
        return np.ones(form, np.float32)
    if name.endswith("ssm_a"):
        return -np.exp(random.uniform(-1, 1, form)).astype(np.float32)
    # Small embeddings: else the last token outweighs all that the blocks add.
    scale = 0.1 if name.startswith("token_embd") else 2.0 / np.sqrt(shape[0])
    return (scale * random.standard_normal(form)).astype(np.float32)


def _copy_tokenizer(writer: GGUFWriter) -> int:
    source = GGUFReader(resolve("demo").path)
    n_vocab = 0
    for name, field in source.fields.items():
        if not name.startswith("tokenizer."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        contents = field.contents()
        writer.add_key_value(name, contents, kind, inner)
        if name == gguf.Keys.Tokenizer.LIST:
            n_vocab = len(contents)
    return n_vocab
