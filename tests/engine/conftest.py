from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.demo_engine import open_demo

from nbinfer.contract.requests import CompletionRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.demo_engine import Ask

    from nbinfer.engines.llamacpp.generate import CompletionEngine
    from nbinfer.engines.stream import Stream


@pytest.fixture(scope="module")
def engine() -> Iterator[CompletionEngine]:
    engine = open_demo()
    yield engine
    engine.close()


@pytest.fixture
def ask(engine: CompletionEngine) -> Ask:
    def submit(prompt: str, **options: Any) -> Stream:
        system = options.pop("system", None)
        head = () if system is None else ({"role": "system", "content": system},)
        return engine.submit(
            CompletionRequest(messages=(*head, {"role": "user", "content": prompt}), **options),
        )

    return submit
