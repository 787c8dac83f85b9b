"""Images on the wire: OpenAI's shapes, and beside them what those have no place for."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import EngineError, NotSupported
from nbinfer.contract.results import GeneratedImage, ImageDone, ImageProgress, ImageResult

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.contract.requests import ImageRequest

PATH = "/v1/images/generations"
PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"
"""OpenAI's events of a stream."""
STEP, FINISHED = "nbinfer.step", "nbinfer.finished"
"""Our own, sent only to those who ask for them."""


def image_body(request: ImageRequest, model: str, *, own: bool) -> dict[str, Any]:
    """Return the body of a request for images.

    Raises
    ------
    NotSupported
        Another server cannot be told what is asked.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "n": request.n,
        "size": None if request.size is None else f"{request.size[0]}x{request.size[1]}",
    }
    ours = {
        "negative_prompt": request.negative_prompt,
        "steps": request.steps,
        "guidance": request.guidance,
        "seed": request.seed,
    }
    if own:
        body |= ours | {"partial_images": request.previews, "priority": request.priority}
        body |= {"stream": True, "nbinfer": True}
    else:
        refused = [name for name, value in ours.items() if value is not None and name != "seed"]
        if refused:
            raise NotSupported(f"an external server takes no {refused[0]} in OpenAI's API.")
        # Not OpenAI's own, but what local servers call it.
        body |= {"seed": request.seed, "response_format": "b64_json"}
    return {key: value for key, value in body.items() if value is not None}


def image_to_json(image: GeneratedImage) -> dict[str, Any]:
    """Return an image in OpenAI's shape; ``nbinfer`` holds the rest."""
    rest = {"seed": image.seed, "width": image.width, "height": image.height, "flagged": image.flagged}
    return {"b64_json": base64.b64encode(image.png).decode(), "nbinfer": rest}


def image_from_json(value: Mapping[str, Any], seed: int = 0) -> GeneratedImage:
    """Read an image; one of another server is opened for its size.

    Raises
    ------
    EngineError
        It is none.
    """
    data = value.get("b64_json")
    if not isinstance(data, str):
        raise EngineError("the server sent no image data: it must take response_format=b64_json.")
    png, rest = base64.b64decode(data), value.get("nbinfer")
    if isinstance(rest, dict):
        return GeneratedImage(png, rest["seed"], rest["width"], rest["height"], rest["flagged"])
    from PIL import Image

    image = Image.open(io.BytesIO(png))
    if image.format != "PNG":
        out = io.BytesIO()
        image.save(out, "PNG")
        png = out.getvalue()
    return GeneratedImage(png, seed, image.width, image.height)


def details_from_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what our own server says of the whole answer; what a newer one adds is left out."""
    return {key: value[key] for key in ("finish_reason", "params", "seconds")}


def event_from_json(chunk: Mapping[str, Any]) -> ImageProgress | ImageDone | None:
    """Read an event of our own stream; None for one that is not about steps or images."""
    kind, rest = chunk.get("type"), chunk.get("nbinfer") or {}
    if kind == STEP:
        preview = chunk.get("b64_json")
        return ImageProgress(
            rest["index"],
            rest["n"],
            rest["step"],
            rest["steps"],
            None if preview is None else base64.b64decode(preview),
        )
    return ImageDone(rest["index"], image_from_json(chunk)) if kind == COMPLETED else None


def result_from_json(body: Any, request: ImageRequest, *, model: str, seconds: float) -> ImageResult:
    """Read the whole answer of a server that is not ours."""
    seed = request.seed or 0
    data = body.get("data") if isinstance(body, dict) else None
    images = tuple(image_from_json(each, seed + i) for i, each in enumerate(data or ()))
    return ImageResult(
        images=images,
        prompt=request.prompt,
        params={"n": request.n, "seed": request.seed},
        model=model,
        seconds=seconds,
    )
