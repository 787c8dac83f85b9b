"""A backend for the workers of a cluster: the fake engine, and rows that end their process."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import WorkerPlugin

from nbinfer.backends import registry
from nbinfer.contract.modes import Mode
from nbinfer.contract.status import BackendStatus, StatusWord
from nbinfer.session import Model
from support.fake_engine import FakeEngine, echo

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from nbinfer.contract.requests import CompletionRequest

NAME = "deadly"


def script(request: CompletionRequest) -> Iterable[Any]:
    """Echo; rows that say "poison" kill the process, rows that say "slow" take a while, "bad" ones fail."""
    text = str(request.messages[-1]["content"]) if request.messages else ""
    if "poison" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "bad" in text:
        return [ValueError("no")]
    return [0.1, *echo(request)] if "slow" in text else echo(request)


opened: list[FakeEngine] = []
"""Every engine that this process has opened."""


def open_fake(mode: Mode = Mode.COMPLETION) -> FakeEngine:
    opened.append(FakeEngine(script, mode=mode, model=NAME, context_size=50))
    return opened[-1]


def models() -> int:
    """How many chat models this process holds."""
    return sum(not engine.closed for engine in opened if engine.info.mode is Mode.COMPLETION)


def busy() -> int:
    """How many requests this process has."""
    loads = [engine.load() for engine in opened]
    return sum(load.running + load.waiting for load in loads)


class DeadlyBackend:
    """The adapter."""

    name = NAME
    formats: tuple[str, ...] = ()
    allowed_flags: frozenset[str] = frozenset()
    uses_external_model_management = True
    uses_tcp = False

    def status(self) -> BackendStatus:
        return BackendStatus(StatusWord.RUNNING, "")

    def advice(self) -> str:
        return ""

    def install(self) -> None:
        return

    def open(self, path: Path, *, mode: Mode, name: str = "", **options: Any) -> FakeEngine:
        return open_fake(mode)

    def run(self, *arguments: Any, **named: Any) -> None:
        raise NotImplementedError

    def disk_usage(self) -> int:
        return 0


class RegisterBackend(WorkerPlugin):
    """Makes the backend known to a worker, as an installed distribution would."""

    name = "register-deadly"
    idempotent = True

    def setup(self, worker: Any) -> None:
        registry.BUILT_IN[NAME] = "support.dask_backend:DeadlyBackend"
        registry.refresh()


def model(mode: Mode = Mode.COMPLETION) -> Model:
    """What a kernel holds of it, to compare with."""
    return Model(open_fake(mode), name=NAME, ref=NAME, backend=NAME, where="server", mode=mode)
