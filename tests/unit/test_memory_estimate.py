"""Estimates: where each number comes from, the verdict and its words, advice, tables and pictures."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from support import synthetic

from nbinfer.contract.errors import ConfigError, NbinferError, NotSupported
from nbinfer.contract.memory import RequiredMemory
from nbinfer.gguf import read_header
from nbinfer.memory import DeviceEstimate, Estimate, advise, estimate
from nbinfer.memory.exact import CannotEstimate
from nbinfer.memory.rearranged import NOTHING, Rearranging, rearranging

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.gguf import Header

    Load = Callable[[str], Header]

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("headers")
    known: dict[str, Header] = {}

    def load(name: str) -> Header:
        if name not in known:
            path = synthetic.write(synthetic.ALL[name](), folder / f"{name}.gguf")
            known[name] = read_header(path)
            path.unlink()
        return known[name]

    return load


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that wants no weights rearranged, whatever the tests run on."""
    monkeypatch.setattr("nbinfer.memory.analytic.rearranging", lambda: NOTHING)


def plan(found: Header, **options: Any) -> Estimate:
    return estimate(found, **{"exact": False, "ram": "64GiB", "gpus": [], **options})


VERDICTS = [
    # needed, least and most overhead, read from the file again, free -> verdict
    (100, (10, 20), 0, 200, "fits"),
    (100, (10, 20), 0, 120, "fits"),
    (100, (10, 20), 0, 119, "tight"),
    (100, (10, 20), 0, 110, "tight"),
    (100, (10, 20), 0, 109, "does not fit"),
    (100, (10, 20), 80, 200, "fits"),
    (100, (10, 20), 81, 200, "tight"),
    (0, (0, 0), 0, 0, "fits"),
]


@pytest.mark.parametrize(("needed", "overhead", "at_hand", "free", "verdict"), VERDICTS)
def test_the_verdict_depends_on_overhead_and_on_the_file_only_at_the_edge(
    needed: int, overhead: tuple[int, int], at_hand: int, free: int, verdict: str
) -> None:
    device = DeviceEstimate(
        name="RAM", kind="ram", weights=needed, overhead=overhead, at_hand=at_hand, available=free
    )
    assert device.verdict == verdict


def test_weights_in_main_memory_stay_in_the_file_unless_it_is_read(header: Load) -> None:
    mapped = plan(header("llama-3.2-1b"))
    read = plan(header("llama-3.2-1b"), mmap=False)
    assert mapped.ram.weights == 0
    assert mapped.ram.at_hand == pytest.approx(mapped.ram.file_backed, rel=0.001)
    assert read.ram.weights == pytest.approx(mapped.ram.file_backed, rel=0.001)
    assert read.ram.file_backed == read.ram.at_hand == 0
    assert mapped.required.ram < read.required.ram


def test_what_is_rearranged_is_needed_and_not_read_in_the_file_again(
    header: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbinfer.memory.analytic.rearranging", lambda: Rearranging({"Q4_K": 8}))
    made = plan(header("llama-3.1-8b"))
    assert made.ram.weights > 3 * GIB
    assert made.ram.at_hand < made.ram.file_backed
    whole = sum(tensor.n_bytes for tensor in header("llama-3.1-8b").tensors)
    assert made.ram.weights + made.ram.at_hand == pytest.approx(whole, rel=0.001)


def test_the_verdict_is_that_of_the_worst_device(header: Load) -> None:
    made = plan(header("llama-3.1-8b"), gpus=["24GiB", "1GiB"], tensor_split=[1, 1])
    assert [device.verdict for device in made.gpus] == ["fits", "does not fit"]
    assert made.verdict == "does not fit"
    assert made.reason.startswith("does not fit:")
    assert "GPU 1" in made.reason
    assert "1 GiB free" in made.reason


def test_required_memory_is_main_memory_and_each_gpus(header: Load) -> None:
    made = plan(header("llama-3.1-8b"), gpus=["24GiB", "24GiB"])
    assert made.required == RequiredMemory(
        ram=made.ram.required, vram=(made.gpus[0].required, made.gpus[1].required)
    )
    assert sum(gpu.weights for gpu in made.gpus) == pytest.approx(4403.492 * MIB, abs=MIB)


DEFAULTS = [
    # options -> context, sequences, tokens of a call, of a graph
    ({}, (4096, 17, 2048, 128)),
    ({"context_size": -1}, (131072, 17, 2048, 512)),
    ({"context_size": 100}, (256, 17, 256, 128)),
    ({"parallel": 2, "batch_size": 512, "micro_batch": 64}, (4096, 2, 512, 64)),
    ({"mode": "embedding", "context_size": 512}, (512, 32, 512, 512)),
]


@pytest.mark.parametrize(("options", "expected"), DEFAULTS)
def test_what_is_not_asked_for_is_what_a_load_takes(
    header: Load, options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    made = plan(header("llama-3.1-8b"), **options)
    found = made.settings
    assert (made.context_size, found.parallel, found.batch_size, found.micro_batch) == expected


def test_a_recurrent_model_is_planned_for_one_sequence(header: Load) -> None:
    assert plan(header("mamba-2.8b")).settings.parallel == 1


def test_every_number_says_where_it_comes_from(header: Load) -> None:
    frame = plan(header("llama-3.1-8b"), gpus=["24GiB"]).to_frame()
    assert list(frame.columns) == ["device", "part", "bytes", "source"]
    assert set(frame["source"]) == {"formula"}
    assert {("RAM", "compute"), ("GPU 0", "weights"), ("GPU 0", "cache")} <= set(
        zip(frame["device"], frame["part"], strict=True)
    )
    assert (frame["bytes"] > 0).all()


def test_architectures_with_caches_of_their_own_say_that_the_formulas_do_not_cover_them(header: Load) -> None:
    found = header("llama-3.2-1b")
    metadata = {key.replace("llama.", "deepseek4."): value for key, value in found.metadata.items()}
    renamed = replace(found, metadata={**metadata, "general.architecture": "deepseek4"})
    assert plan(found).note == ""
    assert "deepseek4" in plan(renamed).note


def test_blocks_of_an_unknown_kind_get_a_rule_of_thumb_that_is_called_one(header: Load) -> None:
    found = header("llama-3.2-1b")
    tensors = tuple(tensor for tensor in found.tensors if not tensor.name.endswith("attn_output.weight"))
    odd = plan(replace(found, tensors=tensors))
    assert odd.ram.compute > 0
    assert "may differ" in odd.note


def test_headers_that_speak_of_absurdly_many_blocks_are_refused_at_once(header: Load) -> None:
    found = header("llama-3.2-1b")
    with pytest.raises(NotSupported, match="512"):
        plan(replace(found, metadata={**found.metadata, "llama.block_count": 2**40}))


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "olmoe-1b-7b", "deepseek-v2-lite", "qwen3-next-80b-a3b", "bge-m3"]
)
def test_damaged_headers_give_a_number_or_a_refusal_and_never_a_crash(header: Load, name: str) -> None:
    found = header(name)
    random = Random(name)
    answered = 0
    for _ in range(40):
        metadata, tensors = dict(found.metadata), list(found.tensors)
        for _ in range(random.randint(1, 3)):
            key = random.choice(list(metadata))
            if key == "general.architecture":
                continue
            if random.random() < 0.5:
                metadata[key] = random.choice([0, 1, -1, 3, "x", [], [1, 2], 2**40, 1.5])
            else:
                stem = random.choice(tensors).name.split(".")[-2]
                tensors = [tensor for tensor in tensors if stem not in tensor.name] or tensors
        with suppress(NbinferError):
            made = plan(replace(found, metadata=metadata, tensors=tuple(tensors)), gpus=["24GiB"])
            answered += made.required.ram > 0
    assert answered


def test_advice_fits_and_is_the_most_that_does(header: Load) -> None:
    made = plan(header("llama-3.1-8b"), gpus=["8GiB"], context_size=32768)
    assert made.verdict == "does not fit"
    advice = made.advice()
    changes = [dict(item.changes) for item in advice]
    assert [next(iter(change)) for change in changes] == ["context_size", "kv_type", "gpu_layers"]
    for change in changes:
        assert made.again(**change).verdict == "fits", change
    smaller, layers = changes[0]["context_size"], changes[2]["gpu_layers"]
    assert made.again(context_size=smaller + 256).verdict != "fits"
    assert made.again(gpu_layers=layers + 1).verdict != "fits"


def test_advice_that_is_only_tight_says_so(header: Load) -> None:
    made = plan(header("llama-3.1-8b"), gpus=[], ram="4GiB", context_size=131072)
    assert made.verdict == "does not fit"
    advice = made.advice()
    assert advice
    for item in advice:
        assert item.text.endswith("(tight)")
        assert made.again(**item.changes).verdict == "tight"


def test_a_mixture_is_advised_to_keep_its_experts_in_main_memory(header: Load) -> None:
    made = plan(header("qwen3-30b-a3b"), gpus=["12GiB"], context_size=8192)
    assert {"experts_on_cpu": True} in [dict(item.changes) for item in made.advice()]


def test_there_is_no_advice_where_nothing_helps_or_nothing_is_needed(header: Load) -> None:
    assert plan(header("llama-3.1-8b")).advice() == ()
    assert plan(header("llama-3.1-8b"), ram="32MiB").advice() == ()


def test_a_sweep_has_a_row_for_every_combination(header: Load) -> None:
    made = plan(header("llama-3.1-8b"), gpus=["8GiB"])
    frame = made.sweep(context_size=[2048, 65536], kv_type=["f16", "q8_0"])
    assert list(frame.columns) == ["context_size", "kv_type", "ram", "vram", "verdict"]
    assert list(frame["context_size"]) == [2048, 2048, 65536, 65536]
    assert list(frame["verdict"]) == ["fits", "fits", "does not fit", "does not fit"]
    assert frame["vram"].is_monotonic_increasing or frame["vram"][1] < frame["vram"][0]


def test_as_a_dictionary_it_can_be_written_as_json(header: Load) -> None:
    made = plan(header("llama-3.1-8b"), gpus=["8GiB"], context_size=32768)
    told = json.loads(json.dumps(made.to_dict()))
    assert told["verdict"] == "does not fit"
    assert told["required"]["vram"] == [made.gpus[0].required]
    assert told["devices"][1]["weights"] == made.gpus[0].weights
    assert told["advice"][0]["changes"]


def test_as_text_it_says_the_verdict_each_device_and_what_to_change(header: Load) -> None:
    lines = str(plan(header("llama-3.1-8b"), gpus=["8GiB"], context_size=32768)).splitlines()
    assert "does not fit" in lines[0]
    assert any(line.strip().startswith("GPU 0: 8.7") for line in lines)
    assert sum(line.strip().startswith("try: ") for line in lines) == 3
    assert max(map(len, lines)) <= 120


def test_in_a_notebook_names_are_escaped_and_nothing_is_fetched(header: Load) -> None:
    made = replace(plan(header("llama-3.1-8b"), gpus=["24GiB"]), model="<script>alert(1)</script>")
    html = made._repr_mimebundle_()["text/html"]
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert not any(word in html for word in ("http", "src=", "@import", "url("))
    for part in ("weights", "KV cache", "compute"):
        assert part in html


def test_parts_are_told_apart_where_style_sheets_are_dropped(header: Load) -> None:
    import re

    html = plan(header("llama-3.1-8b"), gpus=["24GiB"])._repr_mimebundle_()["text/html"]
    words = re.sub("<[^>]*>", "", html)
    assert re.search("weights [0-9.]+ [GMK]iB KV cache [0-9.]+ [GMK]iB compute ", words)


def test_bars_never_run_out_of_their_frame(header: Load) -> None:
    import re

    for size in ("1GiB", "8GiB", "80GiB"):
        html = plan(header("llama-3.1-8b"), gpus=[size])._repr_mimebundle_()["text/html"]
        for bar in re.findall(r'role="img".*?</div>', html):
            widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bar)]
            assert 0 < sum(widths) <= 100.5


def test_a_projector_and_a_draft_model_are_counted(header: Load, tmp_path: Any) -> None:
    draft = synthetic.write(synthetic.ALL["qwen3-0.6b"](), tmp_path / "draft.gguf")
    alone = plan(header("llama-3.1-8b"), gpus=["24GiB"])
    both = plan(header("llama-3.1-8b"), gpus=["24GiB"], draft=draft)
    assert both.gpus[0].draft > 300 * MIB
    assert both.required.total_vram == pytest.approx(alone.required.total_vram + both.gpus[0].draft, abs=MIB)


@pytest.mark.parametrize("width", [float("inf"), float("nan")])
def test_a_draft_models_header_of_no_known_kind_is_refused_as_a_models_is(header: Load, width: float) -> None:
    good = header("qwen3-0.6b")
    odd = replace(good, metadata={**good.metadata, "qwen3.embedding_length": width})
    with pytest.raises(CannotEstimate, match="known architecture"):
        plan(odd)
    made = plan(good)
    with pytest.raises(CannotEstimate, match="known architecture"):
        made.again(draft=odd)


REFUSED = [
    ({"mode": "dreaming"}, ConfigError, "dreaming"),
    ({"kv_type": "q3"}, ConfigError, "q3"),
    ({"kv_type": "q8_0", "flash_attention": False}, NotSupported, "flash"),
    ({"gpus": ["many"]}, ConfigError, "many"),
]


@pytest.mark.parametrize(("options", "error", "word"), REFUSED)
def test_impossible_questions_are_refused(
    header: Load, options: dict[str, Any], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        plan(header("llama-3.1-8b"), **options)


def test_without_llama_cpp_formulas_answer_and_say_so(header: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbinfer.memory.probe.client import ProbeUnavailable

    class Off:
        def measure(self, *args: Any, **options: Any) -> Any:
            raise ProbeUnavailable("the exact probe is switched off: no library")

    monkeypatch.setattr("nbinfer.memory.probe.client.shared_probe", Off)
    made = plan(header("llama-3.2-1b"), exact=None)
    assert not made.exact
    assert "switched off" in made.note
    with pytest.raises(ProbeUnavailable):
        plan(header("llama-3.2-1b"), exact=True)


def test_the_processor_of_this_machine_has_known_layouts() -> None:
    assert set(rearranging().rows) <= {
        "Q2_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "said"),
    [(768, "768"), (4096, "4k"), (12_800, "12.5k"), (1 << 20, "1,024k"), (10**9, "976,562k")],
)
def test_tokens_are_said_without_exponents(tokens: int, said: str) -> None:
    assert advise._short(tokens) == said
