"""Images for vision models, through llama.cpp's mtmd library.

The projector (``mmproj`` file) turns an image into rows that stand where tokens would. A prompt with images
is cut into pieces of text and images; the engine's thread feeds them to the context one after another.
"""

from __future__ import annotations

import ctypes
import weakref
from contextlib import ExitStack
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import BackendUnavailable, ModelLoadError, NotSupported, RequestError
from nbinfer.engines.images import image_bytes
from nbinfer.engines.llamacpp.library import LOG, library, log_callback

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import ModuleType

    from numpy.typing import NDArray

    from nbinfer.contract.requests import CompletionRequest, Message
    from nbinfer.engines.llamacpp.weights import Weights

MARKER = "<__media__>"
"""What stands for an image in a rendered prompt; mtmd's own default."""

# Positions of images have no token: numbers that no other prompt has keep prefixes from being mistaken.
_placeholders = count(-2, -1)


@cache
def mtmd() -> ModuleType:
    """The bindings of mtmd, its log in our buffer."""
    lib = library()
    try:
        from llama_cpp import mtmd_cpp
    except (ImportError, OSError, RuntimeError) as e:
        raise BackendUnavailable(f"this llama.cpp was built without image support: {e}") from e
    mtmd_cpp.mtmd_log_set(log_callback(lib), ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(log_callback(lib), ctypes.c_void_p(0))
    module: ModuleType = mtmd_cpp
    return module


class Media:
    """A prompt with images, cut and ready to be fed. Frees itself.

    Attributes
    ----------
    n_tokens
        Rows it takes in the context.
    placeholders
        One number per position, int32, unlike any token.
    """

    def __init__(self, lib: Any, chunks: Any) -> None:
        self.chunks = chunks
        self.n_tokens = int(lib.mtmd_helper_get_n_tokens(chunks))
        n = int(lib.mtmd_helper_get_n_pos(chunks))
        self.placeholders: NDArray[np.int32] = np.fromiter(
            (next(_placeholders) for _ in range(n)), np.int32, n
        )
        weakref.finalize(self, lib.mtmd_input_chunks_free, chunks)


class Projector:
    """The image encoder beside a model.

    Parameters
    ----------
    path
        The ``mmproj`` GGUF file.

    Raises
    ------
    ModelLoadError
        The file is no projector, or one for another model.
    """

    def __init__(self, weights: Weights, path: Path, *, threads: int) -> None:
        lib = self._lib = mtmd()
        params = lib.mtmd_context_params_default()
        params.use_gpu = bool(library().llama_supports_gpu_offload())
        params.n_threads = threads
        params.print_timings = False
        params.warmup = False
        since = LOG.mark()
        self._pointer: Any = lib.mtmd_init_from_file(str(path).encode(), weights.pointer, params)
        if not self._pointer:
            reasons = LOG.errors(since)
            reason = reasons[-1][:200] if reasons else "no reason given"
            raise ModelLoadError(
                f"cannot load the projector {path.name}: {reason}\n"
                f"It must be the mmproj file made for {weights.path.stem}.",
            )
        if not lib.mtmd_support_vision(self._pointer):
            self.close()
            raise NotSupported(f"{path.name} reads sound, not images; nbinfer passes images only.")

    def cut(self, text: str, images: Sequence[bytes], *, add_special: bool) -> Media:
        """Cut a rendered prompt with one marker per image.

        Raises
        ------
        RequestError
            An image cannot be read, or the prompt has not one marker for each.
        """
        lib = self._lib
        with ExitStack() as frees:
            bitmaps = []
            for i, data in enumerate(images):
                bitmaps.append(self._bitmap(i, data))
                frees.callback(lib.mtmd_bitmap_free, bitmaps[-1])
            chunks = lib.mtmd_input_chunks_init()
            encoded = text.encode("utf-8", "surrogatepass")
            given = lib.mtmd_input_text(
                text=encoded, text_len=len(encoded), add_special=add_special, parse_special=True
            )
            array = (lib.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
            code = lib.mtmd_tokenize(self._pointer, chunks, ctypes.byref(given), array, len(bitmaps))
        if code == 0:
            return Media(lib, chunks)
        lib.mtmd_input_chunks_free(chunks)
        if code == 1:
            raise RequestError(
                f"the prompt has not one place for each of its {len(images)} images: "
                "the model's chat template may not take images.",
            )
        raise RequestError("the images cannot be prepared for this model.")

    def _bitmap(self, number: int, data: bytes) -> Any:
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        bitmap = self._lib.mtmd_helper_bitmap_init_from_buf(self._pointer, buffer, len(data), False)
        if not bitmap:
            raise RequestError(f"image {number} cannot be read: give PNG, JPEG, BMP or GIF data.")
        return bitmap

    def feed(self, context: Any, media: Media, sequence: int, n_batch: int) -> bool:
        """Feed all of it to a llama.cpp context, logits for the last row; False when it did not go in."""
        end = ctypes.c_int32(0)
        code = self._lib.mtmd_helper_eval_chunks(
            self._pointer, context, media.chunks, 0, sequence, n_batch, True, ctypes.byref(end)
        )
        return bool(code == 0)

    def close(self) -> None:
        """Free the projector; idempotent."""
        if self._pointer:
            self._lib.mtmd_free(self._pointer)
            self._pointer = None


def take_images(request: CompletionRequest) -> tuple[tuple[Message, ...], list[bytes]]:
    """Return the request's messages with markers for their images, and the images in order.

    ``request.images`` stand before the text of the last user message.

    Raises
    ------
    RequestError
        An image is given as an address: nothing is fetched.
    """
    images: list[bytes] = []
    messages = [_with_markers(message, images) for message in request.messages or ()]
    if request.images:
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise RequestError("images belong to a user message, and there is none.")
        last = messages[users[-1]]
        markers = "\n".join([MARKER] * len(request.images))
        messages[users[-1]] = {**last, "content": f"{markers}\n{last['content']}"}
        images.extend(request.images)
    return tuple(messages), images


def _with_markers(message: Message, images: list[bytes]) -> dict[str, Any]:
    content = message.get("content")
    # A marker that somebody typed is text like any other.
    if isinstance(content, str) or content is None:
        return {**message, "content": (content or "").replace(MARKER, "")}
    texts = []
    for part in content:
        if part.get("type") == "image_url":
            images.append(image_bytes(part["image_url"]["url"]))
            texts.append(MARKER)
        else:
            texts.append(str(part.get("text", "")).replace(MARKER, ""))
    return {**message, "content": "\n".join(texts)}
