"""Images in requests, for every engine that takes them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nbinfer.contract.errors import RequestError

if TYPE_CHECKING:
    from nbinfer.contract.requests import CompletionRequest


def has_images(request: CompletionRequest) -> bool:
    """Whether a request brings images, beside its text or inside a message."""
    return bool(request.images) or any(
        isinstance(part, Mapping) and part.get("type") == "image_url"
        for message in request.messages or ()
        if not isinstance(message.get("content"), str)
        for part in message.get("content") or ()
    )


def image_bytes(url: str) -> bytes:
    """Return the bytes of an image given as a ``data:`` URL.

    Raises
    ------
    RequestError
        It is another address, which is never fetched, or not valid.
    """
    head, _, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise RequestError(
            f"an image must be a data: URL, got {url[:40]!r}: nothing is fetched from the network."
        )
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as e:
        raise RequestError(f"an image's data: URL is not valid base64: {e}") from e
