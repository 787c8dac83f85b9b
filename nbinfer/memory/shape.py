"""What a model's header says about the memory it takes: layers, heads, windows, states, sizes of tensors.

The rules are those by which llama.cpp reads the same metadata (``llama-model.cpp`` and the loaders of the
architectures). Sizes of matrices come from the tensors themselves, so a new architecture with known parts
needs nothing here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import NotSupported
from nbinfer.gguf.types import tensor_types

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbinfer.gguf import Header, TensorInfo
    from nbinfer.memory.rearranged import Rearranging
    from nbinfer.memory.room import Schedule

CPU_ALIGNMENT = 32
GPU_ALIGNMENT = 128
GPU_ROW_PADDING = 512

# They see the whole text at once: no cache of keys and values.
_WITHOUT_CACHE = frozenset(
    (
        "bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "neo-bert", "eurobert",
        "modern-bert", "gemma-embedding", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1",
    )
)  # fmt: skip
_WITHOUT_OUTPUT = frozenset(
    (
        "bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "neo-bert", "eurobert",
        "modern-bert", "wavtokenizer-dec",
    )
)  # fmt: skip
_RECURRENT = frozenset(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"))
_RECURRENT_WITHOUT_KV_HEADS = frozenset(
    ("jamba", "granitehybrid", "lfm2", "lfm2moe", "plamo2", "kimi-linear", "bailingmoe3", "nemotron_h",
     "nemotron_h_moe")
)  # fmt: skip
_RECURRENT_BY_INTERVAL = frozenset(("qwen3next", "qwen35", "qwen35moe", "minimax-01"))
# Caches of their own kind (compressed, indexed, shared with another model): only the exact probe knows them.
_OWN_CACHE = frozenset(
    (
        "minimax-m3", "deepseek32", "glm-dsa", "glm5-next", "hy-v4", "dots3note", "deepseek4", "dflash",
        "gemma4-assistant", "eagle3", "t5", "nanbeige", "granite-switch", "qwen4exp", "kimi-k3",
    )
)  # fmt: skip

# Their loaders make the output before the embedding, and then do not notice that it is the same tensor.
_OUTPUT_FIRST = frozenset(("gemma3n", "gemma4"))

# Sliding windows: architecture -> (period of the pattern, whether the full layer comes first, window when
# the file gives none). The last layer of a period is the full one, or the first.
_WINDOWS: dict[str, tuple[int, bool, int]] = {
    "afmoe": (4, False, 0),
    "cohere2": (4, False, 0),
    "cohere2moe": (4, True, 0),
    "exaone-moe": (4, False, 128),
    "gemma-embedding": (6, False, 0),
    "gemma2": (2, False, 4096),
    "gemma3": (6, False, 0),
    "gemma3n": (5, False, 0),
    "gpt-oss": (2, False, 0),
    "laguna": (4, True, 0),
    "llama4": (4, False, 8192),
    "mellum": (4, False, 0),
    "modern-bert": (3, True, 0),
    "muse-glimmer": (4, False, 0),
    "olmo2": (4, False, 0),
    "plamo3": (8, False, 0),
    "smallthinker": (4, True, 0),
}
# Their pattern is an array in the file.
_WINDOWS_BY_ARRAY = frozenset(("gemma4", "granite-swa", "maple", "mimo2", "spark2-5", "step35"))
_EXAONE4_32B_BLOCKS = 64

_BLOCK = re.compile(r"blk\.(\d+)\.(.*)")
_INPUT = frozenset(("token_embd", "position_embd", "token_types", "per_layer_token_embd"))
# Named without a block, but placed with the first one.
_FIRST_BLOCK = frozenset(("token_embd_norm", "per_layer_model_proj", "per_layer_proj_norm"))
_EVERY_BLOCK = ("rope_freqs", "rope_factors")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps")
_MOST_BLOCKS, _MOST_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS


def padded(size: int, alignment: int) -> int:
    """Return ``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def row_bytes(kind: str, elements: int) -> int:
    """Return the bytes of one row of ``elements`` numbers of a tensor type such as ``Q8_0``."""
    known = _types()[kind]
    return int(elements // known.block * known.n_bytes)


def block_elements(kind: str) -> int:
    """Return how many elements a tensor type packs together; 1 when it is not quantised."""
    return int(_types()[kind].block)


def gpu_bytes(kind: str, n_bytes: int, row: int) -> int:
    """Return what a tensor takes on a GPU: rows of quantised tensors are padded, the start is aligned.

    ``row`` is the length of the first dimension in elements. The rule is that of ggml's CUDA backend.
    """
    if block_elements(kind) > 1 and row % GPU_ROW_PADDING:
        n_bytes += row_bytes(kind, GPU_ROW_PADDING - row % GPU_ROW_PADDING)
    return padded(n_bytes, GPU_ALIGNMENT)


_by_name: dict[str, Any] = {}


def _types() -> dict[str, Any]:
    if not _by_name:
        _by_name.update({known.name: known for known in tensor_types().values()})
    return _by_name


@dataclass(frozen=True, slots=True)
class Copies:
    """What of a part is copied for the processor: bytes, how many more than in the file, and names."""

    n_bytes: int = 0
    added: int = 0
    names: frozenset[str] = frozenset()


@dataclass(slots=True)
class Part:
    """Bytes of the tensors that are placed together: one block's, the input's or the output's.

    ``experts_*`` are of the expert matrices alone, and not in the others. ``host`` and ``device`` hold the
    sizes with their padding. What is ``looked_up``, row by row, is never multiplied with.
    """

    host: int = 0
    device: int = 0
    experts_host: int = 0
    experts_device: int = 0
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    looked_up: bool = False
    _copies: tuple[Rearranging, Copies, Copies] | None = None

    def add(self, name: str, tensor: TensorInfo) -> None:
        """Count a tensor that is placed here."""
        host = padded(tensor.n_bytes, CPU_ALIGNMENT)
        device = gpu_bytes(tensor.type, tensor.n_bytes, tensor.shape[0])
        if is_expert(name):
            self.experts_host += host
            self.experts_device += device
        else:
            self.host += host
            self.device += device
        self.tensors[name] = tensor

    def copies(self, how: Rearranging, *, experts: bool) -> Copies:
        """Return what of this part is copied, of the experts or of the rest; the last answer is kept."""
        if self.looked_up:
            return Copies()
        kept = self._copies
        if kept is None or kept[0] is not how:
            # Not read back: estimates of other settings are made in other threads.
            kept = self._copies = (how, self._copied(how, experts=False), self._copied(how, experts=True))
        return kept[2] if experts else kept[1]

    def _copied(self, how: Rearranging, *, experts: bool) -> Copies:
        n_bytes = added = 0
        names = []
        for name, tensor in self.tensors.items():
            if is_expert(name) is experts and (size := how.copied(tensor, expert=experts)):
                size = padded(size, CPU_ALIGNMENT)
                n_bytes += size
                added += size - padded(tensor.n_bytes, CPU_ALIGNMENT)
                names.append(tensor.name)
        return Copies(n_bytes, added, frozenset(names))


def is_expert(name: str) -> bool:
    """Whether a tensor, named without its block, holds the matrices of a mixture's experts."""
    return name.startswith(_EXPERTS)


@dataclass(slots=True)
class Block:
    """One block of the model.

    ``key_row`` and ``value_row`` are the elements that one token adds to this block's cache (0: none);
    ``state`` the sizes of its recurrent state in elements, per sequence.
    """

    index: int
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    sliding: bool
    recurrent: bool
    key_row: int
    value_row: int
    state: tuple[int, int]
    part: Part


@dataclass(slots=True)
class Shape:
    """A model as the memory formulas need it.

    Attributes
    ----------
    blocks
        The trunk's blocks; blocks that only draft further tokens are not loaded and not in it.
    n_layers
        What llama.cpp counts layers by when it offloads them: all blocks, drafting ones included.
    width, vocabulary
        Components of the hidden state; tokens of the tokenizer.
    window
        Tokens of the sliding window; 0 when there is none.
    has_cache
        False for encoders.
    latent_size
        Components of the compressed row that keys and values share; 0 where they have their own.
    exact
        True when the rules below cover this architecture's cache in full.
    plans
        The last few schedules worked out for it: what each was for, whether flash attention runs, and itself.
    """

    architecture: str
    n_layers: int
    width: int
    vocabulary: int
    trained_context: int
    window: int
    has_cache: bool
    latent_size: int
    causal: bool
    exact: bool
    n_experts: int
    n_experts_used: int
    blocks: list[Block]
    input: Part
    output: Part
    rope: Part
    tied: TensorInfo | None
    tied_twice: bool
    has_logits: bool
    outputs: int
    pooling: str
    file_order: dict[str, tuple[int, int, int]]
    plans: tuple[tuple[tuple[object, ...], bool, Schedule], ...] = field(
        default=(), init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, header: Header) -> Shape:
        """Return the shape of a model; it is worked out once and kept with the header."""
        known = header.__dict__.get("_memory_shape")
        if not isinstance(known, Shape):
            known = _shape(header)
            header.__dict__["_memory_shape"] = known
        return known

    @property
    def recurrent(self) -> bool:
        """Whether any block keeps a recurrent state."""
        return any(block.recurrent for block in self.blocks)

    @property
    def value_row_max(self) -> int:
        """The widest value row of any block, in elements."""
        return max((block.kv_heads * block.value_size for block in self.blocks), default=0)

    @property
    def value_rows_vary(self) -> bool:
        """Whether blocks differ in the width of their value rows; a recurrent block's is 0."""
        rows = {block.kv_heads * block.value_size for block in self.blocks}
        return len(rows) > 1


def _per_block(header: Header, key: str, count: int, default: int) -> list[int]:
    value = header.get(key)
    if isinstance(value, (tuple, list)):
        found = [int(item) for item in value[:count]]
        return found + [default] * (count - len(found))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [int(value)] * count
    return [default] * count


def _number(header: Header, key: str, default: int = 0) -> int:
    value = header.get(key)
    return int(value) if isinstance(value, (int, float)) else default


def _shape(header: Header) -> Shape:
    architecture = header.architecture
    count = max(header.n_layers or 0, 0)
    if count > _MOST_BLOCKS or _number(header, "expert_count") > _MOST_EXPERTS:
        raise NotSupported(
            f"the header speaks of {count} blocks and {_number(header, 'expert_count')} experts: "
            f"llama.cpp reads up to {_MOST_BLOCKS} and {_MOST_EXPERTS}."
        )
    drafting = min(_number(header, "nextn_predict_layers"), count)
    trunk = count - drafting
    width = _number(header, "embedding_length")
    heads = _per_block(header, "attention.head_count", count, 0)
    kv_heads = _per_block(header, "attention.head_count_kv", count, -1)
    kv_heads = [heads[i] if kv < 0 else kv for i, kv in enumerate(kv_heads)]
    usual = width // heads[0] if heads and heads[0] else 0
    key = _number(header, "attention.key_length", usual)
    value = _number(header, "attention.value_length", usual)
    key_sliding = _number(header, "attention.key_length_swa", key)
    value_sliding = _number(header, "attention.value_length_swa", value)
    # Multi-head latent attention, where the values are part of the keys' one row.
    latent = _number(header, "attention.kv_lora_rank")
    if not (_number(header, "attention.key_length_mla") and _number(header, "attention.value_length_mla")):
        latent = 0
    window, sliding = _sliding(header, trunk)
    recurrent = _recurrent(header, trunk, kv_heads)
    state = _state(header, width, heads[0] if heads else 0)
    has_cache = architecture not in _WITHOUT_CACHE
    own_cache = _blocks_with_cache(header, trunk)

    input_part, output_part, rope, parts = _place(header, trunk, count)
    blocks = []
    for index in range(trunk):
        key_size = key_sliding if sliding[index] else key
        value_size = value_sliding if sliding[index] else value
        attends = has_cache and own_cache[index] and (not recurrent[index] or architecture == "falcon-h1")
        if architecture.startswith("nemotron_h"):
            attends = attends and _per_block(header, "feed_forward_length", count, 0)[index] == 0
        if architecture in _RECURRENT:
            attends = False
        blocks.append(
            Block(
                index=index,
                heads=heads[index],
                kv_heads=kv_heads[index],
                key_size=key_size,
                value_size=value_size,
                sliding=sliding[index],
                recurrent=recurrent[index],
                key_row=key_size * kv_heads[index] if attends else 0,
                value_row=value_size * kv_heads[index] if attends and not latent else 0,
                state=state if recurrent[index] else (0, 0),
                part=parts[index],
            )
        )
    untied = "output.weight" in output_part.tensors or architecture in _WITHOUT_OUTPUT
    used = _per_block(header, "expert_used_count", max(count, 1), 0)
    return Shape(
        architecture=architecture,
        n_layers=count,
        width=width,
        vocabulary=header.n_vocab,
        trained_context=header.context_length or 0,
        window=window,
        has_cache=has_cache,
        latent_size=latent,
        causal=bool(header.get("attention.causal", True)) and has_cache,
        exact=architecture not in _OWN_CACHE,
        n_experts=_number(header, "expert_count"),
        n_experts_used=min(max(used), _number(header, "expert_count")),
        blocks=blocks,
        input=input_part,
        output=output_part,
        rope=rope,
        tied=None if untied else input_part.tensors.get("token_embd.weight"),
        tied_twice=architecture in _OUTPUT_FIRST,
        has_logits=architecture not in _WITHOUT_OUTPUT and architecture != "gemma-embedding",
        outputs=_number(header, "embedding_length_out", width),
        pooling=header.pooling or "",
        file_order=_file_order(header),
    )


def _sliding(header: Header, trunk: int) -> tuple[int, list[bool]]:
    architecture = header.architecture
    given = header.get("attention.sliding_window")
    none = (0, [False] * trunk)
    if architecture == "lfm2" and _number(header, "attention.sliding_window"):
        kv_heads = _per_block(header, "attention.head_count_kv", trunk, 0)
        return _number(header, "attention.sliding_window"), [kv > 0 for kv in kv_heads]
    if architecture in _WINDOWS_BY_ARRAY:
        period, full_first, usual = 0, False, 0
    elif architecture == "exaone4" and trunk == _EXAONE4_32B_BLOCKS:
        period, full_first, usual = 4, False, 4096
        given = usual
    elif architecture in _WINDOWS:
        period, full_first, usual = _WINDOWS[architecture]
    else:
        return none
    window = int(given) if isinstance(given, (int, float)) else usual
    if window <= 0:
        return none
    if architecture == "llama4":
        window = usual
    if architecture == "smallthinker":
        window = 4096
    return window, _pattern(header, trunk, period, full_first=full_first)


def _pattern(header: Header, trunk: int, period: int, *, full_first: bool) -> list[bool]:
    """Return which blocks attend to a window only: as the file lists them, or by their period."""
    pattern = header.get("attention.sliding_window_pattern")
    if isinstance(pattern, (tuple, list)):
        flags = [bool(flag) for flag in pattern[:trunk]]
        return flags + [False] * (trunk - len(flags))
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        period = pattern
    if full_first:
        return [period == 0 or index % period != 0 for index in range(trunk)]
    return [period == 0 or index % period < period - 1 for index in range(trunk)]


def _recurrent(header: Header, trunk: int, kv_heads: Sequence[int]) -> list[bool]:
    architecture = header.architecture
    if architecture in _RECURRENT or architecture == "falcon-h1":
        return [True] * trunk
    if architecture in _RECURRENT_WITHOUT_KV_HEADS:
        idle = _per_block(header, "feed_forward_length", trunk, 0)
        if architecture.startswith("nemotron_h"):
            return [kv_heads[index] == 0 and idle[index] == 0 for index in range(trunk)]
        return [kv == 0 for kv in kv_heads[:trunk]]
    if architecture in _RECURRENT_BY_INTERVAL:
        listed = header.get("attention.recurrent_layers")
        if isinstance(listed, (tuple, list)):
            return [bool(flag) for flag in listed[:trunk]]
        usual = 8 if architecture == "minimax-01" else 4
        interval = _number(header, "full_attention_interval", usual) or usual
        return [(index + 1) % interval != 0 for index in range(trunk)]
    return [False] * trunk


def _state(header: Header, width: int, heads: int) -> tuple[int, int]:
    """Return the elements of one sequence's convolution state and recurrent state in a recurrent block."""
    if size := _number(header, "wkv.head_size"):
        return _number(header, "token_shift_count", 2) * width, width * size
    if cache := _number(header, "shortconv.l_cache"):
        return width * (cache - 1), 0
    kernel = _number(header, "ssm.conv_kernel")
    if size := _number(header, "kda.head_dim"):
        return 3 * (kernel - 1 if kernel else 3) * heads * size, size * size * heads
    inner, depth = _number(header, "ssm.inner_size"), _number(header, "ssm.state_size")
    groups = _number(header, "ssm.group_count")
    convolution = (kernel - 1 if kernel else 0) * (inner + 2 * groups * depth)
    if header.architecture == "minimax-01":
        size = _number(header, "attention.key_length", width // heads if heads else 0)
        return convolution, size * size * heads
    return convolution, depth * inner


def _blocks_with_cache(header: Header, trunk: int) -> list[bool]:
    """Return which blocks keep keys and values of their own; some reuse an earlier block's."""
    first_shared = trunk
    if header.architecture == "gemma3n":
        first_shared = 20
    elif header.architecture == "gemma4":
        first_shared = trunk - _number(header, "attention.shared_kv_layers")
    return [index < first_shared for index in range(trunk)]


def _place(header: Header, trunk: int, count: int) -> tuple[Part, Part, Part, list[Part]]:
    """Sort the tensors by what they are placed with: the input, the output, each block, or every block."""
    parts = [Part() for _ in range(max(count, 1))]
    input_part, output_part, rope = Part(looked_up=True), Part(), Part()
    for tensor in header.tensors:
        found = _BLOCK.match(tensor.name)
        if found:
            index = int(found[1])
            # Drafting blocks are skipped unless a second context for them is asked for.
            if index < trunk:
                parts[index].add(found[2], tensor)
            continue
        stem = tensor.name.split(".", 1)[0]
        if stem in _INPUT:
            input_part.add(tensor.name, tensor)
        elif stem.startswith(_EVERY_BLOCK):
            rope.add(tensor.name, tensor)
        elif stem in _FIRST_BLOCK and not (
            stem == "token_embd_norm" and header.architecture.startswith("lfm2")
        ):
            parts[0].add(tensor.name, tensor)
        else:
            output_part.add(tensor.name, tensor)
    return input_part, output_part, rope, parts[:trunk]


def _file_order(header: Header) -> dict[str, tuple[int, int, int]]:
    return {tensor.name: (tensor.part, tensor.offset, tensor.n_bytes) for tensor in header.tensors}
