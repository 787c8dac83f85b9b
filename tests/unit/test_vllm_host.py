"""The thread that holds a vLLM model, without vLLM: how it ends."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from nbinfer.contract.errors import EngineClosed
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import EmbeddingRequest
from nbinfer.engines.vllm.host import Host
from nbinfer.engines.vllm.pooled import PooledEngine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> PooledEngine:
    monkeypatch.setattr(Host, "_load", lambda host: None)
    given: Any = SimpleNamespace(engine={})
    return PooledEngine(given, {}, mode=Mode.EMBEDDING, name="m", threads=1)


def test_a_process_that_ends_does_not_wait_for_a_model_of_vectors_that_waits_for_requests(
    engine: PooledEngine,
) -> None:
    # What is closed when the interpreter ends is the host: the engine hears of it in no other way.
    closing = threading.Thread(target=engine._host.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    with pytest.raises(EngineClosed, match="unloaded"):
        engine.submit(EmbeddingRequest(texts=("a",)))


def test_a_model_of_vectors_can_be_closed_twice(engine: PooledEngine) -> None:
    engine.close()
    engine.close()
    assert engine.load().waiting == 0
