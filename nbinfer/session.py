"""What this kernel holds: loaded models, the default one, and how a request is made and run."""

from __future__ import annotations

import base64
import dataclasses
import difflib
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import InitVar, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from nbinfer.contract import rendering
from nbinfer.contract.errors import (
    ConfigError,
    DoesNotFit,
    ModelNotFound,
    NotSupported,
    RequestError,
    SchemaError,
    short_interrupt,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import (
    CompletionRequest,
    Constraint,
    EmbeddingRequest,
    ImageRequest,
    RerankRequest,
    Sampling,
)
from nbinfer.contract.results import Delta, Finished, GeneratedImage, ImageDone, ImageResult, Result
from nbinfer.contract.settings import configured, configured_aliases
from nbinfer.contract.units import human_bytes, plain_number

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from types import TracebackType

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from nbinfer.contract.keepalive import KeepAlive
    from nbinfer.contract.memory import RequiredMemory
    from nbinfer.contract.rendering import Bundle
    from nbinfer.contract.requests import Message, Request
    from nbinfer.contract.results import EmbeddingResult, Event
    from nbinfer.contract.schemas import Schema
    from nbinfer.engines.protocol import Engine, EngineInfo
    from nbinfer.engines.stream import Stream
    from nbinfer.models import FoundModel, ResolvedModel
    from nbinfer.models.hub import RemoteModel
    from nbinfer.request_log import Entry, History

_SAMPLING = tuple(f.name for f in dataclasses.fields(Sampling))
OPTIONS = (
    *_SAMPLING,
    "messages",
    "system",
    "images",
    "tools",
    "max_tokens",
    "stop",
    "schema",
    "choices",
    "regex",
    "grammar",
    "json",
    "logprobs",
    "think",
    "reasoning_budget",
    "adapter",
    "raw",
    "params",
    "priority",
)
"""Every option that :func:`infer` and its siblings take, besides the prompt and the model."""


# -- making a request -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request, and the schema its answer is read with."""

    request: CompletionRequest
    schema: Schema | None = None
    choices: tuple[str, ...] | None = None

    def read(self, result: Result) -> Result:
        """Add the typed value to a finished result.

        Raises
        ------
        SchemaError
            The answer does not fit the schema.
        """
        if result.finish_reason == "interrupted" or self.request.constraint is None:
            return result
        kind = self.request.constraint.kind
        if self.choices is not None:
            return result.with_changes(parsed=result.text)
        if self.schema is not None:
            return result.with_changes(parsed=self.schema.parse(result.text))
        if kind == "json":
            import json

            try:
                return result.with_changes(parsed=json.loads(result.text))
            except ValueError as e:
                raise SchemaError(f"the answer is not whole JSON: {e}", raw=result.text) from e
        return result


def prepare(prompt: str | None = None, **options: Any) -> Prepared:
    """Build and validate a request; runs nothing. The options are those of :func:`infer`.

    Raises
    ------
    RequestError
        An option is unknown, contradictory or out of range.
    """
    _add_params(options, options.pop("params", None))
    _reject_unknown(options)
    options = {name: plain_number(value) for name, value in options.items() if value is not None}
    sampling = Sampling(**{name: options.pop(name) for name in _SAMPLING if name in options})
    constraint, schema, choices = _constraint(options)
    messages, raw_prompt = _conversation(prompt, options)
    stop = options.pop("stop", ())
    request = CompletionRequest(
        messages=messages,
        prompt=raw_prompt,
        sampling=sampling,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        constraint=constraint,
        tools=tuple(options.pop("tools", ())),
        images=tuple(_image_bytes(image) for image in _listed(options.pop("images", ()))),
        **options,
    )
    return Prepared(request, schema, choices)


def _add_params(options: dict[str, Any], params: Any) -> None:
    """Add ``params`` to the options given by name."""
    if params is None:
        return
    if not isinstance(params, Mapping):
        raise RequestError(f"params is {type(params).__name__}, not a dict of options.")
    for name, value in params.items():
        if options.get(name) is not None and options[name] != value:
            raise RequestError(
                f"{name} is given twice: {options[name]!r:.60} by name, {value!r:.60} in params. Say which."
            )
        options[name] = value


def _reject_unknown(options: Mapping[str, Any], known: Sequence[str] = OPTIONS) -> None:
    unknown = [name for name in options if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RequestError(f"unknown option {unknown[0]!r}.{hint}\nOptions: {', '.join(sorted(known))}.")


def _constraint(options: dict[str, Any]) -> tuple[Constraint | None, Schema | None, tuple[str, ...] | None]:
    given = [
        name
        for name in ("schema", "choices", "regex", "grammar", "json")
        if options.get(name) is not None and options[name] is not False
    ]
    values = {name: options.pop(name, None) for name in ("schema", "choices", "regex", "grammar", "json")}
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} cannot be combined: each fixes the whole output.")
    if not given:
        return None, None, None
    kind, value = given[0], values[given[0]]
    if kind == "schema":
        from nbinfer.contract.schemas import Schema

        schema = value if isinstance(value, Schema) else Schema(value)
        return Constraint("json_schema", schema.closed), schema, None
    if kind == "choices":
        choices = (
            tuple(str(c) for c in value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
        )
        if not choices or any(not c for c in choices):
            raise RequestError("choices needs a list of at least one non-empty text.")
        return Constraint("choices", choices), None, choices
    if kind == "json":
        return Constraint("json"), None, None
    return Constraint("regex" if kind == "regex" else "grammar", str(value)), None, None


def _conversation(prompt: Any, options: dict[str, Any]) -> tuple[tuple[Message, ...] | None, str | None]:
    messages, system, raw = (
        options.pop("messages", None),
        options.pop("system", None),
        options.pop("raw", False),
    )
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError(
            f"the prompt is {type(prompt).__name__}, not text. For a conversation use messages=[…]."
        )
    if (prompt is None) == (messages is None):
        raise RequestError("give a prompt or messages=[…], not both and not neither.")
    if raw:
        if system is not None or messages is not None:
            raise RequestError(
                "raw=True sends the prompt as it is: it goes with neither system nor messages."
            )
        return None, prompt
    conversation = list(messages) if messages is not None else [{"role": "user", "content": prompt}]
    if system is not None:
        conversation.insert(0, {"role": "system", "content": str(system)})
    return tuple(conversation), None


def _listed(images: Any) -> Any:
    """One image counts as a list of one."""
    return images if isinstance(images, list | tuple) else [images]


def _image_bytes(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        path = Path(image)
        try:
            return path.read_bytes()
        except OSError as e:
            raise RequestError(f"cannot read the image {path}: {e.strerror or e}") from e
    if hasattr(image, "save"):  # a PIL image
        import io

        buffer = io.BytesIO()
        try:
            image.save(buffer, "PNG")
        except OSError:  # a colour space that PNG does not have
            image.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()
    if hasattr(image, "_repr_png_"):
        png = image._repr_png_()
        return base64.b64decode(png) if isinstance(png, str) else bytes(png)
    raise RequestError(f"an image is {type(image).__name__}: give a path, bytes or a PIL image.")


# -- running a request ----------------------------------------------------------------------------------


class TextStream:
    """An answer on its way: iterate it for pieces of text.

    Leaving the loop early stops the engine. ``result()`` waits for the whole answer, ``partial()`` is what
    there is so far, ``events()`` yields everything including progress and reasoning.
    """

    def __init__(self, stream: Stream, prepared: Prepared, model: Model) -> None:
        self._stream = stream
        self._prepared = prepared
        self._model = model
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._result: Result | None = None
        self._recorded = False
        # Nobody can read an answer whose stream is gone: it need not be finished.
        weakref.finalize(self, stream.cancel)

    def events(self) -> Iterator[Event]:
        """Yield every event; the last is ``Finished``, its result with the typed value read."""
        with short_interrupt("the answer was stopped."):
            try:
                for event in self._stream:
                    yield self._note(event)
            except BaseException as error:
                self._record(None, error)
                raise
            finally:
                if not self._stream.done:
                    self._stream.cancel()

    def __iter__(self) -> Iterator[str]:
        for event in self.events():
            if isinstance(event, Delta) and not event.reasoning:
                yield event.text

    async def aevents(self) -> AsyncIterator[Event]:
        """Yield every event without blocking the event loop."""
        try:
            async for event in self._stream:
                yield self._note(event)
        except BaseException as error:
            self._record(None, error)
            raise
        finally:
            if not self._stream.done:
                self._stream.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self.aevents():
            if isinstance(event, Delta) and not event.reasoning:
                yield event.text

    def _note(self, event: Event) -> Event:
        if isinstance(event, Delta):
            (self._reasoning if event.reasoning else self._text).append(event.text)
        elif isinstance(event, Finished):
            self._result = self._whole(cast("Result", event.result))
            return Finished(self._result)
        return event

    def _whole(self, result: Result) -> Result:
        """Return the result as its reader gets it, the typed value read."""
        result = self._model._adopt(result)  # noqa: SLF001 - one room
        self._record(result)
        return self._prepared.read(result)

    def _record(self, result: Result | None, error: BaseException | None = None) -> None:
        """Write the request down, once, when the notebook asked for that; None is what there is so far."""
        if session.history is not None and not self._recorded:
            self._recorded = True
            found = self.partial() if result is None else result
            session.history.add(_entry(self._model, self._prepared.request, found, error))

    def cancel(self) -> None:
        """Stop generating; the result is then ``interrupted``."""
        self._stream.cancel()

    def result(self) -> Result:
        """Wait for the whole answer. An interrupt (Ctrl-C, ■) stops the engine and is raised on."""
        if self._result is None:
            for event in self.events():
                del event
        if self._result is None:
            # The events were read to the end elsewhere, or the loop over them was left.
            self._result = self._whole(self._stream.result())
        return self._result

    def partial(self) -> Result:
        """What has arrived so far, as a result with ``finish_reason="interrupted"``."""
        if self._result is not None:
            return self._result
        request = self._prepared.request
        return self._model._adopt(  # noqa: SLF001 - one room
            Result(
                text="".join(self._text),
                reasoning="".join(self._reasoning) or None,
                finish_reason="interrupted",
                model=self._model.name,
                messages=request.messages,
            ),
        )


IMAGE_OPTIONS = ("size", "n", "steps", "guidance", "negative_prompt", "seed", "previews", "priority")
"""Every option that :func:`generate_image` takes, besides the prompt and the model."""


def prepare_images(prompt: str, **options: Any) -> ImageRequest:
    """Build and validate a request for images; runs nothing.

    Raises
    ------
    RequestError
        An option is unknown or out of range.
    """
    _add_params(options, options.pop("params", None))
    _reject_unknown(options, IMAGE_OPTIONS)
    given = {name: plain_number(value) for name, value in options.items() if value is not None}
    return ImageRequest(prompt=prompt, **given)


class ImageStream:
    """Images on their way: iterate it for steps, finished images, and the end.

    Leaving the loop early stops the engine after its present step. ``result()`` waits for all images,
    ``partial()`` is those that are finished.
    """

    def __init__(self, stream: Stream, prompt: str, model: Model) -> None:
        self._stream = stream
        self._prompt = prompt
        self._model = model
        self._images: list[GeneratedImage] = []
        self._result: ImageResult | None = None
        weakref.finalize(self, stream.cancel)

    def __iter__(self) -> Iterator[Event]:
        with short_interrupt("the images were stopped; the finished ones are kept."):
            try:
                for event in self._stream:
                    if isinstance(event, ImageDone):
                        self._images.append(event.image)
                    yield event
            finally:
                if not self._stream.done:
                    self._stream.cancel()

    def cancel(self) -> None:
        """Stop after the present step; the result is then ``interrupted``."""
        self._stream.cancel()

    def result(self) -> ImageResult:
        """Wait for all images. An interrupt (Ctrl-C, ■) stops the engine and is raised on."""
        if self._result is None:
            for event in self:
                del event
            self._result = cast("ImageResult", self._stream.result()).with_changes(model=self._model.name)
        return self._result

    def partial(self) -> ImageResult:
        """The images that are finished, as a result with ``finish_reason="interrupted"``."""
        if self._result is not None:
            return self._result
        return ImageResult(
            images=tuple(self._images),
            prompt=self._prompt,
            finish_reason="interrupted",
            model=self._model.name,
        )


def with_images(prompt: str, images: Any) -> Any:
    """The content of a message: the text alone, or images before it, as they stay in a conversation."""
    parts: list[dict[str, Any]] = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"},
        }
        for data in map(_image_bytes, _listed(images))
    ]
    return [*parts, {"type": "text", "text": prompt}] if parts else prompt


class Chat:
    """A conversation with one model; ``messages`` is its history."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self._system = system
        self.messages: list[dict[str, Any]] = []
        self.clear()

    def send(self, prompt: str, **options: Any) -> Result:
        """Ask, and keep both the question and the answer. A failed or interrupted turn is not kept."""
        asked = [*self.messages, {"role": "user", "content": with_images(prompt, options.pop("images", ()))}]
        result = self._model.infer(messages=asked, **options)
        self.messages = [*asked, {"role": "assistant", "content": result.text}]
        return result

    def clear(self) -> None:
        """Forget the conversation, keep the system prompt."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]


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

    def keep(self, stay: KeepAlive | None) -> None:
        """Set how long the model stays while idle; None is until it is unloaded."""
        watched = self.keep_alive is not None and not self.keep_alive.never
        self.keep_alive = stay
        if stay is not None and not stay.never and not watched:
            threading.Thread(target=_unload_when_idle, args=(self,), name="nbinfer-idle", daemon=True).start()

    def is_load_of(self, path: Path, mode: Mode, where: str, options: Mapping[str, Any]) -> bool:
        """Whether a load with these settings would be this model."""
        return (self.path, self.mode, self.where, dict(self.config)) == (path, mode, where, dict(options))

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

    def _adopt(self, result: Result) -> Result:
        return result.with_changes(model=self.name, continue_with=self.infer)


@short_interrupt("the request was stopped.")
def _wait(stream: Stream) -> Any:
    try:
        return stream.result()
    except BaseException:
        stream.cancel()
        raise


# -- the session ----------------------------------------------------------------------------------------


class Settings:
    """What a notebook can set once: ``model`` is the default of cells and calls that name none.

    Until it is set here, it is what the environment or a configuration file says
    (:mod:`nbinfer.contract.settings`); None goes back to that.
    """

    def __init__(self) -> None:
        self._model: str | None = None

    @property
    def explicit(self) -> str | None:
        """The name that was set here, if one was."""
        return self._model

    @property
    def model(self) -> str | None:
        """The default model's name."""
        name: str | None = self._model if self._model is not None else configured("model").value
        return name

    @model.setter
    def model(self, name: str | None) -> None:
        self._model = name

    def __repr__(self) -> str:
        return f"<Settings model={self.model!r}>"


@dataclass(frozen=True, eq=False)
class Running:
    """A request that an engine has: for whoever shows it, or stops it with ``cancel()``.

    ``since`` is of ``time.monotonic()``. Holds the stream weakly: an answer that nobody waits for is gone.
    """

    model: str
    request: Request
    stream: InitVar[Stream]
    since: float
    _stream: weakref.ref[Stream] = field(init=False)

    def __post_init__(self, stream: Stream) -> None:
        object.__setattr__(self, "_stream", weakref.ref(stream))

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        stream = self._stream()
        return stream is None or stream.done

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to stop."""
        stream = self._stream()
        return stream is None or stream.cancelled

    def cancel(self) -> None:
        """Ask the engine to stop; it does so at the next token."""
        stream = self._stream()
        if stream is not None:
            stream.cancel()


class Session:
    """The models this process has loaded, by name."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._running: weakref.WeakKeyDictionary[Stream, Running] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._loading: dict[str, threading.RLock] = {}
        self._aliases: dict[str, str] | None = None
        self.history: History | None = None
        """Where requests are recorded; None: nowhere."""

    @property
    def aliases(self) -> dict[str, str]:
        """Short names of models, to be changed at will; at first those of the configuration files."""
        if self._aliases is None:
            self._aliases = configured_aliases()
        return self._aliases

    def models(self) -> list[Model]:
        """Loaded models, oldest first."""
        with self._lock:
            return list(self._models.values())

    def add(self, model: Model) -> None:
        """Remember a model under its name; one of the same name is unloaded first."""
        with self._lock:
            replaced = self._models.pop(model.name, None)
            self._models[model.name] = model
        if replaced is not None and replaced is not model:
            replaced.engine.close()

    def forget(self, model: Model) -> None:
        """Take a model off the list."""
        with self._lock:
            for name in [name for name, known in self._models.items() if known is model]:
                del self._models[name]

    def note(self, stream: Stream, running: Running) -> None:
        """Remember a request for as long as somebody holds its stream."""
        with self._lock:
            self._running[stream] = running

    def running(self) -> list[Running]:
        """Requests that have not ended, oldest first."""
        with self._lock:
            known = list(self._running.values())
        return sorted((each for each in known if not each.done), key=lambda each: each.since)

    def named(self, name: str) -> Model | None:
        """Return the loaded model of exactly this name."""
        with self._lock:
            return self._models.get(name)

    @contextmanager
    def loading(self, name: str) -> Iterator[Callable[[Path], str]]:
        """Hold the one place where a model of this name is loaded: a second caller waits for the first.

        Yields a function that gives the name for a file: this one, or with a number where another file
        has it already.
        """
        with self._lock:
            place = self._loading.setdefault(name, threading.RLock())

        def free(path: Path) -> str:
            number, chosen = 1, name
            while (taken := self.named(chosen)) is not None and taken.path != path:
                number += 1
                chosen = f"{name}-{number}"
            return chosen

        with place:
            yield free

    def find(self, name: str) -> Model | None:
        """Return a loaded model by name, alias or reference; None when there is none."""
        ref = self.aliases.get(name, name)
        with self._lock:
            if name in self._models:
                return self._models[name]
            return next((m for m in self._models.values() if ref in (m.ref, m.name)), None)


session = Session()
settings = Settings()


def loaded() -> list[Model]:
    """Models loaded in this kernel, oldest first."""
    return session.models()


def get(model: Model | str | None = None, *, mode: Mode | str = Mode.COMPLETION) -> Model:
    """Return the model a call means: the one given, the default, or the only one loaded in that mode.

    Raises
    ------
    ModelNotFound
        None is meant, several could be, or the name is not loaded; the message lists what is.
    """
    if isinstance(model, Model):
        return model
    candidates = [m for m in session.models() if m.mode == mode]
    name = model if model is not None else settings.model
    if name is not None:
        found = session.find(name)
        if found is None:
            raise ModelNotFound(
                f"no model called {name!r} is loaded. {_loaded_words(session.models())}\n"
                f"Load it with nb.load({name!r})."
            )
        if found.mode == mode or model is not None:
            return found
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        hint = {
            Mode.EMBEDDING: '"demo-embed", mode="embedding"',
            Mode.RERANKING: 'ref, mode="reranking"',
            Mode.IMAGE_GENERATION: '"demo-image"',
        }.get(Mode(mode), '"demo"')
        raise ModelNotFound(
            f"no {mode} model is loaded. {_loaded_words(session.models())}\nLoad one with nb.load({hint})."
        )
    names = ", ".join(m.name for m in candidates)
    raise ModelNotFound(
        f"several {mode} models are loaded: {names}.\n"
        f"Say which: model={candidates[0].name!r}, or set nb.settings.model."
    )


def _loaded_words(models: list[Model]) -> str:
    return (
        "Loaded: " + ", ".join(f"{m.name} ({m.mode})" for m in models) + "."
        if models
        else "Nothing is loaded."
    )


def load(
    ref: str | Path,
    *,
    backend: str | None = None,
    where: str = "kernel",
    mode: Mode | str | None = None,
    name: str | None = None,
    context_size: int | None = None,
    keep_alive: Any = None,
    gpu_layers: int | None = None,
    kv_type: str | None = None,
    parallel: int | None = None,
    speculative: Any = None,
    force: bool = False,
    progress: Any = None,
    **backend_options: Any,
) -> Model:
    """Load a model and return it; the same call again returns the model that is already there.

    Parameters
    ----------
    ref
        ``demo``, ``demo-embed``, a path to a GGUF file, or any reference that ``nb.models()`` shows.
    backend
        Name of the backend; None chooses by the file's format.
    where
        ``kernel``: inside this process. ``sidecar``: in a process of its own, shared by all your notebooks,
        that outlives a restart of this kernel by the model's keep-alive; it is started where there is none.
    mode
        ``completion``, ``embedding``, ``reranking`` or ``image-generation``; None reads it from the file.
    context_size
        Tokens of prompt and answer together; -1 is the trained maximum; None is that, up to 4,096
        (2,048 for embeddings and ranking).
    keep_alive
        How long the model stays loaded while idle: ``"5m"``, seconds, or a timedelta. None (the default for
        a model in the kernel, where a variable of yours holds it) and -1: until it is unloaded. In the
        sidecar the time runs once no kernel holds the model, and None is 5 minutes.
    gpu_layers
        Layers on the GPU; None is all of them where there is one.
    kv_type
        Type of the KV cache (``f16``, ``q8_0``, ``q4_0``…).
    parallel
        Sequences decoded at once.
    speculative
        Guess tokens ahead: ``{"draft_model": ref, "num_tokens": 4, "min_acceptance_rate": 0.5}``, each
        optional; without a draft model, or with True, phrases of the prompt are guessed. The text stays what
        it is.
    force
        Load although the estimate says that it does not fit.
    progress
        Called with the fraction loaded, 0 to 1.
    backend_options
        Passed to the backend: ``threads``, ``flash_attention``, ``mmap``, ``batch_size``,
        ``experts_on_cpu`` (True, or of how many first blocks a mixture's experts stay in main memory), …; for
        images ``device``, ``dtype``, ``batch``.

    Raises
    ------
    ModelNotFound
        No such file, model or alias.
    GGUFParseError, ModelLoadError
        The file cannot be read or loaded.
    DoesNotFit
        It needs more memory than there is; the message names a setting that fits.
    BackendUnavailable
        The backend is not installed; the message is the install line.
    ConfigError
        A setting is not valid.
    """
    from nbinfer import backends
    from nbinfer.models import resolve

    _check_place(where)
    from nbinfer.contract.keepalive import KeepAlive

    if backend is not None and backends.get(backend).uses_external_model_management:
        named = {
            "context_size": context_size,
            "gpu_layers": gpu_layers,
            "kv_type": kv_type,
            "parallel": parallel,
            "speculative": speculative,
            "keep_alive": keep_alive,
        }
        set_here = {key: value for key, value in named.items() if value is not None}
        return _load_external(
            str(ref), backend, mode=mode, name=name, options={**set_here, **backend_options}
        )
    stay = None if keep_alive is None else KeepAlive.parse(keep_alive)
    resolved = resolve(str(ref), aliases=session.aliases, confirm=None if force else _confirm_download)
    actual_mode = _natural_mode(resolved) if mode is None else _mode(mode)
    asked = _engine_options(
        resolved,
        actual_mode,
        {"confirm": None if force else _confirm_download},
        context_size=context_size,
        gpu_layers=gpu_layers,
        kv_type=kv_type,
        parallel=parallel,
        speculative=speculative,
        **backend_options,
    )
    with session.loading(name or resolved.name) as free_name:
        name = name or free_name(resolved.path)
        known = session.named(name)
        if known is not None and known.is_load_of(resolved.path, actual_mode, where, asked):
            # In the sidecar the time runs there, and only while nobody holds the model.
            if where == "kernel":
                known.keep(stay)
            return known
        adapter = backends.for_format(resolved.format, backend)
        estimated: Callable[[], Any]
        if where == "kernel":
            estimate = _fits(resolved, actual_mode, asked, force=force, replacing=known)
            estimated = partial(_same, estimate)
        else:
            # The sidecar knows its own room, and can make some.
            estimated = partial(_estimate, resolved, actual_mode, asked, exact=False)
        began = time.perf_counter()
        engine: Engine
        if where == "sidecar":
            from nbinfer.contract.config import ModelConfig
            from nbinfer.sidecar.client import open_engine

            engine = open_engine(
                resolved.path,
                name=name,
                backend=adapter.name,
                mode=actual_mode,
                config=ModelConfig(keep_alive=stay),
                options=asked,
                on_progress=progress,
            )
        else:
            engine = adapter.open(
                resolved.path,
                mode=actual_mode,
                name=name,
                on_progress=progress,
                **asked,
            )
        model = Model(
            engine=engine,
            name=name,
            ref=str(ref),
            backend=adapter.name,
            where=where,
            mode=actual_mode,
            config=asked,
            path=resolved.path,
            paths=resolved.paths,
            estimated=estimated,
            load_seconds=time.perf_counter() - began,
        )
        session.add(model)
    if where == "kernel":
        model.keep(stay)
    return model


def _check_place(where: str) -> None:
    if where not in ("kernel", "sidecar"):
        raise ConfigError(f"where={where!r}: use 'kernel' or 'sidecar'.")


def _engine_options(
    resolved: Any, mode: Mode, fetching: Mapping[str, Any], /, **options: Any
) -> dict[str, Any]:
    """Return what is asked of the engine, without what is left open; ``fetching`` is for ``resolve``."""
    if options.get("speculative") is not None:
        options["speculative"] = _speculative(options["speculative"], fetching)
    asked = {key: value for key, value in options.items() if value is not None}
    if resolved.projector is not None and mode == Mode.COMPLETION:
        asked.setdefault("projector", resolved.projector)
    return asked


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What a load would do; made by :func:`dry_run`.

    ``loaded``: it is there already, and nothing would happen. ``unloads``: names of the models that would go
    to make room, in that order, or that it would replace. ``required`` is in bytes, None where the file's
    kind allows no estimate; ``fits`` says whether it would be loaded, and ``reason`` why not.
    """

    name: str
    where: str
    mode: Mode
    loaded: bool
    unloads: tuple[str, ...] = ()
    required: RequiredMemory | None = None
    fits: bool = True
    reason: str = ""

    def __str__(self) -> str:
        if self.loaded:
            return f"{self.name} is loaded in the {self.where}: nothing would happen."
        if not self.fits:
            return f"{self.name} would not be loaded: {self.reason}"
        size = "" if self.required is None else f" It needs {human_bytes(self.required.ram)} of RAM"
        vram = 0 if self.required is None else self.required.total_vram
        size += f" and {human_bytes(vram)} on GPUs." if vram else "." if size else ""
        going = f" Unloaded for it: {', '.join(self.unloads)}." if self.unloads else " Nothing is unloaded."
        return f"{self.name} would be loaded in the {self.where}.{size}{going}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001 - IPython's way to call it
        del cycle
        printer.text(str(self))


def dry_run(
    ref: str | Path,
    *,
    backend: str | None = None,
    where: str = "kernel",
    mode: Mode | str | None = None,
    name: str | None = None,
    keep_alive: Any = None,
    **options: Any,
) -> LoadPlan:
    """Say what :func:`load` would do with the same arguments: what fits, and which models would go.

    Loads, unloads and downloads nothing, and starts no sidecar: where none runs, none of its models would go.

    Raises
    ------
    ModelNotFound
        No such file, model or alias, or it is not on this disk yet.
    BackendUnavailable, ConfigError, GGUFParseError
        As :func:`load`.
    """
    from nbinfer import backends
    from nbinfer.models import resolve

    _check_place(where)
    if backend is not None and backends.get(backend).uses_external_model_management:
        raise ConfigError(f"backend={backend!r} loads nothing: the server does.")
    resolved = resolve(str(ref), aliases=session.aliases, download=False)
    actual_mode = _natural_mode(resolved) if mode is None else _mode(mode)
    force = bool(options.pop("force", False))
    options.pop("progress", None)
    asked = _engine_options(resolved, actual_mode, {"download": False}, **options)
    adapter = backends.for_format(resolved.format, backend)
    chosen = name or resolved.name
    known = session.named(chosen)
    if name is None and known is not None and known.path != resolved.path:
        known = None  # it would get a name of its own
    said: dict[str, Any] = {"name": chosen, "where": where, "mode": actual_mode}
    if known is not None and known.is_load_of(resolved.path, actual_mode, where, asked):
        return LoadPlan(**said, loaded=True)
    replaced = () if known is None else (known.name,)
    if where == "sidecar":
        from nbinfer.contract.config import ModelConfig
        from nbinfer.contract.keepalive import KeepAlive
        from nbinfer.sidecar.client import plan

        stay = None if keep_alive is None else KeepAlive.parse(keep_alive)
        try:
            found = plan(
                resolved.path,
                name=chosen,
                backend=adapter.name,
                mode=actual_mode,
                config=ModelConfig(keep_alive=stay),
                options=asked,
            )
        except DoesNotFit as error:
            return LoadPlan(**said, loaded=False, fits=False, reason=str(error))
        going = (*replaced, *(each for each in found.unloads if each not in replaced))
        return LoadPlan(**said, loaded=found.loaded, unloads=going, required=found.required)
    made = _estimate(resolved, actual_mode, asked)
    if made is None:
        return LoadPlan(**said, loaded=False, unloads=replaced)
    fits = force or made.verdict != "does not fit"
    reason = "" if fits else _refusal(resolved.name, made)
    return LoadPlan(**said, loaded=False, unloads=replaced, required=made.required, fits=fits, reason=reason)


def _load_external(
    ref: str, backend: str, *, mode: Mode | str | None, name: str | None, options: Mapping[str, Any]
) -> Model:
    """Name a model of a server that already runs; nothing is loaded here."""
    from nbinfer import backends

    actual_mode = Mode.COMPLETION if mode is None else _mode(mode)
    name = name or ref
    known = session.find(name)
    if known is not None:
        known.unload()
    engine = backends.get(backend).open(Path(ref), mode=actual_mode, name=name, **options)
    model = Model(
        engine=engine,
        name=name,
        ref=ref,
        backend=backend,
        where="server",
        mode=actual_mode,
        config=dict(options),
    )
    session.add(model)
    return model


def pull(ref: str, *, force: bool = False) -> ResolvedModel:
    """Download a model if it is not on this disk, and return its files.

    Says what memory it will take before the first byte of weights: when it will not fit here, it asks, or
    where nobody can be asked, raises.

    Raises
    ------
    ModelNotFound, ModelLoadError
        It cannot be found, or cannot be downloaded.
    DoesNotFit
        It will not fit, and ``force`` is not set.
    """
    from nbinfer.models import resolve

    return resolve(ref, aliases=session.aliases, confirm=None if force else _confirm_download)


def _confirm_download(remote: RemoteModel) -> None:
    """Show the estimate of a model that is not here yet; stop the download of one that will not fit."""
    from nbinfer.gguf import Header
    from nbinfer.memory import estimate

    header = remote.header
    if not isinstance(header, Header):
        return
    made = estimate(header)
    size = human_bytes(remote.n_bytes)
    if made.verdict != "does not fit":
        print(f"{remote.name}: {size} to download; {made.reason}.")  # noqa: T201 - said before a long wait
        return
    refusal = _refusal(remote.name, made).replace("loads it", "downloads it")
    try:
        answer = input(f"{refusal}\nDownload {size} all the same? [y/N] ")
    except (EOFError, RuntimeError, OSError):  # nobody is there to answer
        raise DoesNotFit(refusal) from None
    if not answer.strip().lower().startswith("y"):
        raise DoesNotFit(refusal)


def _mode(asked: Mode | str) -> Mode:
    try:
        return Mode(asked)
    except ValueError as e:
        raise ConfigError(f"mode={asked!r} is unknown: use one of {', '.join(Mode)}.") from e


def _speculative(asked: Any, fetching: Mapping[str, Any]) -> Any:
    """What the contract calls ``speculative``, with the draft model's file found."""
    from nbinfer.contract.config import SpeculativeConfig
    from nbinfer.engines.llamacpp import Speculative
    from nbinfer.models import resolve

    if asked is True:
        asked = {}
    if not isinstance(asked, SpeculativeConfig | Mapping):
        raise ConfigError(
            'speculative is True, to guess from the prompt, or a dict such as {"num_tokens": 4}.'
        )
    config = asked if isinstance(asked, SpeculativeConfig) else SpeculativeConfig(**asked)
    draft = None
    if config.draft_model is not None:
        draft = resolve(config.draft_model, aliases=session.aliases, **fetching).path
    return Speculative(
        draft_path=draft,
        num_tokens=config.num_tokens,
        min_acceptance_rate=config.min_acceptance_rate,
    )


def _natural_mode(resolved: Any) -> Mode:
    """What the file says it is made for."""
    if resolved.format == "diffusers":
        return Mode.IMAGE_GENERATION
    modes = resolved.header.modes
    return Mode(modes[0]) if modes else Mode.COMPLETION


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


def _fits(
    resolved: Any, mode: Mode, asked: Mapping[str, Any], *, force: bool, replacing: Model | None = None
) -> Any:
    """Estimate before the load; refuse what does not fit. None when the file's kind allows no estimate.

    A model that the new one replaces stays while both fit, so that a load that fails costs nothing.

    Raises
    ------
    DoesNotFit
        It needs more memory than there is, and ``force`` is not set.
    """
    made = _estimate(resolved, mode, asked)
    too_much = made is not None and made.verdict == "does not fit"
    # Some engines hold one model per process: then the two cannot be there side by side.
    if replacing is not None and (too_much or getattr(replacing.engine, "alone", False)):
        replacing.unload()
        made = _estimate(resolved, mode, asked)
    if made is None:
        return None
    if made.verdict == "does not fit" and not force:
        raise DoesNotFit(_refusal(resolved.name, made))
    return made


def _estimate(resolved: Any, mode: Mode, asked: Mapping[str, Any], *, exact: bool | None = None) -> Any:
    """Return the estimate of a load; None when the file's kind allows none."""
    if resolved.format == "diffusers":
        from nbinfer.memory import estimate_images

        given = {name: asked[name] for name in ("batch", "dtype", "device") if name in asked}
        return estimate_images(resolved.header, name=resolved.name, **given)
    if resolved.format == "safetensors":
        from nbinfer.engines.vllm.build import installed
        from nbinfer.memory.vllm import estimate_load

        build = installed()
        known = {} if build is None else {"device": build.device}
        try:
            return estimate_load(resolved.header, name=resolved.name, **{**asked, **known})
        except NotSupported:  # the configuration lacks what the formulas need
            return None
    if resolved.format != "gguf":
        return None
    from nbinfer.memory import CannotEstimate, estimate
    from nbinfer.memory.defaults import ESTIMATED

    options = {name: asked[name] for name in ESTIMATED if name in asked}
    speculative = asked.get("speculative")
    if speculative is not None:
        options["draft"] = speculative.draft_path
    if asked.get("exact"):
        options["parallel"] = 1
    try:
        return estimate(resolved.header, mode=mode, exact=exact, **options)
    except CannotEstimate:
        return None


def _same(value: Any) -> Any:
    return value


def _refusal(name: str, made: Any) -> str:
    advice = made.advice()[:2]
    lines = [f"{name} {made.reason}."]
    for each in advice:
        options = ", ".join(f"{key}={value!r}" for key, value in each.changes.items())
        lines.append(f"It fits with {options} ({each.text}).")
    if not advice:
        lines.append("No setting makes it fit here: take a smaller quantisation or unload other models.")
    lines.append("force=True loads it all the same.")
    return "\n".join(lines)


# -- the log of requests --------------------------------------------------------------------------------


def history(
    record: bool | None = None,  # noqa: FBT001 - the one thing that it switches
    *,
    path: str | Path | None = None,
    limit: int | None = None,
) -> History:
    """Return the log of requests; or begin, or stop, to write it.

    Nothing is written before ``record=True``, and then only what this kernel asks: cells, :func:`infer`,
    :func:`stream`, chats. Rows of a DataFrame are not in it; they have a journal of their own. The log
    keeps the exact prompt, the parameters with the seed, the engine and the digest of the weights, so that
    ``nb.history().replay(number)`` asks the same again. Only its user can read the file; ``.clear()``
    removes it.

    Parameters
    ----------
    record
        True begins to record, False stops; None changes nothing.
    path
        Another file than the usual one in the user's folder for the state of programs.
    limit
        Requests that are kept, 1,000 unless it says otherwise; the oldest go.

    Raises
    ------
    ConfigError
        ``limit`` is not a number of requests.
    """
    from nbinfer.request_log import LIMIT, History, default_path

    now = session.history
    file = Path(path).expanduser() if path is not None else now.path if now is not None else default_path()
    kept = limit if limit is not None else now.limit if now is not None else LIMIT
    recording = now is not None if record is None else bool(record)
    found = History(file, limit=kept, ask=_ask_again, recording=recording)
    if record is not None:
        session.history = found if record else None
    return found


def _entry(model: Model, request: CompletionRequest, result: Result, error: BaseException | None) -> Entry:
    from nbinfer.contract.errors import NbinferError
    from nbinfer.request_log import Entry, now

    cut = getattr(error, "result", None)
    result = cut if isinstance(cut, Result) else result
    prompt, failed = result.prompt, isinstance(error, Exception)
    if not prompt:
        # An answer that was stopped or refused does not bring its prompt along.
        with suppress(NbinferError):
            prompt = model.engine.render(request)[0]
    version = model.info.version
    return Entry(
        at=now(),
        model=model.name,
        ref=model.ref,
        where=model.where,
        engine=f"{model.backend} {version}".strip(),
        digest=model.digest,
        request=request,
        prompt=prompt,
        params=result.params or {"seed": request.sampling.seed},
        text=result.text,
        reasoning=result.reasoning,
        finish_reason="error" if failed and cut is None else result.finish_reason,
        tool_calls=result.tool_calls,
        usage=dataclasses.asdict(result.usage),
        timings=dataclasses.asdict(result.timings),
        error=str(error) if failed else None,
    )


def _ask_again(entry: Entry, model: Model | str | None) -> Result:
    """Ask what an entry asked; see :meth:`nbinfer.request_log.History.replay`."""
    chosen = get(model) if model is not None else session.find(entry.model)
    if chosen is None:
        raise ModelNotFound(
            f"{entry.model} is not loaded. {_loaded_words(loaded())}\n"
            f"Load it with nb.load({entry.ref!r}), or ask another: replay({entry.number}, model=…)."
        )
    if model is None and entry.digest and chosen.digest != entry.digest:
        raise RequestError(
            f"{chosen.name} has other weights ({chosen.digest[:12]}) than those that answered "
            f"({entry.digest[:12]}).\nTo ask it all the same: replay({entry.number}, model={chosen.name!r})."
        )
    request, schema, choices = entry.again(), None, None
    if request.constraint is not None and request.constraint.kind == "json_schema":
        from nbinfer.contract.schemas import Schema

        schema = Schema(request.constraint.value)
    elif request.constraint is not None and request.constraint.kind == "choices":
        choices = tuple(request.constraint.value)
    return TextStream(chosen.submit(request), Prepared(request, schema, choices), chosen).result()


def unload(model: Model | str | None = None) -> None:
    """Unload a model by handle or name; None unloads all.

    Raises
    ------
    ModelNotFound
        Nothing of that name is loaded.
    """
    if model is None:
        for each in loaded():
            each.unload()
        return
    if isinstance(model, str):
        found = session.find(model)
        if found is None:
            raise ModelNotFound(f"no model called {model!r} is loaded. {_loaded_words(loaded())}")
        model = found
    model.unload()


def infer(prompt: str | None = None, *, model: Model | str | None = None, **options: Any) -> Result:
    """Ask a model and wait for the answer.

    Parameters
    ----------
    prompt
        What to ask; or ``messages=[{"role": …, "content": …}, …]`` for a conversation.
    model
        A model or its name; None is the default, or the only one loaded.
    system
        The system prompt.
    temperature, top_p, top_k, min_p, seed, repeat_penalty, presence_penalty, frequency_penalty, logit_bias
        Sampling; see :class:`nbinfer.contract.requests.Sampling`. The default is greedy: the same call gives
        the same text.
    max_tokens
        At most so many tokens; None: as many as the context has room for.
    stop
        A string, or several, that ends the answer.
    schema, choices, regex, grammar, json
        What the answer must look like (one of them): a type or JSON Schema, a list of texts, a regular
        expression, Lark or GBNF text, or any JSON object. ``Result.parsed`` is then the typed value.
    logprobs
        k: log-probabilities of each token and of the k most likely ones.
    think, reasoning_budget
        For reasoning models.
    adapter
        Name of a LoRA adapter loaded with the model: ``nb.load(ref, lora={"name": file})``.
    images
        Paths, bytes or PIL images, for vision models.
    raw
        Send the prompt as it is, without the chat template.
    params
        More options as a dict.

    Raises
    ------
    RequestError
        An option is unknown or out of range; :class:`ContextOverflow` when the prompt is too long.
    ModelNotFound
        No model is loaded, or several are and none is named.
    SchemaError
        The answer was cut before it was whole.
    """
    return get(model).infer(prompt, **options)


def stream(prompt: str | None = None, *, model: Model | str | None = None, **options: Any) -> TextStream:
    """Start an answer; iterate the return value for text. The options are those of :func:`infer`."""
    return get(model).stream(prompt, **options)


def generate_image(
    prompt: str,
    *,
    model: Model | str | None = None,
    size: str | Sequence[int] | None = None,
    n: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> ImageResult:
    """Make images for a prompt and wait for them.

    Parameters
    ----------
    prompt
        What they show.
    model
        An image model or its name; None is the default, or the only one loaded for images.
    size
        ``"512x768"`` (width first) or (width, height) in pixels; None: what the model was trained for.
    n
        How many; image ``i`` is the one that ``seed + i`` gives alone.
    steps, guidance
        Denoising steps, and how closely the prompt is followed; None: the pipeline's own numbers.
    negative_prompt
        What they do not show.
    seed
        None draws one; the result and each PNG file record it.
    options
        ``previews``: small pictures of each image on its way, for those who read the events.

    Returns
    -------
    ImageResult
        ``.image`` is the first as a PIL image, ``.images`` all of them; a notebook shows them.

    Raises
    ------
    RequestError
        An option is unknown or out of range.
    ModelNotFound
        No image model is loaded, or several are and none is named.
    NotSupported
        The pipeline has no such setting.
    """
    found = get(model, mode=Mode.IMAGE_GENERATION)
    return found.generate_image(
        prompt,
        size=size,
        n=n,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        seed=seed,
        **options,
    )


async def ainfer(prompt: str | None = None, *, model: Model | str | None = None, **options: Any) -> Result:
    """As :func:`infer`, for ``await``: widgets stay live while it runs."""
    return await get(model).ainfer(prompt, **options)


def status() -> pd.DataFrame:
    """Every known backend: name, status word, detail and how to install it. Takes milliseconds."""
    from nbinfer import backends
    from nbinfer.tables import table

    rows = [
        {"backend": name, "status": str(found.word), "detail": found.detail or "", "install": advice or ""}
        for name, found, advice in backends.statuses()
    ]
    return table("status", rows, ["backend", "status", "detail", "install"])


def models() -> pd.DataFrame:
    """Models on this disk: the demo models, and what other programs keep here (read, never copied).

    Columns: name, ref (what :func:`load` takes), source, architecture, parameters, quantisation, size_bytes,
    disk_bytes (files shared with a row above count once), context (tokens it was trained for), modes,
    verdict (whether it fits here as :func:`load` would load it), problem.
    """
    from nbinfer.models import discover
    from nbinfer.tables import table

    columns = ["name", "ref", "source", "architecture", "parameters", "quantisation", "size_bytes"]
    columns += ["disk_bytes", "context", "modes", "verdict", "problem"]
    return table("models", [_model_row(found) for found in discover()], columns)


def _model_row(found: FoundModel) -> dict[str, Any]:
    header = found.header
    row: dict[str, Any] = {
        "name": found.name,
        "ref": found.ref,
        "source": found.source,
        "size_bytes": found.size,
        "disk_bytes": found.disk_bytes,
        "problem": found.trouble or "",
    }
    if header is not None:
        row |= {
            "architecture": header.architecture,
            "parameters": header.parameters,
            "quantisation": str(header.quantisation),
            "context": header.context_length,
            "modes": ", ".join(header.modes),
            "verdict": _verdict(header),
        }
    return row


def _verdict(header: Any) -> str:
    """Whether a model fits here with the usual settings, by formula; empty where it is not llama.cpp's."""
    from nbinfer.contract.errors import NbinferError
    from nbinfer.gguf import Header
    from nbinfer.gguf.pipeline import PipelineHeader
    from nbinfer.memory import estimate, estimate_images

    try:
        if isinstance(header, PipelineHeader):
            return estimate_images(header).verdict
        if not isinstance(header, Header):
            return ""
        return estimate(header, exact=False).verdict
    except NbinferError:
        return ""


def ps() -> pd.DataFrame:
    """Loaded models: where they run, the context in use, what they do, and their memory as estimated.

    A notebook shows the columns that fit a page; the frame has them all.
    """
    from nbinfer.tables import table

    rows = []
    for m in loaded():
        now = m.engine.load()
        rows.append(
            {
                "name": m.name,
                "mode": str(m.mode),
                "backend": m.backend,
                "where": m.where,
                "context": m.info.context_size,
                "context_used": now.context_used,
                "parallel": m.info.parallel,
                "running": now.running,
                "waiting": now.waiting,
                "tokens": now.tokens_generated,
                "load_seconds": round(m.load_seconds, 3),
                "memory_bytes": _estimated_bytes(m.memory),
            },
        )
    columns = [
        "name",
        "mode",
        "backend",
        "where",
        "context",
        "context_used",
        "parallel",
        "running",
        "waiting",
        "tokens",
        "load_seconds",
        "memory_bytes",
    ]
    return table("ps", rows, columns)


def _estimated_bytes(estimate: Any) -> int | None:
    from nbinfer.contract.memory import RequiredMemory

    required = getattr(estimate, "required", None)
    return required.ram + required.total_vram if isinstance(required, RequiredMemory) else None


_PACKAGES = ("ipython", "ipykernel", "pandas", "pyarrow", "llama-cpp-python", "vllm")


def doctor() -> pd.DataFrame:
    """Versions and health in one table, for a look or a report: columns what, status, detail.

    Packages, memory and GPUs, backends with what to type for those that are not usable, the models of this
    process, and the sidecar with its models and what killed ones left.
    """
    from nbinfer.sidecar.commands import checkup
    from nbinfer.tables import table

    rows = [*_versions(), *_devices(), _configuration()]
    for backend in status().itertuples(index=False):
        detail = ": ".join(filter(None, (str(backend.detail), str(backend.install))))
        rows.append({"what": f"backend {backend.backend}", "status": str(backend.status), "detail": detail})
    for model in loaded():
        info = model.info
        detail = f"{model.mode}, {model.backend}, context {info.context_size:,}, {info.parallel} at once"
        rows.append({"what": f"model {model.name}", "status": "ok", "detail": detail})
    return table("doctor", [*rows, *checkup()], ["what", "status", "detail"])


def _versions() -> Iterator[dict[str, str]]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from nbinfer._version import __version__

    yield {"what": "nbinfer", "status": "ok", "detail": __version__}
    detail = f"{platform.python_version()} on {platform.platform()}"
    yield {"what": "python", "status": "ok", "detail": detail}
    for package in _PACKAGES:
        try:
            yield {"what": package, "status": "ok", "detail": version(package)}
        except PackageNotFoundError:
            yield {"what": package, "status": "missing", "detail": ""}


def _configuration() -> dict[str, str]:
    from nbinfer.contract.settings import SETTINGS, sources

    try:
        for setting in SETTINGS:
            configured(setting.name)
        detail = "; ".join(sources()) or "defaults"
    except ConfigError as error:
        return {"what": "settings", "status": "error", "detail": str(error)}
    return {"what": "settings", "status": "ok", "detail": detail}


def _devices() -> Iterator[dict[str, str]]:
    from nbinfer.memory import machine

    here = machine()
    limit = f", limited by {here.ram.limit}" if here.ram.limit else ""
    detail = f"{human_bytes(here.ram.available)} free of {human_bytes(here.ram.total)}{limit}"
    yield {"what": "memory", "status": "ok", "detail": detail}
    for gpu in here.gpus:
        detail = f"{gpu.name}, {human_bytes(gpu.free)} free of {human_bytes(gpu.total)}"
        yield {"what": f"gpu {gpu.index}", "status": "ok", "detail": detail}
    if not here.gpus or here.gpu_status:
        word = "check" if here.gpus else "missing"
        yield {"what": "gpu", "status": word, "detail": here.gpu_status}
