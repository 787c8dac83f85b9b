"""A schedule of a graph is kept with the model: it serves another context, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from support import synthetic

from nbinfer.gguf import read_header
from nbinfer.memory.analytic import layout
from nbinfer.memory.settings import Settings
from nbinfer.memory.shape import Shape

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Load = Callable[[str], Shape]

GPU = [200.0 * (1 << 30)]


@pytest.fixture
def shape(tmp_path: Path) -> Load:
    def load(name: str) -> Shape:
        return Shape.of(read_header(synthetic.write(synthetic.ALL[name](), tmp_path / f"{name}.gguf")))

    return load


def plain(tokens: int, **changes: Any) -> Settings:
    return replace(
        Settings(context_size=tokens, batch_size=512, flash_attention=True, swa_full=True, kv_unified=False),
        **changes,
    )


# Each is another schedule than that of the settings without it, and not to be taken for it.
SPREAD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"experts_on_cpu": True}),
    ({"experts_on_cpu": True}, {"experts_on_cpu": 1}),
    ({}, {"gpu_layers": 5}),
    ({"gpu_layers": 5}, {"gpu_layers": 5, "op_offload": False}),
    ({}, {"kv_type": "q8_0"}),
    ({}, {"kv_type": "f32"}),
    ({}, {"flash_attention": False}),
    ({"gpu_layers": 5}, {"gpu_layers": 5, "flash_attention": None}),
    ({"kv_unified": True}, {"kv_unified": True, "parallel": 4}),
    ({"parallel": 4, "kv_type": "f32"}, {"parallel": 4, "kv_type": "f32", "kv_unified": True}),
    ({"parallel": 4}, {"parallel": 4, "n_outputs_max": 4}),
    ({"n_outputs_max": 4}, {"n_outputs_max": 4, "micro_batch": 128}),
    ({}, {"pooled": True}),
]


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gemma-3-4b", "bge-m3"])
def test_a_schedule_that_is_kept_gives_what_a_new_one_gives(shape: Load, name: str) -> None:
    found = shape(name)
    for before, after in SPREAD:
        known = replace(found)
        for changes, tokens in ((before, 4096), (after, 4096), (after, 16384), (before, 8192)):
            settings = plain(tokens, **changes)
            kept = layout(known, settings, GPU)
            assert kept == layout(replace(known), settings, GPU), (changes, tokens)
        assert len(known.plans) <= 2


def test_another_context_needs_no_new_schedule_and_few_are_kept(shape: Load) -> None:
    known = shape("qwen3-0.6b")
    for tokens in (4096, 8192, 16384):
        layout(known, plain(tokens), GPU)
    assert len(known.plans) == 1
    for layers in range(20):
        layout(known, plain(4096, gpu_layers=layers), GPU)
    assert len(known.plans) == 8
