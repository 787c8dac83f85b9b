"""Write a 0.5B llama model with random weights: the size of a small real model, for measuring speed only.

    python tools/perf_model.py --type q8_0                # prints the path; made once, in the cache folder
    python tools/perf_model.py --type q4_0 --out perf.gguf --seed 1

Speed does not depend on what the weights say, only on their shapes and types: here 24 layers of 896 and a
vocabulary of 151,936, as small models that people run have. Quantised blocks are drawn as they are stored,
without a pass through floating point, so half a billion parameters take seconds.

The vocabulary is made up, a byte-level BPE whose tokens all come from valid merges: llama.cpp loads it,
and any text survives tokenising and back. What the model writes is noise.
"""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import gguf
import numpy as np

from nbinfer.models.cache import cache_dir

if TYPE_CHECKING:
    from numpy.typing import NDArray

WeightType: TypeAlias = Literal["q8_0", "q4_0", "f16"]

TYPES: dict[WeightType, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The weights' standard deviation, and those of a uniform int8 and a uniform 4-bit number: their ratio is the
# scale of a block, so that activations stay finite.
_STD, _INT8_STD, _INT4_STD = 0.02, 73.9, 4.61
_BLOCK = 32


@dataclass(frozen=True)
class Shape:
    """The sizes of the model."""

    layers: int = 24
    hidden: int = 896
    heads: int = 14
    kv_heads: int = 2
    ffn: int = 4864
    context: int = 32_768
    vocabulary: int = 151_936


def byte_letters() -> list[str]:
    """Return the letter that stands for each byte in a byte-level BPE (GPT-2's table), by byte value."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in shown}
    hidden = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Make a vocabulary of ``size`` tokens and the merges that build it.

    The 256 bytes come first, then two letters (or a space and a letter), then three, until there are enough:
    each token is a shorter one and one more letter, by a merge of its own. The special tokens come last.

    Returns
    -------
    tokens
        ``size`` token texts, their ids being their positions.
    merges
        One ``"left right"`` for each token that is longer than a byte.
    """
    tokens = byte_letters()
    merges: list[str] = []
    space = tokens[ord(" ")]
    # The commonest letters first: they merge first, and the longest tokens are made of them.
    alphabet = "etaoinshrdlcumwfgypbvkjxqzETAOINSHRDLCUMWFGYPBVKJXQZ"
    stems = [space, *alphabet]
    wanted = size - len(SPECIAL_TOKENS) - len(tokens)
    if wanted < 0:
        raise SystemExit(f"a vocabulary has at least {len(tokens) + len(SPECIAL_TOKENS)} tokens.")
    while len(merges) < wanted:
        longer = list(itertools.islice(((a, b) for a in stems for b in alphabet), wanted - len(merges)))
        merges += [f"{a} {b}" for a, b in longer]
        stems = [a + b for a, b in longer]
        tokens += stems
    return [*tokens, *SPECIAL_TOKENS], merges


def _matrix(
    rng: np.random.Generator, rows: int, columns: int, weight_type: WeightType
) -> NDArray[np.generic]:
    """Draw a matrix as it is stored: float16 (rows, columns), or bytes (rows, bytes of a row)."""
    if weight_type == "f16":
        drawn = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(_STD)
        return drawn.astype(np.float16)
    blocks = columns // _BLOCK
    # A block is a float16 scale, then 32 numbers: a byte each, or four bits each.
    size, std = (_BLOCK, _INT8_STD) if weight_type == "q8_0" else (_BLOCK // 2, _INT4_STD)
    numbers = np.frombuffer(rng.bytes(rows * blocks * size), np.uint8).reshape(rows, blocks, size)
    scales = np.full((rows, blocks, 1), _STD / std, np.float16).view(np.uint8)
    return np.concatenate([scales, numbers], axis=2).reshape(rows, -1)


def write_perf_model(
    path: Path, weight_type: WeightType, *, seed: int = 0, shape: Shape | None = None
) -> None:
    """Write the model to ``path``; the same arguments give the same bytes."""
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    tensor_type, file_type = TYPES[weight_type]
    tokens, merges = vocabulary(shape.vocabulary)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("perf-random")
    writer.add_description("random weights, for measuring speed only")
    writer.add_license("cc0-1.0")
    writer.add_file_type(file_type)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    _add_tokenizer(writer, tokens, merges)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, _matrix(rng, rows, columns, weight_type), raw_dtype=tensor_type)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.hidden, np.float32))

    kv = shape.hidden // shape.heads * shape.kv_heads
    matrix("token_embd.weight", len(tokens), shape.hidden)
    norm("output_norm.weight")
    for i in range(shape.layers):
        layer = f"blk.{i}."
        norm(layer + "attn_norm.weight")
        norm(layer + "ffn_norm.weight")
        matrix(layer + "attn_q.weight", shape.hidden, shape.hidden)
        matrix(layer + "attn_k.weight", kv, shape.hidden)
        matrix(layer + "attn_v.weight", kv, shape.hidden)
        matrix(layer + "attn_output.weight", shape.hidden, shape.hidden)
        matrix(layer + "ffn_gate.weight", shape.ffn, shape.hidden)
        matrix(layer + "ffn_up.weight", shape.ffn, shape.hidden)
        matrix(layer + "ffn_down.weight", shape.hidden, shape.ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokens: list[str], merges: list[str]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    control = gguf.TokenType.CONTROL
    writer.add_token_types(
        [control if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def perf_model(weight_type: WeightType = "q8_0", *, seed: int = 0, shape: Shape | None = None) -> Path:
    """Return the model's path in the cache folder; writes it there on first use."""
    shape = shape or Shape()
    sizes = "-".join(str(size) for size in asdict(shape).values())
    path = cache_dir("perf") / f"perf-{weight_type}-{sizes}-seed{seed}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            write_perf_model(part, weight_type, seed=seed, shape=shape)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model with random weights, for measuring speed.")
    parser.add_argument("--type", choices=TYPES, default="q8_0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the file to write (default: one in the cache folder)")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = parser.parse_args()
    shape = Shape(**{name: getattr(options, name) for name in asdict(Shape())})
    if options.out is None:
        path = perf_model(options.type, seed=options.seed, shape=shape)
    else:
        path = options.out
        write_perf_model(path, options.type, seed=options.seed, shape=shape)
    print(f"{path}  {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
