"""What every engine is: something that takes requests and streams events back.

The same three calls serve a model in this process, in a sidecar or behind somebody else's server, so that
nothing above this line asks where a model runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.contract.modes import Mode
    from nbinfer.contract.requests import CompletionRequest, Request
    from nbinfer.engines.stream import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine really uses, read back from it after the load.

    ``context_size`` is in tokens per request; ``parallel`` the sequences that run at once; ``digest``
    identifies the weights; ``effective`` holds the engine's own settings (threads, batch sizes, devices…).
    """

    backend: str
    model: str
    mode: Mode
    context_size: int
    trained_context_size: int | None = None
    parallel: int = 1
    dimensions: int | None = None
    digest: str = ""
    version: str = ""
    effective: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """A snapshot of what an engine is doing now."""

    running: int = 0
    waiting: int = 0
    context_used: int = 0
    tokens_generated: int = 0
    prompt_tokens: int = 0
    images_generated: int = 0


class Engine(Protocol):
    """A loaded model."""

    @property
    def info(self) -> EngineInfo:
        """What is loaded and with which effective settings."""
        ...

    def submit(self, request: Request) -> Stream:
        """Start a request; returns at once.

        Raises
        ------
        ContextOverflow
            The prompt is longer than the context.
        RequestError, NotSupported
            The request cannot be run by this model.
        EngineClosed
            The engine was closed.
        """
        ...

    def render(self, request: CompletionRequest) -> tuple[str, int]:
        """Return the exact prompt, chat template applied, and its length in tokens; runs nothing."""
        ...

    def load(self) -> EngineLoad:
        """Return what is running now; cheap, callable from any thread."""
        ...

    def close(self) -> None:
        """End running requests with ``EngineClosed`` and free the model's memory; idempotent."""
        ...
