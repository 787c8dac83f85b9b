"""Buttons never wait, sliders never queue up, and no thread stays behind."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from nbinfer.widgets import lanes
from nbinfer.widgets.lanes import Lane
from nbinfer.widgets.ticks import Monitor

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

_PATIENCE = 20


def _threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def _hold(started: threading.Event, go: threading.Event) -> Callable[[], None]:
    def job() -> None:
        started.set()
        go.wait(_PATIENCE)

    return job


def _fail() -> None:
    raise KeyError("on purpose")


def _join(name: str) -> None:
    for thread in _threads(name):
        thread.join(_PATIENCE)


def test_jobs_run_in_order_on_one_thread() -> None:
    lane, done, ran = Lane("in-order"), threading.Event(), []
    for n in range(5):
        lane.put(lambda n=n: ran.append((n, threading.current_thread().name)))  # type: ignore[misc]
    lane.put(done.set)
    assert done.wait(_PATIENCE)
    assert ran == [(n, "in-order") for n in range(5)]
    lane.close()


def test_of_jobs_with_one_key_only_the_newest_that_waits_runs() -> None:
    lane, started, go, done = Lane("newest"), threading.Event(), threading.Event(), threading.Event()
    ran: list[int] = []
    lane.put(_hold(started, go))
    assert started.wait(_PATIENCE)
    for n in range(100):
        lane.put(lambda n=n: ran.append(n), key="plan")  # type: ignore[misc]
    lane.put(done.set)
    go.set()
    assert done.wait(_PATIENCE)
    assert ran == [99]
    lane.close()


def test_a_failing_job_is_reported_and_the_next_one_runs() -> None:
    errors: list[Exception] = []
    lane, done = Lane("failing", errors.append), threading.Event()
    lane.put(_fail)
    lane.put(done.set)
    assert done.wait(_PATIENCE)
    assert [type(error) for error in errors] == [KeyError]
    lane.close()


def test_an_idle_lane_has_no_thread_and_gets_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_LINGER_SECONDS", 0.01)
    lane = Lane("idle")
    for _ in range(2):
        done = threading.Event()
        lane.put(done.set)
        assert done.wait(_PATIENCE)
        _join("idle")
        assert _threads("idle") == []


def test_a_closed_lane_drops_what_waits_and_ends_its_thread() -> None:
    lane, started, go = Lane("closed"), threading.Event(), threading.Event()
    ran: list[str] = []
    lane.put(_hold(started, go))
    lane.put(lambda: ran.append("first"), key="waits")
    assert started.wait(_PATIENCE)
    lane.close()
    go.set()
    _join("closed")
    lane.put(lambda: ran.append("second"))
    assert (ran, _threads("closed")) == ([], [])


def test_the_monitor_has_one_thread_for_all_watchers_and_none_without() -> None:
    monitor = Monitor(0.01)
    seen = {name: threading.Event() for name in "ab"}
    ends = [monitor.watch(event.set) for event in seen.values()]
    assert all(event.wait(_PATIENCE) for event in seen.values())
    assert len(_threads("nbinfer-monitor")) == 1
    ends[0]()
    seen["b"].clear()
    assert seen["b"].wait(_PATIENCE)
    ends[1]()
    ends[1]()  # again: nothing happens
    _join("nbinfer-monitor")
    assert not monitor.running


def test_a_watcher_that_fails_does_not_stop_the_others() -> None:
    monitor, seen = Monitor(0.01), threading.Event()
    ends = [monitor.watch(_fail), monitor.watch(seen.set)]
    assert seen.wait(_PATIENCE)
    seen.clear()
    assert seen.wait(_PATIENCE)
    for end in ends:
        end()
    _join("nbinfer-monitor")
