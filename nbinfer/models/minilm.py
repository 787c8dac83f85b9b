"""A converter for one family: a Hugging Face BERT sentence encoder (MiniLM) to GGUF, without torch.

The names of tensors and keys are those that llama.cpp reads for ``general.architecture = bert``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOURCE_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "vocab.txt")
"""The files of a model folder that :func:`convert_minilm` reads; nothing else influences the output."""

_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}
_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
# llama.cpp adds these two with operations that take float32 only.
_ALWAYS_FLOAT32 = frozenset({"position_embd.weight", "token_types.weight"})


def convert_minilm(source: Path, target: Path, *, name: str = "all-MiniLM-L6-v2") -> None:
    """Write the model in folder ``source`` as a GGUF file: matrices in float16, vectors in float32.

    The output is a function of :data:`SOURCE_FILES` and ``name`` alone, and its vectors are mean-pooled,
    not normalised.

    Parameters
    ----------
    source
        A folder with a ``BertModel``: :data:`SOURCE_FILES`.
    target
        The file to write. It is written in place: pass a temporary name where a half-written file would hurt.

    Raises
    ------
    OSError
        A file cannot be read or written.
    ValueError
        The folder does not hold such a model.
    """
    import gguf

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    special = json.loads((source / "special_tokens_map.json").read_text(encoding="utf-8"))
    tokens = (source / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if config.get("model_type") != "bert" or len(tokens) != config["vocab_size"]:
        raise ValueError(f"{source} does not hold a BERT model with a vocab.txt of its vocabulary's size.")

    writer = gguf.GGUFWriter(target, "bert")
    try:
        _describe(writer, config, name)
        _add_tokenizer(writer, tokens, special)
        for tensor_name, values in _tensors(source / "model.safetensors", config["num_hidden_layers"]):
            writer.add_tensor(tensor_name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _describe(writer: Any, config: dict[str, Any], name: str) -> None:
    import gguf

    writer.add_name(name)
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)


def _add_tokenizer(writer: Any, tokens: list[str], special: dict[str, str]) -> None:
    import gguf

    # Without the count of token types, llama.cpp refuses the file.
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    control = frozenset(special.values())
    writer.add_token_list([token if token in control else _phantom_space(token) for token in tokens])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens]
    )
    index = {token: i for i, token in enumerate(tokens)}
    writer.add_bos_token_id(index[special["cls_token"]])
    writer.add_eos_token_id(index[special["sep_token"]])
    writer.add_sep_token_id(index[special["sep_token"]])
    writer.add_unk_token_id(index[special["unk_token"]])
    writer.add_pad_token_id(index[special["pad_token"]])
    writer.add_mask_token_id(index[special["mask_token"]])


def _phantom_space(token: str) -> str:
    """Return a WordPiece token as llama.cpp spells it: the start of a word is marked."""
    return token[2:] if token.startswith("##") else "\u2581" + token


def _tensors(path: Path, n_layers: int) -> Iterator[tuple[str, Any]]:
    import numpy as np
    from safetensors import safe_open

    names = dict(_EMBEDDINGS)
    for layer in range(n_layers):
        for theirs, ours in _LAYER.items():
            for kind in ("weight", "bias"):
                names[f"encoder.layer.{layer}.{theirs}.{kind}"] = f"blk.{layer}.{ours}.{kind}"

    with safe_open(path, "numpy") as file:
        missing = names.keys() - set(file.keys())
        if missing:
            raise ValueError(
                f"{path} lacks {len(missing)} tensors of a BERT encoder, among them {min(missing)}."
            )
        for theirs, ours in names.items():
            values = file.get_tensor(theirs)
            exact = values.ndim == 1 or ours in _ALWAYS_FLOAT32
            yield ours, np.ascontiguousarray(values.astype(np.float32 if exact else np.float16))
