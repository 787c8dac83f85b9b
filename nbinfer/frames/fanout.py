"""``endpoints=[…]``: one model on several servers, as one.

Every server has as many rows as it can take. The rows of one that is lost go to the others, and it is tried
again, with one row, after ever longer waits.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import (
    BackendUnavailable,
    ConfigError,
    EngineClosed,
    EngineError,
    ModelNotFound,
    NbinferError,
    NotSupported,
    RequestError,
)
from nbinfer.contract.results import Finished
from nbinfer.engines.remote.wire import NO_ANSWER, STOPPING, Busy, Unreachable, info_from_json
from nbinfer.frames.switchboard import Job, Switchboard
from nbinfer.frames.work import identity, weights

if TYPE_CHECKING:
    from nbinfer.contract.modes import Mode
    from nbinfer.engines.protocol import Engine, EngineInfo
    from nbinfer.engines.stream import Stream
    from nbinfer.frames.work import FrameModel
    from nbinfer.session import Model

OPTIONS = ("base_url", "model", "api_key", "socket", "concurrency", "weights")
"""What an endpoint may say of itself."""

CONCURRENCY = 8
"""Requests at once at a server that does not say how many it can take."""

# The server is at fault, not the row: another may do.
_LOST = (Unreachable, EngineClosed, BackendUnavailable, ModelNotFound)
_ABSENT = (NO_ANSWER, STOPPING)
_LIST_SECONDS, _LOAD_SECONDS = 10.0, 600.0
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
# As long as a busy server may ask to be left alone.
_LONGEST_ASKED = 60.0
# A server that fails so many different rows in a row is not well.
_STRIKES = 3
# A row that failed so often is an error, also where there are servers that it was not at.
_ERRORS = 3
# A row that was with so many well servers when they were lost may be why.
_LOSSES = 3
PATIENCE = 60.0
"""Seconds without any server after which a run ends."""
QUIET = 15.0
"""Seconds without an answer after which a server is asked whether it is there."""


@dataclass(eq=False)
class Place:
    """A server, and how it is doing.

    Attributes
    ----------
    model
        The model there.
    limit
        Requests at once.
    allowed
        Requests at once now: fewer for a while after it said that it has too much to do.
    busy
        How often it has said so since it last answered.
    check
        Raises when the server is not there; None: nobody knows better than its connection.
    """

    model: FrameModel
    label: str
    limit: int
    check: Any = None
    running: dict[Job, Stream] = field(default_factory=dict)
    answered: int = 0
    failures: int = 0
    losses: int = 0
    strikes: set[Job] = field(default_factory=set)
    allowed: int = 0
    busy: int = 0
    note: str = ""
    again_at: float = 0.0
    heard_at: float = 0.0
    checking: bool = False

    def __post_init__(self) -> None:
        self.allowed = self.limit

    @property
    def well(self) -> bool:
        """Whether its last request reached it."""
        return self.failures == 0

    def room(self, now: float) -> int:
        """Return how many more requests it may have; one that was lost is tried with one."""
        if now < self.again_at:
            return 0
        return (self.allowed if self.well else 1) - len(self.running)


class FanOut(Switchboard):
    """Several servers of one model. A :class:`nbinfer.frames.work.FrameModel`.

    Parameters
    ----------
    places
        At least one.
    patience
        Seconds without any server after which requests fail.

    Raises
    ------
    ConfigError
        The servers run different weights, or with different settings.
    """

    def __init__(self, places: list[Place], *, patience: float | None = None) -> None:
        super().__init__()
        self._places = places
        self._patience = patience
        # Seconds without a server, and when that was last looked at, if there was none then.
        self._alone = 0.0
        self._alone_at: float | None = None
        self._assigned_at = 0.0
        first = places[0].model
        self.name = first.name
        self.digest = _same_weights(places)
        self.config = _same_settings(places)
        infos = [place.model.info for place in places]
        sizes = [info.context_size for info in infos if info.context_size]
        self.info: EngineInfo = replace(
            infos[0],
            backend="+".join(sorted({info.backend for info in infos})),
            context_size=min(sizes, default=0),
            parallel=max(place.limit for place in places),
        )

    @property
    def places(self) -> int:
        """How many servers there are."""
        return len(self._places)

    @property
    def engine(self) -> Engine:
        """The engine that is asked for lengths: of a server that is there."""
        return next((p for p in self._places if p.well), self._places[0]).model.engine

    # -- the thread's side -------------------------------------------------------------------------------

    def pause(self) -> float:
        """Return the seconds until something may have to be done without anything happening."""
        waits = [p.again_at - time.monotonic() for p in self._places if p.again_at > self._assigned_at]
        return max(0.02, min([1.0, *waits]))

    def assign(self, *, quiet: bool) -> None:
        """Give waiting rows to servers with room, the emptiest first."""
        del quiet
        self._assigned_at = now = time.monotonic()
        # Others that answer must not hide one that does not.
        self._ask_the_silent(now)
        while free := [place for place in self._places if place.room(now) > 0]:
            found = next(
                ((job, place) for job in self.waiting if (place := self._best(job, free)) is not None), None
            )
            if found is None:
                break
            job, place = found
            self.waiting.remove(job)
            if not job.stream.done:
                self._send(place, job)
        self._wait_for_any(now)

    def _best(self, job: Job, free: list[Place]) -> Place | None:
        """Return the emptiest server for a row; None where it waits for one that it was not at yet."""
        others = [place for place in free if place not in job.tried]
        if not others and any(place.well and place not in job.tried for place in self._places):
            return None
        return min(others or free, key=lambda place: (not place.well, len(place.running) / place.allowed))

    def _send(self, place: Place, job: Job) -> None:
        if not place.running:
            place.heard_at = time.monotonic()
        was_well = place.well
        try:
            stream = place.model.submit(job.request)
        except NbinferError as error:
            self._failed(place, job, error, was_well=was_well)
            return
        place.running[job] = stream
        stream.add_done_callback(partial(self.post, partial(self._ended, place, job, stream, was_well)))

    def _ended(self, place: Place, job: Job, stream: Stream, was_well: bool) -> None:  # noqa: FBT001 - bound once
        # Taken back in the meantime: somebody else has it.
        if place.running.get(job) is not stream:
            return
        del place.running[job]
        try:
            result = stream.result(timeout=0)
        except NbinferError as error:
            self._failed(place, job, error, was_well=was_well)
            return
        if getattr(result, "finish_reason", None) == "interrupted" and not job.stream.cancelled:
            lost = EngineClosed(f"{place.label} stopped before the row was finished.")
            self._failed(place, job, lost, was_well=was_well)
            return
        self._heard(place, was_well=was_well)
        place.strikes.clear()
        place.answered += 1
        # What was sent before it had too much to do says nothing of now.
        if place.heard_at >= place.again_at:
            place.busy = 0
            place.allowed = min(place.limit, place.allowed + 1)
        job.stream.put(Finished(result))

    def _heard(self, place: Place, *, was_well: bool) -> None:
        place.heard_at = time.monotonic()
        # What was sent before a loss, and came through, says nothing of the time after it.
        if not was_well:
            place.failures = 0

    def _failed(self, place: Place, job: Job, error: NbinferError, *, was_well: bool) -> None:
        if job.stream.cancelled:
            job.stream.fail(error)
        elif isinstance(error, Busy):
            self._busy(place, error, was_well=was_well)
            self.waiting.appendleft(job)
        elif isinstance(error, _LOST):
            self._lost(place, job, error, was_well=was_well)
        elif type(error) is EngineError:
            self._struck(place, job, error, was_well=was_well)
        else:
            self._heard(place, was_well=was_well)
            job.stream.fail(error)

    def _lost(self, place: Place, job: Job, error: NbinferError, *, was_well: bool) -> None:
        job.tried.add(place)
        job.losses += was_well
        self._down(place, error, was_well=was_well)
        if job.losses >= _LOSSES:
            job.stream.fail(
                EngineError(f"{job.losses} servers were lost while they had this row: {error!s:.200}")
            )
        else:
            self.waiting.appendleft(job)

    def _struck(self, place: Place, job: Job, error: EngineError, *, was_well: bool) -> None:
        """Ask for a row elsewhere: it may be the reason, or this server."""
        job.tried.add(place)
        job.errors += 1
        place.strikes.add(job)
        if len(place.strikes) >= _STRIKES and len(self._places) > 1:
            self._down(place, error, was_well=was_well)
        else:
            self._heard(place, was_well=was_well)
        if job.errors >= _ERRORS or job.tried.issuperset(self._places):
            job.stream.fail(error)
        else:
            # Last: if the server is the reason, the rows before it tell.
            self.waiting.append(job)

    def _busy(self, place: Place, error: Busy, *, was_well: bool) -> None:
        """Give a server that has too much to do fewer rows, and those later: it is there."""
        self._heard(place, was_well=was_well)
        now, wait = place.heard_at, min(error.retry_after, _LONGEST_ASKED)
        # What was sent together is refused together, for one reason.
        if now >= place.again_at:
            place.busy += 1
            place.allowed = max(1, place.allowed // 2)
            wait = max(wait, _back_off(place.busy))
        place.again_at = max(place.again_at, now + wait)

    def _down(self, place: Place, error: Exception, *, was_well: bool) -> None:
        """Leave a lost server alone for a while."""
        if was_well and not place.well:
            # It was sent before the outage that is known: this is not another one.
            return
        if place.well:
            place.losses += 1
            often = f", {place.losses} times" if place.losses > 1 else ""
            note = f"{place.label} was lost after {place.answered} answers{often}: {_line(error)}"
            self.notes[:] = [each for each in self.notes if each != place.note] + [note]
            place.note = note
        place.failures += 1
        place.again_at = time.monotonic() + _back_off(place.failures)

    def _wait_for_any(self, now: float) -> None:
        """End the run where no server has been there for long."""
        patience = PATIENCE if self._patience is None else self._patience
        if self._alone_at is not None:
            self._alone += now - self._alone_at
        self._alone_at = None
        if not self.open or any(place.well and not place.busy for place in self._places):
            self._alone = 0.0
        elif any(place.running for place in self._places):
            # A server that is tried again may take long over its row.
            pass
        elif self._alone <= patience:
            self._alone_at = now
        else:
            self._alone = 0.0
            labels = ", ".join(place.label for place in self._places)
            lost = EngineClosed(
                f"none of the servers has answered for {patience:.0f} s: {labels}.\n"
                "Finished rows are kept; with a server there, running the cell again goes on from them."
            )
            self.fail(self.waiting.copy(), lost)

    def _ask_the_silent(self, now: float) -> None:
        """Find servers that hold a connection open and do not answer."""
        for place in self._places:
            silent = place.running and now - place.heard_at > QUIET
            if silent and place.check is not None and not place.checking:
                threading.Thread(target=self._check, args=(place,), name="nbinfer-check", daemon=True).start()
                place.checking = True

    def _check(self, place: Place) -> None:
        try:
            place.check()
        except Exception as error:  # noqa: BLE001 - whatever it raises, the place is asked again later
            self.post(partial(self._checked, place, error))
        else:
            self.post(partial(self._checked, place, None))

    def _checked(self, place: Place, error: Exception | None) -> None:
        place.checking = False
        if error is None or isinstance(error, Busy):
            # Slow, not gone.
            place.heard_at = time.monotonic()
            return
        taken, place.running = place.running, {}
        self._down(place, error, was_well=place.well)
        for job, stream in taken.items():
            stream.cancel()
            job.tried.add(place)
            self.waiting.appendleft(job)

    def cancel(self, job: Job) -> None:
        """Stop a request where it runs."""
        for place in self._places:
            stream = place.running.get(job)
            if stream is not None:
                stream.cancel()
                return
        # Between two servers.
        job.stream.fail(EngineError("the request was interrupted."))


def _back_off(times: int) -> float:
    """Return the seconds before a server is tried again that failed so many times."""
    return min(_FIRST_WAIT * 2.0 ** min(times - 1, 10), _LONGEST_WAIT)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _same_weights(places: list[Place]) -> str:
    known = {place.label: weights(place.model) for place in places}
    digests = {digest for digest in known.values() if digest}
    if len(digests) > 1:
        lines = "; ".join(f"{label}: {digest[:16]}" for label, digest in known.items())
        raise ConfigError(
            f"the endpoints serve different weights ({lines}), and a column has one model's answers."
        )
    return digests.pop() if digests and all(known.values()) else ""


def _same_settings(places: list[Place]) -> Mapping[str, Any]:
    settings = [
        {name: value for name, value in identity(place.model).items() if name not in ("backend", "weights")}
        for place in places
    ]
    differ = [name for name in settings[0] if any(each[name] != settings[0][name] for each in settings)]
    if differ:
        raise ConfigError(f"the endpoints differ in {', '.join(differ)}: load the model alike at each.")
    return places[0].model.config


# -- from what a person wrote ---------------------------------------------------------------------------


def open_endpoints(endpoints: Any, model: Any, mode: Mode) -> FanOut:
    """Return the servers that a call names, as one model.

    Parameters
    ----------
    endpoints
        A list of addresses (``"http://host:8000/v1"``), dicts of ``OPTIONS``, and loaded models or their
        names.
    model
        What the model is called at those that do not say; None: each server's only one.

    Raises
    ------
    ConfigError
        One is not an endpoint, or they do not serve the same model.
    BackendUnavailable
        None of them answers, or one wants another key.
    """
    if isinstance(endpoints, str | Mapping) or not isinstance(endpoints, Iterable):
        endpoints = [endpoints]
    given = [_described(each, model) for each in endpoints]
    if not given:
        raise ConfigError("endpoints is empty: it is a list of addresses such as 'http://host:8000/v1'.")
    places: list[Place] = []
    absent: list[tuple[str, NbinferError]] = []
    for each in given:
        try:
            places.append(_place(each, mode))
        except NbinferError as error:
            if not isinstance(error, Unreachable) and getattr(error, "code", None) not in _ABSENT:
                raise
            absent.append((_label(each), error))
    if not places:
        raise absent[0][1]
    made = FanOut(places)
    made.notes += [f"{label} was left out: {_line(error)}" for label, error in absent]
    return made


def _described(given: Any, model: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        unknown = [str(name) for name in given if name not in OPTIONS]
        if unknown:
            raise ConfigError(f"an endpoint has no {unknown[0]!r:.60}; it may say {', '.join(OPTIONS)}.")
        out = dict(given)
    elif isinstance(given, str) and "://" in given:
        out = {"base_url": given}
    else:
        out = {"model": given}
    limit = out.get("concurrency")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"concurrency={limit!r}: it is the number of requests at once, at least 1.")
    if "base_url" in out or "socket" in out:
        out.setdefault("model", model)
        if out["model"] is not None and not isinstance(out["model"], str):
            raise ConfigError("model is a name where endpoints are addresses: what the servers call it.")
    elif out.get("model") is None:
        raise ConfigError(f"{given!r:.80} is no endpoint: it has neither base_url nor model.")
    return out


def _label(given: Mapping[str, Any]) -> str:
    return str(
        given.get("base_url") or given.get("socket") or getattr(given["model"], "name", given["model"])
    )


def _place(given: Mapping[str, Any], mode: Mode) -> Place:
    if "base_url" not in given and "socket" not in given:
        from nbinfer.frames.rules import loaded

        model = loaded(given["model"], mode)
        return Place(model, model.name, given.get("concurrency") or max(1, 2 * model.info.parallel))
    model, check, default = _served(given, mode)
    return Place(model, _label(given), given.get("concurrency") or default, check)


def _served(given: Mapping[str, Any], mode: Mode) -> tuple[Model, Any, int]:
    """Return a server's model, a check that the server is there, and how many requests it takes at once."""
    from nbinfer import backends
    from nbinfer.backends.openai import context_of, endpoint_of
    from nbinfer.engines.protocol import EngineInfo
    from nbinfer.engines.remote.engine import RemoteEngine
    from nbinfer.engines.remote.questions import list_models
    from nbinfer.session import Model

    backends.get("openai").install()
    address = {name: given.get(name) for name in ("base_url", "api_key", "socket")}
    endpoint = endpoint_of("", **address)
    check = partial(list_models, endpoint, timeout=_LIST_SECONDS)
    entry = _entry(check(), given.get("model"), _label(given))
    endpoint = replace(endpoint, model=str(entry["id"]))
    own = entry.get("owned_by") == "nbinfer"
    digest, limit = str(given.get("weights") or ""), CONCURRENCY
    if own:
        details = _of_our_own(endpoint, entry)
        info = info_from_json(details["nbinfer"])
        digest, limit = digest or str(details.get("digest") or ""), 2 * info.parallel
    else:
        info = EngineInfo(backend="openai", model=endpoint.model, mode=mode, context_size=context_of(entry))
    if info.mode is not mode:
        raise NotSupported(f"{_label(given)} serves {info.model} for {info.mode}; this call needs {mode}.")
    engine = RemoteEngine(endpoint, replace(info, digest=digest), own=own, name=endpoint.model)
    model = Model(engine=engine, name=endpoint.model, backend=info.backend, where="server", mode=mode)
    # Not in the session's list: it goes with the run that asked for it.
    weakref.finalize(model, engine.close)
    return model, check, limit


def _entry(listed: list[dict[str, Any]], name: str | None, label: str) -> dict[str, Any]:
    for each in listed:
        if name is not None and (name == each.get("id") or name in (each.get("aliases") or ())):
            return each
    names = [str(each.get("id")) for each in listed]
    if name is None and len(listed) == 1:
        return listed[0]
    if name is not None and not listed:
        # Some servers list only what is loaded, and load on demand.
        return {"id": name}
    shown = ", ".join(names[:8]) or "none"
    asked = "which model? Pass model=" if name is None else f"there is no model {name!r:.80}"
    raise RequestError(f"{label}: {asked}; it has {shown}.")


def _of_our_own(endpoint: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an nbinfer server says of a model; one that is not loaded is loaded by being asked."""
    from nbinfer.engines.remote.questions import fetch_json

    path = f"/v1/models/{entry['id']}"
    if "nbinfer" not in entry:
        body = {"model": endpoint.model, "content": "?"}
        fetch_json(endpoint, "/tokenize", body, timeout=_LOAD_SECONDS)
    # The weights are read once for their digest.
    found: dict[str, Any] = fetch_json(endpoint, path, timeout=_LOAD_SECONDS)
    return found
