"""LoRA adapters in vLLM: a request under one says what the merged weights say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.vllm_engine import demo_hf, open_demo_hf, quietly

from nbinfer.contract.errors import ModelNotFound, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest
from nbinfer.engines.protocol import EngineInfo

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.vllm

RANK, ALPHA = 8, 32.0
PROJECTION = "model.layers.{}.self_attn.q_proj"


def make_adapter(folder: Path, seed: int) -> dict[str, Any]:
    """Write a PEFT adapter with random weights; returns what it adds to each weight."""
    from safetensors.numpy import save_file

    folder.mkdir()
    rng = np.random.default_rng(seed)
    tensors, added = {}, {}
    for layer in range(4):
        name = PROJECTION.format(layer)
        down = rng.normal(0, 0.15, (RANK, 128)).astype(np.float32)
        up = rng.normal(0, 0.15, (128, RANK)).astype(np.float32)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        added[f"{name}.weight"] = ALPHA / RANK * up @ down
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "demo-hf"}))
    return added


def request(**options: Any) -> CompletionRequest:
    messages = ({"role": "user", "content": "Tell me a story about a dog."},)
    return CompletionRequest(messages=messages, max_tokens=24, **options)


def expected(added: dict[str, Any]) -> str:
    """The text of transformers with the adapter's weights added to the model's."""
    with quietly():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(demo_hf(), dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(demo_hf())
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in added.items():
                weights[name] += torch.from_numpy(value)
            ids = tokenizer.apply_chat_template(
                list(request().messages or ()), add_generation_prompt=True, return_tensors="pt"
            )["input_ids"]
            out = model.generate(ids, max_new_tokens=24, do_sample=False)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_each_request_runs_under_its_own_adapter(tmp_path: Path) -> None:
    added = {name: make_adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "two"), 1)}
    engine = open_demo_hf(lora={name: tmp_path / name for name in added})
    try:
        streams = {name: engine.submit(request(adapter=name)) for name in added}
        # On a CPU, vLLM itself would compute this one under the last adapter: they must not share a batch.
        plain = engine.submit(request())
        rows = [engine.submit(request(adapter=a, priority="batch")) for a in (None, "one", None, "two")]
        found = {name: stream.result(60) for name, stream in streams.items()}
        assert plain.result(60).text == expected({})
        assert {name: result.text for name, result in found.items()} == {
            name: expected(weights) for name, weights in added.items()
        }
        assert len({plain.result(1).text, *(result.text for result in found.values())}) == 3
        texts = [plain.result(1).text, found["one"].text, plain.result(1).text, found["two"].text]
        assert [row.result(60).text for row in rows] == texts
        assert found["one"].params["adapter"] == "one"
        with pytest.raises(RequestError, match="Loaded: one, two"):
            engine.submit(request(adapter="three"))
    finally:
        engine.close()


def test_one_adapter_without_a_name_is_always_on(tmp_path: Path) -> None:
    added = make_adapter(tmp_path / "only", 3)
    engine = open_demo_hf(lora=tmp_path / "only")
    try:
        assert engine.submit(request()).result(60).text == expected(added)
    finally:
        engine.close()


def test_kept_answers_are_found_by_the_adapters_files(tmp_path: Path) -> None:
    from nbinfer.frames.work import identity
    from nbinfer.session import Model

    folders = {name: tmp_path / name for name in ("one", "two")}
    for seed, folder in enumerate(folders.values()):
        make_adapter(folder, seed)
    engine: Any = type(
        "Engine", (), {"info": EngineInfo(backend="vllm", model="x", mode=Mode.COMPLETION, context_size=1)}
    )()
    ids = [
        identity(Model(engine=engine, name="x", config={"lora": lora}))["adapters"]
        for lora in folders.values()
    ]
    assert ids[0] != ids[1]
    named = identity(Model(engine=engine, name="x", config={"lora": folders}))["adapters"]
    assert list(named.values()) == ids


def test_a_folder_that_is_no_adapter_is_refused_before_the_load(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"adapter_config\.json"):
        open_demo_hf(lora=tmp_path)
