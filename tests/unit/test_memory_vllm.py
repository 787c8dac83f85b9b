from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nbinfer.contract.errors import ConfigError, NotSupported
from nbinfer.gguf.safetensors import SafetensorsHeader
from nbinfer.memory.vllm import VllmEstimate, estimate_vllm

GIB = 1 << 30


def header(config: dict[str, Any], tensors: dict[str, tuple[int, str]]) -> SafetensorsHeader:
    size = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "F8_E4M3": 1}
    made: Any = tuple(
        SimpleNamespace(name=name, n_elements=n, n_bytes=n * size[kind], type=kind)
        for name, (n, kind) in tensors.items()
    )
    return SafetensorsHeader(source="some/model", config=config, tensors=made, files=(), file_size=0)


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
WEIGHTS_8B = {"model.x": (8_030_261_248, "BF16")}


def plan(config: dict[str, Any] | None = None, **options: Any) -> VllmEstimate:
    options.setdefault("gpus", ["40GiB"])
    return estimate_vllm(header(config or LLAMA_8B, WEIGHTS_8B), **options)


def test_a_published_start_is_met() -> None:
    # Llama-3-8B on an A100 of 40 GB: 14.96 GiB of weights, 5,691 blocks of 16 tokens in 11.12 GiB.
    made = plan()
    assert made.weights / GIB == pytest.approx(14.96, abs=0.01)
    assert made.cache_per_token == 131_072
    assert 5691 * 16 * made.cache_per_token / GIB == pytest.approx(11.12, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "per_token"),
    [
        ({}, 32 * 2 * 8 * 128 * 2),
        ({"num_key_value_heads": None}, 32 * 2 * 32 * 128 * 2),
        ({"multi_query": True}, 32 * 2 * 1 * 128 * 2),
        ({"head_dim": 64}, 32 * 2 * 8 * 64 * 2),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 32 * 576 * 2),
        ({"layer_types": ["full_attention", "linear_attention"] * 16}, 16 * 2 * 8 * 128 * 2),
        ({"layer_types": ["full_attention", "sliding_attention"] * 16}, 32 * 2 * 8 * 128 * 2),
        ({"full_attention_interval": 4}, 8 * 2 * 8 * 128 * 2),
    ],
)
def test_cache_per_token_follows_the_kind_of_each_layer(changes: dict[str, Any], per_token: int) -> None:
    assert plan({**LLAMA_8B, **changes}).cache_per_token == per_token


def test_a_cache_of_eight_bits_and_several_gpus_take_their_part() -> None:
    assert plan(kv_type="fp8").cache_per_token == plan().cache_per_token // 2
    two = plan(tensor_parallel=2, gpus=["24GiB", "24GiB"])
    assert two.cache_per_token == plan().cache_per_token // 2
    assert two.weights == plan().weights // 2


def test_weights_are_counted_as_loaded() -> None:
    tied = {**LLAMA_8B, "tie_word_embeddings": True}
    tensors = {
        "model.embed_tokens.weight": (1000, "F32"),
        "lm_head.weight": (1000, "F32"),
        "packed": (500, "I32"),
    }
    made = estimate_vllm(header(tied, tensors), gpus=["8GiB"])
    assert made.weights == 1000 * 2 + 500 * 4


def test_verdicts_name_the_setting_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan().verdict == "fits"
    long = plan({**LLAMA_8B, "max_position_embeddings": 1 << 20})
    assert long.verdict == "does not fit"
    assert f"context_size={long.longest_context}" in long.reason
    fitting = plan({**LLAMA_8B, "max_position_embeddings": 1 << 20}, context_size=long.longest_context)
    assert fitting.verdict != "does not fit"
    small = plan(gpus=["12GiB"])
    assert "weights alone" in small.reason
    busy = SimpleNamespace(gpus=(SimpleNamespace(total=40 * GIB, free=30 * GIB),))
    monkeypatch.setattr("nbinfer.memory.vllm.machine", lambda: busy)
    taken = plan(gpus=None)
    assert taken.verdict == "does not fit"
    assert "gpu_memory_utilization=0.75" in taken.reason


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"gpu_memory_utilization": 1.5}, ConfigError),
        ({"tensor_parallel": 0}, ConfigError),
        ({"dtype": "int3"}, ConfigError),
        ({"device": "gpu", "gpus": []}, NotSupported),
        ({"tensor_parallel": 2}, NotSupported),
    ],
)
def test_what_cannot_be_planned_says_why(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        plan(**options)
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize(
    ("free", "options", "verdict", "words"),
    [
        (30, {"kv_cache_bytes": "2GiB"}, "fits", "16,384 tokens"),
        (30, {}, "fits", "32,768 tokens"),  # four contexts, four GiB at most
        (20, {"kv_cache_bytes": "4GiB"}, "tight", "32,768 tokens"),
        (12, {}, "does not fit", "of main memory and 12 GiB are free"),
    ],
)
def test_on_a_cpu_the_cache_is_what_was_given_and_the_verdict_is_about_main_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, options: dict[str, Any], verdict: str, words: str
) -> None:
    here = SimpleNamespace(gpus=(), ram=SimpleNamespace(available=free * GIB, total=64 * GIB))
    monkeypatch.setattr("nbinfer.memory.vllm.machine", lambda: here)
    made = plan(gpus=None, **options)
    assert made.device == "cpu"
    assert made.verdict == verdict
    assert words in made.reason
    assert made.required.ram == made.budget
    assert made.required.vram == ()
    advice = made.advice()
    assert bool(advice) == (verdict == "does not fit" and free * GIB > made.weights + sum(made.overhead) // 2)
    for each in advice:
        assert made.again(**each.changes).verdict != "does not fit"


def test_a_cache_that_is_too_large_is_answered_with_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(gpus=(), ram=SimpleNamespace(available=30 * GIB, total=64 * GIB))
    monkeypatch.setattr("nbinfer.memory.vllm.machine", lambda: here)
    made = plan(gpus=None, kv_cache_bytes="100GiB")
    (found,) = made.advice()
    assert set(found.changes) == {"kv_cache_bytes"}
    # Somebody takes a little meanwhile.
    here.ram.available -= GIB // 2
    assert made.again(**found.changes).verdict != "does not fit"


def test_a_configuration_without_layers_is_refused() -> None:
    with pytest.raises(NotSupported, match="layers"):
        estimate_vllm(header({}, WEIGHTS_8B), gpus=["24GiB"])
