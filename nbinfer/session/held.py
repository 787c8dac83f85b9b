"""What this process holds: the one session with its models and running requests, and the settings."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

from nbinfer.contract.settings import configured, configured_aliases

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nbinfer.contract.requests import Request
    from nbinfer.engines.stream import Stream
    from nbinfer.request_log import History
    from nbinfer.session.model import Model


class Settings:
    """What a notebook can set once: ``model`` is the default of cells and calls that name none.

    Until it is set here, it is what the environment or a configuration file says
    (:mod:`nbinfer.contract.settings`); None goes back to that.
    """

    def __init__(self) -> None:
        self._model: str | None = None

    @property
    def explicit(self) -> str | None:
        """The name that was set here, if one was."""
        return self._model

    @property
    def model(self) -> str | None:
        """The default model's name."""
        name: str | None = self._model if self._model is not None else configured("model").value
        return name

    @model.setter
    def model(self, name: str | None) -> None:
        self._model = name

    def __repr__(self) -> str:
        return f"<Settings model={self.model!r}>"


@dataclass(frozen=True, eq=False)
class Running:
    """A request that an engine has: for whoever shows it, or stops it with ``cancel()``.

    ``since`` is of ``time.monotonic()``. Holds the stream weakly: an answer that nobody waits for is gone.
    """

    model: str
    request: Request
    stream: InitVar[Stream]
    since: float
    _stream: weakref.ref[Stream] = field(init=False)

    def __post_init__(self, stream: Stream) -> None:
        object.__setattr__(self, "_stream", weakref.ref(stream))

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        stream = self._stream()
        return stream is None or stream.done

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to stop."""
        stream = self._stream()
        return stream is None or stream.cancelled

    def cancel(self) -> None:
        """Ask the engine to stop; it does so at the next token."""
        stream = self._stream()
        if stream is not None:
            stream.cancel()


class Session:
    """The models this process has loaded, by name."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._running: weakref.WeakKeyDictionary[Stream, Running] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._loading: dict[str, threading.RLock] = {}
        self._aliases: dict[str, str] | None = None
        self.history: History | None = None
        """Where requests are recorded; None: nowhere."""

    @property
    def aliases(self) -> dict[str, str]:
        """Short names of models, to be changed at will; at first those of the configuration files."""
        if self._aliases is None:
            self._aliases = configured_aliases()
        return self._aliases

    def models(self) -> list[Model]:
        """Loaded models, oldest first."""
        with self._lock:
            return list(self._models.values())

    def add(self, model: Model) -> None:
        """Remember a model under its name; one of the same name is unloaded first."""
        with self._lock:
            replaced = self._models.pop(model.name, None)
            self._models[model.name] = model
        if replaced is not None and replaced is not model:
            replaced.engine.close()

    def forget(self, model: Model) -> None:
        """Take a model off the list."""
        with self._lock:
            for name in [name for name, known in self._models.items() if known is model]:
                del self._models[name]

    def note(self, stream: Stream, running: Running) -> None:
        """Remember a request for as long as somebody holds its stream."""
        with self._lock:
            self._running[stream] = running

    def running(self) -> list[Running]:
        """Requests that have not ended, oldest first."""
        with self._lock:
            known = list(self._running.values())
        return sorted((each for each in known if not each.done), key=lambda each: each.since)

    def named(self, name: str) -> Model | None:
        """Return the loaded model of exactly this name."""
        with self._lock:
            return self._models.get(name)

    @contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """Hold the one place where a model of this name is loaded: a second caller waits for the first."""
        with self._lock:
            place = self._loading.setdefault(name, threading.RLock())
        with place:
            yield

    def free_name(self, name: str, path: Path) -> str:
        """Return the name for a file: this one, or with a number where another file has it already."""
        number, chosen = 1, name
        while (taken := self.named(chosen)) is not None and taken.path != path:
            number += 1
            chosen = f"{name}-{number}"
        return chosen

    def find(self, name: str) -> Model | None:
        """Return a loaded model by name, alias or reference; None when there is none."""
        ref = self.aliases.get(name, name)
        with self._lock:
            if name in self._models:
                return self._models[name]
            return next((m for m in self._models.values() if ref in (m.ref, m.name)), None)


session = Session()
settings = Settings()
