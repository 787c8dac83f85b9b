"""The formulas against llama.cpp's own plan, over many architectures and settings."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from support import synthetic

from nbinfer.gguf import data_size, read_header, stripped
from nbinfer.memory.analytic import layout
from nbinfer.memory.layout import CPU
from nbinfer.memory.probe import Measurement, PretendGPU, Probe
from nbinfer.memory.settings import Settings, expert_patterns
from nbinfer.memory.shape import Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nbinfer.gguf import Header
    from nbinfer.memory.layout import Layout

    Load = Callable[[str], Header]

pytestmark = pytest.mark.engine

GIB = 1 << 30
MIB = 1 << 20
KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2, "bf16": 30}
EACH = 8  # random settings for every model: 216 altogether
SLACK = 4096  # bytes: rounding of the few tensors that are no multiple of a page
# Answers of llama.cpp itself are exact; the formulas re-enact its allocator and are mostly so too.
GPU_TOLERANCE, CPU_TOLERANCE = 0.05, 0.08


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    made = Probe()
    yield made
    made.close()


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("headers")
    known: dict[str, Header] = {}

    def load(name: str) -> Header:
        if name not in known:
            known[name] = read_header(synthetic.write(synthetic.ALL[name](), folder / f"{name}.gguf"))
        return known[name]

    return load


def plan(probe: Probe, header: Header, settings: Settings, free: list[int]) -> Measurement:
    """Ask llama.cpp for the same settings."""
    bare = stripped(header)
    model: dict[str, Any] = {"n_gpu_layers": settings.gpu_layers, "use_extra_bufts": settings.repack}
    if settings.experts_on_cpu:
        model["experts_on_cpu"] = list(expert_patterns(settings.experts_on_cpu))
    if settings.tensor_split:
        model["tensor_split"] = list(settings.tensor_split)
    context = {
        "n_ctx": settings.context_size,
        "n_batch": settings.batch_size,
        "n_ubatch": settings.micro_batch,
        "n_seq_max": settings.parallel,
        "flash_attn_type": {None: -1, False: 0, True: 1}[settings.flash_attention],
        "type_k": KV_TYPES[settings.kv_type],
        "type_v": KV_TYPES[settings.kv_type],
        "swa_full": settings.swa_full,
        "kv_unified": settings.kv_unified,
        "embeddings": settings.pooled,
        "op_offload": bool(free),
        "n_outputs_max": settings.n_outputs_max or 0,
    }
    devices = [PretendGPU(name=f"CUDA{i}", total=size, free=size) for i, size in enumerate(free)]
    return probe.measure(bare, len(bare) + data_size(header), devices=devices, model=model, context=context)


def drawn(name: str, draw: int, shape: Shape) -> tuple[Settings, list[int]]:
    """Settings and GPUs of one case, the same ones each time."""
    rnd = random.Random(zlib.crc32(f"{name} {draw}".encode()))
    free = [rnd.randint(4, 80) * GIB for _ in range(rnd.choice([0, 1, 1, 2]))]
    kv_type = rnd.choice(["f16", "f16", "bf16", "q8_0", "q4_0"])
    if any(b.key_row and (b.key_size % 32 or b.value_size % 32) for b in shape.blocks):
        kv_type = "f16"
    parallel = rnd.choice([1, 1, 2, 4, 7])
    settings = Settings(
        context_size=rnd.choice([300, 2048, 4096, 8192, 20000, 32768]),
        parallel=parallel,
        kv_type=kv_type,
        gpu_layers=rnd.choice([-1, -1, -1, 0, 1, rnd.randint(1, shape.n_layers + 1)]),
        flash_attention=rnd.choice([True, None] if kv_type[0] == "q" else [True, True, False, None]),
        batch_size=rnd.choice([512, 2048]),
        micro_batch=rnd.choice([64, 128, 512, 1024]),
        tensor_split=tuple(rnd.randint(1, 5) for _ in free) if len(free) > 1 and rnd.random() < 0.5 else None,
        experts_on_cpu=rnd.choice([False, True, 3]) if shape.n_experts and free else False,
        swa_full=rnd.random() < 0.3,
        kv_unified=rnd.random() < 0.7,
        n_outputs_max=rnd.choice([None, parallel]),
        repack=False,
    )
    return settings, free


def on_each(made: Layout, plan: Measurement, gpus: int) -> Iterator[tuple[str, Any, Any]]:
    for device in range(CPU, gpus):
        name = "CPU" if device == CPU else f"CUDA{device}"
        yield name, made.on(device), plan.on(name)


@pytest.mark.parametrize("draw", range(EACH))
@pytest.mark.parametrize("name", sorted(synthetic.ALL))
def test_weights_and_cache_agree_with_llama_cpp_and_compute_nearly(
    probe: Probe, header: Load, name: str, draw: int
) -> None:
    shape = Shape.of(header(name))
    settings, free = drawn(name, draw, shape)
    planned = plan(probe, header(name), settings, free)
    made = layout(shape, settings, [float(size) for size in free])

    assert made.flash == planned.flash_attention
    assert made.numbers.context_size == planned.context_size
    # Where devices share the blocks, the gaps between them decide, and a few cases stray: see below.
    together = len(set(made.placed)) == 1 and not (free and made.placed[0] == CPU)
    for device, ours, theirs in on_each(made, planned, len(free)):
        assert ours.weights == pytest.approx(theirs.model, abs=SLACK), device
        assert ours.cache + ours.state == pytest.approx(theirs.context, abs=SLACK), device
        if together:
            tolerance = CPU_TOLERANCE if device == "CPU" else GPU_TOLERANCE
            assert ours.compute == pytest.approx(theirs.compute, rel=tolerance, abs=MIB // 4), device


@pytest.mark.parametrize("layers", [0, 1, 7, 12])
@pytest.mark.parametrize("name", sorted(synthetic.ALL))
def test_compute_is_near_when_a_gpu_holds_some_of_the_layers(
    probe: Probe, header: Load, name: str, layers: int
) -> None:
    shape = Shape.of(header(name))
    parallel = 1 if shape.recurrent else 8
    settings = Settings(context_size=4096, parallel=parallel, gpu_layers=layers, n_outputs_max=parallel)
    planned = plan(probe, header(name), settings, [24 * GIB])
    made = layout(shape, settings, [24.0 * GIB])
    assert made.flash == planned.flash_attention
    for device, ours, theirs in on_each(made, planned, 1):
        assert ours.compute == pytest.approx(theirs.compute, rel=0.1, abs=MIB), device


@pytest.mark.parametrize("name", sorted(synthetic.ALL))
def test_compute_for_embeddings_is_near(probe: Probe, header: Load, name: str) -> None:
    shape = Shape.of(header(name))
    parallel = 1 if shape.recurrent else 32
    settings = Settings(
        context_size=512,
        parallel=parallel,
        batch_size=512,
        micro_batch=512,
        pooled=True,
        repack=False,
    )
    for free in ([], [24 * GIB]):
        planned = plan(probe, header(name), settings, free)
        made = layout(shape, settings, [float(size) for size in free])
        for device, ours, theirs in on_each(made, planned, len(free)):
            assert ours.compute == pytest.approx(theirs.compute, rel=0.05, abs=MIB // 4), device


@pytest.mark.parametrize("name", sorted(synthetic.ALL))
def test_weights_that_the_processor_wants_in_another_order_are_known(
    probe: Probe, header: Load, name: str
) -> None:
    shape = Shape.of(header(name))
    settings = Settings(context_size=512)
    planned = plan(probe, header(name), settings, [])
    made = layout(shape, settings)
    theirs = sum(row.model for row in planned.rows if row.copied)
    assert made.on(CPU).repacked == pytest.approx(theirs, abs=SLACK)
    assert made.on(CPU).weights == pytest.approx(planned.on("CPU").model, abs=SLACK)


def test_enough_architectures_and_settings_are_drawn(header: Load) -> None:
    architectures = {header(name).architecture for name in synthetic.ALL}
    assert len(architectures) >= 12
    assert len(synthetic.ALL) * EACH >= 200


def test_a_cache_type_that_no_gpu_kernel_reads_moves_attention_to_the_processor(
    probe: Probe, header: Load
) -> None:
    found = header("llama-3.2-1b")
    context = {"n_ctx": 4096, "type_k": 20, "type_v": 20, "kv_unified": True, "n_outputs_max": 1}
    bare = stripped(found)
    planned = probe.measure(
        bare,
        len(bare) + data_size(found),
        devices=[PretendGPU(total=24 * GIB, free=24 * GIB)],
        context=context,
    )
    settings = Settings(context_size=4096, kv_type="iq4_nl", n_outputs_max=1)
    odd = layout(Shape.of(found), settings, [24.0 * GIB])
    assert odd.on(CPU).compute == pytest.approx(planned.on("CPU").compute, rel=0.05)
    assert odd.on(0).compute == pytest.approx(planned.on("CUDA0").compute, rel=0.05)
    usual = layout(Shape.of(found), replace(settings, kv_type="q8_0"), [24.0 * GIB])
    assert usual.on(CPU).compute < odd.on(CPU).compute
