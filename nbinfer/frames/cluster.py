"""``client=``: the rows on the workers of a Dask cluster, each with the model loaded once.

Rows travel in chunks of neighbours, which share their beginnings; results come back to this process, which
alone writes the journal. A worker that dies gives its chunk back in halves, until the row that kills workers
is by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import pickle
import threading
import time
import uuid
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client, Event, get_worker
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.scheduler import KilledWorker

from nbinfer.contract.errors import (
    ConfigError,
    EngineClosed,
    EngineError,
    ModelLoadError,
    NbinferError,
    NotSupported,
    RequestError,
    SchemaError,
)
from nbinfer.contract.results import Finished, Result
from nbinfer.engines.remote.wire import error_from_json, error_to_json
from nbinfer.frames.switchboard import Job, Switchboard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distributed import Worker

    from nbinfer.contract.modes import Mode
    from nbinfer.contract.requests import CompletionRequest
    from nbinfer.engines.protocol import EngineInfo
    from nbinfer.engines.stream import Stream

CHUNK = 64
"""Requests of a chunk, at most."""

# A chunk is given so many requests that it takes about this long: what it has done is seen, and kept, when it
# comes back.
_SHORT, _LONG = 2.0, 8.0
# Beyond this, Dask warns that a task is large.
_CHUNK_BYTES = 2**20
# One chunk is computed while the next one is on its way.
_AHEAD = 2
# How often a row that is alone on the cluster may lose its worker.
_DEATHS = 2
_COUNT_SECONDS = 2.0


class WorkerDied(EngineError):  # noqa: N818 - what happened, as the error column names it
    """The worker that computed this row died, more than once, with nothing else to blame."""


# -- on the workers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to load a model, as :func:`nbinfer.load` takes it."""

    ref: str
    mode: Mode
    name: str
    backend: str | None = None
    where: str = "kernel"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of its plugin: the same for the same model loaded the same way."""
        return f"nbinfer-{hashlib.sha256(pickle.dumps(self, 5)).hexdigest()[:16]}"

    def load(self, threads: int) -> Any:
        """Load it, by default on as many threads as Dask gave the worker."""
        from nbinfer import session

        options = dict(self.options)
        if self.backend in (None, "llamacpp"):
            options.setdefault("threads", threads)
        model = session.load(
            self.ref,
            backend=self.backend,
            where=self.where,
            mode=self.mode,
            name=f"{self.name}@{self.key}-{uuid.uuid4().hex[:8]}",
            **options,
        )
        # The plugin holds it. Where the workers are threads of the kernel, its own models are the only ones.
        session.session.forget(model)
        return model


class EnginePlugin(WorkerPlugin):
    """Loads a model when a worker starts, or when it is registered, and unloads it when the worker ends."""

    idempotent = True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.name = recipe.key
        self.model: Any = None
        self.problem: Exception | None = None

    async def setup(self, worker: Worker) -> None:
        """Load, without holding up the worker's heartbeat."""
        try:
            self.model = await asyncio.to_thread(self.recipe.load, worker.state.nthreads)
        except Exception as error:
            self.problem = error
            raise

    def teardown(self, worker: Worker) -> None:
        """Unload."""
        del worker
        if self.model is not None:
            self.model.unload()


def _loaded(key: str) -> Any:
    plugin: Any = get_worker().plugins.get(key)
    if plugin is None or plugin.model is None:
        problem = getattr(plugin, "problem", None) or "it was not loaded"
        raise ModelLoadError(f"a worker has no model: {problem!s:.300}")
    return plugin.model


def about(key: str) -> tuple[EngineInfo, str]:
    """Return what a worker's engine is, and the digest of its weights."""
    model = _loaded(key)
    return model.info, model.digest


def render(key: str, request: CompletionRequest) -> tuple[str, int]:
    """Return the prompt that a worker makes of a request, and its length in tokens."""
    found: tuple[str, int] = _loaded(key).engine.render(request)
    return found


def tokenize(key: str, text: str, options: Mapping[str, Any]) -> list[int]:
    """Return a text's tokens by a worker's model."""
    method = getattr(_loaded(key).engine, "tokenize", None)
    if method is None:
        raise NotSupported("this engine does not count tokens, so that over-long texts cannot be cut.")
    found: list[int] = method(text, **options)
    return found


_streams: dict[str, set[Stream]] = {}
_stopped: set[str] = set()
_streams_lock = threading.Lock()


def stop(run: str) -> None:
    """Stop what a worker computes for a run, now and from now on."""
    with _streams_lock:
        _stopped.add(run)
        running = list(_streams.pop(run, ()))
    for stream in running:
        stream.cancel()


def compute(
    key: str, run: str, mark: str, digest: str, requests: Sequence[bytes]
) -> tuple[list[tuple[str, Any]], float] | None:
    """Answer requests, all at once, on the worker that this runs on.

    Returns
    -------
    tuple or None
        For each request ("result", …) or ("error", …), and the seconds that they took together. None: another
        worker began with these and did not come to their end.
    """
    begun: Any = _event(mark)
    if begun.is_set():
        begun.clear()
        return None
    begun.set()
    try:
        model = _loaded(key)
        if model.digest != digest:
            raise ConfigError(
                "the workers have different files under the model's name; copy the same one to each."
            )
        began = time.perf_counter()
        answers = _answers(model, run, [pickle.loads(request) for request in requests])  # noqa: S301 - our own
        return answers, time.perf_counter() - began
    finally:
        begun.clear()


def _event(name: str) -> Any:
    """Return a mark that all of the cluster can see."""
    made: Any = Event
    return made(name)


def _answers(model: Any, run: str, requests: Sequence[Any]) -> list[tuple[str, Any]]:
    streams: list[Stream | Exception] = []
    for request in requests:
        try:
            stream = model.submit(request)
        except NbinferError as error:
            streams.append(error)
            continue
        streams.append(stream)
        with _streams_lock:
            stopped = run in _stopped
            if not stopped:
                _streams.setdefault(run, set()).add(stream)
        if stopped:
            stream.cancel()
    answers = [_settled(stream) for stream in streams]
    with _streams_lock:
        mine = _streams.get(run, set())
        mine.difference_update(streams)
        if not mine:
            _streams.pop(run, None)
    return answers


def _settled(stream: Stream | Exception) -> tuple[str, Any]:
    """Return a result without what the asking side knows, or an error as it travels between processes."""
    if isinstance(stream, Exception):
        return "error", error_to_json(stream)[1]
    try:
        result = stream.result()
    except SchemaError as error:
        # An answer that was cut before it kept to its rule has its counts all the same.
        result = error.result
        if result is None:
            return "error", error_to_json(error)[1]
    except Exception as error:  # noqa: BLE001 - whatever the engine raised is the row's error
        return "error", error_to_json(error)[1]
    if isinstance(result, Result):
        result = result.with_changes(prompt="", messages=None)
    return "result", result


# -- here -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Chunk:
    """Jobs that travel together.

    Attributes
    ----------
    alone
        Nothing else of the run is computed at the same time.
    """

    jobs: list[Job]
    alone: bool = False
    future: Any = None


class OnCluster(Switchboard):
    """A model on the workers of a cluster. A :class:`nbinfer.frames.work.FrameModel`."""

    def __init__(self, client: Any, recipe: Recipe, info: EngineInfo, digest: str) -> None:
        super().__init__()
        self.name = recipe.name
        self.digest = digest
        self.config = dict(recipe.options)
        self.info = replace(info, model=recipe.name)
        self.engine: Any = _Lengths(client, recipe.key, self.info)
        self._client = client
        self._key = recipe.key
        self._run = uuid.uuid4().hex
        self._stopping = False
        self._chunks: set[Chunk] = set()
        # Halves of what a dead worker had; and rows that were alone in theirs.
        self._halves: deque[Chunk] = deque()
        self._suspects: deque[Job] = deque()
        self._size = max(1, info.parallel)
        self._workers = 1
        self._counted = -math.inf
        self._deaths = 0
        self._count_workers()

    @property
    def places(self) -> int:
        """How many chunks are with the cluster at once."""
        return _AHEAD * max(1, self._workers)

    # -- the thread's side -------------------------------------------------------------------------------

    def pause(self) -> float:
        """Return the seconds until a smaller chunk is better than a later one."""
        return 0.02 if self.waiting else 1.0

    def assign(self, *, quiet: bool) -> None:
        """Send what waits as chunks, as many as the workers can have."""
        self._count_workers()
        if self._stopping and not self._chunks:
            # Who asks again is not stopped.
            self._run, self._stopping = uuid.uuid4().hex, False
        alone = any(chunk.alone for chunk in self._chunks)
        while not alone and len(self._chunks) < self.places:
            if self._halves:
                chunk = self._halves.popleft()
                chunk.jobs = [job for job in chunk.jobs if not job.stream.done]
            elif self.waiting and (quiet or len(self.waiting) >= self._fit()):
                chunk = Chunk([self.waiting.popleft() for _ in range(min(self._fit(), len(self.waiting)))])
            else:
                break
            if chunk.jobs:
                self._send(chunk)
        # A suspect is asked alone, so that its neighbours cannot be to blame, nor be hurt.
        if self._suspects and not (self._chunks or self._halves or self.waiting):
            self._send(Chunk([self._suspects.popleft()], alone=True))

    def _fit(self) -> int:
        """Return how many requests a chunk is given now: fewer towards the end, so that all end together."""
        return max(1, min(self._size, math.ceil(self.open / self.places)))

    def _send(self, chunk: Chunk) -> None:
        requests: list[bytes] = []
        size = 0
        for number, job in enumerate(chunk.jobs):
            requests.append(pickle.dumps(job.request, 5))
            size += len(requests[-1])
            if size > _CHUNK_BYTES and number:
                requests.pop()
                self.waiting.extendleft(reversed(chunk.jobs[number:]))
                del chunk.jobs[number:]
                break
        mark = f"nbinfer-{uuid.uuid4().hex}"
        self._chunks.add(chunk)
        chunk.future = self._client.submit(
            compute, self._key, self._run, mark, self.digest, requests, key=mark, pure=False
        )
        chunk.future.add_done_callback(lambda future: self.post(partial(self._back, chunk, future)))

    def _back(self, chunk: Chunk, future: Any) -> None:
        self._chunks.discard(chunk)
        chunk.future = None
        try:
            found = future.result()
        except KilledWorker:
            found = None
        except Exception as error:  # noqa: BLE001 - the cluster's own, which no row can be blamed for
            self._lost(chunk, error)
            return
        if found is None:
            self._died(chunk)
            return
        answers, seconds = found
        if len(chunk.jobs) >= self._size and seconds < _SHORT:
            self._size = min(CHUNK, 2 * self._size)
        elif seconds > _LONG:
            self._size = max(1, self.info.parallel, self._size // 2)
        for job, (kind, value) in zip(chunk.jobs, answers, strict=True):
            if kind == "result":
                job.stream.put(Finished(value))
            else:
                job.stream.fail(error_from_json(value))

    def _lost(self, chunk: Chunk, error: Exception) -> None:
        """End the requests of a chunk that the cluster could not run, and with them the run."""
        why = error if isinstance(error, NbinferError) else None
        if not isinstance(why, ConfigError | NotSupported | EngineClosed):
            why = EngineClosed(
                f"the cluster did not compute some rows: {type(error).__name__}: {error!s:.300}\n"
                "Finished rows are kept; running the cell again goes on from them."
            )
        for job in chunk.jobs:
            job.stream.fail(why)

    def _died(self, chunk: Chunk) -> None:
        """Halve what a dead worker had; find out about a single row when nothing else runs."""
        self._deaths += 1
        count = "a chunk of rows" if self._deaths == 1 else f"{self._deaths} chunks of rows"
        self.notes[:] = [f"{count} lost its worker on the way, and the rows were computed again."]
        jobs = [job for job in chunk.jobs if not job.stream.cancelled]
        for job in chunk.jobs:
            if job.stream.cancelled:
                job.stream.fail(EngineError("the request was interrupted."))
        if len(jobs) > 1:
            middle = len(jobs) // 2
            self._halves.extendleft([Chunk(jobs[middle:]), Chunk(jobs[:middle])])
            return
        for job in jobs:
            job.losses += chunk.alone
            if job.losses >= _DEATHS:
                job.stream.fail(
                    WorkerDied(f"{job.losses} workers died while they computed this row and nothing else.")
                )
            else:
                self._suspects.append(job)

    def cancel(self, job: Job) -> None:
        """Stop a request: with it the run, whose requests are cancelled together."""
        if job in self._suspects:
            self._suspects.remove(job)
            job.stream.fail(EngineError("the request was interrupted."))
            return
        for half in self._halves:
            if job in half.jobs:
                job.stream.fail(EngineError("the request was interrupted."))
                return
        if not self._stopping and all(each.stream.cancelled for each in self._open.copy()):
            # What is finished comes back with its chunk.
            self._stopping = True
            self._client.run(stop, self._run, wait=False)

    def _count_workers(self) -> None:
        now = time.monotonic()
        if now - self._counted > _COUNT_SECONDS:
            self._workers, self._counted = len(self._client.nthreads()), now


class _Lengths:
    """What a plan asks an engine for, asked of a worker."""

    def __init__(self, client: Any, key: str, info: EngineInfo) -> None:
        self._client = client
        self._key = key
        self.info = info

    def render(self, request: CompletionRequest) -> tuple[str, int]:
        found: tuple[str, int] = self._client.submit(render, self._key, request, pure=False).result()
        return found

    def tokenize(self, text: str, **options: Any) -> list[int]:
        found: list[int] = self._client.submit(tokenize, self._key, text, options, pure=False).result()
        return found


def on_cluster(client: Any, model: Any, mode: Mode) -> OnCluster:
    """Have a cluster's workers load a model, and return it.

    It stays loaded there until :func:`release`; the same model is not loaded again.

    Parameters
    ----------
    model
        A loaded model (its workers load the same file in the same way), its name, or a reference that means
        something on the workers' machines; None: the default, or the only one loaded.

    Raises
    ------
    RequestError
        ``client`` is not a synchronous Dask client.
    ModelLoadError
        A worker cannot load it.
    """
    if not isinstance(client, Client) or client.asynchronous:
        raise RequestError("client is a dask.distributed.Client, and not an asynchronous one.")
    recipe = _recipe(model, mode)
    try:
        client.register_plugin(EnginePlugin(recipe))
        _registered.setdefault(client, set()).add(recipe.key)
        info, digest = client.submit(about, recipe.key, pure=False).result()
    except Exception as error:
        _forget(client, recipe.key)
        if isinstance(error, NbinferError):
            raise
        raise ModelLoadError(
            f"the workers cannot load {recipe.name}: {type(error).__name__}: {error!s:.300}\n"
            "nbinfer, and the model's file under the same reference, have to be on each of their machines."
        ) from error
    if info.mode is not mode:
        raise NotSupported(f"{recipe.name} is loaded for {info.mode}, and this call needs {mode}.")
    return OnCluster(client, recipe, info, digest)


_registered: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def release(client: Any) -> int:
    """Have the workers of a cluster unload the models that calls with ``client=`` made them load.

    They would otherwise keep them, for the next call, as long as they live.

    Returns
    -------
    int
        How many models that were.
    """
    keys = _registered.pop(client, set())
    for key in keys:
        client.unregister_worker_plugin(key)
    return len(keys)


def _forget(client: Any, key: str) -> None:
    """Take a plugin back that did not come up, so that the next call tries again."""
    with suppress(Exception):
        client.unregister_worker_plugin(key)


def _recipe(model: Any, mode: Mode) -> Recipe:
    from nbinfer import session

    if isinstance(model, str):
        model = session.session.find(model) or model
    if isinstance(model, str | Path):
        ref = session.session.aliases.get(str(model), str(model))
        return Recipe(_absolute(ref), mode, Path(ref).name or ref)
    found = session.get(model, mode=mode)
    if found.path is None and found.where == "kernel":
        raise RequestError(
            f"{found.name} has no file that a worker could load; give its reference as model=."
        )
    return Recipe(
        _absolute(session.session.aliases.get(found.ref, found.ref)),
        found.mode,
        found.name,
        found.backend,
        "kernel" if found.where == "server" else found.where,
        dict(found.config),
    )


def _absolute(ref: str) -> str:
    """Return a path so that it means the same in another folder; other references as they are."""
    path = Path(ref).expanduser()
    return str(path.absolute()) if path.exists() else ref
