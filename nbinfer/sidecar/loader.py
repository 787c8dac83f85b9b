"""Which models are loaded: within a budget of bytes, each once, the idle ones going first.

The loader knows nothing of processes or engines. It is given a function that loads a model and gets back
something that can be stopped; the sidecar loads runners with it, and a kernel could load engines.

One thread decides; loads and unloads run on threads of their own, so that no lock is held across either.
"""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from nbinfer.contract.errors import DoesNotFit, EngineClosed, NbinferError
from nbinfer.contract.keepalive import KeepAlive
from nbinfer.contract.memory import RequiredMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

PATIENCE = 10.0
"""Seconds that a request for an unloaded model is overtaken by requests for loaded ones."""


class Loaded(Protocol):
    """A loaded model, as the loader sees it."""

    def stop(self) -> None:
        """Unload; returns when the memory is free."""
        ...


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A model to load.

    Attributes
    ----------
    key
        Equal keys share one loaded model.
    name
        What people call it.
    size
        Bytes that it needs, per device.
    keep_alive
        How long it stays while idle; None is the default, or what was asked before.
    detail
        Whatever the loading function needs; the loader does not look at it.
    """

    key: Hashable
    name: str
    size: RequiredMemory = field(default_factory=RequiredMemory)
    keep_alive: KeepAlive | None = None
    detail: Any = None


@dataclass(eq=False)
class Progress:
    """How far a load is; written by the loading function, read by anyone.

    ``cancelled`` is set when nobody waits for the load any more.
    """

    stage: str = "waiting"
    fraction: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class Entry:
    """A model that is loaded, on its way in, or on its way out."""

    wanted: Wanted
    state: str = "loading"
    """``loading``, ``ready``, ``unloading``."""
    loaded: Any = None
    keep_alive: KeepAlive = KeepAlive.DEFAULT
    progress: Progress = field(default_factory=Progress)
    busy: int = 0
    holds: int = 0
    used_at: float = 0.0
    load_seconds: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether nothing runs on it."""
        return self.state == "ready" and self.busy == 0


class Use:
    """A model in use; it is not unloaded before :meth:`release`. Also a context manager."""

    def __init__(self, loader: Loader, entry: Entry, *, hold: bool) -> None:
        self._loader = loader
        self._entry: Entry | None = entry
        self._hold = hold
        self.loaded: Any = entry.loaded
        self.wanted = entry.wanted
        self.load_seconds = entry.load_seconds

    def release(self) -> None:
        """Give it back; idempotent."""
        entry, self._entry = self._entry, None
        if entry is not None:
            self._loader._release(entry, hold=self._hold)  # noqa: SLF001 - one module

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Ticket:
    """A place in the queue for a model. ``future`` becomes the :class:`Use`."""

    def __init__(self, loader: Loader, wanted: Wanted, *, hold: bool, since: float) -> None:
        self._loader = loader
        self.wanted = wanted
        self.hold = hold
        self.since = since
        self.future: Future[Use] = Future()
        self.progress = Progress()

    @property
    def position(self) -> int:
        """How many wait for room before this one; 0 when it is its turn, or its model is being loaded."""
        return self._loader._position(self)  # noqa: SLF001 - one module

    def cancel(self) -> None:
        """Stop waiting. The load ends when nobody else waits for it; a use that was granted is released."""
        self._loader._cancel(self)  # noqa: SLF001 - one module


class Loader:
    """Loads models within a budget.

    Parameters
    ----------
    start
        Loads a model and returns it; raises when it cannot. Called on a thread of its own.
    budget
        Bytes that all models together may need, per device; None is no bound.
    default_keep_alive
        For models that say nothing.
    """

    def __init__(
        self,
        start: Callable[[Wanted, Progress], Loaded],
        *,
        budget: RequiredMemory | None = None,
        default_keep_alive: KeepAlive = KeepAlive.DEFAULT,
        patience: float = PATIENCE,
    ) -> None:
        self._start = start
        self.budget = budget
        self._default = default_keep_alive
        self._patience = patience
        self._entries: dict[Hashable, Entry] = {}
        self._queue: list[Ticket] = []
        self._changed = threading.Condition()
        self._closed = False
        self._clock = itertools.count()
        self._thread = threading.Thread(target=self._decide, name="nbinfer-loader", daemon=True)
        self._thread.start()

    # -- for everyone -----------------------------------------------------------------------------------

    def request(self, wanted: Wanted, *, hold: bool = False) -> Ticket:
        """Ask for a model; returns at once.

        Parameters
        ----------
        wanted
            The model.
        hold
            Keep it by its handle: its keep-alive does not run, but it may go to make room while it is idle.
            Otherwise it is used for one request, and stays for as long as that runs.
        """
        ticket = Ticket(self, wanted, hold=hold, since=time.monotonic())
        with self._changed:
            if self._closed:
                raise EngineClosed("the service is stopping.")
            self._queue.append(ticket)
            entry = self._entries.get(wanted.key)
            if entry is not None and entry.state == "ready" and len(self._queue) == 1:
                # Nobody waits for anything: there is nothing to decide.
                self._grant(ticket, entry)
            else:
                self._changed.notify_all()
        return ticket

    def acquire(self, wanted: Wanted, *, hold: bool = False, timeout: float | None = None) -> Use:
        """Ask for a model and wait for it; an interrupt stops waiting.

        Raises
        ------
        DoesNotFit
            It is larger than the budget, or than what models that stay for ever leave of it.
        NbinferError
            It could not be loaded.
        """
        ticket = self.request(wanted, hold=hold)
        try:
            return ticket.future.result(timeout)
        except BaseException:
            ticket.cancel()
            raise

    def unload(self, key: Hashable, *, force: bool = False) -> bool:
        """Unload a model when it is idle (``force``: whatever runs on it); returns whether it will go."""
        with self._changed:
            entry = self._entries.get(key)
            if entry is None or entry.state != "ready" or (entry.busy and not force):
                return False
            self._begin_unload(entry)
            return True

    def plan(self, wanted: Wanted) -> list[Entry]:
        """Return which models would be unloaded, in order, to load this one; nothing happens.

        Raises
        ------
        DoesNotFit
            It would not fit whatever went.
        """
        with self._changed:
            if wanted.key in self._entries:
                return []
            self._check_possible(wanted)
            going: list[Entry] = []
            for victim in self._victims():
                if self._fits(wanted, without=going):
                    break
                going.append(victim)
            return going

    def entries(self) -> list[Entry]:
        """Return what is loaded or on its way, oldest first."""
        with self._changed:
            return list(self._entries.values())

    def get(self, key: Hashable) -> Entry | None:
        """Return one model's entry."""
        with self._changed:
            return self._entries.get(key)

    @property
    def empty(self) -> bool:
        """Whether nothing is loaded and nobody waits."""
        with self._changed:
            return not self._entries and not self._queue

    def waiting(self) -> int:
        """Return how many requests wait for a model."""
        with self._changed:
            return len(self._queue)

    def lost(self, loaded: Loaded) -> None:
        """Take a model that ended by itself off the list; the next request loads it anew."""
        with self._changed:
            for key, entry in list(self._entries.items()):
                if entry.loaded is loaded and entry.state == "ready":
                    del self._entries[key]
            self._changed.notify_all()

    def close(self) -> None:
        """Unload everything, busy or not, and end; idempotent."""
        with self._changed:
            self._closed = True
            for ticket in self._queue:
                _fail(ticket, EngineClosed("the service is stopping."))
            self._queue.clear()
            for entry in list(self._entries.values()):
                if entry.state == "loading":
                    entry.progress.cancelled.set()
                elif entry.state == "ready":
                    self._begin_unload(entry)
            self._changed.notify_all()
            while self._entries:
                self._changed.wait()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the deciding thread ----------------------------------------------------------------------------

    def _decide(self) -> None:
        with self._changed:
            while not self._closed:
                self._serve_queue()
                self._drop_unwanted_loads()
                self._changed.wait(self._expire())

    def _serve_queue(self) -> None:
        """Grant what is loaded; start one load, or make room for it, for the first that needs one."""
        blocked = False
        for ticket in list(self._queue):
            entry = self._entries.get(ticket.wanted.key)
            if entry is not None and entry.state == "ready":
                # Who waits long for room is not overtaken for ever by users of what is loaded.
                if not blocked or not self._overdue(ticket):
                    self._grant(ticket, entry)
            elif entry is not None:
                continue
            elif not blocked:
                blocked = not self._begin(ticket)

    def _overdue(self, later: Ticket) -> bool:
        first = next((t for t in self._queue if t.wanted.key not in self._entries), None)
        return (
            first is not None
            and first.since < later.since
            and time.monotonic() - first.since > self._patience
        )

    def _grant(self, ticket: Ticket, entry: Entry) -> None:
        self._queue.remove(ticket)
        if not ticket.future.set_running_or_notify_cancel():
            return
        if ticket.hold:
            entry.holds += 1
        else:
            entry.busy += 1
        if ticket.wanted.keep_alive is not None:
            entry.keep_alive = ticket.wanted.keep_alive
        entry.used_at = time.monotonic()
        ticket.future.set_result(Use(self, entry, hold=ticket.hold))

    def _begin(self, ticket: Ticket) -> bool:
        """Start the load that a ticket needs; False when it must wait for room."""
        wanted = ticket.wanted
        try:
            self._check_possible(wanted)
        except NbinferError as error:
            self._queue.remove(ticket)
            _fail(ticket, error)
            return True
        if not self._fits(wanted):
            # One at a time, and only when none is on its way out already.
            if not any(entry.state == "unloading" for entry in self._entries.values()):
                victim = next(iter(self._victims()), None)
                if victim is not None:
                    self._begin_unload(victim)
            return False
        entry = Entry(wanted, keep_alive=wanted.keep_alive or self._default, used_at=time.monotonic())
        self._entries[wanted.key] = entry
        threading.Thread(target=self._load, args=(entry,), name="nbinfer-load", daemon=True).start()
        return True

    def _drop_unwanted_loads(self) -> None:
        wanted = {ticket.wanted.key for ticket in self._queue}
        for key, entry in self._entries.items():
            if entry.state == "loading" and key not in wanted:
                entry.progress.cancelled.set()

    def _expire(self) -> float | None:
        """Unload what was idle for long enough; return how long nothing will be due."""
        now, soonest = time.monotonic(), None
        for entry in list(self._entries.values()):
            if not entry.idle or entry.holds or entry.keep_alive.never:
                continue
            left = entry.keep_alive.deadline(entry.used_at) - now
            if left <= 0:
                self._begin_unload(entry)
            else:
                soonest = left if soonest is None else min(soonest, left)
        if self._queue:
            soonest = min(soonest or self._patience, self._patience)
        # A timer's own length is bounded (292 years are too many for a condition).
        return None if soonest is None else min(soonest, 3600.0)

    # -- room -------------------------------------------------------------------------------------------

    def _victims(self) -> list[Entry]:
        """Return what may go, the one unused for longest first."""
        free = [e for e in self._entries.values() if e.idle and not e.keep_alive.never]
        return sorted(free, key=lambda entry: (entry.holds > 0, entry.used_at))

    def _fits(self, wanted: Wanted, *, without: Iterable[Entry] = ()) -> bool:
        if self.budget is None:
            return True
        gone = list(without)
        used = sum(
            (entry.wanted.size for entry in self._entries.values() if entry not in gone), RequiredMemory()
        )
        return (used + wanted.size).fits(self.budget)

    def _check_possible(self, wanted: Wanted) -> None:
        if self.budget is None:
            return
        check_size(wanted, self.budget)
        pinned = [e for e in self._entries.values() if e.keep_alive.never and e.state != "unloading"]
        total = sum((entry.wanted.size for entry in pinned), RequiredMemory())
        if not (total + wanted.size).fits(self.budget):
            names = ", ".join(entry.wanted.name for entry in pinned)
            raise DoesNotFit(
                f"{wanted.name} needs {_words(wanted.size)}; of {_words(self.budget)}, models that stay "
                f"loaded (keep_alive=-1) use {_words(total)}: {names}.\nUnload one of them by name."
            )

    # -- loads and unloads, each on a thread of its own -------------------------------------------------

    def _load(self, entry: Entry) -> None:
        began = time.monotonic()
        loaded: Loaded | None = None
        error: BaseException | None = None
        try:
            loaded = self._start(entry.wanted, entry.progress)
        except BaseException as e:  # noqa: BLE001 - given to whoever waits
            error = e
        with self._changed:
            if loaded is not None and (self._closed or entry.progress.cancelled.is_set()):
                waits = [t for t in self._queue if t.wanted.key == entry.wanted.key]
                if self._closed or not waits:
                    entry.loaded, entry.state = loaded, "ready"
                    self._begin_unload(entry)
                    return
            if loaded is not None:
                entry.loaded, entry.state = loaded, "ready"
                entry.used_at = time.monotonic()
                entry.load_seconds = entry.used_at - began
            else:
                self._entries.pop(entry.wanted.key, None)
                # Cancelled because everybody left; who came meanwhile has it loaded again.
                if not entry.progress.cancelled.is_set():
                    for ticket in [t for t in self._queue if t.wanted.key == entry.wanted.key]:
                        self._queue.remove(ticket)
                        _fail(ticket, error or EngineClosed("the load was cancelled."))
            self._changed.notify_all()

    def _begin_unload(self, entry: Entry) -> None:
        entry.state = "unloading"
        threading.Thread(target=self._unload, args=(entry,), name="nbinfer-unload", daemon=True).start()

    def _unload(self, entry: Entry) -> None:
        try:
            entry.loaded.stop()
        finally:
            with self._changed:
                if self._entries.get(entry.wanted.key) is entry:
                    del self._entries[entry.wanted.key]
                self._changed.notify_all()

    # -- uses and tickets -------------------------------------------------------------------------------

    def _release(self, entry: Entry, *, hold: bool) -> None:
        with self._changed:
            if hold:
                entry.holds -= 1
            else:
                entry.busy -= 1
            entry.used_at = time.monotonic()
            self._changed.notify_all()

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._queue:
                self._queue.remove(ticket)
                ticket.future.cancel()
                self._changed.notify_all()
                return
        if ticket.future.done() and not ticket.future.cancelled() and ticket.future.exception() is None:
            ticket.future.result().release()

    def _position(self, ticket: Ticket) -> int:
        with self._changed:
            if ticket not in self._queue or ticket.wanted.key in self._entries:
                return 0
            before = self._queue[: self._queue.index(ticket)]
            return sum(1 for other in before if other.wanted.key not in self._entries)

    def progress_of(self, ticket: Ticket) -> Progress:
        """Return how far the load is that a ticket waits for."""
        with self._changed:
            entry = self._entries.get(ticket.wanted.key)
            return ticket.progress if entry is None else entry.progress


def check_size(wanted: Wanted, budget: RequiredMemory) -> None:
    """Check that a model alone fits into a budget.

    Raises
    ------
    DoesNotFit
        It does not.
    """
    if not wanted.size.fits(budget):
        raise DoesNotFit(
            f"{wanted.name} needs {_words(wanted.size)}; the sidecar may use {_words(budget)}.\n"
            "Use a smaller context_size or quantisation, or start it with more: nbinfer serve --ram."
        )


def _fail(ticket: Ticket, error: BaseException) -> None:
    if ticket.future.set_running_or_notify_cancel():
        ticket.future.set_exception(error)


def _words(size: RequiredMemory) -> str:
    text = f"{size.ram / 2**30:.2f} GiB of RAM"
    return text + "".join(f", {each / 2**30:.2f} GiB on GPU {i}" for i, each in enumerate(size.vram))
