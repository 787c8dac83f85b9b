"""Answers on their way: text and images, piece by piece, stopped by whoever leaves them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, cast

from nbinfer.contract.errors import short_interrupt
from nbinfer.contract.results import Delta, Finished, GeneratedImage, ImageDone, ImageResult, Result
from nbinfer.session.recording import record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from nbinfer.contract.results import Event
    from nbinfer.engines.stream import Stream
    from nbinfer.session.asking import Prepared
    from nbinfer.session.model import Model


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
        """Write the request down, once; None is what there is so far."""
        if not self._recorded:
            self._recorded = True
            found = self.partial() if result is None else result
            record(self._model, self._prepared.request, found, error)

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
