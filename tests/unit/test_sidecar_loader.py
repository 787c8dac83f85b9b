"""The loader: its rules, on models that are only scripts."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from nbinfer.contract.errors import DoesNotFit, EngineClosed, ModelLoadError
from nbinfer.contract.keepalive import KeepAlive
from nbinfer.contract.memory import RequiredMemory
from nbinfer.sidecar.loader import Loader, Progress, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Model:
    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name

    def stop(self) -> None:
        with self.world.lock:
            self.world.stopped.append(self.name)
            self.world.loaded.remove(self.name)


class World:
    """Loads scripted models and writes down what happened."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded: list[str] = []
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.most = 0
        self.gate: threading.Event | None = None
        self.error: Exception | None = None

    def start(self, wanted: Wanted, progress: Progress) -> Model:
        self.started.append(wanted.name)
        if self.error is not None:
            raise self.error
        while self.gate is not None and not self.gate.wait(0.005):
            if progress.cancelled.is_set():
                raise EngineClosed("cancelled")
        with self.lock:
            self.loaded.append(wanted.name)
            self.most = max(self.most, len(self.loaded))
        return Model(self, wanted.name)


def want(name: str, ram: int = 10, keep_alive: Any = None) -> Wanted:
    stay = None if keep_alive is None else KeepAlive.parse(keep_alive)
    return Wanted(key=name, name=name, size=RequiredMemory(ram), keep_alive=stay)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "this never came true"
        time.sleep(0.003)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def loader(world: World) -> Iterator[Loader]:
    made = Loader(world.start, budget=RequiredMemory(20))
    yield made
    made.close()
    assert world.loaded == []
    assert not made._thread.is_alive()


def test_the_same_key_is_loaded_once_for_all_who_wait(loader: Loader, world: World) -> None:
    world.gate = threading.Event()
    tickets = [loader.request(want("a")) for _ in range(5)]
    until(lambda: world.started == ["a"])
    world.gate.set()
    uses = [ticket.future.result(10) for ticket in tickets]
    assert len({id(use.loaded) for use in uses}) == 1
    assert world.started == ["a"]
    for use in uses:
        use.release()


def test_the_one_unused_for_longest_goes_and_only_as_many_as_needed(loader: Loader, world: World) -> None:
    for name in ("a", "b"):
        loader.acquire(want(name)).release()
    loader.acquire(want("a")).release()
    assert [entry.wanted.name for entry in loader.plan(want("c"))] == ["b"]
    with loader.acquire(want("c")):
        assert world.stopped == ["b"]
        assert sorted(world.loaded) == ["a", "c"]
    assert world.most == 2


def test_a_busy_model_is_never_unloaded_to_make_room(loader: Loader, world: World) -> None:
    a, b = loader.acquire(want("a")), loader.acquire(want("b"))
    ticket = loader.request(want("c"))
    second = loader.request(want("d"))
    until(lambda: second.position == 1)
    assert ticket.position == 0
    assert world.stopped == []
    b.release()
    with ticket.future.result(10):
        assert world.stopped == ["b"]
    a.release()
    second.future.result(10).release()


def test_a_model_that_stays_for_ever_does_not_go_to_make_room(loader: Loader, world: World) -> None:
    loader.acquire(want("a", keep_alive=-1)).release()
    loader.acquire(want("b")).release()
    loader.acquire(want("c")).release()
    assert world.stopped == ["b"]
    with pytest.raises(DoesNotFit, match=r"(?s)a\b.*by name"):
        loader.acquire(want("big", ram=15))
    assert loader.unload("a")
    loader.acquire(want("big", ram=15)).release()


def test_what_is_larger_than_the_budget_is_refused_at_once_and_nothing_goes(
    loader: Loader, world: World
) -> None:
    loader.acquire(want("a")).release()
    with pytest.raises(DoesNotFit, match="may use"):
        loader.acquire(want("huge", ram=21))
    with pytest.raises(DoesNotFit):
        loader.plan(want("huge", ram=21))
    assert world.loaded == ["a"]


def test_gpu_memory_is_counted_for_each_device(world: World) -> None:
    loader = Loader(world.start, budget=RequiredMemory(100, (10, 10)))
    first = Wanted(key=1, name="first", size=RequiredMemory(1, (8, 0)))
    second = Wanted(key=2, name="second", size=RequiredMemory(1, (0, 8)))
    third = Wanted(key=3, name="third", size=RequiredMemory(1, (3, 0)))
    loader.acquire(first).release()
    loader.acquire(second).release()
    assert [entry.wanted.name for entry in loader.plan(third)] == ["first"]
    loader.close()


@pytest.mark.parametrize("keep_alive", ["0", "30ms"])
def test_an_idle_model_goes_when_its_keep_alive_is_over(
    loader: Loader, world: World, keep_alive: str
) -> None:
    use = loader.acquire(want("a", keep_alive=keep_alive))
    until(lambda: world.loaded == ["a"])
    time.sleep(0.1)
    assert world.loaded == ["a"], "in use, so the time does not run"
    use.release()
    until(lambda: world.stopped == ["a"])


def test_a_held_model_stays_though_idle_but_goes_to_make_room(loader: Loader, world: World) -> None:
    held = loader.acquire(want("a", keep_alive="0"), hold=True)
    loader.acquire(want("a")).release()
    time.sleep(0.1)
    assert world.stopped == []
    loader.acquire(want("b")).release()
    loader.acquire(want("c")).release()
    assert world.stopped == ["b"], "an unheld one goes first"
    with loader.acquire(want("d", ram=20)):
        assert world.loaded == ["d"]
    held.release()


def test_a_load_ends_when_nobody_waits_for_it(loader: Loader, world: World) -> None:
    world.gate = threading.Event()
    first, second = loader.request(want("a")), loader.request(want("a"))
    until(lambda: world.started == ["a"])
    first.cancel()
    time.sleep(0.05)
    assert loader.get("a") is not None, "the other one still waits"
    second.cancel()
    until(lambda: loader.empty)
    assert world.loaded == []
    world.gate = None
    loader.acquire(want("a")).release()


def test_the_error_of_a_load_reaches_everybody_who_waits_and_the_next_try_is_fresh(
    loader: Loader, world: World
) -> None:
    world.error = ModelLoadError("broken file")
    tickets = [loader.request(want("a")) for _ in range(3)]
    for ticket in tickets:
        with pytest.raises(ModelLoadError, match="broken file"):
            ticket.future.result(10)
    world.error = None
    loader.acquire(want("a")).release()


def test_a_model_that_died_is_loaded_again_by_the_next_request(loader: Loader, world: World) -> None:
    use = loader.acquire(want("a"))
    with world.lock:
        world.loaded.remove("a")
    loader.lost(use.loaded)
    with loader.acquire(want("a")) as again:
        assert again.loaded is not use.loaded
    use.release()
    assert world.started == ["a", "a"]


def test_who_waits_for_room_is_not_overtaken_for_ever(world: World) -> None:
    loader = Loader(world.start, budget=RequiredMemory(10), patience=0.05)
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            loader.acquire(want("a")).release()

    # Three of them: some request for a is always running.
    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: world.loaded == ["a"])
    with loader.acquire(want("b"), timeout=20):
        assert world.loaded == ["b"]
    stop.set()
    for thread in threads:
        thread.join()
    loader.close()


def test_many_threads_and_models_never_exceed_the_budget_and_never_hang(loader: Loader, world: World) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(40):
                ticket = loader.request(want(rng.choice("abcd"), keep_alive=rng.choice(["0", "5m"])))
                if rng.random() < 0.2:
                    ticket.cancel()
                    continue
                with ticket.future.result(30):
                    time.sleep(rng.random() / 500)
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert world.most <= 2


def test_closing_fails_who_waits_and_unloads_what_is_busy(world: World) -> None:
    loader = Loader(world.start, budget=RequiredMemory(10))
    loader.acquire(want("a"))
    ticket = loader.request(want("b"))
    loader.close()
    with pytest.raises(EngineClosed):
        ticket.future.result(10)
    with pytest.raises(EngineClosed):
        loader.request(want("c"))
    assert world.loaded == []
