"""Chunks of rows on a cluster, where a test says when each comes back."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from distributed.scheduler import KilledWorker
from support.frames import chat_model

from nbinfer.contract.modes import Mode
from nbinfer.frames.cluster import OnCluster, Recipe
from nbinfer.frames.switchboard import Job


class Cluster:
    """A client whose chunks stay on their way until they are ended."""

    def __init__(self) -> None:
        self.sent: list[Future[Any]] = []

    def nthreads(self) -> dict[str, int]:
        return {"worker": 1}

    def submit(self, *given: Any, **options: Any) -> Future[Any]:
        self.sent.append(Future())
        return self.sent[-1]


def test_nothing_is_sent_while_a_suspect_is_alone() -> None:
    cluster = Cluster()
    board = OnCluster(cluster, Recipe("m", Mode.COMPLETION, "m"), chat_model().info, "")

    def ended(future: Future[Any], error: Exception) -> None:
        future.set_exception(error)
        board._actions.get()()
        board.assign(quiet=True)

    def add(name: str) -> None:
        job = Job(name, lambda job: None)
        board._open.add(job)
        board.waiting.append(job)
        board.assign(quiet=True)

    worker: Any = None
    add("suspect")
    ended(cluster.sent[0], KilledWorker("x", worker, 0))
    (chunk,) = board._chunks
    assert chunk.alone
    add("another")
    assert len(cluster.sent) == 2
    ended(cluster.sent[1], RuntimeError("lost"))
    assert len(cluster.sent) == 3
