"""What there is to see: loaded models, requests, backends and files, each as a part of the state."""

from __future__ import annotations

import sys
import time
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

from nbinfer import session
from nbinfer.contract.errors import NbinferError
from nbinfer.contract.requests import CompletionRequest, EmbeddingRequest, ImageRequest, RerankRequest
from nbinfer.contract.units import human_bytes
from nbinfer.widgets import words

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.models.stores import FoundModel
    from nbinfer.session import Model, Running
    from nbinfer.widgets.state import Row


_LOG_BYTES = 64 * 1024
_LONGEST_LINE = 400


class Rates:
    """Tokens per second of each model, from how far it came between two looks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: weakref.WeakKeyDictionary[Model, tuple[float, int]] = weakref.WeakKeyDictionary()

    def of(self, model: Model, generated: int) -> float:
        """Return the rate since the last look, 0 at the first."""
        now = self._clock()
        then, before = self._last.get(model, (now, generated))
        self._last[model] = now, generated
        return max(0, generated - before) / (now - then) if now > then else 0.0


def loaded(rates: Rates) -> Row:
    """Return the loaded models."""
    return {"rows": [_model_row(model, rates) for model in session.loaded()]}


def _model_row(model: Model, rates: Rates) -> Row:
    try:
        info, now = model.info, model.engine.load()
    except NbinferError as error:  # it was closed a moment ago, or its process is gone
        return {**_EMPTY_ROW, "name": model.name, "mode": str(model.mode), "queue": words.short(str(error))}
    rate = rates.of(model, now.tokens_generated)
    busy = now.running > 0 or now.waiting > 0
    queue = f"{now.running} running, {now.waiting} waiting" if busy else "idle"
    # What one request may hold times the requests at once; engines that share one cache say less in use.
    room = max(info.context_size, now.context_used)
    made = now.images_generated
    return {
        "name": model.name,
        "mode": str(model.mode),
        "where": f"{model.backend}, {_where(model)}",
        # An image model has no context; what it has made is what there is to say.
        "context": f"{now.context_used:,} of {words.tokens(room)}" if room else "",
        "context_used": now.context_used,
        "context_size": room,
        "rate": f"{rate:,.0f} tokens/s" if rate else words.count(made, "image") if made else "",
        "queue": queue,
        "busy": busy,
        "memory": _memory(model),
        "keep": _keep(model),
    }


_EMPTY_ROW: Row = {
    "name": "",
    "mode": "",
    "where": "",
    "context": "",
    "context_used": 0,
    "context_size": 0,
    "rate": "",
    "queue": "",
    "busy": False,
    "memory": "",
    "keep": "",
}


def _where(model: Model) -> str:
    return {"kernel": "in this kernel", "sidecar": "in the sidecar"}.get(model.where, model.where)


def _memory(model: Model) -> str:
    """Return what the engine holds beside what was estimated for the same parts."""
    found = []
    measured = _MEASURED.of(model)
    if measured is not None:
        found.append(f"memory {human_bytes(measured)} measured")
    devices = getattr(model.memory, "devices", None)
    if devices is not None:
        # The process around the engine is not counted by it.
        estimated = sum(device.counted for device in devices)
        found.append(
            f"{human_bytes(estimated)} estimated" if found else f"memory {human_bytes(estimated)} estimated"
        )
    return ", ".join(found)


class _Measured:
    """What engines say they hold: asked once for each model, for it does not change."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Model, int | None] = weakref.WeakKeyDictionary()

    def of(self, model: Model) -> int | None:
        """Return bytes on all devices together, or None when the engine does not say."""
        if model not in self._known:
            self._known[model] = self._ask(model)
        return self._known[model]

    def _ask(self, model: Model) -> int | None:
        if getattr(model.engine, "context_pointer", None) is not None:
            from nbinfer.memory import breakdown

            breakdown(0)  # the first answer takes a while, in which the model could be unloaded
        devices = model.measured_memory()
        return None if devices is None else sum(sum(held.values()) for held in devices.values())


_MEASURED = _Measured()


def _keep(model: Model) -> str:
    if model.unload_at is None:
        return "held by this kernel" if model.where == "sidecar" else "stays loaded"
    return f"unloads in {words.duration(model.unload_at - time.time())}"


# -- requests -------------------------------------------------------------------------------------------


class Requests:
    """Requests that run, and how each is stopped."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._ids: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

    def part(self) -> Row:
        """Return what runs now: a batch over a DataFrame is one row, whatever it has in the air."""
        running = session.session.running()
        batch = _batch()
        alone = [each for each in running if _priority(each) != "batch"]
        rest = [each for each in running if _priority(each) == "batch"]
        rows = [self._request(each) for each in alone]
        if batch is not None:
            rows.append(
                {"id": self._id(batch), "what": batch.progress.line(), "model": "", "stopping": False}
            )
        else:
            rows += [self._request(each) for each in rest]
        return {"rows": rows}

    def stop(self, ident: str) -> bool:
        """Stop a request by the ``id`` of its row; whether it still ran."""
        batch = _batch()
        for each in [*session.session.running(), *([batch] if batch is not None else [])]:
            if self._ids.get(each) == ident:
                each.cancel()
                return True
        return False

    def _id(self, thing: Any) -> str:
        return self._ids.setdefault(thing, f"r{next(self._numbers)}")

    def _request(self, running: Running) -> Row:
        return {
            "id": self._id(running),
            "what": _what(running.request),
            "model": running.model,
            "stopping": running.cancelled,
        }


def _priority(running: Running) -> str:
    return str(getattr(running.request, "priority", ""))


def _batch() -> Any:
    """Return the DataFrame run that is under way, or None."""
    module = sys.modules.get("nbinfer.frames.run")
    if module is None:
        return None
    try:
        run = module.last_run()
    except NbinferError:
        return None
    return None if run.done else run


def _what(request: Any) -> str:
    if isinstance(request, CompletionRequest):
        last: Any = (request.messages or [{"content": request.prompt}])[-1].get("content", "")
        if isinstance(last, list):  # text beside images
            last = " ".join(str(part.get("text", "")) for part in last if isinstance(part, dict))
        return words.short(str(last))
    if isinstance(request, EmbeddingRequest):
        return f"embed {words.count(len(request.texts), 'text')}"
    if isinstance(request, RerankRequest):
        return f"rerank {words.count(len(request.documents), 'document')}"
    if isinstance(request, ImageRequest):
        return words.short(f"draw {request.prompt}")
    return words.short(type(request).__name__)


# -- crashes --------------------------------------------------------------------------------------------


class Crashes:
    """Logs that model processes of the sidecar left when they crashed, from now on."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._since = clock()
        self._seen: set[str] = set()

    def new(self) -> list[tuple[str, str]]:
        """Return (what happened, the end of the log) of each crash that was not returned before."""
        # A kernel that has not used the sidecar has nothing to hear from it.
        module = sys.modules.get("nbinfer.sidecar.discovery")
        if module is None:
            return []
        found = []
        for path in sorted(module.runtime_folder().glob("crash-*.log")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                if path.stat().st_mtime < self._since:
                    continue
                log = path.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
            except OSError:  # only the newest are kept
                continue
            last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
            crashed = "A model's process in the sidecar crashed; the next request loads it again."
            found.append((f"{crashed}\n{last[:_LONGEST_LINE]}", log))
        return found


# -- backends and files ---------------------------------------------------------------------------------


def backends() -> Row:
    """Return every backend with its status.

    ``install`` is the line that makes it usable, or empty; ``more`` what else there is to say about that.
    """
    from nbinfer import backends as known

    rows = []
    for name, status, advice in known.statuses():
        install, _, more = advice.partition("\n")
        row = {"name": name, "word": str(status.word), "kind": words.kind_of(status.word)}
        rows.append({**row, "detail": status.detail, "install": install, "more": " ".join(more.split())})
    return {"rows": rows}


def models(verdict: Callable[[FoundModel], Row] | None = None) -> Row:
    """Return the models on this disk.

    Parameters
    ----------
    verdict
        Says whether a model fits here: ``{"word": …, "kind": …}``.
    """
    from nbinfer.models.stores import discover

    found = discover()
    rows = [_file_row(model, verdict) for model in found]
    size = sum(model.disk_bytes for model in found)
    return {
        "rows": rows,
        "text": f"{words.count(len(rows), 'model')}, {human_bytes(size)} on this disk" if rows else "",
        "busy": False,
    }


def _file_row(model: FoundModel, verdict: Callable[[FoundModel], Row] | None) -> Row:
    header = model.header
    about = "" if header is None else _about(header)
    row: Row = {
        "ref": model.ref,
        "name": model.name,
        "source": model.source,
        "about": about,
        "size": human_bytes(model.size),
        "problem": model.problem or ("" if header is not None else "its header cannot be read"),
        "verdict": "",
        "kind": "",
    }
    if verdict is not None and not row["problem"]:
        found = verdict(model)
        row |= {"verdict": found["word"], "kind": found["kind"]}
    return row


def _about(header: Any) -> str:
    modes = ", ".join(str(mode) for mode in header.modes)
    parameters = header.parameters
    size = f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"  # noqa: PLR2004
    trained = header.context_length
    parts = [header.architecture, f"{size} parameters" if parameters else "", str(header.quantisation)]
    parts += [f"up to {words.tokens(trained)}"] if trained else []
    return ", ".join(part for part in [*parts, modes] if part)
