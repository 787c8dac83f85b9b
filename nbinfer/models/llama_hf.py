"""A converter for one family: a llama GGUF file with a byte-level BPE to a Hugging Face folder. No torch.

It is how the chat model that ships as GGUF runs on engines that take safetensors: the same weights, the same
tokens. Names of tensors and fields are those of ``LlamaForCausalLM`` and of the ``tokenizers`` library.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How a text is cut before its bytes are merged; llama.cpp knows it by its name alone.
_CUTS = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_CONTROL = 3
_ENDS = frozenset({"<|im_end|>", "<|endoftext|>"})


def convert_llama(source: Path, target: Path) -> None:
    """Write the model in the GGUF file ``source`` as a folder of safetensors.

    Weights become float32, which holds what quantised ones stand for to the last bit. The output is a
    function of the file alone.

    Parameters
    ----------
    source
        A GGUF file of the architecture ``llama``, with a ``gpt2`` vocabulary cut as ``qwen2``'s.
    target
        The folder to write into; made.

    Raises
    ------
    OSError
        A file cannot be read or written.
    ValueError
        The file holds another kind of model.
    """
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    cut = _CUTS.get(fields.get("tokenizer.ggml.pre", ""))
    if fields.get("general.architecture") != "llama" or cut is None:
        raise ValueError(f"{source} does not hold a llama model with a vocabulary that is cut as qwen2's.")
    target.mkdir(parents=True, exist_ok=True)
    config = _config(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    save_file(dict(_weights(reader.tensors, config)), target / "model.safetensors", {"format": "pt"})
    controls = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == _CONTROL]
    tokens = fields["tokenizer.ggml.tokens"]
    ends = [i for i in controls if tokens[i] in _ENDS]
    _write(target / "config.json", config)
    _write(target / "generation_config.json", {"eos_token_id": ends})
    _write(target / "tokenizer.json", _tokenizer(tokens, fields["tokenizer.ggml.merges"], controls, cut))
    _write(target / "tokenizer_config.json", _tokenizer_config(fields, tokens))


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    width = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", width // heads),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields.get("llama.rope.freq_base", 10_000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def _weights(tensors: Any, config: dict[str, Any]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    import numpy as np
    from gguf.quants import dequantize

    names = dict(_TENSORS)
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in _LAYER.items():
            names[f"blk.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    for tensor in tensors:
        if tensor.name not in names:
            continue  # tables that a reader computes itself
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name:
            values = _unpermuted(values, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            values = _unpermuted(values, config["num_key_value_heads"])
        yield names[tensor.name], np.ascontiguousarray(values)


def _unpermuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo GGUF's order of rows: it rotates neighbours, Hugging Face's llama the halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(tokens: list[str], merges: list[str], controls: list[int], cut: str) -> dict[str, Any]:
    """What ``tokenizers.Tokenizer.from_file`` reads."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_as_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pattern = {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **plain} for i in controls],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pattern, bytes_as_text]},
        "post_processor": None,
        "decoder": bytes_as_text,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _tokenizer_config(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    def named(key: str) -> str | None:
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        return None if number is None else tokens[number]

    adds_bos = bool(fields.get("tokenizer.ggml.add_bos_token", False))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named("bos") if adds_bos else None,
        "eos_token": named("eos"),
        "pad_token": named("padding") or named("eos"),
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields.get("tokenizer.chat_template"),
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
