"""Models for the frames tests: real ones of the session, on the fake engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer.contract.modes import Mode
from nbinfer.session import Model
from support.fake_engine import FakeEngine, Script, echo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbinfer.contract.requests import CompletionRequest


def chat_model(script: Script | None = None, **options: Any) -> Model:
    """A completion model that answers by ``script`` (default: echoes the prompt)."""
    return Model(FakeEngine(script, **options), name=options.get("model", "fake"), backend="fake")


def embedding_model(**options: Any) -> Model:
    engine = FakeEngine(mode=Mode.EMBEDDING, **options)
    return Model(engine, name=options.get("model", "fake"), backend="fake", mode=Mode.EMBEDDING)


def reranking_model(**options: Any) -> Model:
    engine = FakeEngine(mode=Mode.RERANKING, **options)
    return Model(engine, name=options.get("model", "fake"), backend="fake", mode=Mode.RERANKING)


def engine_of(model: Model) -> FakeEngine:
    assert isinstance(model.engine, FakeEngine)
    return model.engine


def asked(model: Model) -> list[str]:
    """The last message of every request that reached the engine, in order."""
    texts = []
    for request in engine_of(model).requests:
        messages = getattr(request, "messages", None)
        texts.append(str(messages[-1]["content"]) if messages else str(getattr(request, "prompt", "")))
    return texts


def last_text(request: CompletionRequest) -> str:
    return str(request.messages[-1]["content"]) if request.messages else str(request.prompt)


def failing_on(bad: str, error: Exception) -> Script:
    """Script: rows whose prompt holds ``bad`` fail with ``error``, the others are echoed."""

    def script(request: CompletionRequest) -> Iterable[Any]:
        return [error] if bad in last_text(request) else echo(request)

    return script
