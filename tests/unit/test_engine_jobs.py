"""The queue of an engine that serves one request after the other: order, failures, and the end."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from nbinfer.contract.errors import EngineClosed, EngineError, RequestError
from nbinfer.contract.requests import EmbeddingRequest
from nbinfer.contract.results import EmbeddingResult, Finished
from nbinfer.engines.jobs import Jobs
from nbinfer.engines.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Job:
    name: str
    priority: Any = "interactive"
    stream: Stream = field(default_factory=Stream)

    @property
    def request(self) -> EmbeddingRequest:
        return EmbeddingRequest(texts=(self.name,), priority=self.priority)


def done(job: Job) -> None:
    vectors: Any = job.name
    job.stream.put(Finished(EmbeddingResult(vectors=vectors, n_tokens=())))


def engine_error(error: BaseException, job: Job) -> EngineError:
    return EngineError(f"{job.name}: {error}")


def serving(
    jobs: Jobs[Job], work: Callable[[Job], None], failure: Callable[[BaseException, Job], EngineError]
) -> threading.Thread:
    thread = threading.Thread(target=jobs.serve, args=(work, failure), daemon=True)
    thread.start()
    return thread


def test_cells_are_served_before_rows_and_else_as_they_came() -> None:
    jobs: Jobs[Job] = Jobs("m")
    served: list[str] = []

    def work(job: Job) -> None:
        served.append(job.name)
        if len(served) == 4:
            jobs.close()

    for name, priority in (("row", "batch"), ("cell", "interactive"), ("row 2", "batch"), ("cell 2", None)):
        jobs.put(Job(name, priority or "interactive"))
    assert (jobs.waiting, jobs.running, jobs.closing) == (4, 0, False)
    jobs.serve(work, engine_error)
    assert served == ["cell", "cell 2", "row", "row 2"]
    assert (jobs.waiting, jobs.running, jobs.closing) == (0, 0, True)


def test_a_request_that_fails_does_not_concern_the_next_one() -> None:
    jobs: Jobs[Job] = Jobs("m")

    def work(job: Job) -> None:
        if job.name == "bad":
            raise KeyError("x")
        done(job)

    thread = serving(jobs, work, engine_error)
    bad, good = Job("bad"), Job("good")
    jobs.put(bad)
    jobs.put(good)
    with pytest.raises(EngineError, match="bad: 'x'"):
        bad.stream.result(10)
    assert good.stream.result(10).vectors == "good"
    jobs.close()
    thread.join(10)
    assert not thread.is_alive()


def test_closing_lets_the_present_request_end_and_fails_those_that_wait() -> None:
    jobs: Jobs[Job] = Jobs("m")
    began, goes_on = threading.Event(), threading.Event()
    running: list[int] = []

    def work(job: Job) -> None:
        running.append(jobs.running)
        began.set()
        goes_on.wait(10)
        done(job)

    thread = serving(jobs, work, engine_error)
    first, second = Job("first"), Job("second")
    jobs.put(first)
    assert began.wait(10)
    jobs.put(second)
    jobs.close()
    jobs.close()
    with pytest.raises(EngineClosed, match=r"m was unloaded; load it again"):
        jobs.put(Job("late"))
    goes_on.set()
    thread.join(10)
    assert first.stream.result(0).vectors == "first"
    assert not second.stream.done
    jobs.fail()
    with pytest.raises(EngineClosed, match="m was unloaded while the request ran"):
        second.stream.result(0)
    assert running == [1]


def test_an_error_that_ends_the_engine_ends_every_request() -> None:
    jobs: Jobs[Job] = Jobs("m")

    def work(job: Job) -> None:
        raise MemoryError(job.name)

    def failure(error: BaseException, job: Job) -> EngineError:
        del job
        raise error

    first, second = Job("first"), Job("second")
    jobs.put(first)
    jobs.put(second)
    with pytest.raises(MemoryError, match="first"):
        jobs.serve(work, failure)
    assert not first.stream.done
    jobs.fail(RequestError("the device is gone"))
    for job in (first, second):
        with pytest.raises(RequestError, match="the device is gone"):
            job.stream.result(0)
    with pytest.raises(EngineClosed):
        jobs.put(Job("late"))
    assert jobs.running == 0


def test_an_answer_that_nobody_holds_is_gone_while_the_engine_waits() -> None:
    jobs: Jobs[Job] = Jobs("m")
    thread = serving(jobs, done, engine_error)
    job, gone = Job("a"), threading.Event()
    weakref.finalize(job.stream, gone.set)
    jobs.put(job)
    assert job.stream.result(30).vectors == "a"
    del job
    assert gone.wait(30)
    jobs.close()
    thread.join()
