"""Write the trained chat model as GGUF files, and complete its Hugging Face folder.

    python tools/export_chat.py MODEL --out nbinfer/models/data --types q8_0

MODEL is the folder that train_chat.py wrote. Writes OUT/NAME-TYPE.gguf for each type, and into MODEL the chat
template and the tokenizer's settings that transformers and vLLM read. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from chat_corpus import END, SPECIAL_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def chat_template() -> str:
    """Return the chat template that goes into every exported file."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8").removesuffix("\n")


def interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of a query or key matrix, (heads * size, in), as GGUF's llama architecture has them.

    Hugging Face turns the first half of a head against the second; llama.cpp turns neighbouring pairs.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield each tensor's GGUF name and its float32 values."""
    from safetensors.numpy import load_file

    weights: dict[str, NDArray[np.float32]] = load_file(model / "model.safetensors")
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    for i in range(config["num_hidden_layers"]):
        for theirs, ours in _LAYER.items():
            values = weights[f"model.layers.{i}.{theirs}.weight"]
            if ours == "attn_q":
                values = interleaved(values, config["num_attention_heads"])
            elif ours == "attn_k":
                values = interleaved(values, config["num_key_value_heads"])
            yield f"blk.{i}.{ours}.weight", values


def write_gguf(model: Path, path: Path, name: str, type_name: str) -> None:
    """Write ``path`` with matrices of the type named and vectors in float32."""
    from gguf.quants import quantize

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    tensor_type, file_type = TYPES[type_name]
    values_of = dict(tensors(model, config))

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_license("cc0-1.0")
    writer.add_description("a tiny chat model, trained from scratch on a generated corpus")
    writer.add_file_type(file_type)
    writer.add_size_label(f"{sum(values.size for values in values_of.values()) / 1e6:.1f}M")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, tokenizer)
    for tensor_name, values in values_of.items():
        if values.ndim == 1 or type_name == "f32":
            writer.add_tensor(tensor_name, values)
        else:
            writer.add_tensor(tensor_name, quantize(values, tensor_type), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any]) -> None:
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(ids[SPECIAL_TOKENS[0]])
    writer.add_pad_token_id(ids[SPECIAL_TOKENS[0]])
    writer.add_eos_token_id(ids[END])
    writer.add_eot_token_id(ids[END])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(chat_template())


def complete_folder(model: Path) -> None:
    """Write the files beside the weights that transformers and vLLM read."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    pad = SPECIAL_TOKENS[0]
    files = {
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0},
        "special_tokens_map.json": {"eos_token": END, "pad_token": pad},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": END,
            "pad_token": pad,
            "unk_token": None,
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "chat_template": chat_template(),
        },
    }
    for name, value in files.items():
        (model / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (model / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo chat model as GGUF files.")
    parser.add_argument("model", type=Path, help="the folder that train_chat.py wrote")
    parser.add_argument("--out", type=Path, help="folder for the GGUF files (default: MODEL)")
    parser.add_argument("--name", default="tiny-chat")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["f16", "q8_0"])
    options = parser.parse_args()
    out: Path = options.out or options.model
    out.mkdir(parents=True, exist_ok=True)
    complete_folder(options.model)
    for type_name in options.types:
        path = out / f"{options.name}-{type_name}.gguf"
        write_gguf(options.model, path, options.name, type_name)
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
