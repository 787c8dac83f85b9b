"""The process behind one model: an engine, the OpenAI API over it, and the care to end when it should.

Its first line on standard input says what to serve; the end of standard input says that whoever started it
is gone, however that went.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.backends.process import ERROR_MARK
from nbinfer.backends.protocol import ServesBeside
from nbinfer.contract.errors import EngineError, NbinferError
from nbinfer.contract.modes import Mode
from nbinfer.engines.remote.wire import error_to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.engines.protocol import Engine
    from nbinfer.sidecar.app import Served

EXIT_FAILED = 3
LAST_SECONDS = 2.0
"""What a runner without a supervisor has to end by itself, before it kills its own process group."""


def main() -> None:
    """Serve until told to stop."""
    # An interrupt during the imports means the same as one later.
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    line = sys.stdin.buffer.readline()
    if not line:
        return
    try:
        code = asyncio.run(_serve(json.loads(line)))
    except NbinferError as error:
        _last_words(error)
        code = EXIT_FAILED
    # Whatever thread is still inside the engine's library must not hold the process up.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _serve(spec: dict[str, Any]) -> int:
    from nbinfer.sidecar.app import Served, make_app
    from nbinfer.sidecar.guard import Guard
    from nbinfer.sidecar.listen import server, unix_socket

    served = Served(tuple(dict.fromkeys(spec["names"])))
    listener = unix_socket(spec["socket"])
    serving = server(Guard(make_app(served)))
    loop = asyncio.get_running_loop()
    failed: list[BaseException] = []

    def stop() -> None:
        serving.should_exit = True

    def orphaned() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        # A hung loop or engine must not keep an orphan alive.
        threading.Timer(LAST_SECONDS, lambda: os.killpg(0, signal.SIGKILL)).start()
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop)

    def load() -> None:
        try:
            served.engine = _open(spec, served, dead)
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            failed.append(error)
            loop.call_soon_threadsafe(stop)

    def dead(error: BaseException) -> None:
        known = isinstance(error, EngineError)
        failed.append(error if known else EngineError(f"{served.names[0]}: the engine stopped by itself."))
        loop.call_soon_threadsafe(stop)

    served.on_dead = dead
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    threading.Thread(target=orphaned, name="nbinfer-guard", daemon=True).start()
    threading.Thread(target=load, name="nbinfer-load", daemon=True).start()
    ends = asyncio.create_task(_close_engine_at_exit(serving, served))
    try:
        await serving.serve(sockets=[listener])
    finally:
        with contextlib.suppress(OSError):
            Path(spec["socket"]).unlink()
    await ends
    if failed:
        _last_words(failed[0])
        return EXIT_FAILED
    return 0


async def _close_engine_at_exit(serving: Any, served: Served) -> None:
    """End what runs, so that open streams get their last event while the server still sends."""
    while not serving.should_exit:  # noqa: ASYNC110 - uvicorn's own flag
        await asyncio.sleep(0.05)
    if served.engine is not None:
        await asyncio.to_thread(served.engine.close)


def _open(spec: dict[str, Any], served: Served, dead: Callable[[BaseException], None]) -> Engine:
    from nbinfer import backends
    from nbinfer.contract.config import ModelConfig

    def stage(word: str, fraction: float) -> None:
        served.stage, served.fraction = word, fraction

    options = dict(spec["options"])
    if spec["digest"]:
        options["digest"] = spec["digest"]
    described: dict[str, Any] = {
        "mode": Mode(spec["mode"]),
        "name": served.names[0],
        "config": ModelConfig.from_json(spec["config"]),
        **options,
    }
    adapter = backends.get(spec["backend"])
    stage("importing the engine", 0.0)
    if isinstance(adapter, ServesBeside):
        return adapter.open_server(Path(spec["model"]), on_stage=stage, on_lost=dead, **described)
    return adapter.open(
        Path(spec["model"]), on_progress=lambda fraction: stage("reading weights", fraction), **described
    )


def _last_words(error: BaseException) -> None:
    """Say what ended the process, for its supervisor to raise."""
    if not isinstance(error, NbinferError):
        import traceback

        traceback.print_exception(error)
        return
    sys.stderr.write(f"\n{ERROR_MARK}{json.dumps(error_to_json(error)[1])}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
