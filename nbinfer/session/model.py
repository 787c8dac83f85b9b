"""A loaded model: what can be asked of it, what it takes, and how long it stays."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, cast

from nbinfer.contract import rendering
from nbinfer.contract.errors import EngineError, NotSupported, short_interrupt
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import EmbeddingRequest, RerankRequest
from nbinfer.session.asking import prepare, prepare_images
from nbinfer.session.chat import Chat
from nbinfer.session.held import Running, session
from nbinfer.session.streams import ImageStream, TextStream

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from nbinfer.contract.keepalive import KeepAlive
    from nbinfer.contract.memory import RequiredMemory
    from nbinfer.contract.rendering import Bundle
    from nbinfer.contract.requests import CompletionRequest, Request
    from nbinfer.contract.results import EmbeddingResult, ImageResult, Result
    from nbinfer.engines.protocol import Engine, EngineInfo
    from nbinfer.engines.stream import Stream


@dataclass(eq=False)
class Model:
    """A loaded model. Also a context manager: ``with nb.load("demo") as m: …`` unloads it at the end."""

    engine: Engine
    name: str
    ref: str = ""
    backend: str = ""
    where: str = "kernel"
    mode: Mode = Mode.COMPLETION
    config: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for; ``info.effective`` is what the engine uses."""
    path: Path | None = None
    paths: tuple[Path, ...] = ()
    estimated: Callable[[], Any] | None = field(default=None, repr=False)
    """Makes the estimate; see ``memory``."""
    loaded_at: float = field(default_factory=time.time)
    load_seconds: float = 0.0
    keep_alive: KeepAlive | None = None
    unload_at: float | None = None
    """When (``time.time()``) it is unloaded unless it is used before; None: not by itself, or it is busy."""

    @property
    def info(self) -> EngineInfo:
        """What the engine really uses."""
        return self.engine.info

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, for keys and records; a large file is read once (about 1 s per GB)."""
        from nbinfer.models import weights_digest

        return weights_digest(self.paths) if self.paths else self.info.digest

    @cached_property
    def memory(self) -> Any:
        """The estimate: made before the load in the kernel, when first looked at elsewhere; or None."""
        return None if self.estimated is None else self.estimated()

    @property
    def required(self) -> RequiredMemory | None:
        """The bytes of ``memory``: of RAM, and of each GPU."""
        found: RequiredMemory | None = getattr(self.memory, "required", None)
        return found

    def keep(self, stay: KeepAlive | None) -> None:
        """Set how long the model stays while idle; None is until it is unloaded."""
        watched = self.keep_alive is not None and not self.keep_alive.never
        self.keep_alive = stay
        if stay is not None and not stay.never and not watched:
            threading.Thread(target=_unload_when_idle, args=(self,), name="nbinfer-idle", daemon=True).start()

    def is_load_of(
        self, path: Path, mode: Mode, backend: str, where: str, options: Mapping[str, Any]
    ) -> bool:
        """Whether a load with these settings would be this model."""
        settings = (path, mode, backend, where, dict(options))
        return (self.path, self.mode, self.backend, self.where, dict(self.config)) == settings

    def measured_memory(self) -> dict[str, dict[str, int]] | None:
        """What the engine itself says it holds: bytes of weights, context and compute by device; or None.

        ``memory`` is the estimate made before the load, to compare with.
        """
        from nbinfer.memory import breakdown

        if hasattr(self.engine, "measured"):
            held: dict[str, dict[str, int]] = self.engine.measured()
            return held
        context = getattr(self.engine, "context_pointer", None)
        return None if context is None else breakdown(context)

    def __repr__(self) -> str:
        size = f"context {self.info.context_size:,}"
        if self.mode == Mode.IMAGE_GENERATION:
            size = str(self.info.effective.get("size", ""))
        return f"<Model {self.name} ({self.mode}, {self.backend}, {self.where}, {size})>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Bundle:
        del include, exclude
        return rendering.mimebundle(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    def request(self, prompt: str | None = None, **options: Any) -> CompletionRequest:
        """Build and validate a request; runs nothing."""
        return prepare(prompt, **options).request

    def submit(self, request: Request) -> Stream:
        """Start a request made by hand; see :class:`nbinfer.engines.stream.Stream`."""
        stream = self.engine.submit(request)
        session.note(stream, Running(self.name, request, stream, time.monotonic()))
        return stream

    def stream(self, prompt: str | None = None, **options: Any) -> TextStream:
        """Start an answer and return at once; iterate the return value for its text."""
        prepared = prepare(prompt, **options)
        return TextStream(self.submit(prepared.request), prepared, self)

    def infer(self, prompt: str | None = None, **options: Any) -> Result:
        """Ask and wait for the answer. See :func:`infer`."""
        return self.stream(prompt, **options).result()

    async def ainfer(self, prompt: str | None = None, **options: Any) -> Result:
        """As :meth:`infer`, without blocking the event loop; cancelling the task stops the engine."""
        stream = self.stream(prompt, **options)
        async for event in stream.aevents():
            del event
        return stream.result()

    def chat(self, system: str | None = None) -> Chat:
        """Start a conversation."""
        return Chat(self, system)

    def embed(
        self, texts: Sequence[str] | str, *, normalize: bool = True, dims: int | None = None
    ) -> NDArray[np.float32]:
        """Return vectors, float32 of shape (texts, dimensions); one text gives shape (1, dimensions).

        Raises
        ------
        NotSupported
            The model was loaded with ``pooling="none"``: see :meth:`embed_tokens`.
        """
        if self._gives_token_vectors:
            raise NotSupported(f"{self.name} was loaded with pooling='none': use embed_tokens.")
        return self._embedded(texts, normalize=normalize, dims=dims).vectors

    def embed_tokens(
        self, texts: Sequence[str] | str, *, normalize: bool = True, dims: int | None = None
    ) -> list[NDArray[np.float32]]:
        """Return a vector for each token: for each text float32 of shape (tokens, dimensions).

        For late interaction and the like; the model has to be loaded with ``pooling="none"``.

        Raises
        ------
        NotSupported
            It was loaded without.
        """
        if not self._gives_token_vectors:
            raise NotSupported(
                f"{self.name} makes one vector of each text: load it with pooling='none' for token vectors."
            )
        return self._embedded(texts, normalize=normalize, dims=dims).by_text()

    @property
    def _gives_token_vectors(self) -> bool:
        return self.info.effective.get("pooling") == "none"

    def _embedded(self, texts: Sequence[str] | str, *, normalize: bool, dims: int | None) -> EmbeddingResult:
        batch = [texts] if isinstance(texts, str) else list(texts)
        stream = self.submit(EmbeddingRequest(texts=batch, normalize=normalize, dims=dims))
        return cast("EmbeddingResult", _wait(stream))

    def rerank(self, query: str, documents: Sequence[str]) -> NDArray[np.float32]:
        """Return a score per document, float32 of shape (documents,); higher is more relevant."""
        stream = self.submit(RerankRequest(query=query, documents=list(documents)))
        return cast("NDArray[np.float32]", _wait(stream).scores)

    def images(self, prompt: str, **options: Any) -> ImageStream:
        """Start images and return at once; iterate the return value for its events. Options as below."""
        return ImageStream(self.submit(prepare_images(prompt, **options)), prompt, self)

    def generate_image(self, prompt: str, **options: Any) -> ImageResult:
        """Make an image, or several. See :func:`generate_image`."""
        return self.images(prompt, **options).result()

    def unload(self) -> None:
        """Free the model's memory; idempotent."""
        session.forget(self)
        self.engine.close()

    def adopt(self, result: Result) -> Result:
        """Return a result of the engine as one of this model, which can be replied to."""
        return result.with_changes(model=self.name, continue_with=self.infer)


@short_interrupt("the request was stopped.")
def _wait(stream: Stream) -> Any:
    try:
        found = stream.result()
    except BaseException:
        stream.cancel()
        raise
    # A bare array has no place to say so.
    if found.finish_reason == "interrupted":
        raise EngineError("the request was stopped before it was finished.")
    return found


def _unload_when_idle(model: Model) -> None:
    """Unload a model once nothing has run on it for as long as its keep-alive says.

    Time runs from the end of its last use. One that goes as soon as it is idle waits for its first use.
    """
    idle_since, done = time.monotonic(), 0
    while any(m is model for m in session.models()):
        stay = model.keep_alive
        if stay is None or stay.never:
            model.unload_at = None
            return
        now, load_now = time.monotonic(), model.engine.load()
        progress = load_now.tokens_generated + load_now.prompt_tokens + load_now.images_generated
        busy = bool(load_now.running or load_now.waiting)
        if busy or progress != done:
            idle_since, done = now, progress
        unused = not done and stay.seconds == 0
        model.unload_at = None if busy or unused else time.time() + stay.seconds - (now - idle_since)
        if not busy and not unused and now - idle_since >= stay.seconds:
            model.unload()
            return
        time.sleep(min(1.0, max(stay.seconds / 4, 0.02)))
