"""Start, watch and stop the processes behind models."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbinfer import backends
from nbinfer.backends.process import RunControl, as_load_error
from nbinfer.contract.config import ModelConfig
from nbinfer.contract.errors import EngineClosed, EngineError, NbinferError
from nbinfer.engines.remote.control import ControlError, call, call_status
from nbinfer.sidecar.discovery import runtime_folder, socket_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nbinfer.contract.modes import Mode
    from nbinfer.sidecar.loader import Progress, Wanted

POLL_SECONDS = 0.03
KEPT_LOGS = 10
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is run; what a :class:`nbinfer.sidecar.loader.Wanted` carries here."""

    backend: str
    path: Path
    name: str
    mode: Mode
    config: ModelConfig = field(default_factory=ModelConfig)
    options: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    names: tuple[str, ...] = ()


class Runner:
    """One running process: a model in one mode.

    Attributes
    ----------
    socket
        Where it listens.
    info
        What it says the engine really uses.
    error
        Why it ended, when it did so by itself.
    """

    def __init__(self, recipe: Recipe, on_lost: Callable[[Runner], None]) -> None:
        self.recipe = recipe
        self.socket = str(socket_folder() / f"runner-{os.getpid()}-{next(_numbers)}.sock")
        self.info: dict[str, Any] = {}
        self.error: NbinferError | None = None
        self.ended = threading.Event()
        self.ready = False
        self._on_lost = on_lost
        self._control = RunControl(options=recipe.options, names=recipe.names, digest=recipe.digest)
        self._thread = threading.Thread(target=self._run, name=f"nbinfer-run-{recipe.name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The process."""
        return self._control.pid

    def log(self) -> str:
        """Return the end of its output."""
        return self._control.log.text()

    def rss(self) -> int:
        """Bytes of RAM that the process, and those that it started, have resident now; 0 when it is gone."""
        import psutil

        try:
            own = psutil.Process(self.pid)
            processes = [own, *own.children(recursive=True)]
        except psutil.Error:
            return 0
        total = 0
        for process in processes:
            with contextlib.suppress(psutil.Error):  # it went meanwhile
                total += int(process.memory_info().rss)
        return total

    def _run(self) -> None:
        recipe = self.recipe
        try:
            backends.get(recipe.backend).run(
                self.socket, recipe.path, recipe.name, recipe.mode, recipe.config, control=self._control
            )
        except NbinferError as error:
            self.error = error
        except BaseException as error:  # noqa: BLE001 - an adapter of another distribution may raise anything
            self.error = EngineError(f"{recipe.name}: the backend {recipe.backend} failed: {error!r:.300}")
        self.ended.set()
        if self.error is not None:
            self._keep_log()
        if self.ready:
            self._on_lost(self)

    def _keep_log(self) -> None:
        """Leave the log of a crash in a file, and not too many of them."""
        # The report too: a process may die before it writes a word.
        text = f"{self.error}\n\n{self.log()}"
        folder = runtime_folder()
        path = folder / f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(_numbers)}.log"
        with contextlib.suppress(OSError):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
            for old in sorted(folder.glob("crash-*.log"))[:-KEPT_LOGS]:
                old.unlink()
        if self.error is not None:
            self.error.add_note(f"log: {path}")

    def wait_ready(self, progress: Progress) -> None:
        """Wait until it answers, for as long as it makes progress or not: it may be reading for minutes.

        Raises
        ------
        NbinferError
            It ended instead; EngineClosed when the load was cancelled.
        """
        while True:
            if progress.cancelled.is_set():
                self.stop()
                raise EngineClosed(f"{self.recipe.name}: the load was cancelled.")
            if self.ended.is_set():
                raise as_load_error(self.error or EngineClosed(f"{self.recipe.name} was stopped."))
            with contextlib.suppress(ControlError):
                status, found = call_status(self.socket, "GET", "/health", timeout=5)
                if status == 200:  # noqa: PLR2004 - OK
                    self.info = self._read_info()
                    self.ready = True
                    return
                progress.stage = str(found.get("stage", progress.stage))
                progress.fraction = float(found.get("progress", 0.0))
            self.ended.wait(POLL_SECONDS)

    def _read_info(self) -> dict[str, Any]:
        """Return the engine's description, where the server gives one."""
        models = call(self.socket, "GET", "/v1/models", timeout=10).get("data") or [{}]
        info = models[0].get("nbinfer") or {}
        return dict(info)

    def stop(self) -> None:
        """End the process; returns when it is gone."""
        self.ready = False
        self._control.cancel()
        self._thread.join()


def start(wanted: Wanted, progress: Progress, on_lost: Callable[[Runner], None]) -> Runner:
    """Start a runner and wait until it serves.

    Raises
    ------
    NbinferError
        The model could not be loaded.
    """
    progress.stage = "starting"
    runner = Runner(wanted.detail, on_lost)
    try:
        runner.wait_ready(progress)
    except BaseException:
        runner.stop()
        raise
    return runner
