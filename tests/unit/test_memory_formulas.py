"""Memory by formula: known sizes, where each layer lies, and the allocator re-enacted on sizes."""

from __future__ import annotations

import platform
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from support import synthetic

from nbinfer.contract.errors import ConfigError, NotSupported
from nbinfer.gguf import TensorInfo, read_header
from nbinfer.memory import builder, rearranged
from nbinfer.memory.analytic import layout
from nbinfer.memory.graph import Graph, View
from nbinfer.memory.layout import CPU
from nbinfer.memory.rearranged import NOTHING, Rearranging
from nbinfer.memory.settings import (
    Numbers,
    Settings,
    expert_patterns,
    split_layers,
)
from nbinfer.memory.shape import Copies, Part, Shape, gpu_bytes, row_bytes
from nbinfer.processor import amx

if TYPE_CHECKING:
    from collections.abc import Callable

    Load = Callable[[str], Shape]

MIB = 1 << 20
GIB = 1 << 30
GPU = [200.0 * GIB]


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("headers")
    known: dict[str, Shape] = {}

    def load(name: str) -> Shape:
        if name not in known:
            path = synthetic.write(synthetic.ALL[name](), folder / f"{name}.gguf")
            known[name] = Shape.of(read_header(path))
            path.unlink()
        return known[name]

    return load


def plain(tokens: int, **changes: Any) -> Settings:
    """Settings as llama.cpp's own defaults have them."""
    settings = Settings(
        context_size=tokens, batch_size=512, flash_attention=True, swa_full=True, kv_unified=False
    )
    return replace(settings, **changes)


KNOWN = [
    # model, tokens, settings -> weights, cache with state, compute on the GPU in MiB, as llama.cpp reports
    ("llama-3.1-8b", 4096, {"gpu_layers": 0}, (0, 0, 669.477)),
    ("llama-3.1-8b", 4096, {"gpu_layers": 1}, (410.992, 0, 258.5)),
    ("llama-3.1-8b", 4096, {"gpu_layers": 16}, (2290.211, 240, 266.51)),
    ("llama-3.1-8b", 4096, {"gpu_layers": 32}, (4270.992, 496, 266.51)),
    ("llama-3.1-8b", 4096, {}, (4403.492, 512, 258.5)),
    ("qwen3-30b-a3b", 8192, {}, (17524.432, 768, 300.75)),
    ("qwen3-30b-a3b", 8192, {"experts_on_cpu": True}, (784.42, 768, 300.75)),
    ("gemma-3-4b", 32768, {}, (2082.742, 4352, 517.125)),
    ("gemma-3-4b", 32768, {"swa_full": False}, (2082.742, 814, 517.125)),
    ("gemma-3-4b", 32768, {"swa_full": False, "parallel": 4}, (2082.742, 1336, 517.125)),
    (
        "gemma-3-4b",
        32768,
        {"swa_full": False, "parallel": 4, "kv_unified": True},
        (2082.742, 1162, 517.125),
    ),
    ("deepseek-v2-lite", 32768, {}, (10775.407, 972, 232.262)),
    ("deepseek-v2-lite", 32768, {"flash_attention": False}, (10775.407, 972, 1174.27)),
    ("deepseek-v2-lite", 32768, {"kv_type": "q8_0"}, (10775.407, 516.388, 232.262)),
    ("qwen3-next-80b-a3b", 32768, {}, (42820.142, 768 + 75.375, 304.75)),
    ("qwen3-next-80b-a3b", 32768, {"parallel": 4}, (42820.142, 768 + 301.5, 308.75)),
    ("gpt-oss-20b", 131072, {}, (10949.38, 6144, 404)),
    ("gpt-oss-20b", 131072, {"swa_full": False}, (10949.38, 3090, 404)),
]


@pytest.mark.parametrize(("name", "tokens", "changes", "expected"), KNOWN)
def test_known_sizes_come_out_of_the_formulas(
    shape: Load, name: str, tokens: int, changes: dict[str, Any], expected: tuple[float, float, float]
) -> None:
    held = layout(shape(name), plain(tokens, **changes), GPU).on(0)
    weights, cache, compute = expected
    assert held.weights / MIB == pytest.approx(weights, abs=0.01)
    assert (held.cache + held.state) / MIB == pytest.approx(cache, abs=0.01)
    assert held.compute / MIB == pytest.approx(compute, rel=0.03)


def test_two_gpus_keep_several_copies_of_their_inputs(shape: Load) -> None:
    made = layout(shape("llama-3.1-8b"), plain(4096), [24.0 * GIB, 8.0 * GIB])
    both = made.on(0), made.on(1)
    assert sum(held.weights for held in both) / MIB == pytest.approx(4403.492, abs=0.01)
    single = layout(shape("llama-3.1-8b"), plain(4096), GPU)
    assert both[0].compute + both[1].compute > single.on(0).compute
    assert made.on(CPU).compute > single.on(CPU).compute


SPLITS = [
    # blocks, layers on GPUs, shares -> the GPU of each block and of the output, which counts as one more
    (4, -1, [], [-1, -1, -1, -1, -1]),
    (4, -1, [1.0], [0, 0, 0, 0, 0]),
    (4, 99, [1.0], [0, 0, 0, 0, 0]),
    (4, 0, [1.0], [-1, -1, -1, -1, -1]),
    (4, 1, [1.0], [-1, -1, -1, -1, 0]),
    (4, 4, [1.0], [-1, 0, 0, 0, 0]),
    (4, -1, [1.0, 1.0], [0, 0, 0, 1, 1]),
    (4, -1, [3.0, 1.0], [0, 0, 0, 0, 1]),
    (4, 3, [1.0, 1.0], [-1, -1, 0, 0, 1]),
    (4, -1, [1.0, 0.0], [0, 0, 0, 0, 0]),
]


@pytest.mark.parametrize(("count", "gpu_layers", "shares", "expected"), SPLITS)
def test_layers_go_to_gpus_by_their_shares_the_last_ones_first(
    count: int, gpu_layers: int, shares: list[float], expected: list[int]
) -> None:
    assert split_layers(count, gpu_layers, shares) == expected


NUMBERS = [
    # settings -> tokens altogether, cells of each stream, streams, tokens of a graph, rows of logits
    ({"context_size": 300}, (512, 512, 1, 300, 300)),
    ({"context_size": 4096}, (4096, 4096, 1, 512, 512)),
    ({"context_size": 4096, "parallel": 4}, (4096, 4096, 1, 512, 512)),
    ({"context_size": 4096, "parallel": 4, "kv_unified": False}, (4096, 1024, 4, 512, 512)),
    ({"context_size": 1000, "parallel": 3, "kv_unified": False}, (1536, 512, 3, 513, 512)),
    ({"context_size": 4096, "n_outputs_max": 1}, (4096, 4096, 1, 512, 1)),
    ({"context_size": 4096, "micro_batch": 64, "batch_size": 32}, (4096, 4096, 1, 32, 32)),
]


@pytest.mark.parametrize(("changes", "expected"), NUMBERS)
def test_settings_become_the_numbers_that_llama_cpp_makes_of_them(
    shape: Load, changes: dict[str, Any], expected: tuple[int, ...]
) -> None:
    found = Numbers.of(shape("llama-3.2-1b"), Settings(**changes))
    assert (found.context_size, found.cells, found.streams, found.tokens, found.outputs) == expected


def test_a_window_keeps_its_own_cells_and_one_batch_more(shape: Load) -> None:
    gemma = shape("gemma-3-4b")
    assert gemma.window == 1024
    assert Numbers.of(gemma, Settings(context_size=32768)).window_cells == 1024 + 512
    assert Numbers.of(gemma, Settings(context_size=1024)).window_cells == 1024
    assert Numbers.of(gemma, Settings(context_size=32768, parallel=3)).window_cells == 3 * 1024 + 512
    assert Numbers.of(gemma, Settings(context_size=32768, swa_full=True)).window_cells == 32768


SIZES = [
    ("F16", 128, 256, 256),
    ("F32", 1, 4, 128),
    ("Q8_0", 512, 544, 640),
    ("Q8_0", 64, 68, 640),  # a short row of a quantised type is filled up to 512 numbers
    ("Q4_K", 256, 144, 384),
]


@pytest.mark.parametrize(("kind", "row", "plain_bytes", "on_gpu"), SIZES)
def test_rows_of_tensors_take_these_bytes(kind: str, row: int, plain_bytes: int, on_gpu: int) -> None:
    assert row_bytes(kind, row) == plain_bytes
    assert gpu_bytes(kind, plain_bytes, row) == on_gpu


def test_blocks_that_share_an_earlier_cache_add_none(shape: Load) -> None:
    gemma = shape("gemma-4-e2b")
    own = [block for block in gemma.blocks if block.key_row]
    assert 0 < len(own) < len(gemma.blocks)
    assert {block.key_size for block in own} == {256, 512}


def test_latent_attention_stores_one_row_for_keys_and_values(shape: Load) -> None:
    blocks = shape("deepseek-v2-lite").blocks
    assert {(block.key_row, block.value_row) for block in blocks} == {(576, 0)}


def test_recurrent_blocks_keep_a_state_of_the_same_size_for_any_context(shape: Load) -> None:
    short = layout(shape("qwen3-next-80b-a3b"), Settings(context_size=512), GPU).on(0)
    long = layout(shape("qwen3-next-80b-a3b"), Settings(context_size=32768), GPU).on(0)
    assert short.state == long.state > 0
    assert long.cache == 64 * short.cache
    several = layout(shape("qwen3-next-80b-a3b"), Settings(context_size=512, parallel=4), GPU).on(0)
    assert several.state == 4 * short.state


def test_encoders_have_no_cache(shape: Load) -> None:
    made = layout(shape("bge-m3"), Settings(context_size=512, pooled=True))
    assert made.on(CPU).cache == made.on(CPU).state == 0


OUTPUTS = [
    # settings -> rows handed out, and numbers in each
    ({}, 1, 151936),
    ({"parallel": 8, "n_outputs_max": 8}, 8, 151936),
    ({"parallel": 1, "n_outputs_max": 6}, 6, 151936),
    ({"pooled": True, "batch_size": 512, "parallel": 32}, 512, 151936 + 1024),
]


@pytest.mark.parametrize(("changes", "rows", "numbers"), OUTPUTS)
def test_a_row_of_logits_is_held_for_each_sequence_or_each_token_of_an_embedding(
    shape: Load, changes: dict[str, Any], rows: int, numbers: int
) -> None:
    made = layout(shape("qwen3-0.6b"), Settings(context_size=512, **changes))
    assert made.output == 4 * rows * numbers


def test_blocks_for_drafting_are_not_loaded(shape: Load) -> None:
    found = shape("glm-4.5-air")
    assert len(found.blocks) == found.n_layers - 1


def test_experts_in_main_memory_leave_the_gpu(shape: Load) -> None:
    whole = layout(shape("olmoe-1b-7b"), Settings(context_size=4096), GPU)
    some = layout(shape("olmoe-1b-7b"), Settings(context_size=4096, experts_on_cpu=4), GPU)
    none = layout(shape("olmoe-1b-7b"), Settings(context_size=4096, experts_on_cpu=True), GPU)
    assert whole.on(0).weights > some.on(0).weights > none.on(0).weights
    moved = whole.on(0).weights - none.on(0).weights
    assert none.on(CPU).weights - whole.on(CPU).weights == pytest.approx(moved, rel=0.01)
    assert len(expert_patterns(4)) == 4


def test_a_tied_output_is_a_second_copy_only_on_another_device(
    shape: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen = shape("qwen3-0.6b")
    assert qwen.tied is not None
    here = layout(qwen, Settings(context_size=512, repack=False))
    there = layout(qwen, Settings(context_size=512, repack=False), GPU)
    tensors = sum(size for _, _, size in qwen.file_order.values())
    assert here.on(CPU).weights == pytest.approx(tensors, abs=4096)
    assert there.on(CPU).weights + there.on(0).weights == pytest.approx(
        tensors + qwen.tied.n_bytes, rel=0.001
    )


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2"}, {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}),
        ("x86_64", {"avx2", "avx512f"}, {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4", "Q2_K"}),
        ("x86_64", set(), set()),
        ("aarch64", set(), {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "Q8_0"}),
    ],
)
def test_what_is_rearranged_depends_on_the_processor(
    machine: str, flags: set[str], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(rearranged, "flags", lambda: frozenset(flags))
    rearranged._rearranging.cache_clear()
    try:
        assert set(rearranged.rearranging().rows) == expected
    finally:
        rearranged._rearranging.cache_clear()


def test_a_build_that_is_installed_later_is_counted_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(rearranged, "has_amx", lambda: True)
    for found in (False, True):
        monkeypatch.setattr(rearranged, "_amx_computes", lambda found=found: found)
        assert rearranged.rearranging().tiles is found


TILES = Rearranging({"Q4_0": 8, "IQ4_NL": 8}, tiles=True)
COPIED = [
    # type, shape, bytes in the file, expert, bytes of the copy
    ("Q4_0", (64, 32), 1152, False, 1152),
    ("Q4_1", (64, 32), 1280, False, 1280),
    ("Q8_0", (64, 32), 2176, False, 2176 + 32 * 2 * 4),
    ("Q4_K", (512, 32), 9216, False, 9216 + 32 * 2 * 4),
    ("Q5_K", (512, 32), 11264, False, 11264 + 32 * 2 * 4),
    ("Q6_K", (512, 32), 13440, False, 13440),
    ("IQ4_XS", (512, 32), 8704, False, 8704 + 32 * 2 * 2),
    ("F16", (48, 32), 3072, False, 3072),
    ("Q8_0", (64, 40), 2720, False, 0),  # 40 rows are no whole tiles
    ("Q4_0", (64, 40), 1440, False, 1440),  # but whole groups of eight
    ("Q4_0", (64, 36), 1296, False, 0),
    ("IQ4_NL", (64, 32), 1152, False, 1152),
    ("F32", (64, 32), 8192, False, 0),
    ("Q8_0", (64, 32, 4), 8704, False, 0),  # several slices
    ("Q8_0", (64, 32, 4), 8704, True, 0),  # experts have no tiles
    ("Q4_0", (64, 32, 4), 4608, True, 4608),
    ("Q8_0", (64,), 68, False, 0),
]


@pytest.mark.parametrize(("kind", "dimensions", "stored", "expert", "copied"), COPIED)
def test_tiles_have_room_for_what_each_type_adds(
    kind: str, dimensions: tuple[int, ...], stored: int, expert: bool, copied: int
) -> None:
    tensor = TensorInfo("blk.0.x.weight", dimensions, kind, 0, stored)
    assert TILES.copied(tensor, expert=expert) == copied
    assert NOTHING.copied(tensor, expert=expert) == 0


@pytest.mark.parametrize(
    ("name", "kept_whole"),
    [
        ("blk.0.attn_k_b.weight", True),
        ("blk.11.attn_v_b.weight", True),
        ("blk.3.attn_output_a.weight", True),
        ("altup_proj.weight", True),
        ("altup_unembd_proj.weight", True),
        ("blk.0.attn_kv_b.weight", False),
        ("blk.0.attn_output.weight", False),
        ("blk.0.attn_output_b.weight", False),
    ],
)
def test_matrices_of_several_slices_are_copied_unchanged_by_engine_and_formula(
    name: str, kept_whole: bool
) -> None:
    tensor = TensorInfo(name, (64, 32, 4), "Q8_0", 0, 8704)
    assert (re.search(amx.BATCHED, name) is not None) is kept_whole
    assert TILES.copied(tensor) == (8704 if kept_whole else 0)


def test_copies_are_those_asked_for_while_another_thread_asks_for_others() -> None:
    class Shared(Part):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_copies" and value is not None:  # the other thread's answer comes after ours
                super().__setattr__(name, (NOTHING, Copies(), Copies()))

    part = Shared()
    part.add("attn_q.weight", TensorInfo("blk.0.attn_q.weight", (64, 32), "Q8_0", 0, 2176))
    assert part.copies(TILES, experts=False).n_bytes == 2432
    assert part.copies(NOTHING, experts=False).n_bytes == 0


def test_rearranged_weights_do_not_stay_mapped(shape: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    qwen = shape("qwen3-0.6b-q4_0")
    monkeypatch.setattr("nbinfer.memory.analytic.rearranging", lambda: Rearranging({"Q4_0": 8}))
    copied = layout(qwen, Settings(context_size=512))
    as_stored = layout(qwen, Settings(context_size=512, repack=False))
    assert as_stored.on(CPU).repacked == 0 < copied.on(CPU).repacked < copied.on(CPU).weights
    assert copied.mapped < as_stored.mapped
    assert layout(qwen, Settings(context_size=512, mmap=False)).mapped == 0


REFUSED = [
    ({"kv_type": "q9"}, ConfigError, "q9"),
    ({"context_size": 0}, ConfigError, "context_size"),
    ({"parallel": True}, ConfigError, "parallel"),
    ({"parallel": 4, "n_outputs_max": 2}, ConfigError, "row"),
]


@pytest.mark.parametrize(("changes", "error", "word"), REFUSED)
def test_settings_that_cannot_be_are_refused(
    changes: dict[str, Any], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        Settings(**{"context_size": 512, **changes})


def test_a_packed_cache_needs_flash_attention_and_heads_it_can_pack(shape: Load) -> None:
    Settings(context_size=512, kv_type="q8_0").check(shape("llama-3.2-1b"))
    with pytest.raises(NotSupported, match="flash attention"):
        Settings(context_size=512, kv_type="q8_0", flash_attention=False).check(shape("llama-3.2-1b"))
    odd = shape("llama-3.2-1b")
    block = replace(odd.blocks[0], key_size=40)
    with pytest.raises(NotSupported, match="40"):
        Settings(context_size=512, kv_type="q8_0").check(replace(odd, blocks=[block]))


# -- the allocator ---------------------------------------------------------------------------------------


CUT = [
    ("llama-3.1-8b", 20, False),
    ("gemma-3-4b", 12, False),
    ("qwen3-30b-a3b", 33, False),
    ("qwen3-30b-a3b", -1, 17),
    ("gpt-oss-20b", 9, True),
    ("gemma-4-e2b", 20, False),
    ("qwen3-next-80b-a3b", -1, False),
    ("qwen3-next-80b-a3b", -1, True),
    ("falcon-h1-0.5b", 20, False),
]


@pytest.mark.parametrize("flash", [True, None])
@pytest.mark.parametrize(("name", "gpu_layers", "experts_on_cpu"), CUT)
def test_rounds_left_out_of_the_graph_would_not_have_changed_its_size(
    shape: Load,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    gpu_layers: int,
    experts_on_cpu: bool | int,
    flash: bool | None,
) -> None:
    settings = plain(
        4096, gpu_layers=gpu_layers, parallel=4, experts_on_cpu=experts_on_cpu, flash_attention=flash
    )
    made = layout(shape(name), settings, GPU)
    for rule in ("rounds_kept", "ends_kept"):
        monkeypatch.setattr(builder, rule, lambda kinds, *_, **__: [True] * len(kinds))
    whole = layout(replace(shape(name)), settings, GPU)  # a copy, which knows no schedule yet
    assert made.flash == whole.flash
    assert {device: held.compute for device, held in made.held.items()} == {
        device: held.compute for device, held in whole.held.items()
    }


def test_a_result_takes_the_place_of_one_that_nobody_needs_any_more() -> None:
    graph = Graph(0)
    first = graph.op(1024, graph.input(64))
    second = graph.op(1024, first, reuse=(first,))
    graph.op(1024, second, reuse=(second,))
    assert graph.schedule().buffers()[CPU] == 64 + 1024


def test_a_result_that_is_needed_later_keeps_its_place() -> None:
    graph = Graph(0)
    first = graph.op(1024, graph.input(64))
    second = graph.op(1024, first, reuse=(first,))
    graph.op(1024, first, second)
    assert graph.schedule().buffers()[CPU] == 64 + 3 * 1024


def test_a_view_keeps_the_room_of_what_it_is_part_of() -> None:
    def used(*, viewed: bool) -> int:
        graph = Graph(0)
        first = graph.op(4096, graph.input(32))
        second = graph.op(512, first)
        graph.op(4096, second)
        graph.op(32, View(first) if viewed else second)
        return graph.schedule().buffers()[CPU]

    assert used(viewed=True) == used(viewed=False) + 4096


def test_the_smallest_hole_that_fits_is_taken() -> None:
    graph = Graph(0)
    source = graph.input(32)
    large, wall, small, end = (graph.op(size, source) for size in (4096, 32, 1024, 32))
    graph.op(0, large)
    graph.op(0, small)
    graph.op(1000, source)
    graph.op(4096, source)
    graph.op(32, wall, end)  # where the input was
    assert graph.schedule().buffers()[CPU] == 32 + 4096 + 32 + 1024 + 32


def test_operations_run_where_their_weights_are_and_inputs_are_copied_there() -> None:
    graph = Graph(1)
    given = graph.input(256)
    made = graph.op(512, given, weight=graph.weight(1 << 20, 0))
    graph.op(512, made, reuse=(made,))
    sizes = graph.schedule().buffers()
    assert sizes[0] == 256 + 512
    assert sizes[CPU] == 256


def test_a_gpu_fetches_weights_for_large_batches_only() -> None:
    def used(rows: int, *, offload: bool) -> int:
        graph = Graph(1, offload=offload)
        graph.op(512, graph.input(256), weight=graph.weight(1 << 20, CPU), rows=rows)
        return graph.schedule().buffers()[0]

    assert used(32, offload=True) >= 1 << 20
    assert used(31, offload=True) == 0
    assert used(32, offload=False) == 0


def test_a_pipeline_holds_inputs_four_times() -> None:
    def used(*, pipeline: bool) -> dict[int, int]:
        graph = Graph(2, pipeline=pipeline)
        made = graph.op(1024, graph.input(1024), weight=graph.weight(64, 0))
        graph.op(1024, made, weight=graph.weight(64, 1))
        return graph.schedule().buffers()

    assert used(pipeline=False) == {0: 2048, 1: 2048, CPU: 1024}
    assert used(pipeline=True) == {0: 5 * 1024, 1: 5 * 1024, CPU: 4 * 1024}
