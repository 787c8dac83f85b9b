"""The graph of a model, as sizes: what each block computes, in llama.cpp's order.

Written from the graphs that llama.cpp builds (``llama-graph.cpp`` and the architectures' own files); blocks
are recognised by their tensors, so most architectures need no rule of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer.memory.graph import Graph, Result, View
from nbinfer.memory.layout import CPU, has_kernel
from nbinfer.memory.repeats import ends_kept, rounds_kept
from nbinfer.memory.settings import experts_stay
from nbinfer.memory.shape import GPU_ALIGNMENT, padded, row_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.memory.layout import Layout
    from nbinfer.memory.settings import Settings
    from nbinfer.memory.shape import Block, Part, Shape

_FLOAT = 4
_ROTATION = 64
_MULTIPLE_POSITIONS = frozenset(("qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "paddleocr"))
# These centre the mean as well; that operation cannot work in place.
_LAYER_NORM = frozenset(
    ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "cohere2",
     "cohere2moe", "command-r", "phi2", "gpt2", "gptneox", "falcon", "starcoder", "starcoder2", "stablelm",
     "bloom", "mpt", "nemotron", "olmo", "refact", "codeshell", "orion", "dbrx", "jais")
)  # fmt: skip
# They may hand every token's last state to a drafting head, and choose rows only behind it.
_CHOOSES_LATE = frozenset(
    ("bailingmoe3", "cohere2moe", "gemma4", "gpt-oss", "hy-v3", "mimo2", "nemotron_h", "nemotron_h_moe",
     "qwen35", "qwen35moe", "qwen3next", "step35")
)  # fmt: skip
_CHOOSES_BEFORE_NORM = frozenset(("gpt-oss",))
# Their sums begin with the older part, and take its room.
_OLDER_FIRST = frozenset(("lfm2", "lfm2moe"))
_OLDER_FIRST_AFTER_FEED = frozenset(("lfm2", "lfm2moe", "phi3"))
_POST_NORM = frozenset(("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3"))
_SOFT_CAPPED = frozenset(("gemma2", "grok"))
_NORMALISES_VALUES = frozenset(("gemma3n", "gemma4"))
# Only blocks with a window know positions.
_TURNS_IN_WINDOW = frozenset(("cohere2", "cohere2moe", "exaone4", "exaone-moe"))
# The delta net's kernel reads shared keys itself; here they are repeated for it.
_REPEATS_KEYS = frozenset(("qwen3next",))


class Builder:
    """Builds one graph.

    Parameters
    ----------
    made, shape, settings
        What is laid out; the cache, the weights and whether flash attention runs are taken from ``made``.
    gpus, pipeline
        As of :class:`nbinfer.memory.graph.Graph`.
    tokens
        Tokens in the graph; 0 is as many as the largest one has.

    Attributes
    ----------
    graph
        What was built.
    attended
        The device of each block with flash attention, and that operation.
    """

    block: Block
    part: Part

    def __init__(
        self,
        made: Layout,
        shape: Shape,
        settings: Settings,
        *,
        gpus: int,
        pipeline: bool = False,
        tokens: int = 0,
    ) -> None:
        self.shape, self.settings, self.placed = shape, settings, made.placed
        self.numbers = made.numbers
        # Fewer than the largest graph has: only to see what runs where.
        self.small = tokens > 0
        self.tokens = self.rows = tokens or made.numbers.tokens
        self.outputs = tokens or made.numbers.outputs
        self.flash = made.flash
        # Without flash attention the values are stored turned, unless it was hoped for.
        self.turned = settings.flash_attention is False
        self.graph = Graph(gpus, offload=settings.op_offload, pipeline=pipeline)
        self.cache_kind = settings.kv_type.upper()
        self.centred = shape.architecture in _LAYER_NORM
        self.device = CPU
        self.attended: list[tuple[int, Result]] = []
        self._given: dict[str, Result] = {}
        self._rope: dict[int, Result | None] = {}
        self._following: Block | None = None
        self._ahead: Result | None = None
        self._source: Result
        self._chosen_source: Result | None = None
        self._per_layer: Result | None = None
        self._start: Result | None = None

    # -- pieces ------------------------------------------------------------------------------------------

    def size(self, elements: int) -> int:
        """Return the bytes of ``elements`` numbers for each row."""
        return _FLOAT * elements * self.rows

    def given(self, name: str, size: int) -> Result:
        """Return an input, made when it is first needed."""
        if name not in self._given:
            self._given[name] = self.graph.input(size)
        return self._given[name]

    def has(self, name: str) -> bool:
        """Whether the block has a weight of this name."""
        return f"{name}.weight" in self.part.tensors

    def weight(self, name: str) -> Result | None:
        """Return a tensor of the current block, or None."""
        tensor = self.part.tensors.get(name)
        if tensor is None:
            return None
        stays = "_exps." in name and experts_stay(self.settings.experts_on_cpu, self.block.index)
        device = CPU if stays else self.device
        return self.graph.weight(tensor.n_bytes, device, kind=tensor.type, row=tensor.shape[0])

    def width(self, name: str) -> int:
        """Return how many numbers a row has after multiplying with a weight."""
        return self.part.tensors[f"{name}.weight"].shape[1]

    def multiply(self, source: Result, name: str, *, per_sequence: bool = False) -> Result:
        """Multiply with a matrix of the block, and add its bias when it has one.

        ``per_sequence``: the rows of one sequence count, not all, for whether a GPU takes it over.
        """
        rows = self.rows // self.settings.parallel if per_sequence else self.rows
        made = self.graph.op(
            self.size(self.width(name)), source, weight=self.weight(f"{name}.weight"), rows=rows
        )
        return self.shift(made, f"{name}.bias")

    def shift(self, source: Result, name: str) -> Result:
        """Add or multiply with a vector of the block, in place; nothing where there is none."""
        vector = self.weight(name)
        if vector is None:
            return source
        rows = source.size // (_FLOAT * self.part.tensors[name].shape[0])
        return self.graph.op(source.size, source, reuse=(source,), weight=vector, rows=rows)

    def norm(self, source: Result, name: str) -> Result:
        """Normalise and scale by a weight of the block; nothing where there is none."""
        if not self.has(name) and name not in self.part.tensors:
            return source
        made = self.graph.op(source.size, source, reuse=() if self.centred else (source,))
        made = self.shift(self.shift(made, f"{name}.weight"), name)
        return self.shift(made, f"{name}.bias")

    def add(self, one: Result, other: Result) -> Result:
        """Add two results, in place of one that is not needed any more."""
        return self.graph.op(one.size, one, other, reuse=(one, other))

    def in_place(self, source: Result) -> Result:
        """Append an operation that changes its source."""
        return self.graph.op(source.size, source, reuse=(source,))

    def by_cells(self, made: Result, per_cell: int) -> Result:
        """Let a result hold so many bytes more for each cell of the block's cache."""
        cells = self.numbers.window_cells if self.block.sliding else self.numbers.cells
        made.size += per_cell * cells
        made.per_cell, made.windowed = per_cell, self.block.sliding
        return made

    def gate(self, one: Result, other: Result | None = None) -> Result:
        """Append a gated activation: of two results, or of the halves of one."""
        if other is None:
            return self.graph.op(one.size // 2, one)
        return self.graph.op(one.size, one, other)

    def columns(self, source: Result, size: int) -> View:
        """Return some columns of a result; when copied elsewhere, what lies between them goes along."""
        return View(source, source.size - (source.size - size) // self.rows)

    def pick(self, source: Result) -> Result:
        """Keep the rows that are asked for."""
        wanted = self.given("outputs", _FLOAT * self.outputs)
        return self.graph.op(source.size // self.tokens * self.outputs, source, wanted)

    # -- the whole ---------------------------------------------------------------------------------------

    def build(self) -> None:
        """Lay out the graph."""
        shape = self.shape
        indices = self.given("tokens", _FLOAT * self.tokens)
        # Callers may pass vectors instead of tokens: room for them is always there.
        self.given("vectors", self.size(shape.width))
        current = self._look_up(self.size(shape.width), indices)
        if "position_embd.weight" in shape.input.tensors:
            positions = self.given("positions", _FLOAT * self.tokens)
            placed = self._look_up(current.size, positions)
            if "token_types.weight" in shape.input.tensors:
                kinds = self.graph.weight(_FLOAT * shape.width, CPU)
                current = self.graph.op(current.size, current, reuse=(current,), weight=kinds)
            current = self.graph.op(current.size, placed, current, reuse=(placed, current))
        chosen = self._chosen()
        if chosen:
            self._enter(chosen[0])
            if "token_embd_norm.weight" in self.part.tensors:
                current = self.norm(current, "token_embd_norm")
            if "per_layer_model_proj.weight" in self.part.tensors:
                current = self._begin_per_layer(current, indices)
        for block, following in zip(chosen, [*chosen[1:], None], strict=True):
            current = self._block(block, current, following)
        self._finish(current)

    def _look_up(self, size: int, indices: Result) -> Result:
        return self.graph.look_up(size, self.graph.weight(0, CPU), indices)

    def _chosen(self) -> list[Block]:
        """Return the blocks to lay out: some of each kind from either end.

        Places alternate from block to block, so an odd number of equal blocks stays odd. Whole rounds of the
        pattern where the order of kinds leaves other gaps: recurrent blocks among others, and blocks that a
        GPU computes for main memory.
        """
        blocks = self.shape.blocks
        kinds = [self._kind(block) for block in blocks]
        among = len(set(self.placed)) > 1 or any(block.key_row for block in blocks)
        shared = self.graph.gpus > 0 and CPU in self.placed
        if self.small:
            # What runs where depends on the neighbours alone.
            kept = rounds_kept(kinds, alone=2, among=2)
        elif shared and self.shape.recurrent:
            return blocks
        else:
            kept = rounds_kept(kinds, alone=6 if shared else 3, among=2)
        if not (self.small or shared or (self.shape.recurrent and among)):
            kept = min(kept, ends_kept(kinds, 3 if self._is_per_layer() else 2), key=sum)
        return [block for block, stays in zip(blocks, kept, strict=True) if stays]

    def _is_per_layer(self) -> bool:
        """Whether every block gets embeddings of its own."""
        return "per_layer_token_embd.weight" in self.shape.input.tensors

    def _kind(self, block: Block) -> tuple[object, ...]:
        return (
            self.placed[block.index],
            experts_stay(self.settings.experts_on_cpu, block.index),
            block.sliding,
            block.recurrent,
            bool(block.key_row),
            block.heads,
            block.kv_heads,
            len(block.part.tensors),
        )

    def _enter(self, block: Block) -> None:
        self.block, self.part, self.device = block, block.part, self.placed[block.index]

    def _finish(self, current: Result) -> None:
        """Append the output: a vector for each row, and logits where the model has them."""
        shape = self.shape
        self.part, self.device = shape.output, self.placed[-1]
        norm = next((n for n in shape.output.tensors if n.endswith("_norm.weight")), None)
        late = shape.architecture in _CHOOSES_LATE
        if late and shape.architecture in _CHOOSES_BEFORE_NORM:
            current = self._pick_late(current)
            late = False
        if norm:
            current = self.norm(current, norm.removesuffix(".weight"))
        if late:
            current = self._pick_late(current)
        current.kept = True
        head = shape.output.tensors.get("output.weight", shape.tied)
        skips = self.settings.pooled and shape.architecture in _OLDER_FIRST
        if head is not None and shape.has_logits and not skips:
            weight = self.graph.weight(head.n_bytes, self.device, kind=head.type, row=head.shape[0])
            logits = self.graph.op(self.size(shape.vocabulary), current, weight=weight, rows=self.rows)
            logits.kept = True
        if self.settings.pooled:
            self._pool(current)

    def _pick_late(self, current: Result) -> Result:
        current.kept = True
        current = self.pick(current)
        self.rows = self.outputs
        return current

    def _pool(self, vectors: Result) -> None:
        parallel = self.settings.parallel
        if self.shape.pooling in ("", "none"):
            return
        if self.shape.pooling == "mean":
            means = self.given("means", _FLOAT * self.tokens * parallel)
            turned = self.graph.op(vectors.size, vectors)
            pooled = self.graph.op(_FLOAT * self.shape.width * parallel, turned, means)
        else:
            rows = self.given("rows", _FLOAT * parallel)
            pooled = self.graph.op(_FLOAT * self.shape.width * parallel, vectors, rows)
        pooled.kept = True

    # -- a block -----------------------------------------------------------------------------------------

    def _block(self, block: Block, source: Result, following: Block | None) -> Result:
        self._enter(block)
        self._following, self._source = following, source
        past = self._ahead or (self._state(0) if self._fetches_first() else None)
        self._ahead = None
        normed = self.norm(source, "attn_norm")
        if self._is_parallel():
            return self._parallel_block(source, normed)
        mixed = self._mix(source, normed, past)
        architecture = self.shape.architecture
        if following is None and architecture not in _CHOOSES_LATE and architecture != "falcon-h1":
            mixed = self.pick(mixed)
            source = self._chosen_source or self.pick(source)
            self.rows = self.outputs
        before = "ffn_norm"
        if self.has("ffn_norm") or "ffn_norm" in self.part.tensors or self.has("post_ffw_norm"):
            mixed = self.norm(mixed, "post_attention_norm")
        else:
            before = "post_attention_norm"
        older_first = architecture in _OLDER_FIRST
        summed = self.add(source, mixed) if older_first else self.add(mixed, source)
        if following is None and architecture == "falcon-h1":
            summed = self.pick(summed)
            self.rows = self.outputs
        if architecture in _POST_NORM:
            summed = self.norm(summed, "attn_output_norm")
        if not self._feeds():
            return summed
        fed = self._feed_forward(self.norm(summed, before))
        fed = self.norm(fed, "post_ffw_norm")
        older_first = architecture in _OLDER_FIRST_AFTER_FEED
        done = self.add(summed, fed) if older_first else self.add(fed, summed)
        if self.has("inp_gate"):
            done = self._add_per_layer(done)
        return self.norm(done, "layer_output_norm")

    def _fetches_first(self) -> bool:
        """Whether the block's graph begins with its state; a delta net's begins with its norm."""
        if self.has("shortconv.in_proj"):
            return True
        return self.has("ssm_in") and not self.has("attn_q") and "ssm_conv1d.weight" in self.part.tensors

    def _fetch_ahead(self) -> None:
        """Append what llama.cpp begins before the block is complete: the next block's state.

        In the last block of a model whose sums begin with the older part, that part's rows are chosen now.
        """
        here = self.block
        if self._following is None and self.shape.architecture in _OLDER_FIRST:
            self._chosen_source = self.pick(self._source)
        elif self._following is not None:
            self._enter(self._following)
            if self._fetches_first():
                self._ahead = self._state(0)
            self._enter(here)

    def _mix(self, source: Result, normed: Result, past: Result | None) -> Result:
        """Append what mixes tokens: attention, a recurrence, or both."""
        names = self.part.tensors
        if self.has("attn_kv_a_mqa"):
            return self._project(self._latent(normed))
        if self.has("attn_gate") and "ssm_conv1d.weight" in names:
            return self._delta_net(normed)
        if self.has("shortconv.in_proj") and past is not None:
            return self._short_convolution(past, normed)
        if self.has("attn_q") or self.has("attn_qkv"):
            attended = self._attention(normed)
            if not self.has("ssm_in"):
                if not self.has("ffn_gate_inp"):
                    self._fetch_ahead()
                return self._project(attended)
            past = self._state(0)
            projected: list[Result] = []
            scanned = self._scan(
                past, self.norm(source, "attn_norm"), lambda: projected.append(self._project(attended))
            )
            return self.add(projected[0], scanned)
        if self.has("ssm_in") and past is not None:
            return self._scan(past, normed)
        return normed

    def _feeds(self) -> bool:
        return any(name.startswith(("ffn_down", "ffn_gate_inp")) for name in self.part.tensors)

    def _is_parallel(self) -> bool:
        """Whether attention and feed-forward have the same input."""
        norms = ("ffn_norm", "post_attention_norm", "post_ffw_norm", "attn_output_norm")
        return (
            self.has("ffn_down")
            and not any(self.has(name) for name in norms)
            and "ffn_norm" not in self.part.tensors
        )

    def _parallel_block(self, source: Result, normed: Result) -> Result:
        attended = self._attention(normed)
        if self._following is None:
            normed = self.pick(normed)
            everything, self.rows = self.rows, self.outputs
            fed = self._feed_forward(normed)
            fed = self.add(fed, self.pick(source))
            self.rows = everything
            projected = self.pick(self._project(attended))
            self.rows = self.outputs
            return self.add(fed, projected)
        fed = self.add(self._feed_forward(normed), source)
        return self.add(fed, self._project(attended))

    # -- attention ---------------------------------------------------------------------------------------

    def _positions(self) -> Result:
        times = 4 if self.shape.architecture in _MULTIPLE_POSITIONS else 1
        return self.given("positions", _FLOAT * self.tokens * times)

    def _turn(self, source: Result, size: int | None = None) -> Result:
        """Append the rotation by position, in place where the source is not shared."""
        absolute = "position_embd.weight" in self.shape.input.tensors
        if absolute or (self.shape.architecture in _TURNS_IN_WINDOW and not self.block.sliding):
            return source
        if self.device not in self._rope:
            factors = next(iter(self.shape.rope.tensors.values()), None)
            self._rope[self.device] = (
                None if factors is None else self.graph.weight(factors.n_bytes, self.device)
            )
        reuse = (source,) if size is None else ()
        size = source.size if size is None else size
        return self.graph.op(
            size, source, self._positions(), reuse=reuse, weight=self._rope[self.device], chooses=False
        )

    def _rotation(self, which: str, size: int) -> Result | None:
        """Return the matrix that spreads the values of a quantised cache over a head, or None."""
        if not self.settings.quantised_cache or size < 1 or size % _ROTATION or not self.shape.has_cache:
            return None
        side = _ROTATION
        if which == "keys":
            while size % (2 * side) == 0:
                side *= 2
        sliding = "sliding " if self.block.sliding else ""
        return self.given(f"{sliding}{which} rotation", _FLOAT * side * side)

    def _rotate(self, source: Result, which: str, size: int) -> Result:
        rotation = self._rotation(which, size)
        return source if rotation is None else self.graph.op(source.size, source, rotation)

    def _attention(self, normed: Result) -> Result:
        """Append attention up to its result before the output matrix."""
        block = self.block
        query_size = self.size(block.heads * block.key_size)
        if self.has("attn_qkv"):
            fused = self.multiply(normed, "attn_qkv")
            queries = self._turn(self.columns(fused, query_size), query_size)
            key_size = self.size(block.kv_heads * block.key_size)
            keys = self._turn(self.columns(fused, key_size), key_size)
            values = self.columns(fused, self.size(block.kv_heads * block.value_size))
            return self._attend(queries, keys, values)
        queries = self.multiply(normed, "attn_q")
        gated = self._is_gated()
        held = queries
        if gated:
            # Queries and their gates lie in one result, side by side.
            queries = self.graph.op(query_size, View(held))
            queries = self._turn(self.shift(queries, "attn_q_norm.weight"))
        else:
            queries = self._turn(self._head_norm(queries, "attn_q_norm"))
        if self.shape.has_cache and not block.key_row:
            # The keys and values are those of an earlier block.
            attended = self._attend(self._rotate(queries, "keys", block.key_size), None, None)
        else:
            attended = self._attend(*self._with_keys(normed, queries))
        if gated:
            attended = self._rotate(attended, "values", block.value_size)
            gate = self.in_place(self.graph.op(query_size, View(held)))
            attended = self.graph.op(attended.size, View(attended), gate, reuse=(gate,))
        return attended

    def _with_keys(self, normed: Result, queries: Result) -> tuple[Result, Result, Result]:
        """Append keys and values, in the order in which llama.cpp adds them to its graph."""
        block = self.block
        queries = self._rotate(queries, "keys", block.key_size)

        def make_keys() -> Result:
            keys = self._turn(self._head_norm(self.multiply(normed, "attn_k"), "attn_k_norm"))
            return self._rotate(keys, "keys", block.key_size)

        def make_values(keys: Result | None) -> Result:
            if not self.has("attn_v"):
                return keys or make_keys()
            values = self.multiply(normed, "attn_v")
            if self.shape.architecture in _NORMALISES_VALUES:
                values = self.in_place(View(values))
            return self._rotate(values, "values", block.value_size)

        if self.shape.window or not self.shape.has_cache:
            keys = make_keys()
            return queries, keys, make_values(keys)
        values = make_values(None)
        return queries, make_keys(), values

    def _head_norm(self, source: Result, name: str) -> Result:
        """Return a result split into heads, each normalised where the model does that."""
        if not self.has(name):
            return View(source)
        if self.part.tensors[f"{name}.weight"].shape[0] * _FLOAT * self.rows == source.size:
            # Normalised as a whole, before it is split.
            return View(self.shift(self.in_place(source), f"{name}.weight"))
        return self.shift(self.in_place(View(source)), f"{name}.weight")

    def _project(self, attended: Result) -> Result:
        if self.has("attn_k_b") or self._is_gated():
            return self.multiply(attended, "attn_output")
        return self.multiply(self._rotate(attended, "values", self.block.value_size), "attn_output")

    def _is_gated(self) -> bool:
        """Whether the query matrix also makes a gate for the attention's result."""
        queries = self.block.heads * self.block.key_size
        return self.has("attn_q") and not self.has("attn_k_b") and self.width("attn_q") > queries

    def _attend(self, queries: Result, keys: Result | None, values: Result | None) -> Result:
        """Append the attention itself, over the cache or over the batch."""
        block = self.block
        size = self.size(block.heads * block.value_size)
        if not self.shape.has_cache:
            return self._attend_batch(queries, keys, values, size)
        key_row, value_row = block.kv_heads * block.key_size, block.kv_heads * block.value_size
        device = self._cache_device()
        key_cache, value_cache = self._cache(key_row, device), self._cache(value_row, device)
        if keys is not None and values is not None:
            self._store(key_cache, keys, "keys")
            self._store(value_cache, values, "values")
        mask = self._mask()
        sinks = self.weight("attn_sinks.weight")
        if self.flash:
            made = self.graph.op(
                size,
                queries,
                self._as_f16(key_cache, key_row),
                self._as_f16(value_cache, value_row),
                mask,
                weight=sinks,
                chooses=False,
                device=self._must_run_on(),
            )
            self._hold_f16_copies(made, key_row, value_row)
            self.attended.append((self.device, made))
            return made
        each = _FLOAT * self.tokens * block.heads
        scores = self.by_cells(self.graph.op(0, key_cache, queries), each)
        if self.shape.architecture in _SOFT_CAPPED:
            scores = self.by_cells(self.graph.op(0, scores, reuse=(scores,)), each)
        weighed = self.graph.op(0, scores, mask, reuse=(scores,), weight=sinks, chooses=False)
        scores = self.by_cells(weighed, each)
        held = value_cache
        if not self.turned:
            row = row_bytes(self.cache_kind, value_row) * self.numbers.streams
            held = self.by_cells(self.graph.op(0, value_cache), row)
        mixed = self.graph.op(size, held, scores)
        return self.graph.op(size, mixed)

    def _must_run_on(self) -> int | None:
        """Return the processor where the block's GPU has no kernel for flash attention, else None."""
        lacks = self.device != CPU and not has_kernel(self.shape, self.settings, self.block)
        return CPU if lacks else None

    def _cache_device(self) -> int:
        """Return where the cache is that the block reads."""
        block = self.block
        if block.key_row:
            return self.device
        # It reads what the last block of its kind has stored.
        own = [other for other in self.shape.blocks if other.key_row and other.sliding == block.sliding]
        return self.placed[own[-1].index] if own else self.device

    def _cache(self, row: int, device: int) -> Result:
        """Return the block's part of the cache, of so many numbers for each token."""
        each = row_bytes(self.cache_kind, row) * self.numbers.streams
        return self.by_cells(self.graph.cache(0, device), each)

    def _as_f16(self, cache: Result, row: int) -> Result:
        """Return what flash attention reads: the cache, or a conversion of one of 32-bit floats."""
        if self.cache_kind != "F32":
            return cache
        return self.by_cells(self.graph.op(0, cache), 2 * row * self.numbers.streams)

    def _store(self, cache: Result, rows: Result, which: str) -> None:
        sliding = "sliding " if self.block.sliding else ""
        length = self.tokens
        if which == "values" and self.turned:
            # Written element by element, because they are stored column by column, all equally wide.
            length *= self.shape.value_row_max
            if self.shape.value_row_max > self.block.kv_heads * self.block.value_size:
                rows = self.graph.op(self.size(self.shape.value_row_max), rows)
        self.graph.write(cache, rows, self.given(f"{sliding}{which}", 8 * length))

    def _mask(self) -> Result:
        name = "sliding mask" if self.block.sliding else "mask"
        if name not in self._given:
            self.by_cells(self.given(name, 0), (2 if self.flash else _FLOAT) * self.tokens)
        return self._given[name]

    def _hold_f16_copies(self, attended: Result, *rows: int) -> None:
        """Add what a GPU keeps behind the result: one block's cache as f16, when it is of another type.

        A cache of 32-bit floats is converted before. Cells come in multiples that need no padding.
        """
        if self.cache_kind in ("F16", "F32"):
            return
        cells = self.numbers.window_cells if self.block.sliding else self.numbers.cells
        attended.extra_per_cell = 2 * sum(rows) * self.numbers.streams
        attended.extra = (
            padded(attended.size, GPU_ALIGNMENT) - attended.size + attended.extra_per_cell * cells
        )
        attended.windowed = self.block.sliding

    def _attend_batch(self, queries: Result, keys: Result | None, values: Result | None, size: int) -> Result:
        """Append attention without a cache, of every token to every token."""
        if keys is None or values is None:
            return queries
        name = "sliding mask" if self.block.sliding else "mask"
        mask = self.given(name, (2 if self.flash else _FLOAT) * self.tokens * self.tokens)
        if self.flash:
            halves = [
                self.graph.op(self.size(self.block.kv_heads * size) // 2, part)
                for part, size in ((keys, self.block.key_size), (values, self.block.value_size))
            ]
            return self.graph.op(size, queries, *halves, mask)
        turned = self.graph.op(self.size(self.block.kv_heads * self.block.value_size), values)
        scores = self.graph.op(_FLOAT * self.tokens * self.tokens * self.block.heads, keys, queries)
        scores = self.graph.op(scores.size, scores, mask, reuse=(scores,))
        return self.graph.op(size, self.graph.op(size, turned, scores))

    def _latent(self, normed: Result) -> Result:
        """Append multi-head latent attention: keys and values are read from one compressed row."""
        block, numbers, graph = self.block, self.numbers, self.graph
        heads = block.heads
        lower = self.part.tensors["attn_k_b.weight"]
        rank, rope = lower.shape[1], block.key_size - lower.shape[1]
        if self.has("attn_q_a"):
            queries = self.multiply(self.norm(self.multiply(normed, "attn_q_a"), "attn_q_a_norm"), "attn_q_b")
        else:
            queries = self.multiply(normed, "attn_q")
        absorbed = graph.op(
            self.size(heads * rank), View(queries), weight=self.weight("attn_k_b.weight"), rows=self.rows
        )
        turned = self._turn(View(queries), self.size(heads * rope))
        queries = graph.op(self.size(heads * (rank + rope)), absorbed, turned)
        row = self.multiply(normed, "attn_kv_a_mqa")
        small = graph.op(self.size(rank), View(row))
        small = self.shift(small, "attn_kv_a_norm.weight")
        key = graph.op(self.size(rank + rope), small, self._turn(View(row), self.size(rope)))
        cache = self._cache(rank + rope, self.device)
        self._store(cache, key, "keys")
        mask = self._mask()
        size = self.size(heads * rank)
        upper = self.weight("attn_v_b.weight")
        out = self.size(heads * self.part.tensors["attn_v_b.weight"].shape[1])
        if self.flash:
            held = self._as_f16(cache, rank + rope)
            made = graph.op(size, queries, held, held, mask, device=self._must_run_on())
            self._hold_f16_copies(made, rank + rope)
            self.attended.append((self.device, made))
            made = graph.op(out, View(made), weight=upper, rows=self.rows)
            return graph.op(out, made)
        turned = self.by_cells(graph.op(0, cache), row_bytes(self.cache_kind, rank) * numbers.streams)
        each = _FLOAT * self.tokens * heads
        scores = self.by_cells(graph.op(0, cache, queries), each)
        scores = self.by_cells(graph.op(0, scores, mask, reuse=(scores,)), each)
        made = graph.op(size, turned, scores)
        made = graph.op(out, made, weight=upper, rows=self.rows)
        return graph.op(out, made)

    # -- recurrences -------------------------------------------------------------------------------------

    def _state(self, which: int) -> Result:
        """Return one of the block's states, fetched for the sequences of the batch."""
        size = _FLOAT * self.block.state[which] * self.settings.parallel
        stored = self.graph.cache(size, self.device)
        self.graph.write(stored)  # cleared for new sequences
        fetched = self.graph.op(size, stored, self._sequences())
        self._move_others(stored)
        return fetched

    def _move_others(self, stored: Result) -> None:
        """Move the states of sequences outside the batch: there are none, but the empty result is placed."""
        self.graph.write(stored, self.graph.op(0, stored, self._sequences("others")))

    def _sequences(self, which: str = "all") -> Result:
        """Return which state each sequence has: those of the batch, or none, each a view of one input."""
        size = _FLOAT * self.settings.parallel
        given = self.given("sequences", size)
        name = f"sequences {which}"
        if name not in self._given:
            self._given[name] = View(given, size if which == "all" else 0)
        return self._given[name]

    def _with_past(self, past: Result, source: Result, size: int) -> Result:
        """Append the convolution's past in front of ``source`` and write its end back."""
        made = self.graph.op(size + past.size, past, source)
        self.graph.write(self.graph.cache(0, self.device), View(made))
        return made

    def _convolve(self, source: Result, size: int, name: str) -> Result:
        made = self.graph.op(size, source, weight=self.weight(f"{name}.weight"), rows=self.rows)
        return self.shift(made, f"{name}.bias")

    def _delta_net(self, normed: Result) -> Result:
        """Append a gated delta net."""
        graph = self.graph
        past = self._state(0)
        fused = self.multiply(normed, "attn_qkv")
        both = self._with_past(past, View(fused), fused.size)
        state = self._state(1)
        mixed = self.in_place(self._convolve(both, fused.size, "ssm_conv1d"))
        values = self.size(self.width("attn_gate"))
        keys = (fused.size - values) // 2
        parts = []
        for _ in range(2):
            part = self.in_place(graph.op(keys, self.columns(mixed, keys)))
            if self.shape.architecture in _REPEATS_KEYS and keys != values:
                part = graph.op(values, part)
            parts.append(part)
        gates = self._delta_gates(normed)
        whole = graph.op(values + state.size, *parts, self.columns(mixed, values), *gates, state)
        graph.write(graph.cache(0, self.device), View(whole))
        made = self.shift(graph.op(values, View(whole)), "ssm_norm.weight")
        gate = self.in_place(View(self.multiply(normed, "attn_gate")))
        made = graph.op(values, made, gate, reuse=(made, gate))
        return View(self.multiply(View(made), "ssm_out", per_sequence=True))

    def _delta_gates(self, normed: Result) -> tuple[Result, Result]:
        if self.has("ssm_ba"):
            fused = self.multiply(normed, "ssm_ba")
            decay = self.graph.op(fused.size // 2, View(fused))
            decay = self.shift(self.shift(decay, "ssm_dt.bias"), "ssm_a")
            return decay, self.in_place(self.graph.op(fused.size // 2, View(fused)))
        decay = View(self.multiply(normed, "ssm_alpha"))
        decay = self.shift(self.shift(decay, "ssm_dt.bias"), "ssm_a")
        return decay, self.in_place(View(self.multiply(normed, "ssm_beta")))

    def _scan(self, past: Result, normed: Result, between: Callable[[], None] | None = None) -> Result:
        """Append a state space block of Mamba's first or second kind.

        ``between`` is called where llama.cpp has written the state and goes on with other parts first.
        """
        graph = self.graph
        fused = self.multiply(normed, "ssm_in", per_sequence=self.has("ssm_x"))
        inner = self.size(self.part.tensors["ssm_out.weight"].shape[0])
        wide = self.size(self.part.tensors["ssm_conv1d.weight"].shape[1])
        state = _FLOAT * self.block.state[1] * self.settings.parallel
        both = self._with_past(past, self.columns(fused, wide), wide)
        cache = graph.cache(state, self.device)
        graph.write(cache)
        mixed = self.in_place(self._convolve(both, wide, "ssm_conv1d"))
        if self.has("ssm_x"):
            small = self.multiply(mixed, "ssm_x", per_sequence=True)
            steps = graph.op(self.size(self.part.tensors["ssm_dt.weight"].shape[0]), View(small))
            steps = self.multiply(steps, "ssm_dt", per_sequence=True)
            depth = self.size(self.part.tensors["ssm_a.weight" if self.has("ssm_a") else "ssm_a"].shape[0])
            ends = [self.columns(small, depth) for _ in range(2)]
            parts = (cache, View(mixed), steps, *ends, self._sequences())
            scanned = graph.op(inner + state, *parts, weight=self.weight("ssm_a"), rows=1)
            self._move_others(cache)
            graph.write(cache, View(scanned, state))
            (between or self._fetch_ahead)()
            gate = graph.op(inner, View(fused))
            direct = self.shift(mixed, "ssm_d")
        else:
            heads = self.part.tensors["ssm_a"].shape[-1]
            steps = self.shift(graph.op(self.size(heads), View(fused)), "ssm_dt.bias")
            ends = [self.columns(mixed, (wide - inner) // 2) for _ in range(2)]
            scan = (cache, self.columns(mixed, inner), steps, *ends, self._sequences())
            scanned = graph.op(inner + state, *scan, weight=self.weight("ssm_a"), rows=1)
            self._move_others(cache)
            graph.write(cache, View(scanned, state))
            (between or self._fetch_ahead)()
            gate = graph.op(inner, View(fused))
            direct = graph.op(inner, View(mixed), weight=self.weight("ssm_d"), rows=self.rows)
        made = graph.op(inner, View(scanned, inner), direct, reuse=(direct,))
        made = graph.op(inner, gate, made)
        if self.has("ssm_x"):
            return View(self.multiply(made, "ssm_out", per_sequence=True))
        return self.multiply(self.norm(View(made), "ssm_norm"), "ssm_out")

    def _short_convolution(self, past: Result, normed: Result) -> Result:
        """Append LFM2's gated short convolution."""
        graph, size = self.graph, normed.size
        fused = self.multiply(normed, "shortconv.in_proj", per_sequence=True)
        product = graph.op(size, View(fused), View(fused))
        both = self._with_past(past, View(product), size)
        self._fetch_ahead()
        mixed = self._convolve(both, size, "shortconv.conv")
        made = graph.op(size, View(fused), mixed, reuse=(mixed,))
        return self.multiply(made, "shortconv.out_proj", per_sequence=True)

    # -- feed-forward ------------------------------------------------------------------------------------

    def _feed_forward(self, normed: Result) -> Result:
        if self.has("ffn_gate_inp"):
            return self._experts(normed)
        if self.has("ffn_gate"):
            first = self.multiply(normed, "ffn_gate")
            made = self.gate(first, self.multiply(normed, "ffn_up"))
        else:
            made = self.multiply(normed, "ffn_up")
            if self.width("ffn_up") > self.part.tensors["ffn_down.weight"].shape[0]:
                made = self.gate(made)
            else:
                made = self.in_place(made)
        return self.multiply(made, "ffn_down")

    def _experts(self, normed: Result) -> Result:
        """Append a mixture of experts, with the shared one when there is one."""
        graph, rows = self.graph, self.rows
        used = self.shape.n_experts_used
        count = self.shape.n_experts
        scores = self.in_place(self.multiply(normed, "ffn_gate_inp"))
        selection: Result = scores
        bias = self.weight("exp_probs_b.bias")
        if bias is not None:
            selection = graph.op(scores.size, scores, weight=bias, rows=rows)
        order = graph.op(self.size(count), selection)
        top = View(order)
        weights = graph.op(self.size(used), View(scores), top)
        total = self.in_place(graph.op(self.size(1), View(weights)))
        weights = graph.op(weights.size, View(weights), total)
        if self.has("ffn_gate_up_exps"):
            wide = self.part.tensors["ffn_gate_up_exps.weight"].shape[1]
            both = graph.op(
                self.size(used * wide), normed, top, weight=self.weight("ffn_gate_up_exps.weight"), rows=rows
            )
            made = graph.op(both.size // 2, View(both), View(both))
        else:
            first = self._expert(normed, top, "ffn_gate_exps") if self.has("ffn_gate_exps") else None
            second = self._expert(normed, top, "ffn_up_exps")
            made = self.in_place(second) if first is None else self.gate(first, second)
        made = self._expert(made, top, "ffn_down_exps")
        made = graph.op(made.size, made, weights, reuse=(made,))
        each = self.size(self.shape.width)
        views = [View(made, each) for _ in range(used)]
        summed: Result = views[0]
        for index, view in enumerate(views[1:]):
            summed = graph.op(each, summed, view, reuse=(summed,) if index else ())
        if used == 1:
            summed = graph.op(each, views[0])
        if self.has("ffn_down_shexp"):
            first = self.multiply(normed, "ffn_gate_shexp") if self.has("ffn_gate_shexp") else None
            second = self.multiply(normed, "ffn_up_shexp")
            shared = self.in_place(second) if first is None else self.gate(first, second)
            shared = self.multiply(shared, "ffn_down_shexp")
            if self.has("ffn_gate_inp_shexp"):
                gate = graph.op(
                    self.size(1), normed, weight=self.weight("ffn_gate_inp_shexp.weight"), rows=rows
                )
                shared = graph.op(shared.size, shared, self.in_place(gate), reuse=(shared,))
            summed = self.add(summed, shared)
        return summed

    def _expert(self, source: Result, top: Result, name: str) -> Result:
        used = self.shape.n_experts_used
        wide = self.part.tensors[f"{name}.weight"].shape[1]
        made = self.graph.op(
            self.size(used * wide), source, top, weight=self.weight(f"{name}.weight"), rows=self.rows
        )
        return self.shift(made, f"{name}.bias")

    # -- per-layer embeddings ----------------------------------------------------------------------------

    def _begin_per_layer(self, current: Result, indices: Result) -> Result:
        """Look up the embeddings that every block gets of its own (Gemma 3n and 4)."""
        wide = self.part.tensors["per_layer_model_proj.weight"].shape[1]
        looked_up = self._look_up(self.size(wide), indices)
        self._per_layer = self.in_place(View(looked_up))
        self._start = current = self.in_place(current)
        return current

    def _add_per_layer(self, done: Result) -> Result:
        gated = self.in_place(self.multiply(done, "inp_gate"))
        if self._start is not None and self._per_layer is not None:
            projected = self.multiply(self._start, "per_layer_model_proj")
            projected = self.in_place(View(self.in_place(projected)))
            projected = self.shift(projected, "per_layer_proj_norm.weight")
            summed = self.in_place(self.add(projected, self._per_layer))
            self._per_layer, self._start = self.graph.op(summed.size, View(summed)), None
        if self._per_layer is None:
            return done
        mine = View(self._per_layer, self._per_layer.size // len(self.shape.blocks))
        gated = self.graph.op(gated.size, gated, mine, reuse=(gated,))
        made = self.norm(self.multiply(gated, "proj"), "post_norm")
        return self.graph.op(done.size, done, made, reuse=(done, made))
