"""The real engine on the demo chat model, at one thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from nbinfer.contract.modes import Mode
from nbinfer.models.demo import demo_path

if TYPE_CHECKING:
    from nbinfer.engines.llamacpp.generate import CompletionEngine
    from nbinfer.engines.stream import Stream


class Ask(Protocol):
    """Submit one question."""

    def __call__(self, prompt: str, **options: Any) -> Stream: ...


def open_demo(**options: Any) -> CompletionEngine:
    """Open the demo model; the caller closes it."""
    from nbinfer.engines.llamacpp import open_engine
    from nbinfer.engines.llamacpp.generate import CompletionEngine

    options = {"context_size": 1024, "threads": 1, **options}
    engine = open_engine(demo_path(), mode=Mode.COMPLETION, name="demo", **options)
    assert isinstance(engine, CompletionEngine)
    return engine
