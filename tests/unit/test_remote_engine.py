"""The remote engine's own bookkeeping, with a server that never answers."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest
from nbinfer.engines.protocol import EngineInfo
from nbinfer.engines.remote.clients import Endpoint
from nbinfer.engines.remote.engine import RemoteEngine
from nbinfer.engines.remote.loop import LOOP

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def engine() -> Iterator[RemoteEngine]:
    info = EngineInfo(backend="openai", model="m", mode=Mode.COMPLETION, context_size=100)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        made = RemoteEngine(Endpoint(base_url=url, model="m"), info)
        yield made
        made.close()


class Reader:
    """Whoever holds an answer; part of a cycle, as a frame of a traceback is."""

    me: Any = None


def test_an_answer_that_the_garbage_collector_lets_go_of_is_cancelled_wherever_that_happens(
    engine: RemoteEngine,
) -> None:
    stream = engine.submit(CompletionRequest(prompt="a"))
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), LOOP.get()).result(30)  # it has begun
    reader = Reader()
    reader.me = reader
    weakref.finalize(reader, stream.cancel)
    del reader

    def collect() -> None:
        with engine._lock:  # an allocation under it is enough to begin a collection
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert stream.result(30).finish_reason == "interrupted"
