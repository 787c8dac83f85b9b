"""Answers on their way: text and images, piece by piece, stopped by whoever leaves them."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from nbinfer.contract.errors import short_interrupt
from nbinfer.contract.results import Delta, Finished, GeneratedImage, ImageDone, ImageResult, Result
from nbinfer.session.recording import record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from nbinfer.contract.results import Event
    from nbinfer.engines.stream import Stream
    from nbinfer.session.asking import Prepared
    from nbinfer.session.model import Model

R = TypeVar("R", bound=Result | ImageResult)


class _OnItsWay(ABC, Generic[R]):
    """What text and images have in common: events that are read to the end, or left and thereby stopped."""

    _interrupted = ""
    """What an interrupt says."""

    def __init__(self, stream: Stream, model: Model) -> None:
        self._stream = stream
        self._model = model
        self._result: R | None = None
        # Nobody can read an answer whose stream is gone: it need not be finished.
        weakref.finalize(self, stream.cancel)

    def events(self) -> Iterator[Event]:
        """Yield every event; the last is ``Finished``, with what :meth:`result` returns."""
        with short_interrupt(self._interrupted):
            try:
                for event in self._stream:
                    yield self._note(event)
            except BaseException as error:
                self._failed(error)
                raise
            finally:
                if not self._stream.done:
                    self._stream.cancel()

    async def aevents(self) -> AsyncIterator[Event]:
        """Yield every event without blocking the event loop."""
        try:
            async for event in self._stream:
                yield self._note(event)
        except BaseException as error:
            self._failed(error)
            raise
        finally:
            if not self._stream.done:
                self._stream.cancel()

    def cancel(self) -> None:
        """Ask the engine to stop; the result is then ``interrupted``."""
        self._stream.cancel()

    def result(self) -> R:
        """Wait for all of it. An interrupt (Ctrl-C, ■) stops the engine and is raised on."""
        if self._result is None:
            for event in self.events():
                del event
        if self._result is None:
            # The events were read to the end elsewhere, or the loop over them was left.
            self._result = self._whole(self._stream.result())
        return self._result

    def partial(self) -> R:
        """What has arrived so far, as a result with ``finish_reason="interrupted"``."""
        return self._so_far() if self._result is None else self._result

    def _note(self, event: Event) -> Event:
        if isinstance(event, Finished):
            self._result = self._whole(event.result)
            return Finished(self._result)
        self._keep(event)
        return event

    def _failed(self, error: BaseException) -> None:
        """Take note of an error, or of a loop that was left."""

    @abstractmethod
    def _keep(self, event: Event) -> None:
        """Remember what an event brings, for :meth:`partial`."""

    @abstractmethod
    def _whole(self, result: Any) -> R:
        """Return the engine's result as its reader gets it."""

    @abstractmethod
    def _so_far(self) -> R:
        """Return what has arrived."""


class TextStream(_OnItsWay[Result]):
    """An answer on its way: iterate it for pieces of text.

    Leaving the loop early stops the engine. ``result()`` waits for the whole answer, ``partial()`` is what
    there is so far, ``events()`` yields everything including progress and reasoning.
    """

    _interrupted = "the answer was stopped."

    def __init__(self, stream: Stream, prepared: Prepared, model: Model) -> None:
        super().__init__(stream, model)
        self._prepared = prepared
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._recorded = False

    def __iter__(self) -> Iterator[str]:
        for event in self.events():
            if isinstance(event, Delta) and not event.reasoning:
                yield event.text

    async def __aiter__(self) -> AsyncIterator[str]:
        async for event in self.aevents():
            if isinstance(event, Delta) and not event.reasoning:
                yield event.text

    def _keep(self, event: Event) -> None:
        if isinstance(event, Delta):
            (self._reasoning if event.reasoning else self._text).append(event.text)

    def _whole(self, result: Any) -> Result:
        """Return the result with the typed value read."""
        result = self._model.adopt(cast("Result", result))
        self._record(result)
        return self._prepared.read(result)

    def _failed(self, error: BaseException) -> None:
        self._record(self.partial(), error)

    def _record(self, result: Result, error: BaseException | None = None) -> None:
        """Write the request down, once."""
        if not self._recorded:
            self._recorded = True
            record(self._model, self._prepared.request, result, error)

    def _so_far(self) -> Result:
        return self._model.adopt(
            Result(
                text="".join(self._text),
                reasoning="".join(self._reasoning) or None,
                finish_reason="interrupted",
                model=self._model.name,
                messages=self._prepared.request.messages,
            ),
        )


class ImageStream(_OnItsWay[ImageResult]):
    """Images on their way: iterate it for steps, finished images, and the end.

    Leaving the loop early stops the engine after its present step. ``result()`` waits for all images,
    ``partial()`` is those that are finished.
    """

    _interrupted = "the images were stopped; the finished ones are kept."

    def __init__(self, stream: Stream, prompt: str, model: Model) -> None:
        super().__init__(stream, model)
        self._prompt = prompt
        self._images: list[GeneratedImage] = []

    def __iter__(self) -> Iterator[Event]:
        return self.events()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self.aevents()

    def _keep(self, event: Event) -> None:
        if isinstance(event, ImageDone):
            self._images.append(event.image)

    def _whole(self, result: Any) -> ImageResult:
        return cast("ImageResult", result).with_changes(model=self._model.name)

    def _so_far(self) -> ImageResult:
        return ImageResult(
            images=tuple(self._images),
            prompt=self._prompt,
            finish_reason="interrupted",
            model=self._model.name,
        )
