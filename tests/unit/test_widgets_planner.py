"""What the widgets say about memory, and what they make of settings that come from a page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.tiny_models import write_tiny

import nbinfer as nb
from nbinfer.contract.errors import ModelNotFound
from nbinfer.contract.units import human_bytes
from nbinfer.memory import estimate, show
from nbinfer.memory.machine import Gpu, Machine, Ram
from nbinfer.widgets.planner import MemoryPlanner, context_stops, machine_part, whole_settings

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
LIMITS = {"context": [512, 1024, 4096, 8192], "kv_types": ["f16", "q8_0"], "layers": 33, "parallel": 16}


@pytest.mark.parametrize(
    ("longest", "first", "last"),
    [(512, 512, 512), (300, 300, 300), (1024, 512, 1024), (131072, 512, 131072), (40960, 512, 40960)],
)
def test_a_context_slider_ends_at_what_the_model_was_trained_for(longest: int, first: int, last: int) -> None:
    stops = context_stops(longest)
    assert (stops[0], stops[-1]) == (first, last)
    assert stops == sorted(set(stops))
    assert all(stop % 256 == 0 for stop in stops[:-1])
    assert all(b / a <= 1.5 for a, b in pairwise(stops))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (4096, "f16", -1, None)),
        ({"context_size": 1024, "kv_type": "q8_0", "gpu_layers": 20, "parallel": 4}, (1024, "q8_0", 20, 4)),
        ({"context_size": 10**9, "gpu_layers": 99, "parallel": 99}, (8192, "f16", 33, 16)),
        ({"context_size": -5, "gpu_layers": -7, "parallel": 0}, (1, "f16", -1, 1)),
        (
            {"context_size": "8192", "kv_type": ["f16"], "gpu_layers": True, "parallel": {}},
            (4096, "f16", -1, 1),
        ),
        ({"context_size": None, "kv_type": "q9", "more": 1}, (4096, "f16", -1, None)),
    ],
)
def test_settings_of_a_page_are_made_whole_and_kept_within_limits(
    settings: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert tuple(whole_settings(settings, LIMITS).values()) == expected


def test_a_load_gets_only_what_differs_from_its_defaults() -> None:
    planner = MemoryPlanner()
    usual = {"context_size": 4096, "kv_type": "f16", "gpu_layers": -1, "parallel": None}
    assert planner.load_options(usual) == {"context_size": 4096}
    other = {"context_size": 512, "kv_type": "q8_0", "gpu_layers": 0, "parallel": 1}
    assert planner.load_options(other) == other


def test_a_machine_is_bars_with_words() -> None:
    machine = Machine(
        ram=Ram(total=16 * GIB, available=1 * GIB, limit="cgroup"),
        gpus=(Gpu(index=0, name="Imaginary 8", total=8 * GIB, free=5 * GIB),),
        gpu_status="a doubt",
    )
    part = machine_part(machine)
    assert [(row["name"], row["text"], row["kind"]) for row in part["rows"]] == [
        ("RAM (limit: cgroup)", "15 of 16 GiB used", "error"),
        ("GPU 0, Imaginary 8", "3 of 8 GiB used", "ok"),
    ]
    assert part["text"] == "GPU: a doubt"


def test_the_demo_model_can_be_planned_and_a_misspelt_name_is_an_error() -> None:
    plan = MemoryPlanner().quick("demo", {})
    assert plan["verdict"]["word"] == "fits"
    assert plan["bars"][0]["name"] == "RAM"
    assert plan["name"] == "demo"
    assert plan["limits"]["context"][-1] == 1024
    assert plan["settings"]["context_size"] == 1024
    with pytest.raises(ModelNotFound):
        nb.memory_bar("dmeo")


def test_what_does_not_fit_says_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # With no room at all nothing helps; with a little, a shorter context does.
    need = estimate("demo", context_size=1024, exact=False).ram
    least = estimate("demo", context_size=512, exact=False).ram
    room = (need.known + least.known) // 2 + need.overhead[0]
    small = Machine(ram=Ram(total=64 * 2**20, available=room))
    # The function has the module's name in the room; the module is known by its own.
    monkeypatch.setattr(sys.modules["nbinfer.memory.estimate"], "machine", lambda: small)
    planner = MemoryPlanner()
    quick = planner.quick("demo", {})
    assert (quick["verdict"]["word"], quick["verdict"]["kind"]) == ("does not fit", "error")
    assert "needed on RAM" in quick["verdict"]["text"]
    exact = planner.exact("demo", {})
    assert exact["source"] == "exact: llama.cpp's own plan"
    around = planner.around("demo", exact["settings"])
    assert len(around["curve"]) == len(exact["limits"]["context"])
    assert around["advice"]
    for advice in around["advice"]:
        changed = planner.exact("demo", {**exact["settings"], **advice["settings"]})
        assert changed["verdict"]["kind"] != "error"


def test_with_a_gpu_there_are_two_bars_and_a_slider_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(index=0, name="Imaginary 8", total=8 * GIB, free=7 * GIB)
    here = Machine(ram=Ram(total=16 * GIB, available=8 * GIB), gpus=(gpu,))
    room = sys.modules["nbinfer.memory.estimate"]
    monkeypatch.setattr(room, "machine", lambda: here)
    monkeypatch.setattr(room, "_build_uses_gpus", lambda: True)
    planner = MemoryPlanner()
    plan = planner.exact("demo", {})
    layers = plan["limits"]["layers"]
    assert layers > 1
    weights = {}
    for n in (0, layers):
        plan = planner.exact("demo", {"gpu_layers": n})
        assert [bar["name"] for bar in plan["bars"]][-1] == "GPU 0 (Imaginary 8)" or n == 0
        on_gpu = [bar for bar in plan["bars"] if "GPU" in bar["name"]]
        segments = [segment for bar in on_gpu for segment in bar["segments"]]
        weights[n] = sum(segment["bytes"] for segment in segments if segment["kind"] == "weights")
        assert sum(s["bytes"] for s in segments if s["kind"] == "taken") in (0, GIB)
    assert weights[0] == 0
    assert weights[layers] > 0


def test_advice_to_keep_experts_in_main_memory_moves_them_and_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = Gpu(index=0, name="Imaginary 8", total=8 * GIB, free=7 * GIB)
    here = Machine(ram=Ram(total=16 * GIB, available=8 * GIB), gpus=(gpu,))
    room = sys.modules["nbinfer.memory.estimate"]
    monkeypatch.setattr(room, "machine", lambda: here)
    monkeypatch.setattr(room, "_build_uses_gpus", lambda: True)
    path = str(write_tiny(tmp_path / "mixture.gguf", "mixture"))
    planner = MemoryPlanner()

    def on_gpu(plan: dict[str, Any]) -> int:
        segments = [each for bar in plan["bars"] if "GPU" in bar["name"] for each in bar["segments"]]
        return sum(each["bytes"] for each in segments if each["kind"] == "weights")

    usual, moved = planner.quick(path, {}), planner.quick(path, {"experts_on_cpu": True})
    assert 0 < on_gpu(moved) < on_gpu(usual)
    assert planner.load_options(moved["settings"])["experts_on_cpu"] is True
    assert "experts_on_cpu" not in planner.load_options(usual["settings"])


@pytest.fixture
def hf_folder(tmp_path: Path) -> str:
    """A model of safetensors: 16 MiB of weights, 64 KiB of cache a token, 8,192 tokens."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "hidden_size": 1024,
        "max_position_embeddings": 8192,
        "torch_dtype": "float16",
        "vocab_size": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.x": np.zeros((8, 2**20), np.float16)}, tmp_path / "model.safetensors")
    return str(tmp_path)


def test_a_model_for_vllm_is_planned_by_vllms_rules(hf_folder: str) -> None:
    planner = MemoryPlanner()
    plan = planner.quick(hf_folder, {"context_size": 1024, "parallel": 2, "kv_type": "q8_0"})
    made = estimate(hf_folder, context_size=1024)
    assert plan["verdict"]["word"] == made.verdict
    texts = [row["text"] for row in plan["segments"][1:]]
    assert texts[:2] == ["weights 16 MiB", f"KV cache {human_bytes(made.devices[0].cache)}"]
    # llama.cpp's types of cache are not vLLM's; what is not asked for is not passed on.
    assert plan["limits"]["kv_types"] == []
    assert planner.load_options(plan["settings"]) == {"context_size": 1024, "parallel": 2}
    exact = planner.exact(hf_folder, plan["settings"])
    assert exact["segments"][1:] == plan["segments"][1:]


def test_on_a_gpu_vllm_takes_a_share_and_advice_changes_what_has_no_slider(
    hf_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(index=0, name="Imaginary 2", total=2 * GIB, free=2 * GIB)
    here = Machine(ram=Ram(total=16 * GIB, available=8 * GIB), gpus=(gpu,))
    module = sys.modules["nbinfer.memory.vllm"]
    monkeypatch.setattr(module, "machine", lambda: here)
    planner = MemoryPlanner()
    plan = planner.quick(hf_folder, {"context_size": 8192, "gpu_layers": 3})
    assert plan["verdict"]["word"] in ("fits", "tight")
    assert "vLLM takes 90% of the GPU whatever the model" in plan["verdict"]["text"]
    (bar,) = plan["bars"]
    assert bar["used"] == pytest.approx(0.9 * 2 * GIB, rel=0.01)
    # Another program has a part of it.
    crowded = Machine(ram=here.ram, gpus=(replace(gpu, free=GIB * 3 // 2),))
    monkeypatch.setattr(module, "machine", lambda: crowded)
    plan = planner.quick(hf_folder, {"context_size": 8192})
    assert plan["verdict"]["word"] == "does not fit"
    (advice,) = planner.around(hf_folder, plan["settings"])["advice"]
    assert "gpu_memory_utilization" in advice["settings"]
    settled = planner.quick(hf_folder, {**plan["settings"], **advice["settings"]})
    assert settled["verdict"]["word"] != "does not fit"
    assert advice["settings"].items() <= planner.load_options(settled["settings"]).items()


def test_the_exact_plan_is_what_the_engine_then_holds() -> None:
    with nb.load("demo", context_size=768) as model:
        plan = MemoryPlanner().exact("demo", {"context_size": 768})
        planned = {row["kind"]: row["bytes"] for row in plan["segments"]}
        held = (model.measured_memory() or {})["CPU"]
        assert planned["cache"] == held["context"]
        assert planned["compute"] == held["compute"]
        assert planned["file_backed"] + planned.get("weights", 0) == held["weights"]


def test_the_real_panel_shows_this_machine_its_models_and_backends() -> None:
    panel = nb.panel()
    try:
        text = repr(panel)
        assert "RAM" in text
        assert "demo-embed" in text
        assert "llamacpp" in text
    finally:
        panel.close()


def test_the_small_widgets_show_themselves_in_words() -> None:
    for widget, words in (
        (nb.monitor(), "RAM"),
        (nb.status_badge("vllm"), "vllm"),
        (nb.memory_bar("demo"), "demo"),
    ):
        try:
            assert words in repr(widget)
        finally:
            widget.close()


def test_a_part_of_the_memory_has_one_colour_in_estimates_and_widgets() -> None:
    css = (files("nbinfer.widgets") / "static" / "widgets.css").read_text(encoding="utf-8")
    drawn = dict(re.findall(r'\[data-part="(\w+)"\] \{ background: (#\w+)', css))
    assert {part: drawn[part] for part in show.COLOURS} == show.COLOURS


def test_importing_the_package_imports_no_widget() -> None:
    heavy = ("ipywidgets", "anywidget", "psutil", "pandas")
    code = f"import sys, nbinfer, nbinfer.widgets; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
