"""Answers of ``/v1/images/generations``, in OpenAI's shapes."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

from nbinfer.contract.results import Finished, ImageDone, ImageProgress
from nbinfer.engines.remote.images import COMPLETED, FINISHED, PARTIAL, STEP, image_to_json
from nbinfer.engines.remote.wire import error_to_json
from nbinfer.sidecar.answers import DONE, sse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from nbinfer.contract.results import ImageResult
    from nbinfer.engines.stream import Stream


def whole(result: ImageResult, *, details: bool) -> dict[str, Any]:
    """Return all images in one answer."""
    data = [image_to_json(image) for image in result.images]
    for each in data if not details else ():
        del each["nbinfer"]
    answer: dict[str, Any] = {"created": int(time.time()), "data": data, "output_format": "png"}
    if result.images:
        answer["size"] = f"{result.images[0].width}x{result.images[0].height}"
    return answer | ({"nbinfer": _finished(result)} if details else {})


def _finished(result: ImageResult) -> dict[str, Any]:
    return {
        "finish_reason": result.finish_reason,
        "params": dict(result.params),
        "seconds": result.seconds,
    }


async def events(
    stream: Stream,
    *,
    size: str,
    details: bool,
    on_end: Callable[[ImageResult | BaseException | None], None],
) -> AsyncGenerator[bytes, None]:
    """Yield a stream of images as they come, with pictures of the one on its way where they were asked for.

    Parameters
    ----------
    size
        Of the finished images, as OpenAI's events say it.
    details
        Whether to report every step, and how it ended.
    on_end
        Called once: with the result, with the error, or with None when the client went away.
    """
    ended: ImageResult | BaseException | None = None
    shown = 0
    try:
        async for event in stream:
            if isinstance(event, ImageProgress):
                at = {"index": event.index, "n": event.n, "step": event.step, "steps": event.steps}
                picture = None if event.preview is None else base64.b64encode(event.preview).decode()
                if details:
                    yield sse({"type": STEP, "nbinfer": at} | ({"b64_json": picture} if picture else {}))
                elif picture is not None:
                    yield sse(_event(PARTIAL, size) | {"b64_json": picture, "partial_image_index": shown})
                    shown += 1
            elif isinstance(event, ImageDone):
                body = image_to_json(event.image)
                body["nbinfer"]["index"] = event.index
                if not details:
                    del body["nbinfer"]
                yield sse(_event(COMPLETED, size) | body)
            elif isinstance(event, Finished):
                result: Any = event.result
                ended = result
                if details:
                    yield sse({"type": FINISHED, "nbinfer": _finished(result)})
        yield DONE
    except Exception as error:  # noqa: BLE001 - whatever ended the request is its last event
        ended = error
        yield sse(error_to_json(error)[1])
    finally:
        on_end(ended)


def _event(kind: str, size: str) -> dict[str, Any]:
    return {
        "type": kind,
        "created_at": int(time.time()),
        "size": size,
        "quality": "auto",
        "background": "opaque",
        "output_format": "png",
    }
