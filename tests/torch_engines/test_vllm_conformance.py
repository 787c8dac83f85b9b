"""vLLM, in this process and behind its own server, keeps to the suite that every engine keeps to."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import psutil
import pytest
from support import sidecar
from support.conformance import *  # noqa: F403 - the suite
from support.vllm_engine import SETTINGS, demo_hf, quietly

from nbinfer import session
from nbinfer.contract.errors import DoesNotFit, EngineError
from nbinfer.memory import estimate_vllm
from nbinfer.sidecar import discovery

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.session import Model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def load(where: str) -> Model:
    # Exact: else the last bits depend on what ran before, and at a high temperature tokens depend on them.
    return session.load(
        "demo-hf",
        backend="vllm",
        where=where,
        name=f"demo-{where}",
        context_size=1024,
        exact=True,
        **SETTINGS,
    )


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Model]]:
    folder = sidecar.make_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sidecar.VARIABLE, str(folder))
        made = {where: load(where) for where in ("kernel", "sidecar")}
        yield made
        for model in made.values():
            model.unload()
        discovery.stop()
    sidecar.check_gone(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def kernel(models: dict[str, Model]) -> Model:
    return models["kernel"]


@pytest.fixture(params=["kernel", "sidecar"])
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]


def test_the_estimate_is_what_vllm_takes(kernel: Model) -> None:
    made = estimate_vllm("demo-hf", context_size=1024, dtype="float32", device="cpu")
    assert made.cache_tokens == pytest.approx(kernel.info.effective["kv_tokens"], rel=0.02)
    # On a CPU vLLM packs its weights out of sight, and reports no size: transformers holds the same ones.
    with quietly():
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(demo_hf(), dtype="float32")
    assert made.weights == pytest.approx(reference.get_memory_footprint(return_buffers=False), rel=0.02)


def test_what_does_not_fit_is_refused_before_anything_starts_or_goes(kernel: Model) -> None:
    # By the name of the one that is there: a second one is refused for another reason.
    with pytest.raises(DoesNotFit, match="kv_cache_bytes=") as caught:
        session.load("demo-hf", backend="vllm", name=kernel.name, kv_cache_bytes="1000GiB")
    assert len(str(caught.value).splitlines()) <= 5
    assert kernel.infer("Hello", max_tokens=2).usage.completion_tokens == 2


def test_an_engine_process_that_is_killed_is_a_crash_with_its_reason(models: dict[str, Model]) -> None:
    # The last test: the model in the sidecar is gone after it. vLLM itself would end with exit code 0.
    described = discovery.describe()
    assert described is not None
    runner = psutil.Process(next(each["pid"] for each in described["models"]))
    processes = runner.children(recursive=True)
    stream = models["sidecar"].stream("Tell me a story.", max_tokens=900, logit_bias={2: -100})
    pieces = iter(stream)  # one that nobody keeps ends the answer
    next(pieces)
    next(each for each in processes if "EngineCore" in " ".join(each.cmdline())).kill()
    with pytest.raises(EngineError, match="has died") as caught:
        stream.result()
    assert len(str(caught.value).splitlines()) <= 5
    _, alive = psutil.wait_procs([runner, *processes], timeout=5)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
