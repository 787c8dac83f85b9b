"""The kernel's side: hold a model in the sidecar, and get an engine that runs there."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbinfer.contract.config import ModelConfig
from nbinfer.contract.errors import EngineClosed, EngineError, NbinferError, NotSupported
from nbinfer.contract.memory import RequiredMemory
from nbinfer.engines.remote.control import ControlError, EventStream, call
from nbinfer.engines.remote.wire import STOPPING, error_from_json, info_from_json
from nbinfer.sidecar import discovery

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nbinfer.contract.modes import Mode
    from nbinfer.engines.protocol import EngineInfo
    from nbinfer.engines.remote.engine import RemoteEngine

_TRIES = 50
_open_streams: weakref.WeakSet[EventStream] = weakref.WeakSet()


class Hold:
    """A model in the sidecar, kept by an open stream for as long as this object is not closed.

    Attributes
    ----------
    service
        The sidecar.
    model
        The name that means this very model and configuration there.
    info
        What its engine really uses.
    already
        Whether it was loaded before.
    load_seconds
        How long its load took, whenever that was.
    """

    def __init__(
        self,
        request: dict[str, Any],
        on_progress: Callable[[float], None] | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._request = request
        self.service, self._stream = _opened(request)
        _open_streams.add(self._stream)
        ready = self._wait_ready(on_progress, on_event)
        self.model = str(ready["model"])
        self.info: EngineInfo = info_from_json(ready["info"])
        self._number = str(ready["hold"])
        self.already = bool(ready["already"])
        self.load_seconds = float(ready["load_seconds"])
        self.pid = ready.get("pid")
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="nbinfer-hold", daemon=True).start()

    def _wait_ready(
        self,
        on_progress: Callable[[float], None] | None,
        on_event: Callable[[dict[str, Any]], None] | None,
    ) -> dict[str, Any]:
        event: dict[str, Any] = {}
        try:
            for event in self._stream:
                if on_event is not None:
                    on_event(event)
                if event.get("event") in ("ready", "error"):
                    break
                if on_progress is not None:
                    on_progress(float(event.get("fraction", 0.0)))
        except BaseException:
            # An interrupted cell stops waiting, which ends the load when nobody else waits.
            self._stream.close()
            self._stream.detach()
            raise
        if event.get("event") == "ready":
            if on_progress is not None:
                on_progress(1.0)
            return event
        self._stream.close()
        self._stream.detach()
        if event.get("event") == "error":
            raise error_from_json(event)
        raise EngineError("the sidecar ended while it loaded the model; see `nbinfer doctor`.")

    def _watch(self) -> None:
        for event in self._stream:
            del event
        self._ended.set()
        self._stream.detach()

    @property
    def alive(self) -> bool:
        """Whether the stream is open: the sidecar lives and keeps the model."""
        return not self._ended.is_set()

    def again(self) -> Hold:
        """Hold the same model anew, after the sidecar was lost; starts one, and loads, where needed."""
        self.close()
        return Hold(self._request)

    def unload(self) -> None:
        """Let go, and unload the model unless somebody else holds it."""
        with contextlib.suppress(ControlError, NbinferError):
            call(
                self.service.socket,
                "POST",
                "/nbinfer/unload",
                {"model": self.model, "hold": self._number, "unheld": True},
                timeout=10,
            )
        self.close()

    def close(self) -> None:
        """Let go; the model's keep-alive begins to run."""
        self._stream.close()


def _opened(request: dict[str, Any]) -> tuple[discovery.Service, EventStream]:
    """Return the sidecar and a stream that it accepted."""
    for _ in range(_TRIES):
        service = discovery.ensure()
        try:
            return service, EventStream(service.socket, "/nbinfer/hold", request)
        except ControlError:
            pass
        except EngineClosed as error:
            if getattr(error, "code", None) != STOPPING:
                raise
        # It was on its way out when it was found; the next one is a new one.
        time.sleep(0.1)
    raise EngineError("the sidecar does not take requests; see `nbinfer doctor`, or run `nbinfer stop`.")


def hold_request(
    path: Path,
    *,
    name: str,
    backend: str,
    mode: Mode,
    config: ModelConfig,
    options: Mapping[str, Any],
    digest: str = "",
) -> dict[str, Any]:
    """Return what a kernel sends to have a model loaded.

    Raises
    ------
    NotSupported
        An option is an object of this process.
    """
    config, plain = _plain_options(config, options)
    return {
        "path": str(path.absolute()),
        "name": name,
        "backend": backend,
        "mode": str(mode),
        "config": config.to_json(),
        "options": plain,
        "digest": digest,
    }


def _plain_options(config: ModelConfig, options: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the options as JSON; those that have a place in the configuration go there."""
    plain: dict[str, Any] = {}
    for name, value in options.items():
        if name in ("context_size", "runtime_flags"):
            config = config.with_fields(**{name: value})
        elif name == "speculative":
            fields = {
                "draft_model": None if value.draft_path is None else str(value.draft_path),
                "num_tokens": value.num_tokens,
                "min_acceptance_rate": value.min_acceptance_rate,
            }
            config = config.with_fields(speculative={k: v for k, v in fields.items() if v is not None})
        else:
            plain[name] = _plain(name, value)
    return config, plain


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.path.abspath(value)  # noqa: PTH100 - a str for JSON
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    raise NotSupported(
        f"{name}={value!r:.60} cannot be sent to the sidecar: give a number, text, list or dict."
    )


@dataclass(frozen=True)
class Plan:
    """What a load in the sidecar would do.

    Attributes
    ----------
    loaded
        The model is loaded, or on its way.
    unloads
        Names of the models that would go, in order.
    required
        What it needs.
    """

    loaded: bool
    unloads: tuple[str, ...]
    required: RequiredMemory


def plan(
    path: Path,
    *,
    name: str,
    backend: str,
    mode: Mode,
    config: ModelConfig,
    options: Mapping[str, Any],
) -> Plan:
    """Say what a load in the sidecar would do; starts none.

    Raises
    ------
    DoesNotFit
        It would not fit whatever went.
    NbinferError
        An option is refused.
    """
    request = hold_request(path, name=name, backend=backend, mode=mode, config=config, options=options)
    running = discovery.find()
    if running is not None:
        found = call(running.socket, "POST", "/nbinfer/plan", request, timeout=60)
        required = RequiredMemory.from_json(found["needs"])
        return Plan(bool(found["loaded"]), tuple(found["would_unload"]), required)
    from nbinfer.sidecar.loader import Wanted, check_size
    from nbinfer.sidecar.sizes import default_budget, runner_size

    size = runner_size(path, mode, ModelConfig.from_json(request["config"]), request["options"])
    check_size(Wanted(key=name, name=name, size=size), default_budget())
    return Plan(loaded=False, unloads=(), required=size)


def open_engine(
    path: Path,
    *,
    name: str,
    backend: str,
    mode: Mode,
    config: ModelConfig,
    options: Mapping[str, Any],
    digest: str = "",
    on_progress: Callable[[float], None] | None = None,
) -> RemoteEngine:
    """Load a model in the sidecar, which is started where there is none, and return its engine.

    Parameters
    ----------
    path
        The model's file.
    name, backend, mode
        What to load, and for what.
    config
        What was asked for, keep-alive included.
    options
        The engine's own options, by name; JSON-able.
    on_progress
        Called with the fraction loaded.

    Raises
    ------
    BackendUnavailable
        The sidecar's packages are not installed, or it does not start.
    NbinferError
        The model could not be loaded; as in the kernel.
    """
    from nbinfer.engines.remote.engine import Endpoint, RemoteEngine

    discovery.check_packages()
    request = hold_request(
        path, name=name, backend=backend, mode=mode, config=config, options=options, digest=digest
    )
    held = Hold(request, on_progress)

    def endpoint() -> Endpoint:
        return Endpoint(base_url="http://localhost/v1", model=held.model, socket=held.service.socket)

    def renew() -> Endpoint:
        nonlocal held
        if not held.alive:
            held = engine.hold = held.again()
        return endpoint()

    engine = RemoteEngine(
        endpoint(), held.info, own=True, renew=renew, on_close=lambda: held.unload(), name=name
    )
    engine.hold = held
    return engine


def _abandon_in_child() -> None:
    """A forked child must not keep a dead kernel's models loaded by its copies of the streams."""
    for stream in list(_open_streams):
        with contextlib.suppress(Exception):
            stream.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_child)
