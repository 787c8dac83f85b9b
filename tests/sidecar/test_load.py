"""Many clients, many loads: no error, no leak, nothing over the budget.

Short by default. ``NBINFER_LOAD_SECONDS=60 NBINFER_LOADS=200 pytest -s tests/sidecar/test_load.py`` is the
long run; ``-s`` shows the times to the first token.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import openai
import psutil
import pytest
from support import sidecar as support

from nbinfer import session
from nbinfer.contract.errors import ModelNotFound, NbinferError
from nbinfer.engines.remote.control import call

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.sidecar import Sidecar

pytestmark = pytest.mark.engine

SECONDS = float(os.environ.get("NBINFER_LOAD_SECONDS", "5"))
LOADS = int(os.environ.get("NBINFER_LOADS", "8"))
CLIENTS = 64
MIB = 2**20


def rss(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


async def _clients(served: Sidecar, seconds: float) -> tuple[list[float], int]:
    """Stream from many clients at once; returns the times to the first token and the number of answers."""
    first: list[float] = []
    answers = 0

    async def ask(client: openai.AsyncOpenAI, number: int, until: float) -> None:
        nonlocal answers
        while time.monotonic() < until:
            began, seen = time.monotonic(), False
            chunks = await client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": f"Tell me about the number {number}."}],
                max_tokens=12,
                seed=number,
                stream=True,
            )
            finished = False
            async for chunk in chunks:
                choice = chunk.choices[0]
                if choice.delta.content and not seen:
                    first.append(time.monotonic() - began)
                    seen = True
                finished = finished or choice.finish_reason is not None
            assert finished, "a stream ended in the middle"
            answers += 1

    options: Any = {"base_url": served.address, "api_key": served.token, "max_retries": 0, "timeout": 120}
    async with openai.AsyncOpenAI(**options) as client:
        until = time.monotonic() + seconds
        await asyncio.gather(*(ask(client, number, until) for number in range(CLIENTS)))
    return first, answers


@pytest.mark.timeout(600)
def test_many_streaming_clients_at_once_get_whole_answers_in_flat_memory(shared: Sidecar) -> None:
    asyncio.run(_clients(shared, 1.0))
    found = call(shared.socket, "GET", "/nbinfer/ps")
    runner = next(each["pid"] for each in found["models"] if each["name"] == "demo")
    before = {pid: rss(pid) for pid in (shared.pid, runner)}
    first, answers = asyncio.run(_clients(shared, SECONDS))
    assert answers >= CLIENTS
    p50, p99 = np.percentile(first, [50, 99])
    sys.stdout.write(
        f"\n{CLIENTS} clients, {answers} answers in {SECONDS:g} s: "
        f"first token p50 {p50:.3f} s, p99 {p99:.3f} s\n"
    )
    for pid, size in before.items():
        assert rss(pid) - size < 30 * MIB
    support.until(lambda: not any(e["busy"] for e in call(shared.socket, "GET", "/nbinfer/ps")["models"]), 10)


@pytest.fixture
def small(runtime: Path) -> Iterator[Sidecar]:
    """A service whose budget holds two of the models."""
    process = support.start(runtime, "--port", "0", "--ram", "450M")
    yield support.ready(process, runtime)
    process.terminate()
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()


class Watcher:
    """Counts the runners, and notes when all there are together have more memory than they may."""

    def __init__(self, service: psutil.Process, budget: int) -> None:
        self.most = 0
        self.runners: set[tuple[int, float]] = set()
        self.over: list[int] = []
        self._service, self._budget = service, budget
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            total = 0
            for process in self._service.children():
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
                    self.runners.add((process.pid, process.create_time()))
            self.most = max(self.most, total)
            if total > self._budget:
                self.over.append(total)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


# Four models: one file, four configurations.
CONTEXTS = (256, 384, 512, 640)


def _use_at_random(socket: str, number: int, watcher: Watcher, errors: list[BaseException]) -> None:
    """Ask models in an order of its own, until there were as many loads as there should be."""
    rng = random.Random(number)
    try:
        while len(watcher.runners) < LOADS and not errors:
            model = f"m{rng.choice(CONTEXTS)}"
            request = {"model": model, "prompt": "Hello", "max_tokens": 4, "temperature": 0}
            assert call(socket, "POST", "/v1/completions", request)["choices"][0]["text"]
    except BaseException as error:  # noqa: BLE001 - shown by the test
        errors.append(error)


@pytest.mark.timeout(1800)
def test_loads_and_unloads_keep_to_the_budget_and_leak_nothing(small: Sidecar) -> None:
    service = psutil.Process(small.pid)
    errors: list[BaseException] = []
    for size in CONTEXTS:
        with session.load("demo", where="sidecar", name=f"m{size}", threads=1, context_size=size):
            pass
    fds, threads, size_before = service.num_fds(), service.num_threads(), rss(small.pid)
    with Watcher(service, 450 * MIB) as watcher:
        workers = [
            threading.Thread(target=_use_at_random, args=(small.socket, number, watcher, errors))
            for number in range(3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert errors == []
    assert watcher.over == []
    assert len(watcher.runners) >= LOADS
    for size in CONTEXTS:
        call(small.socket, "POST", "/nbinfer/unload", {"model": f"m{size}"})
    support.until(lambda: not service.children(), 20, "every runner is gone")
    assert [path.name for path in small.folder.glob("runner-*")] == []
    support.until(lambda: service.num_fds() <= fds + 2, 10, "no descriptor is left open")
    # The worker threads of the event loop's pool stay; what a model had does not.
    assert service.num_threads() <= threads + 12
    assert rss(small.pid) - size_before < 30 * MIB
    sys.stdout.write(
        f"\n{len(watcher.runners)} loads: runners took {watcher.most / MIB:.0f} MiB at most, of 450 MiB; the "
        f"service's descriptors {fds} -> {service.num_fds()}, threads {threads} -> {service.num_threads()}, "
        f"memory {size_before / MIB:.0f} -> {rss(small.pid) / MIB:.0f} MiB\n"
    )


def test_a_model_larger_than_the_budget_is_refused_with_numbers(runtime: Path) -> None:
    process = support.start(runtime, "--port", "0", "--ram", "100M")
    served = support.ready(process, runtime)
    try:
        with pytest.raises(NbinferError, match=r"needs 0\.\d+ GiB of RAM; the sidecar may use 0\.10 GiB"):
            session.load("demo", where="sidecar", threads=1, context_size=512)
        assert call(served.socket, "GET", "/nbinfer/ps")["models"] == []
    finally:
        process.terminate()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def test_a_dry_run_says_which_models_would_go(small: Sidecar) -> None:
    for size in CONTEXTS[:2]:
        session.load("demo", where="sidecar", name=f"m{size}", threads=1, context_size=size)
    third = session.dry_run("demo", where="sidecar", name="third", threads=1, context_size=1024)
    assert third.unloads == ("m256",), "the one unused for longest"
    assert third.required is not None
    assert not third.loaded
    assert session.dry_run("demo", where="sidecar", name="m256", threads=1, context_size=256).loaded
    large = session.dry_run("demo", where="sidecar", name="large", context_size=500_000)
    assert not large.fits
    assert "the sidecar may use" in large.reason
    found = call(small.socket, "GET", "/nbinfer/ps")
    assert [each["name"] for each in found["models"]] == ["m256", "m384"], "nothing happened"
    with pytest.raises(ModelNotFound):
        call(small.socket, "POST", "/v1/completions", {"model": "third", "prompt": "x"})


def test_a_dry_run_starts_no_sidecar(runtime: Path) -> None:
    plan = session.dry_run("demo", where="sidecar", context_size=512)
    assert plan.required is not None
    assert plan.unloads == ()
    assert not (runtime / "sidecar.json").exists()
