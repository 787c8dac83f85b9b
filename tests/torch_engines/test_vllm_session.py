"""vLLM in the kernel as a notebook sees it: one word away from llama.cpp."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.kernel import kernel
from support.vllm_engine import SETTINGS

import nbinfer as nb
from nbinfer import session
from nbinfer.contract.errors import ConfigError, DoesNotFit, NotSupported
from nbinfer.engines.vllm.process import undisturbed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.kernel import Kernel

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

PLACES = {"llamacpp": "demo", "vllm": "demo-hf"}
COUNTRIES = ["France", "Italy", "Japan", "Egypt"]


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, session.Model]]:
    made = {
        name: nb.load(ref, backend=name, where="kernel", context_size=1024, name=name, **_for(name))
        for name, ref in PLACES.items()
    }
    yield made
    nb.unload()


def _for(backend: str) -> dict[str, Any]:
    return SETTINGS if backend == "vllm" else {"threads": 1}


def test_the_same_cell_gives_the_same_kind_of_result(models: dict[str, session.Model]) -> None:
    found = {name: nb.infer("What is the capital of France?", model=name, logprobs=1) for name in models}
    ours, theirs = found["llamacpp"], found["vllm"]
    assert ours.text == theirs.text == "The capital of France is Paris."
    assert ours.prompt == theirs.prompt
    assert ours.usage == theirs.usage
    assert ours.to_dict().keys() == theirs.to_dict().keys()
    assert ours.logprobs is not None
    assert theirs.logprobs is not None
    assert [entry.token for entry in ours.logprobs] == [entry.token for entry in theirs.logprobs]
    assert theirs.reply("And of Italy?").text


def test_the_same_cell_gives_the_same_kind_of_frame(models: dict[str, session.Model]) -> None:
    import pandas as pd

    data = pd.DataFrame({"country": COUNTRIES}, index=list("abcd"))
    prompt = "What is the capital of {country}?"
    frames = [nb.complete(data, prompt, model=name, cache=False) for name in models]
    ours, theirs = frames
    assert list(ours["completion"]) == list(theirs["completion"])
    assert ours.dtypes.to_dict() == theirs.dtypes.to_dict()
    assert list(ours.index) == list(theirs.index)
    labelled = [
        nb.classify(["red", "2", "blue"], ["color", "number"], model=name, probs=True, cache=False)
        for name in models
    ]
    assert labelled[0].columns.tolist() == labelled[1].columns.tolist()


def test_a_typed_answer_is_the_same_value(models: dict[str, session.Model]) -> None:
    @dataclass
    class City:
        country: str
        capital: str

    asked = "What is the capital of Italy? Answer in JSON."
    found = [nb.infer(asked, schema=City, model=name) for name in models]
    assert [each.parsed for each in found] == [City("Italy", "Rome")] * 2
    assert found[0].text == found[1].text


def test_kept_answers_are_found_by_the_type_that_they_were_computed_in(
    models: dict[str, session.Model],
) -> None:
    from nbinfer.frames.work import identity

    ours = identity(models["vllm"])
    assert (ours["backend"], ours["dtype"]) == ("vllm", "float32")
    assert "dtype" not in identity(models["llamacpp"])


def test_a_gguf_file_is_refused_with_the_way_out() -> None:
    with pytest.raises(NotSupported, match="llamacpp"):
        nb.load("demo", backend="vllm", where="kernel")
    with pytest.raises(NotSupported, match="vllm"):
        nb.load("demo-hf", backend="llamacpp", where="kernel")


def test_loading_again_with_other_settings_replaces_it(models: dict[str, session.Model]) -> None:
    same = nb.load("demo-hf", backend="vllm", where="kernel", context_size=1024, name="vllm", **SETTINGS)
    assert same is models["vllm"]
    other = nb.load("demo-hf", backend="vllm", where="kernel", context_size=512, name="vllm", **SETTINGS)
    assert other.info.context_size == 512
    assert nb.infer("What is the capital of France?", model="vllm").text == "The capital of France is Paris."
    with pytest.raises(NotSupported, match="one model per process") as caught:
        nb.load("demo-hf", backend="vllm", where="kernel", name="second", **SETTINGS)
    second = nb.dry_run("demo-hf", backend="vllm", where="kernel", name="second", **SETTINGS)
    assert (second.fits, second.unloads, second.reason) == (False, (), str(caught.value))
    assert len(second.reason.splitlines()) <= 5
    again = nb.dry_run("demo-hf", backend="vllm", where="kernel", name="vllm", context_size=256, **SETTINGS)
    assert (again.fits, again.unloads) == (True, ("vllm",))


def test_a_reload_that_does_not_fit_leaves_the_one_that_is_there(models: dict[str, session.Model]) -> None:
    there = nb.get("vllm")
    large: dict[str, Any] = {**SETTINGS, "kv_cache_bytes": "100TiB"}
    with pytest.raises(DoesNotFit, match="once the loaded one is gone"):
        nb.load("demo-hf", backend="vllm", where="kernel", name="vllm", **large)
    assert not nb.dry_run("demo-hf", backend="vllm", where="kernel", name="vllm", **large).fits
    with pytest.raises(ConfigError, match="no option 'dtypes'"):
        nb.load("demo-hf", backend="vllm", where="kernel", name="vllm", dtypes="float32")
    assert nb.get("vllm") is there
    assert nb.infer("What is 2 plus 3?", model="vllm").text == "2 plus 3 is 5."


def test_what_a_cell_does_beside_a_load_stays_and_what_the_load_does_is_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    legacy: Any = np.random  # the generators that a whole process shares
    for name in ("LOADS", "CELLS", "BOTH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.setenv("REMOVED", "before")
    inside, done = threading.Event(), threading.Event()

    def load() -> None:
        with undisturbed({"ASKED": "1"}):
            os.environ |= {"LOADS": "1", "BOTH": "load", "CHANGED": "load"}
            del os.environ["REMOVED"]
            random.seed(0)
            legacy.seed(0)
            torch.manual_seed(0)
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=load)
    drawn = random.getstate(), repr(legacy.get_state()), torch.get_rng_state()
    thread.start()
    try:
        assert inside.wait(60)
        assert os.environ["ASKED"] == "1"
        assert (random.getstate(), repr(legacy.get_state())) == drawn[:2]
        assert torch.equal(torch.get_rng_state(), drawn[2])
        monkeypatch.setenv("CELLS", "1")
        monkeypatch.setenv("BOTH", "cell")
        random.seed(5)
        legacy.seed(5)
        torch.manual_seed(5)
        seeded = random.random(), legacy.random(), torch.rand(1).item()
    finally:
        done.set()
        thread.join()
    found = {name: os.environ.get(name) for name in ("LOADS", "ASKED", "CELLS", "BOTH", "CHANGED", "REMOVED")}
    assert found == {
        "LOADS": None,
        "ASKED": None,
        "CELLS": "1",
        "BOTH": "cell",
        "CHANGED": "before",
        "REMOVED": "before",
    }
    again = random.Random(5), np.random.RandomState(5), torch.Generator().manual_seed(5)
    expected = [
        (again[0].random(), again[1].random(), torch.rand(1, generator=again[2]).item()) for _ in "12"
    ]
    assert seeded == expected[0]
    assert (random.random(), legacy.random(), torch.rand(1).item()) == expected[1]


# -- a kernel of its own -----------------------------------------------------------------------------------

LOAD = """
import os, random, sys
import numpy, torch
def state():
    drawn = random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()
    return dict(os.environ), *drawn, os.putenv, random.seed, torch.manual_seed
random.seed(11)
before = state()
import nbinfer as nb
m = nb.load("demo-hf", backend="vllm", where="kernel", threads=1, context_size=1024)
unchanged = state() == before
"""
ENDLESS = (
    "m.infer('Tell me a story.', max_tokens=1000, logit_bias=dict.fromkeys(m.engine.end_tokens, -100.0))"
)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory, models: dict[str, session.Model]) -> Iterator[Kernel]:
    del models  # two vLLMs at once would compete for the machine
    nb.unload()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.kernel._PATIENCE", 200.0)  # a busy machine imports vLLM for a minute
        with kernel(tmp_path_factory.mktemp("k")) as started:
            yield started


def test_a_cell_loads_it_in_silence_and_nothing_of_the_kernel_changes(notebook: Kernel) -> None:
    ran = notebook.run(LOAD)
    assert ran.reply["status"] == "ok", ran.error_text
    assert ran.of("stream") == []
    assert notebook.value("unchanged") == "True"
    assert notebook.value("m.infer('What is 2 plus 3?').text") == "'2 plus 3 is 5.'"
    ran = notebook.run("!echo preload=$LD_PRELOAD")
    assert ran.printed.strip() == "preload="
    assert notebook.value("__import__('psutil').Process().children()") == "[]"


def test_an_interrupt_stops_the_request_and_the_next_cell_is_served_at_once(notebook: Kernel) -> None:
    def stop(kind: str, content: dict[str, Any]) -> None:
        if kind == "stream" and "asked" in content["text"]:
            notebook.manager.interrupt_kernel()

    ran = notebook.run(f"print('asked', flush=True)\n{ENDLESS}", on_message=stop)
    assert ran.reply["ename"] == "KeyboardInterrupt"
    assert notebook.value("m.infer('What is 2 plus 3?').text") == "'2 plus 3 is 5.'"
    assert notebook.value("m.engine.load().running") == "0"


def test_a_cell_shows_an_error_in_a_few_lines(notebook: Kernel) -> None:
    ran = notebook.run("nb.load('demo-hf', backend='vllm', where='kernel', name='second')")
    assert ran.reply["ename"] == "NotSupported"
    assert "where='sidecar'" in ran.error_text
    assert len(ran.error_text.splitlines()) <= 6


def test_awaiting_beside_other_work_and_unloading(notebook: Kernel) -> None:
    ran = notebook.run(
        "import asyncio\n"
        "both = await asyncio.gather(*(m.ainfer(f'What is {n} plus 3?') for n in (2, 4)))\n"
        "print([r.text for r in both])\n"
        "m.unload(); import threading\n"
        "print([t.name for t in threading.enumerate() if t.name.startswith('nbinfer')])"
    )
    assert ran.reply["status"] == "ok", ran.error_text
    assert ran.printed.splitlines() == ["['2 plus 3 is 5.', '4 plus 3 is 7.']", "[]"]


def test_a_load_that_is_interrupted_ends_and_the_next_one_works(notebook: Kernel) -> None:
    def stop(kind: str, content: dict[str, Any]) -> None:
        if kind == "stream" and "loading" in content["text"]:
            notebook.manager.interrupt_kernel()

    again = LOAD.replace("import os", "print('loading', flush=True); import os")
    ran = notebook.run(again, on_message=stop)
    # It may have been done before the interrupt arrived; then there was nothing to stop.
    assert ran.reply["status"] == "ok" or ran.reply["ename"] == "KeyboardInterrupt"
    ran = notebook.run(LOAD)
    assert ran.reply["status"] == "ok", ran.error_text
    assert notebook.value("m.infer('What is 2 plus 3?').text") == "'2 plus 3 is 5.'"
