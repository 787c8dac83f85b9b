"""Images of a request as vLLM takes them: placeholders in the messages, and PIL images beside the prompt."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import BackendUnavailable, RequestError
from nbinfer.engines.images import image_bytes

if TYPE_CHECKING:
    from nbinfer.contract.requests import CompletionRequest, Message

_PLACE = {"type": "image"}


def with_pictures(request: CompletionRequest) -> tuple[list[Message], list[Any]]:
    """Return the request's messages with a place for each image, and the images in order.

    ``request.images`` stand before the text of the last user message.

    Raises
    ------
    RequestError
        An image cannot be read, or is given as an address.
    """
    messages: list[Message] = list(request.messages or ())
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if request.images and not users:
        raise RequestError("images belong to a user message, and there is none.")
    found: list[bytes] = []
    for i, message in enumerate(messages):
        if request.images and i == users[-1]:
            found.extend(request.images)
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            message = {**message, "content": [_PLACE] * len(request.images) + parts}  # noqa: PLW2901
        messages[i] = _placed(message, found)
    return messages, [_opened(i, data) for i, data in enumerate(found)]


def _placed(message: Message, found: list[bytes]) -> Message:
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    parts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "image_url":
            found.append(image_bytes(part["image_url"]["url"]))
            parts.append(_PLACE)
        else:
            parts.append(part)
    return {**message, "content": parts}


def _opened(number: int, data: bytes) -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        raise BackendUnavailable("images need Pillow.\nInstall it with: pip install pillow") from e
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError) as e:
        raise RequestError(f"image {number} cannot be read: give PNG, JPEG, BMP or GIF data.") from e
