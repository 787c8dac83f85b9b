"""Images in a page: a result as a gallery, frames with thumbnails, and a picture that is still on its way."""

from __future__ import annotations

import base64
import io
import json
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any

from nbinfer.contract.results import ImageDone, ImageProgress, ImageResult
from nbinfer.display.sinks import UPDATES_PER_SECOND, display_publisher, interrupt_later
from nbinfer.display.style import page
from nbinfer.display.text import escape, printable
from nbinfer.frames.images import images_of, open_image, png_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from nbinfer.contract.rendering import Bundle
    from nbinfer.contract.results import Event

THUMBNAIL = 96
"""Pixels of the longer side of a picture in a frame."""
SHOWN = 512
"""Pixels of the longer side of a picture in a gallery; smaller ones are shown as they are."""
_MOST = 100
_JPEG_ABOVE = 256

_STYLE = (
    "<style>"
    ".nbinfer-gallery{display:flex;flex-wrap:wrap;gap:8px;align-items:flex-start}"
    ".nbinfer-gallery details{max-width:100%}"
    ".nbinfer-gallery details[open]{flex-basis:100%}"
    ".nbinfer-gallery summary{list-style:none;cursor:zoom-in}"
    ".nbinfer-gallery summary::-webkit-details-marker{display:none}"
    ".nbinfer-gallery details[open] summary{cursor:zoom-out}"
    ".nbinfer-gallery img{display:block;max-width:100%;height:auto;border-radius:3px}"
    ".nbinfer-gallery details[open] img{width:auto;min-width:min(384px,100%)}"
    ".nbinfer-gallery summary:focus-visible{outline:2px solid var(--jp-brand-color1,#2f7fd0)}"
    "</style>"
)


def data_url(png: bytes, side: int) -> tuple[str, int, int]:
    """Return a picture of at most ``side`` pixels as a data URL, with its width and height.

    A large one is sent as JPEG: a saved notebook holds every one of them.
    """
    image = open_image(png)
    if max(image.size) <= side and max(image.size) <= _JPEG_ABOVE:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}", image.width, image.height
    small = image.convert("RGB")
    small.thumbnail((side, side))
    out = io.BytesIO()
    kind = "jpeg" if max(small.size) > _JPEG_ABOVE else "png"
    small.save(out, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", *small.size


def _img(png: bytes, side: int, text: str) -> str:
    address, width, height = data_url(png, side)
    return f'<img src="{address}" width="{width}" height="{height}" alt="{escape(text)}">'


class Gallery:
    """Pictures side by side, each with its words; a click, or Enter, makes one large. Needs no widget.

    Made by :func:`gallery`.
    """

    def __init__(
        self, pictures: list[tuple[bytes, str]], *, side: int, foot: str = "", captioned: bool = False
    ) -> None:
        self._pictures = pictures
        self._side = side
        self._foot = foot
        self._captioned = captioned

    def __len__(self) -> int:
        return len(self._pictures)

    def __repr__(self) -> str:
        lines = [f"{len(self._pictures)} image{'' if len(self._pictures) == 1 else 's'}"]
        lines += [f"  {printable(words)}" for _, words in self._pictures[:_MOST] if words]
        return "\n".join([*lines, *([printable(self._foot)] if self._foot else [])])

    def _repr_html_(self) -> str:
        cells = []
        for png, words in self._pictures[:_MOST]:
            caption = f'<div class="nbinfer-foot">{escape(words)}</div>' if words else ""
            picture = _img(png, self._side, words or "generated image")
            always, opened = (caption, "") if self._captioned else ("", caption)
            cells.append(f"<details><summary>{picture}{always}</summary>{opened}</details>")
        more = len(self._pictures) - _MOST
        foot = [f"… {more} more"] if more > 0 else []
        foot += [self._foot] if self._foot else []
        under = f'<div class="nbinfer-foot">{escape(" · ".join(foot))}</div>' if foot else ""
        return _STYLE + page(f'<div class="nbinfer-gallery">{"".join(cells)}</div>', under)


def gallery(
    source: Any, *, column: str | None = None, captions: Iterable[Any] | str | None = None, side: int = SHOWN
) -> Gallery:
    """Show images side by side; a click, or Enter, makes one large.

    Parameters
    ----------
    source
        A frame of :func:`nbinfer.generate_images`, an ``ImageResult``, or images (PIL or PNG bytes).
    column
        Of a frame: the column of images; None: the only one that holds images.
    captions
        Words below each image, or the name of the frame's column that holds them; None: what the image itself
        says of its prompt and seed, where it is made large.
    side
        Pixels of the longer side, at most.

    Raises
    ------
    RequestError
        There are no images in ``source``.
    """
    images = images_of(source, column)
    if isinstance(captions, str):
        said: list[Any] = list(source[captions])
    else:
        said = [None] * len(images) if captions is None else list(captions)
    pictures = []
    for image, own in zip(images, said, strict=True):
        if image is not None:
            png = png_of(image)
            pictures.append((png, _words(png) if own is None else str(own)))
    return Gallery(pictures, side=side, captioned=captions is not None)


def _words(png: bytes) -> str:
    """Return what an image says of itself: its prompt and its seed."""
    text = getattr(open_image(png), "text", {})
    try:
        made = json.loads(text["nbinfer"])
        return f"{made['prompt']} · seed {made['seed']}"
    except (KeyError, ValueError, TypeError):
        return ""


# -- a result -------------------------------------------------------------------------------------------


def summary(result: ImageResult) -> str:
    """Return the one line under images: model · how many · size · steps · seconds · how it ended."""
    count = len(result.images)
    parts = [result.model, f"{count} image{'' if count == 1 else 's'}"]
    parts += [str(result.params["size"])] if result.params.get("size") else []
    parts += [f"{result.params['steps']} steps"] if result.params.get("steps") else []
    parts += [f"seed {result.images[0].seed}"] if result.images else []
    parts += [f"{result.seconds:.3g} s"] if result.seconds else []
    if result.finish_reason != "stop":
        parts.append(result.error or result.finish_reason)
    if any(image.flagged for image in result.images):
        parts.append("blackened by the pipeline's safety checker")
    return " · ".join(part for part in parts if part)


def image_bundle(result: ImageResult) -> Bundle:
    """Return (data, metadata) that show a result: a gallery, and in plain text what it holds."""
    from nbinfer._version import __version__

    shown = Gallery(
        [(image.png, f"{result.prompt} · seed {image.seed}") for image in result.images],
        side=SHOWN,
        foot=summary(result),
    )
    kept = {
        "version": __version__,
        "model": result.model,
        "finish_reason": result.finish_reason,
        **{key: value for key, value in result.params.items() if value is not None},
    }
    data = {"text/plain": printable(f"[{summary(result)}]"), "text/html": shown._repr_html_()}
    return data, {"nbinfer": kept}


class ImageSink:
    """One output for images on their way: the step, a small picture, then the finished ones.

    Parameters
    ----------
    model
        For the line below.
    publish
        ``publish(data, metadata, update)``; default: this cell's output.
    """

    def __init__(
        self,
        *,
        model: str = "",
        publish: Callable[[dict[str, Any], dict[str, Any], bool], None] | None = None,
    ) -> None:
        self._model = model
        self._publish = publish or display_publisher()
        self._clock = time.monotonic
        self._done: list[tuple[bytes, str]] = []
        self._preview: bytes | None = None
        self._shown = False
        self._next = 0.0

    def event(self, event: Event) -> None:
        """Show a step or a finished image."""
        if isinstance(event, ImageDone):
            self._done.append((event.image.png, f"seed {event.image.seed}"))
            self._preview = None
        elif isinstance(event, ImageProgress):
            self._preview = event.preview or (self._preview if event.step > 1 else None)
            # Steps may come faster than a page can follow; pictures are always worth showing.
            if event.preview is not None or self._clock() >= self._next:
                self._show(self._bundle(event))

    def _bundle(self, step: ImageProgress) -> Bundle:
        of = f"image {step.index + 1} of {step.n}, " if step.n > 1 else ""
        words = f"{of}step {step.step} of {step.steps}"
        bar = (
            f'<progress max="{step.steps}" value="{step.step}" style="width:12em"></progress> {escape(words)}'
        )
        picture = "" if self._preview is None else _img(self._preview, 128, "the image on its way")
        done = Gallery(self._done, side=128)._repr_html_() if self._done else ""
        html = page(f'<div class="nbinfer-foot">{bar}</div>', picture)
        return {"text/plain": f"{self._model}: {words}", "text/html": done + html}, {}

    def _show(self, bundle: Bundle) -> None:
        with interrupt_later():
            self._publish(*bundle, self._shown)
            self._shown = True
        self._next = self._clock() + 1 / UPDATES_PER_SECOND

    def finish(self, result: ImageResult) -> None:
        """Replace the output by the final one; it is all that a saved notebook keeps."""
        self._show(image_bundle(result))


class ImageTerminalSink:
    """Images in a terminal: one line for each, and how it ended, on standard error."""

    def event(self, event: Event) -> None:
        """Say which image is finished."""
        if isinstance(event, ImageDone):
            image = event.image
            sys.stderr.write(f"image {event.index + 1}: {image.width}x{image.height}, seed {image.seed}\n")

    def finish(self, result: ImageResult) -> None:
        """Say how it ended."""
        sys.stderr.write(f"[{printable(summary(result))}]\n")


class ShownImages(ImageResult):
    """Images that are on screen already, so that returning them from a cell does not show them twice."""

    _fresh: bool = False

    @classmethod
    def of(cls, result: ImageResult) -> ShownImages:
        """Return ``result`` as one that was just shown."""
        shown = cls(**{name: getattr(result, name) for name in result.__dataclass_fields__})
        object.__setattr__(shown, "_fresh", True)
        return shown

    def settle(self) -> None:
        """Mark the cell that showed it as ended: from now on, displaying it shows it."""
        object.__setattr__(self, "_fresh", False)

    def _ipython_display_(self) -> None:
        if not self._fresh:
            # IPython's word for "use the other formatters".
            raise NotImplementedError
        self.settle()


# -- frames ---------------------------------------------------------------------------------------------


def image_frame_bundle(frame: Any) -> Bundle:
    """Return (data, metadata) of a pandas frame with images: pandas' own table, with thumbnails in it."""
    import pandas as pd

    pictures: list[str] = []

    def cell(value: Any) -> str:
        # A mark that no value can hold, since it is drawn anew: pandas escapes what stands around it.
        pictures.append(_img(png_of(value), THUMBNAIL, "generated image"))
        return f"{mark}{len(pictures) - 1}."

    mark = f"nbinfer-{secrets.token_hex(8)}-"
    plain = pd.DataFrame(frame)
    shown = _cut(plain, pd.get_option("display.max_rows"), pd.get_option("display.min_rows"))
    columns = [place for place in range(shown.shape[1]) if any(map(_is_picture, shown.iloc[:, place]))]
    formatters = {
        place: lambda value: cell(value) if _is_picture(value) else ("" if value is None else str(value))
        for place in columns
    }
    # Two columns may have one name: they go by their place until the table is drawn.
    named = shown.copy(deep=False)
    named.columns = pd.Index([f"{mark}c{place}." for place in range(shown.shape[1])])
    drawn = {f"{mark}c{place}.": formatter for place, formatter in formatters.items()}
    html = named.to_html(formatters=drawn, notebook=True)
    for place, name in enumerate(shown.columns):
        html = html.replace(f"{mark}c{place}.", escape(name))
    for number, picture in enumerate(pictures):
        html = html.replace(f"{mark}{number}.", picture)
    if len(shown) < len(plain):
        html += f"<p>{len(plain)} rows, {plain.shape[1]} columns</p>"
    return {"text/plain": printable(repr(plain)), "text/html": html}, {}


def _cut(frame: Any, most: int | None, least: int | None) -> Any:
    """Return what of a long frame is shown: its beginning and its end."""
    import pandas as pd

    if most is None or len(frame) <= most:
        return frame
    half = max(1, (least or most) // 2)
    return pd.concat([frame.iloc[:half], frame.iloc[-half:]])


def _is_picture(value: Any) -> bool:
    return hasattr(value, "save") and hasattr(value, "mode")
