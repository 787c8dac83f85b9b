"""The exact probe: llama.cpp's own plan, without weights and without a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import signal
import struct
import threading
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from support import synthetic

from nbinfer.gguf import data_size, read_header, stripped
from nbinfer.memory.live import breakdown
from nbinfer.memory.probe import (
    Measurement,
    PretendGPU,
    Probe,
    ProbeFailed,
    ProbeRefused,
    ProbeUnavailable,
    abi,
    client,
    shared_probe,
)
from nbinfer.memory.probe.client import library_folder
from nbinfer.models.demo import demo_embed_path, demo_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Header = tuple[bytes, int]
    Load = Callable[[str], Header]

pytestmark = pytest.mark.engine

MIB = 1 << 20
GPU = PretendGPU(total=200 << 30, free=200 << 30)
Q8_0 = 8


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    made = Probe()
    yield made
    made.close()


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("headers")
    made: dict[str, Header] = {}

    def load(name: str) -> Header:
        if name not in made:
            found = read_header(synthetic.write(synthetic.ALL[name](), folder / f"{name}.gguf"))
            made[name] = planned(found)
        return made[name]

    return load


def planned(found: Any) -> Header:
    without_tokenizer = stripped(found)
    return without_tokenizer, len(without_tokenizer) + data_size(found)


def mib(measured: Measurement, device: str) -> tuple[float, float, float]:
    row = measured.on(device)
    return row.model / MIB, row.context / MIB, row.compute / MIB


@pytest.mark.parametrize(
    ("ours", "theirs"), [("ModelParams", "llama_model_params"), ("ContextParams", "llama_context_params")]
)
def test_parameter_structures_are_those_of_the_installed_llama_cpp(ours: str, theirs: str) -> None:
    from llama_cpp import llama_cpp

    mine, reference = getattr(abi, ours), getattr(llama_cpp, theirs)

    def layout(structure: Any) -> list[tuple[str, int, int]]:
        names = [field[0] for field in structure._fields_]
        return [(name, getattr(structure, name).offset, getattr(structure, name).size) for name in names]

    assert layout(mine) == layout(reference)
    assert ctypes.sizeof(mine) == ctypes.sizeof(reference)


GOLDEN = [
    # model, tokens, model and context parameters -> weights, cache and state, compute on the GPU (MiB)
    ("llama-3.1-8b", 4096, {"n_gpu_layers": 0}, {}, (0, 0, 669.477)),
    ("llama-3.1-8b", 4096, {"n_gpu_layers": 1}, {}, (410.992, 0, 258.5)),
    ("llama-3.1-8b", 4096, {"n_gpu_layers": 16}, {}, (2290.211, 240, 266.51)),
    ("llama-3.1-8b", 4096, {"n_gpu_layers": 32}, {}, (4270.992, 496, 266.51)),
    ("llama-3.1-8b", 4096, {"n_gpu_layers": 33}, {}, (4403.492, 512, 258.5)),
    ("qwen3-30b-a3b", 8192, {}, {}, (17524.432, 768, 300.75)),
    ("qwen3-30b-a3b", 8192, {"experts_on_cpu": ["exps"]}, {}, (784.42, 768, 300.75)),
    ("gemma-3-4b", 32768, {}, {}, (2082.742, 4352, 517.125)),
    ("gemma-3-4b", 32768, {}, {"swa_full": False}, (2082.742, 814, 517.125)),
    ("gemma-3-4b", 32768, {}, {"swa_full": False, "n_seq_max": 4}, (2082.742, 1336, 517.125)),
    (
        "gemma-3-4b",
        32768,
        {},
        {"swa_full": False, "n_seq_max": 4, "kv_unified": True},
        (2082.742, 1162, 517.125),
    ),
    ("deepseek-v2-lite", 32768, {}, {}, (10775.407, 972, 232.262)),
    ("deepseek-v2-lite", 32768, {}, {"flash_attn_type": 0}, (10775.407, 972, 1174.27)),
    ("deepseek-v2-lite", 32768, {}, {"type_k": Q8_0, "type_v": Q8_0}, (10775.407, 516.388, 232.262)),
    ("qwen3-next-80b-a3b", 32768, {}, {}, (42820.142, 768 + 75.375, 304.75)),
    ("qwen3-next-80b-a3b", 32768, {}, {"n_seq_max": 4}, (42820.142, 768 + 301.5, 308.75)),
    ("gpt-oss-20b", 131072, {}, {}, (10949.38, 6144, 404)),
    ("gpt-oss-20b", 131072, {}, {"swa_full": False}, (10949.38, 3090, 404)),
]


@pytest.mark.parametrize(
    ("name", "tokens", "model", "context", "expected"), GOLDEN, ids=lambda value: str(value)[:40]
)
def test_known_plans_are_reproduced_to_the_hundredth_of_a_mebibyte(
    probe: Probe,
    header: Load,
    name: str,
    tokens: int,
    model: dict[str, Any],
    context: dict[str, Any],
    expected: tuple[float, float, float],
) -> None:
    settings = {"n_ctx": tokens, "n_batch": 512, "flash_attn_type": 1, **context}
    measured = probe.measure(*header(name), devices=[GPU], model=model, context=settings)
    assert mib(measured, "CUDA0") == pytest.approx(expected, abs=0.01)


def test_host_memory_beside_a_gpu_is_reproduced(probe: Probe, header: Load) -> None:
    context = {"n_ctx": 4096, "n_batch": 512, "flash_attn_type": 1}
    whole = probe.measure(*header("llama-3.1-8b"), devices=[GPU], context=context)
    assert mib(whole, "CPU") == pytest.approx((281.812, 0, 20.014), abs=0.01)
    context["n_ctx"] = 8192
    experts = {"experts_on_cpu": ["exps"]}
    split = probe.measure(*header("qwen3-30b-a3b"), devices=[GPU], model=experts, context=context)
    assert mib(split, "CPU") == pytest.approx((16906.922, 0, 16.014), abs=0.01)


def test_two_gpus_share_the_layers_and_keep_copies_for_the_pipeline(probe: Probe, header: Load) -> None:
    pair = [PretendGPU(name=f"CUDA{i}", total=200 << 30, free=200 << 30) for i in range(2)]
    context = {"n_ctx": 8192, "n_batch": 512, "flash_attn_type": 1}
    measured = probe.measure(*header("llama-3.1-8b"), devices=pair, context=context)
    assert mib(measured, "CUDA0") == pytest.approx((2113.281, 544, 172.039), abs=0.01)
    assert mib(measured, "CUDA1") == pytest.approx((2290.211, 480, 354.547), abs=0.01)
    assert measured.on("CPU").compute / MIB == pytest.approx(72.055, abs=0.01)


# Measured by others on an MI300X (context 4096, q8_0 cache, flash attention, one output a sequence) and, the
# last two, by ollama on CUDA: what they print, to the digits that they print.
PUBLISHED = [
    ("qwen3-0.6b", 1, "compute", 41.64),
    ("qwen3-0.6b", 4, "compute", 41.64),
    ("qwen3-0.6b", 29, "compute", 32.09),
    ("olmoe-1b-7b", 1, "compute", 172.37),
    ("olmoe-1b-7b", 4, "compute", 172.37),
    ("olmoe-1b-7b", 17, "compute", 64.09),
    ("granite-3.0-3b-a800m", 2, "compute", 73.02),
    ("granite-3.0-3b-a800m", 33, "compute", 61.04),
    ("olmoe-1b-7b", 1, "model", 80.60),
    ("llama-3.1-8b", 33, "model", 4403.49),
]


@pytest.mark.parametrize(("name", "layers", "part", "expected"), PUBLISHED)
def test_figures_published_from_real_gpus_are_met(
    probe: Probe, header: Load, name: str, layers: int, part: str, expected: float
) -> None:
    context = {
        "n_ctx": 4096,
        "n_batch": 512,
        "flash_attn_type": 1,
        "type_k": Q8_0,
        "type_v": Q8_0,
        "n_outputs_max": 1,
    }
    measured = probe.measure(*header(name), devices=[GPU], model={"n_gpu_layers": layers}, context=context)
    assert round(getattr(measured.on("CUDA0"), part) / MIB, 2) == expected


@pytest.mark.parametrize("name", sorted(synthetic.ALL))
def test_every_shape_can_be_planned(probe: Probe, header: Load, name: str) -> None:
    # Repacked weights vary by processor, and one of llama.cpp's plans for them aborts; not our subject here.
    for devices in ([], [GPU]):
        measured = probe.measure(
            *header(name),
            devices=devices,
            model={"use_extra_bufts": False},
            context={"n_ctx": 1024, "n_batch": 512, "flash_attn_type": -1},
        )
        assert measured.on("CUDA0" if devices else "CPU").model > 100 * MIB


def test_flash_attention_is_refused_for_heads_that_no_kernel_knows(probe: Probe, tmp_path: Path) -> None:
    odd = synthetic.llama("odd", blocks=2, width=768, heads=16, kv_heads=16, size=48, inner=2048)
    found = planned(read_header(synthetic.write(odd, tmp_path / "odd.gguf")))
    automatic = {"n_ctx": 1024, "flash_attn_type": -1}
    assert not probe.measure(*found, devices=[GPU], context=automatic).flash_attention
    assert probe.measure(*found, context=automatic).flash_attention


def test_the_tokenizer_changes_nothing_but_the_time(probe: Probe, tmp_path: Path) -> None:
    model = synthetic.llama(
        "small", blocks=2, width=512, heads=8, kv_heads=4, size=64, inner=1024, vocabulary=3000
    )
    path = synthetic.write(model, tmp_path / "small.gguf", tokenizer=True)
    found = read_header(path)
    whole = path.read_bytes()[: found.data_offset], path.stat().st_size
    context = {"n_ctx": 2048}
    assert probe.measure(*whole, devices=[GPU], context=context) == probe.measure(
        *planned(found), devices=[GPU], context=context
    )


def test_large_recurrent_state_is_planned_without_taking_memory(probe: Probe, header: Load) -> None:
    measured = probe.measure(
        *header("qwen3-next-80b-a3b"),
        model={"use_extra_bufts": False},
        context={"n_ctx": 4096, "n_seq_max": 256, "kv_unified": True},
    )
    assert measured.on("CPU").context > 15 << 30
    assert psutil.Process(probe.pid).memory_info().rss < 500 * MIB


# -- what goes wrong -----------------------------------------------------------------------------------------


def test_a_refusal_keeps_the_child_and_says_why_in_llama_cpps_words(probe: Probe, header: Load) -> None:
    content, size = header("qwen3-0.6b")
    probe.measure(content, size)
    before = probe.pid
    with pytest.raises(ProbeRefused, match="unknown model architecture"):
        probe.measure(content.replace(b"qwen3", b"qwenX"), size)
    assert probe.pid == before


def test_an_assertion_ends_the_child_and_the_next_request_starts_another(probe: Probe, header: Load) -> None:
    content, size = header("qwen3-0.6b")
    probe.measure(content, size)
    before = probe.pid
    at = content.index(b"qwen3.block_count") + len("qwen3.block_count") + 4
    broken = content[:at] + struct.pack("<I", 0) + content[at + 4 :]
    with pytest.raises(ProbeFailed, match=r"signal 6; .*GGML_ASSERT.*n_layer"):
        probe.measure(broken, size)
    assert probe.measure(content, size).context_size
    assert probe.pid != before


@pytest.mark.parametrize("started", [False, True])
def test_an_interrupted_request_leaves_no_answer_to_the_next_one(
    header: Load, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    def interrupted(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    here = Probe()
    large, small = header("qwen3-30b-a3b"), header("qwen3-0.6b")
    expected = here.measure(*small).on("CPU")
    if not started:
        here.close()
    with monkeypatch.context() as patch:
        patch.setattr(client._Child, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            here.measure(*large)
    assert here.measure(*small).on("CPU") == expected
    here.close()


def test_an_interrupt_of_the_whole_group_leaves_the_child(header: Load) -> None:
    here = Probe()
    expected = here.measure(*header("qwen3-0.6b"))
    child = here.pid
    assert child is not None
    psutil.Process(child).send_signal(signal.SIGINT)
    assert here.measure(*header("qwen3-0.6b")) == expected
    assert here.pid == child
    here.close()


def test_a_child_that_does_not_answer_is_ended(header: Load) -> None:
    slow = Probe(timeout=0.0)
    assert slow.works()
    child = slow.pid
    with pytest.raises(ProbeFailed, match="did not answer within 0 seconds"):
        slow.measure(*header("qwen3-0.6b"))
    assert child is not None
    assert not psutil.pid_exists(child)
    slow.close()


def test_without_the_library_the_probe_is_off_with_a_reason(tmp_path: Path) -> None:
    probe = Probe(folder=tmp_path)
    assert not probe.works()
    assert "no llama library" in probe.status
    with pytest.raises(ProbeUnavailable, match="switched off"):
        probe.measure(b"", 0)


def test_another_library_under_that_name_fails_the_self_test(tmp_path: Path) -> None:
    for file in library_folder().glob("libggml*"):
        shutil.copy(file, tmp_path)
    shutil.copy(tmp_path / "libggml.so", tmp_path / "libllama.so")
    probe = Probe(folder=tmp_path)
    assert not probe.works()
    assert re.search("off: AttributeError: .*undefined symbol", probe.status)


def test_a_child_without_memory_switches_the_probe_off() -> None:
    probe = Probe(address_space=16 * MIB)
    assert not probe.works()
    # Which of its allocations fails first is not ours to say.
    assert probe.status.startswith("off: ")
    assert "failed to map" in probe.status or "MemoryError" in probe.status


def test_threads_may_ask_at_once_and_each_gets_its_own_answer(probe: Probe, header: Load) -> None:
    names = ["llama-3.2-1b", "qwen3-0.6b", "gemma-2-2b", "lfm2-1.2b"]
    alone = {name: probe.measure(*header(name), devices=[GPU]) for name in names}
    together: dict[str, list[Measurement]] = {name: [] for name in names}

    def ask(name: str) -> None:
        together[name].extend(probe.measure(*header(name), devices=[GPU]) for _ in range(3))

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {name: [measured] * 3 for name, measured in alone.items()}


def test_the_child_ends_with_the_probe(header: Load) -> None:
    probe = Probe()
    probe.measure(*header("qwen3-0.6b"))
    child = probe.pid
    assert child is not None
    probe.close()
    assert not psutil.pid_exists(child)


# -- real loads ----------------------------------------------------------------------------------------------


REAL_LOADS = {
    "plain": (demo_path, {"n_ctx": 512}),
    "unified": (
        demo_path,
        {"n_ctx": 2048, "n_seq_max": 4, "kv_unified": True, "flash_attn_type": -1, "n_outputs_max": 4},
    ),
    "quantised": (
        demo_path,
        {
            "n_ctx": 1024,
            "n_seq_max": 2,
            "flash_attn_type": 1,
            "type_k": Q8_0,
            "type_v": Q8_0,
            "n_ubatch": 128,
        },
    ),
    "embedding": (
        demo_embed_path,
        {
            "n_ctx": 512,
            "n_batch": 512,
            "n_ubatch": 512,
            "n_seq_max": 32,
            "kv_unified": True,
            "embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("mmap", [True, False], ids=["mmap", "read"])
@pytest.mark.parametrize("case", REAL_LOADS)
def test_the_plan_equals_what_llama_cpp_holds_after_a_real_load(probe: Probe, mmap: bool, case: str) -> None:
    from llama_cpp import llama_cpp as lib

    find, settings = REAL_LOADS[case]
    path = find()
    found = read_header(path)
    plan = probe.measure(*planned(found), model={"use_extra_bufts": False}, context=settings)

    params = lib.llama_model_default_params()
    params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mmap else lib.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = False
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    context_params = lib.llama_context_default_params()
    for name, value in settings.items():
        setattr(context_params, name, value)
    context = lib.llama_init_from_model(model, context_params)
    try:
        held = breakdown(context)
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)

    assert held is not None
    assert list(held) == ["CPU"]
    row = plan.on("CPU")
    assert held["CPU"]["context"] == row.context
    assert held["CPU"]["compute"] == row.compute
    if mmap:
        # A mapping is counted as the span of the file that the tensors cover; their padding is not in it.
        assert 0 <= row.model - held["CPU"]["weights"] < 32
    else:
        assert held["CPU"]["weights"] == row.model


def test_no_breakdown_is_read_where_the_probe_does_not_trust_the_library() -> None:
    assert breakdown(None) is None
    assert breakdown(ctypes.c_void_p(0)) is None
    assert shared_probe().works()
