"""The service: one per user, in front of the runners of all models.

It listens on a Unix socket (and on TCP where asked), loads models when they are asked for, passes requests
on, and goes when no kernel holds it and no model's keep-alive runs. A kernel holds a model by an open stream:
the operating system closes that however the kernel dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from nbinfer import backends
from nbinfer._version import __version__
from nbinfer.contract.config import ModelConfig
from nbinfer.contract.errors import (
    ConfigError,
    EngineClosed,
    EngineError,
    ModelNotFound,
    NbinferError,
    RequestError,
)
from nbinfer.contract.flags import check_flags
from nbinfer.contract.keepalive import KeepAlive
from nbinfer.contract.modes import Mode, mode_for_path, mode_from_json
from nbinfer.engines.remote.unix import Answer, BrokenConnectionError, UnixClient
from nbinfer.engines.remote.wire import STOPPING, RunnerLost, error_body, error_to_json
from nbinfer.sidecar import discovery, messages
from nbinfer.sidecar.answers import sse
from nbinfer.sidecar.guard import Guard
from nbinfer.sidecar.listen import server, tcp_socket, unix_socket
from nbinfer.sidecar.loader import Loader, Progress, Ticket, Use, Wanted
from nbinfer.sidecar.responses import ENDING, ClosingStream, SafeJSONResponse, error_response, while_connected
from nbinfer.sidecar.runners import Recipe, Runner, start
from nbinfer.sidecar.sizes import default_budget, runner_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from concurrent.futures import Future

    from nbinfer.backends import Backend
    from nbinfer.contract.memory import RequiredMemory
FIRST_SECONDS = 20.0
"""How long a sidecar that a kernel started waits for its first use before it goes."""
CRASH_SECONDS = 1.5
"""How long a request whose runner vanished waits for the report of why."""
_PASSED_ON = {
    "/v1/chat/completions",
    "/v1/completions",
    messages.PATH,
    messages.COUNT_PATH,
    "/v1/embeddings",
    "/v1/rerank",
    "/rerank",
    "/score",
    "/answers/score",
    "/v1/images/generations",
    "/tokenize",
    "/detokenize",
    "/apply-template",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the service is started.

    Attributes
    ----------
    budget
        Bytes for all models together; None: most of what is free now.
    port
        Listen on 127.0.0.1 at this port too (0: a free one); None: only on the Unix socket.
    token
        What TCP clients must send; None makes one.
    persistent
        Stay until stopped.
    keep_alive
        Of models that say nothing.
    """

    budget: RequiredMemory | None = None
    port: int | None = None
    token: str | None = None
    persistent: bool = False
    keep_alive: KeepAlive = KeepAlive.DEFAULT
    models: tuple[str, ...] = field(default=())


class ServiceStopping(EngineClosed):
    """The service is on its way out; whoever wants a model starts a new one."""

    code = STOPPING


class SidecarService:
    """The state and the routes of the service."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._budget = options.budget or default_budget()
        self.loader = Loader(self._load, budget=self._budget, default_keep_alive=options.keep_alive)
        self._names: dict[tuple[str, Mode], Wanted] = {}
        self._clients: dict[str, UnixClient] = {}
        self._holds = 0
        self._uses: dict[str, Use] = {}
        self._requests = 0
        self._started = time.monotonic()
        self._used = False
        self.stopping = asyncio.Event()

    def app(self) -> Starlette:
        """Return the ASGI app, without its guard."""
        routes = [
            Route("/nbinfer/health", self._health),
            Route("/nbinfer/ps", self._ps),
            Route("/nbinfer/hold", self._hold, methods=["POST"]),
            Route("/nbinfer/plan", self._plan, methods=["POST"]),
            Route("/nbinfer/unload", self._unload, methods=["POST"]),
            Route("/nbinfer/log", self._log),
            Route("/nbinfer/stop", self._stop, methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            *(Route(path, self._pass_on, methods=["POST"]) for path in sorted(_PASSED_ON)),
        ]
        handlers: Any = {NbinferError: _on_error, HTTPException: _on_http_error, ClientDisconnect: _on_gone}
        return Starlette(routes=routes, exception_handlers=handlers)

    # -- life -------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Return when the service should go: it was told to, or nobody needs it any more."""
        while not self.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), 0.2)
            if self._options.persistent or self._holds or self._requests or not self.loader.empty:
                continue
            if self._used or time.monotonic() - self._started > FIRST_SECONDS:
                # Set here, with no wait since the look: nobody comes in between.
                self.stopping.set()

    async def close(self) -> None:
        """Stop every runner."""
        await asyncio.to_thread(self.loader.close)
        for client in self._clients.values():
            client.close()

    def _load(self, wanted: Wanted, progress: Progress) -> Runner:
        return start(wanted, progress, self._lost)

    def _lost(self, runner: Runner) -> None:
        self.loader.lost(runner)

    def preload(self) -> None:
        """Begin to load the models that the service was started with; a failure is said in the log."""
        from nbinfer.models import resolve

        for ref in self._options.models:
            found = resolve(ref)
            modes = found.header.modes if found.format == "gguf" else ()
            wanted = self.wanted(
                {
                    "path": str(found.path.absolute()),
                    "name": found.name,
                    "backend": backends.for_format(found.format).name,
                    "mode": str(modes[0]) if modes else str(Mode.COMPLETION),
                }
            )
            self.loader.request(wanted).future.add_done_callback(_preloaded)

    # -- which model ------------------------------------------------------------------------------------

    def wanted(self, given: dict[str, Any], *, remember: bool = True) -> Wanted:
        """Read what a kernel wants loaded, and remember its names.

        Raises
        ------
        ConfigError
            A member is missing or refused.
        ModelNotFound
            The file is not there.
        """
        path, name = given.get("path"), given.get("name")
        if not isinstance(path, str) or not os.path.isabs(path) or "\0" in path:  # noqa: PTH117 - as text
            raise ConfigError(f"path={path!r:.80} is refused: it is the absolute path of a model's file.")
        if not isinstance(name, str) or not name or len(name) > 256 or not name.isprintable():  # noqa: PLR2004
            raise ConfigError(f"name={name!r:.80} is refused: it is 1 to 256 printable characters.")
        if not Path(path).exists():
            raise ModelNotFound(f"there is no file {path}.")
        adapter = backends.get(str(given.get("backend")))
        mode = mode_from_json(given.get("mode"))
        config = ModelConfig.from_json(given.get("config") or {})
        if config.runtime_flags:
            check_flags(list(config.runtime_flags), adapter.allowed_flags, backend=adapter.name)
        options = given.get("options") or {}
        if not isinstance(options, dict):
            raise ConfigError("options is refused: it is an object of the engine's options.")
        real = Path(path).resolve()
        keep_alive = config.keep_alive
        config = config.without("keep_alive")
        draft = config.speculative.draft_model if config.speculative else None
        key = json.dumps(
            [adapter.name, str(real), draft, str(mode), json.loads(config.key()), options], sort_keys=True
        )
        exact = f"{name}@{hashlib.blake2b(key.encode(), digest_size=5).hexdigest()}"
        recipe = Recipe(
            backend=adapter.name,
            path=real,
            name=name,
            mode=mode,
            config=config,
            options=options,
            digest=str(given.get("digest") or ""),
            names=(exact,),
        )
        size = runner_size(real, mode, config, {**_flag_options(adapter, config), **options})
        made = Wanted(key=key, name=name, size=size, keep_alive=keep_alive, detail=recipe)
        for each in (name, exact) if remember else ():
            self._names[each, mode] = made
        return made

    def _named(self, name: str, mode: Mode | None) -> Wanted:
        """Return the model that a request names.

        Raises
        ------
        ModelNotFound
            None was ever loaded under that name, and it is not one of the demo models.
        RequestError
            It is loaded for something else.
        """
        for each in Mode if mode is None else (mode,):
            if (name, each) in self._names:
                return self._names[name, each]
        others = [str(each) for known, each in self._names if known == name]
        if others:
            raise RequestError(f"{name} is loaded for {', '.join(others)}; this request needs {mode}.")
        wanted = self._demo(name, mode)
        if wanted is not None:
            return wanted
        known = ", ".join(sorted({known for known, _ in self._names if "@" not in known}))
        raise ModelNotFound(
            f"there is no model {name!r:.80} here. Models: {known or 'none; load one first'}."
        )

    def _demo(self, name: str, mode: Mode | None) -> Wanted | None:
        """Return a demo model, which anyone may ask for by name; a path is never taken from a request."""
        from nbinfer.models.demo import DEMO_MODELS

        if name not in DEMO_MODELS:
            return None
        fits = {"demo-embed": Mode.EMBEDDING, "demo-image": Mode.IMAGE_GENERATION}.get(name, Mode.COMPLETION)
        if mode not in (None, fits):
            return None
        return self.wanted(
            {
                "path": str(DEMO_MODELS[name]()),
                "name": name,
                "backend": "diffusers" if fits is Mode.IMAGE_GENERATION else "llamacpp",
                "mode": str(fits),
            }
        )

    # -- control routes ---------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        del request
        return SafeJSONResponse({"ok": True, "status": "ok", "version": __version__, "pid": os.getpid()})

    async def _ps(self, request: Request) -> Response:
        del request
        now = time.monotonic()
        rows = []
        for entry in self.loader.entries():
            recipe: Recipe = entry.wanted.detail
            runner: Runner | None = entry.loaded
            left = entry.keep_alive.deadline(entry.used_at) - now
            counts = entry.idle and not entry.holds and not entry.keep_alive.never
            rows.append(
                {
                    "name": recipe.name,
                    "mode": str(recipe.mode),
                    "backend": recipe.backend,
                    "path": str(recipe.path),
                    "state": entry.state,
                    "stage": entry.progress.stage if entry.state == "loading" else "",
                    "fraction": entry.progress.fraction,
                    "busy": entry.busy,
                    "holds": entry.holds,
                    "keep_alive": entry.keep_alive.to_json(),
                    "expires_seconds": round(left, 3) if counts else None,
                    "planned": entry.wanted.size.to_json(),
                    "rss": runner.rss() if runner is not None else 0,
                    "pid": runner.pid if runner is not None else None,
                    "load_seconds": round(entry.load_seconds, 3),
                    "info": runner.info if runner is not None else {},
                }
            )
        return SafeJSONResponse(
            {
                "pid": os.getpid(),
                "version": __version__,
                "persistent": self._options.persistent,
                "budget": self._budget.to_json(),
                "holds": self._holds,
                "waiting": self.loader.waiting(),
                "uptime_seconds": round(now - self._started, 3),
                "models": rows,
            }
        )

    async def _plan(self, request: Request) -> Response:
        given = await _json(request)
        wanted = await asyncio.to_thread(lambda: self.wanted(given, remember=False))
        going = [entry.wanted.name for entry in self.loader.plan(wanted)]
        there = self.loader.get(wanted.key) is not None
        return SafeJSONResponse({"loaded": there, "would_unload": going, "needs": wanted.size.to_json()})

    async def _unload(self, request: Request) -> Response:
        """Unload by name. ``hold`` is let go first; ``unheld`` leaves the model to whoever else holds it."""
        given = await _json(request)
        name, unheld = str(given.get("model")), bool(given.get("unheld"))
        own = self._uses.pop(str(given.get("hold")), None)
        if own is not None:
            own.release()
        gone = []
        for (known, _), wanted in list(self._names.items()):
            if known != name:
                continue
            entry = self.loader.get(wanted.key)
            if entry is None or (unheld and entry.holds):
                continue
            if self.loader.unload(wanted.key, force=bool(given.get("force"))):
                gone.append(wanted.name)
        return SafeJSONResponse({"unloaded": gone})

    async def _log(self, request: Request) -> Response:
        wanted = self._named(str(request.query_params.get("model")), None)
        entry = self.loader.get(wanted.key)
        text = "" if entry is None or entry.loaded is None else entry.loaded.log()
        return SafeJSONResponse({"log": text})

    async def _stop(self, request: Request) -> Response:
        del request
        self.stopping.set()
        return SafeJSONResponse({"ok": True})

    async def _hold(self, request: Request) -> Response:
        """Load a model and keep it for as long as this stream is open."""
        wanted = await asyncio.to_thread(self.wanted, await _json(request))
        if self.stopping.is_set():
            raise ServiceStopping("the sidecar is stopping.")
        self._used = True
        return StreamingResponse(self._held(wanted), media_type="text/event-stream")

    async def _held(self, wanted: Wanted) -> AsyncIterator[bytes]:
        number = secrets.token_hex(8)
        self._holds += 1
        there = self.loader.get(wanted.key)
        already = there is not None and there.state == "ready"
        ticket: Ticket | None = None
        try:
            ticket = self.loader.request(wanted, hold=True)
            granted = asyncio.wrap_future(ticket.future)
            while not granted.done():
                yield sse(self._waiting(ticket))
                await asyncio.wait({granted}, timeout=0.1)
            use = self._uses[number] = granted.result()
            runner: Runner = use.loaded
            yield sse(
                {
                    "event": "ready",
                    "hold": number,
                    "model": wanted.detail.names[0],
                    "info": runner.info,
                    "already": already,
                    "load_seconds": use.load_seconds,
                    "pid": runner.pid,
                }
            )
            await self.stopping.wait()
        except NbinferError as error:
            yield sse({"event": "error", **error_to_json(error)[1]})
        finally:
            self._holds -= 1
            held = self._uses.pop(number, None)
            if held is not None:
                held.release()
            elif ticket is not None:
                ticket.cancel()

    def _waiting(self, ticket: Ticket) -> dict[str, Any]:
        progress = self.loader.progress_of(ticket)
        return {
            "event": "progress",
            "stage": progress.stage,
            "fraction": progress.fraction,
            "position": ticket.position,
        }

    # -- OpenAI's routes --------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        del request
        from nbinfer.models.demo import DEMO_MODELS

        data = [self._listed(wanted) for wanted in self._distinct()]
        known = {each["id"] for each in data}
        # Loaded when they are asked for.
        data += [
            {"id": name, "object": "model", "created": 0, "owned_by": "nbinfer", "loaded": False}
            for name in DEMO_MODELS
            if name not in known
        ]
        return SafeJSONResponse({"object": "list", "data": data})

    async def _model(self, request: Request) -> Response:
        wanted = self._named(request.path_params["name"], None)
        # Who keeps answers has to know which weights gave them; a large file is read for it, once.
        digest = await asyncio.to_thread(_digest, wanted.detail)
        return SafeJSONResponse({**self._listed(wanted), "digest": digest})

    def _distinct(self) -> list[Wanted]:
        return list({wanted.key: wanted for wanted in self._names.values()}.values())

    def _listed(self, wanted: Wanted) -> dict[str, Any]:
        entry, recipe = self.loader.get(wanted.key), wanted.detail
        out = {
            "id": recipe.name,
            "object": "model",
            "created": 0,
            "owned_by": "nbinfer",
            "aliases": list(recipe.names),
            "mode": str(recipe.mode),
            "loaded": entry is not None and entry.state == "ready",
        }
        if entry is not None and entry.loaded is not None:
            out["nbinfer"] = entry.loaded.info
            out["max_model_len"] = entry.loaded.info.get("context_size")
        return out

    async def _pass_on(self, request: Request) -> Response:
        """Send a request to the runner of its model, and its answer back."""
        body = await _json(request)
        name = body.get("model")
        if not isinstance(name, str) or not name:
            raise RequestError("model is missing: the name of the model to use.")
        wanted = self._named(name, mode_for_path(request.url.path))
        self._used = True
        self._requests += 1
        try:
            return await self._passed(request, wanted, body)
        finally:
            self._requests -= 1

    async def _passed(
        self, request: Request, wanted: Wanted, body: dict[str, Any], *, last_try: bool = False
    ) -> Response:
        there = self._at_once(wanted)
        use = there if there is not None else await while_connected(request, self._acquire(wanted))
        runner: Runner = use.loaded
        try:
            # One runner serves a model under every name that it was loaded by, and knows the first.
            named = {**body, "model": runner.recipe.names[0]}
            asked = self._client(runner).request("POST", request.url.path, json.dumps(named).encode())
            answer = await while_connected(request, asked)
        except BrokenConnectionError as error:
            use.release()
            lost = await self._why(runner, error)
            return error_response(lost, request.url.path)
        except BaseException:
            use.release()
            raise
        if ENDING in answer.headers and not last_try:
            # It refused what it had not begun: the next process may serve it.
            answer.close()
            use.release()
            await self._why(runner, EngineError("its engine is gone"))
            return await self._passed(request, wanted, body, last_try=True)
        headers = {
            key: value
            for key, value in answer.headers.items()
            if key in ("content-type", "content-length", "cache-control", "x-should-retry")
        }

        async def done() -> None:
            answer.close()
            use.release()
            self._requests -= 1

        self._requests += 1
        return ClosingStream(
            self._chunks(answer, runner, request.url.path),
            status_code=answer.status,
            headers=headers,
            on_close=done,
        )

    async def _chunks(self, answer: Answer, runner: Runner, path: str) -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.chunks():
                yield chunk
        except BrokenConnectionError as error:
            lost = await self._why(runner, error)
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                raise  # the length was promised: only a broken connection can tell
            if path == messages.PATH:
                yield b"\n\n" + messages.error_event(lost)
            else:
                yield b"\n\n" + sse(error_to_json(lost)[1])

    def _at_once(self, wanted: Wanted) -> Use | None:
        """Return a use of a model that is there and has nobody waiting before us."""
        entry = self.loader.get(wanted.key)
        if entry is None or entry.state != "ready" or entry.loaded.ended.is_set():
            return None
        ticket = self.loader.request(wanted)
        if ticket.future.done():
            return ticket.future.result()
        ticket.cancel()
        return None

    async def _acquire(self, wanted: Wanted) -> Use:
        """Wait for a runner that is really there."""
        while True:
            ticket = self.loader.request(wanted)
            try:
                use = await asyncio.wrap_future(ticket.future)
            except BaseException:
                ticket.cancel()
                raise
            if not use.loaded.ended.is_set():
                return use
            # It died between two requests, before that was noted.
            use.release()
            self.loader.lost(use.loaded)

    def _client(self, runner: Runner) -> UnixClient:
        client = self._clients.get(runner.socket)
        if client is None:
            for socket in [s for s in self._clients if not Path(s).exists()]:
                self._clients.pop(socket).close()
            client = self._clients[runner.socket] = UnixClient(runner.socket)
        return client

    async def _why(self, runner: Runner, error: Exception) -> NbinferError:
        """Return why a runner does not answer any more."""
        await asyncio.to_thread(runner.ended.wait, CRASH_SECONDS)
        if not runner.ended.is_set():
            return EngineError(f"{runner.recipe.name} broke the connection: {error!r:.200}")
        self.loader.lost(runner)
        if runner.error is None:
            return RunnerLost(f"{runner.recipe.name} was unloaded while the request ran.")
        notes = getattr(runner.error, "__notes__", [])
        return RunnerLost("\n".join([str(runner.error), *notes]))

    async def _metrics(self, request: Request) -> Response:
        """Return the counters of all runners, each with the labels of its model."""
        del request
        from prometheus_client import CONTENT_TYPE_LATEST

        pages = []
        for entry in self.loader.entries():
            runner: Runner | None = entry.loaded
            if entry.state == "ready" and runner is not None:
                with contextlib.suppress(BrokenConnectionError, TimeoutError):
                    async with asyncio.timeout(5):
                        answer = await self._client(runner).request("GET", "/metrics")
                        pages.append((runner, (await answer.read()).decode()))
        text = await asyncio.to_thread(_merged_metrics, pages)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _digest(recipe: Recipe) -> str:
    """Return the digest of a model's weights; empty where its files are gone."""
    from nbinfer.models import resolve, weights_digest

    try:
        return recipe.digest or weights_digest(resolve(str(recipe.path)).paths)
    except (OSError, NbinferError):
        return ""


def _flag_options(adapter: Backend, config: ModelConfig) -> dict[str, Any]:
    """Return the options that a configuration's flags stand for, where the backend has any."""
    read = getattr(adapter, "flag_options", None)
    found: dict[str, Any] = {} if read is None else read(config.runtime_flags or ())
    return found


def _preloaded(future: Future[Use]) -> None:
    if future.cancelled():
        return
    error = future.exception()
    if error is None:
        future.result().release()
    else:
        sys.stderr.write(f"{error}\n")


def _merged_metrics(pages: list[tuple[Runner, str]]) -> bytes:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import Metric
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, Metric] = {}
    for runner, page in pages:
        recipe = runner.recipe
        labels = {"model": recipe.name, "mode": str(recipe.mode), "backend": recipe.backend}
        for family in text_string_to_metric_families(page):
            merged = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, **labels}, sample.value)

    class Found:
        def collect(self) -> list[Metric]:
            return list(found.values())

    registry = CollectorRegistry()
    registry.register(Found())
    return bytes(generate_latest(registry))


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error!s:.200}") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body is {type(body).__name__}, not a JSON object.")
    return body


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, NbinferError)  # noqa: S101 - registered for these
    return error_response(error, request.url.path)


async def _on_gone(request: Request, error: Exception) -> Response:
    del request, error
    return Response(status_code=499)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for these
    message = f"{request.method} {request.url.path[:200]} is not part of this API."
    return SafeJSONResponse(error_body(message), error.status_code, headers=error.headers)


# -- the process ----------------------------------------------------------------------------------------


async def run(options: Options, on_ready: Callable[[discovery.Service], None] | None = None) -> None:
    """Serve until nobody needs the service, or it is stopped.

    Raises
    ------
    ConfigError
        It cannot listen where it should.
    """
    import psutil

    # A name of its own: one that is on its way out cannot take the next one's socket along.
    path = str(discovery.socket_folder() / f"sidecar-{os.getpid()}.sock")
    discovery.remove_stale_sockets()
    service = SidecarService(options)
    servers = [(server(Guard(service.app())), unix_socket(path))]
    described: dict[str, Any] = {
        "socket": path,
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
    }
    if options.port is not None:
        listener = tcp_socket(port=options.port)
        token = options.token or secrets.token_urlsafe(32)
        guard = Guard(service.app(), token=token, hosts=("127.0.0.1",))
        servers.append((server(guard), listener))
        described |= {"address": f"http://127.0.0.1:{listener.getsockname()[1]}", "token": token}
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, service.stopping.set)
    serving = [asyncio.create_task(each.serve(sockets=[listener])) for each, listener in servers]
    found = discovery.Service(version=__version__, **described)
    discovery.write(found)
    if on_ready is not None:
        on_ready(found)
    service.preload()
    try:
        await service.watch()
    finally:
        # From here on, whoever looks finds no sidecar, and starts a new one.
        discovery.remove(os.getpid())
        service.stopping.set()
        await service.close()
        for each, _ in servers:
            each.should_exit = True
        await asyncio.gather(*serving)
        with contextlib.suppress(OSError):
            Path(path).unlink()


def main() -> None:
    """Run as a kernel starts it: until nobody needs it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(run(Options()))
    sys.stdout.flush()
    # Threads that wait for nothing any more must not hold the process up.
    os._exit(0)


if __name__ == "__main__":
    main()
