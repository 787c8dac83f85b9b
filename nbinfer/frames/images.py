"""``generate_images``: an image for each row, by an image model."""

from __future__ import annotations

import base64
import html as html_text
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import NotSupported, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import ImageRequest, parse_size
from nbinfer.contract.results import ImageProgress
from nbinfer.contract.units import plain_number
from nbinfer.frames.journal import IMAGES
from nbinfer.frames.outcomes import Record
from nbinfer.frames.output import sample_column, side_columns
from nbinfer.frames.pictures import open_pictures
from nbinfer.frames.progress import JupyterSink, make_sink
from nbinfer.frames.rules import Rules
from nbinfer.frames.tables import column_label, read
from nbinfer.frames.work import identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nbinfer.contract.results import ImageResult
    from nbinfer.engines.protocol import Engine, EngineInfo
    from nbinfer.engines.stream import Stream
    from nbinfer.frames.outcomes import Columns
    from nbinfer.frames.pictures import Pictures
    from nbinfer.frames.plan import CacheMode, Nulls, OnError
    from nbinfer.frames.progress import Progress, Sink
    from nbinfer.frames.run import Run
    from nbinfer.frames.work import FrameModel

_SAID = ("error", "seconds", "source")
_PREVIEWS = 4


@dataclass(frozen=True)
class ImageWork:
    """An image for each row.

    Parameters
    ----------
    base
        The request with its options checked; the row's prompt and seed go into copies of it.
    pictures
        Where the journal's images lie.
    """

    base: ImageRequest
    pictures: Pictures

    op = IMAGES
    mode = Mode.IMAGE_GENERATION
    batch = 1

    def constants(self, model: FrameModel) -> dict[str, Any]:
        """Return what all rows share and results depend on, as JSON."""
        uses, base = model.info.effective, self.base
        return {
            "op": self.op,
            **identity(model),
            # Other number types and devices give other pixels.
            "device": str(uses.get("device", "")).partition(":")[0],
            "dtype": uses.get("dtype"),
            "size": uses.get("size") if base.size is None else "{}x{}".format(*base.size),
            "steps": uses.get("steps") if base.steps is None else base.steps,
            "guidance": uses.get("guidance") if base.guidance is None else float(base.guidance),
            "negative_prompt": base.negative_prompt or None,
        }

    def window(self, info: EngineInfo) -> int:
        """Return how many requests to keep with the engine at once: the next one is there when one ends."""
        del info
        return 2

    def order(self, content: Any) -> int:
        """Return the sort key of a content: rows are made in their order."""
        del content
        return 0

    def fits(self, engine: Engine, content: Any) -> bool:
        """Raise: how much of a prompt a pipeline reads is its own business."""
        del content
        raise NotSupported(f"{engine.info.model} cannot say how long a prompt is.")

    def request(self, contents: Sequence[Any], seeds: Sequence[int | None]) -> ImageRequest:
        """Return the request for this content."""
        (content,), (seed,) = contents, seeds
        if not isinstance(content, str):
            raise RequestError("the prompt of this row is not text.")
        return replace(self.base, prompt=content, seed=seed, priority="batch")

    def records(self, result: ImageResult, contents: Sequence[Any]) -> list[Record]:
        """Return the record of this content."""
        del contents
        image = result.images[0]
        extra = {"seed": image.seed} | ({"flagged": True} if image.flagged else {})
        return [Record(image.png, seconds=result.seconds, extra=extra)]

    def accept(self, record: Record) -> tuple[None, Exception | None]:
        """Return the typed value of a record (none: it is the image), and why it is not valid."""
        del record
        return None, None

    def lasting(self, record: Record) -> bool:
        """Whether the same question will always have this answer; it will."""
        del record
        return True

    def encode(self, value: bytes) -> bytes:
        """Keep an image, and return the bytes that stand for it in the journal: its digest."""
        return bytes.fromhex(self.pictures.put(value))

    def decode(self, data: bytes) -> bytes:
        """Return the image behind such bytes."""
        return self.pictures.get(data.hex())


def generate_images(
    data: Any,
    prompt: Any = None,
    *,
    on: Any = None,
    name: str = "image",
    model: Any = None,
    n: int = 1,
    size: Any = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    seed: int | None = 0,
    cache: CacheMode = True,
    on_error: OnError = "null",
    nulls: Nulls = "skip",
    keep: bool = True,
    progress: bool | Sink | None = None,
) -> Any:
    """Make an image for each row.

    Parameters
    ----------
    data, prompt, on, name, cache, on_error, nulls, keep, progress
        As for :func:`nbinfer.complete`. In a notebook the progress shows the image on its way. Finished
        images are kept, as PNG files by digest beside the results journal: the same cell goes on where it
        was.
    model
        An image model or its name; None: the only one loaded for images.
    n
        Images per row: the frame gets ``n`` rows per row and a column ``sample``.
    size, steps, guidance, negative_prompt
        As for :func:`nbinfer.generate_image`.
    seed
        Of the call: each row's own is derived from it and from the row's prompt, stands in the column
        ``seed``, and gives the same image again in :func:`nbinfer.generate_image`. Equal rows have an image
        each. ``seed=None`` repeats nothing and keeps nothing.

    Returns
    -------
    DataFrame
        ``image``, ``seed``, ``error``, ``seconds``, ``source`` (run, cache). For pandas, images are PIL
        images, and a notebook shows the frame with thumbnails; for polars and pyarrow they are the PNG files'
        bytes.
        :func:`nbinfer.save_images` writes them, :func:`nbinfer.gallery` shows them large.

    Raises
    ------
    RequestError
        The call itself is wrong: an unknown column, a name that is taken, a wrong option.
    KeyboardInterrupt
        As it came: finished rows are kept, and in ``last_run().frame()``.
    """
    rules = Rules(model, None, None, cache, on_error, nulls, keep=keep, progress=progress)
    table = read(data)
    n, seed, steps, guidance = (plain_number(number) for number in (n, seed, steps, guidance))
    if type(n) is not int or n < 1:
        raise RequestError(f"n={n!r}: it is the number of images per row, at least 1.")
    side = (*(("sample",) if n > 1 else ()), "seed", *_SAID)
    output = rules.output(table, [name], side, name=name, per_row=n)
    asked = table.prompt(prompt, on, call="generate_images")
    loaded = rules.model_for(Mode.IMAGE_GENERATION)
    live = isinstance(make_sink(progress), JupyterSink)
    base = ImageRequest(
        prompt="",
        negative_prompt=negative_prompt,
        size=None if size is None else parse_size(size),
        steps=steps,
        guidance=guidance,
        previews=_PREVIEWS if live else 0,
    )
    work = ImageWork(base, open_pictures())
    watched = _Watched(loaded)

    def build(run: Run, columns: Columns) -> Any:
        import pyarrow as pa

        seeds = [columns.outcomes.extra.get(job, {}).get("seed") for job in range(len(columns.outcomes))]
        beside = sample_column(columns, n) | {"seed": columns.values(pa.int64(), seeds)}
        beside |= side_columns(columns, _SAID)
        made = output.frame(run, columns, {name: columns.values(pa.large_binary())}, beside)
        return _with_pictures(made, name) if table.family == "pandas" else made

    params = {
        "size": size,
        "steps": steps,
        "guidance": guidance,
        "negative_prompt": negative_prompt,
        "n": n,
        "name": name,
    }
    run = rules.batch(
        table,
        asked,
        work,
        watched,
        build,
        params=params,
        expand=lambda content: [(content, sample) for sample in range(n)],
        per_row=n,
        seed=seed,
        draws=True,
    )
    return rules.result(run, sink=PreviewSink(watched) if live else None)


def _with_pictures(frame: Any, name: str) -> Any:
    """Return a pandas frame with PIL images for PNG files, that shows itself with thumbnails."""
    import pandas as pd

    from nbinfer.tables import ImageFrame

    label = column_label(frame, name)
    images = [None if png is None or png is pd.NA else open_image(png) for png in frame[label].tolist()]
    place = frame.columns.get_loc(label)
    out = frame.drop(columns=[label])
    out.insert(place, label, pd.Series(images, index=frame.index, dtype=object).array)
    shown = ImageFrame(out)
    shown.attrs = frame.attrs
    return shown


def open_image(png: bytes) -> Any:
    """Return a PNG file's bytes as a PIL image, whose pixels are read when they are first used."""
    from PIL import Image

    return Image.open(io.BytesIO(png))


def png_of(image: Any) -> bytes:
    """Return an image as PNG bytes, with the texts (prompt, seed…) that it came with.

    Parameters
    ----------
    image
        PNG bytes, a :class:`~nbinfer.contract.results.GeneratedImage` or a PIL image.

    Raises
    ------
    RequestError
        It is something else.
    """
    if isinstance(image, bytes):
        return image
    made = getattr(image, "png", None)
    if isinstance(made, bytes):
        return made
    if not hasattr(image, "save"):
        raise RequestError(f"an image is {type(image).__name__}: give a PIL image, PNG bytes or a result.")
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in getattr(image, "text", {}).items():
        info.add_itxt(key, str(value))
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue()


def save_images(
    source: Any, folder: Any, *, column: str | None = None, names: Iterable[Any] | None = None
) -> list[Path]:
    """Write images as PNG files, each with its prompt, seed and settings in it.

    Parameters
    ----------
    source
        A frame of :func:`nbinfer.generate_images`, an ``ImageResult``, or images.
    folder
        Where to; made if need be. Files that are there are replaced.
    column
        Of a frame: the column of images; None: the only one that holds images.
    names
        A name for each image; None numbers them.

    Returns
    -------
    list of Path
        The files, in order; rows without an image have none.

    Raises
    ------
    RequestError
        There are no images in ``source``.
    """
    images = images_of(source, column)
    target = Path(folder).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    called = [f"{i:04d}" for i in range(len(images))] if names is None else [str(each) for each in names]
    if len(called) != len(images):
        raise RequestError(f"{len(called)} names for {len(images)} images.")
    files = []
    for word, image in zip(called, images, strict=True):
        if image is not None:
            plain = "".join(c if c.isalnum() or c in "-_. " else "_" for c in word).strip(". ") or "image"
            path = target / f"{plain[:100]}.png"
            path.write_bytes(png_of(image))
            files.append(path)
    return files


def images_of(source: Any, column: str | None = None) -> list[Any]:
    """Return the images of a result, a frame, a column or a list; None for rows without one.

    Raises
    ------
    RequestError
        There are none, or several columns hold images and none is named.
    """
    made = getattr(source, "images", None)
    if isinstance(made, tuple):
        return list(made)
    if hasattr(source, "columns"):
        table = read(source)
        names = [column] if column is not None else [name for name in table.names if _holds(table, name)]
        if len(names) != 1 or names[0] not in table.names:
            raise RequestError(
                f"which column holds the images? column=… is one of {', '.join(names or table.names)}."
            )
        return [each if _is_image(each) else None for each in table.values(names, 0, table.rows)[0]]
    if isinstance(source, bytes) or _is_image(source):
        return [source]
    found = list(source)
    if not found or not any(map(_is_image, found)):
        raise RequestError(f"{type(source).__name__} holds no images.")
    return [each if _is_image(each) else None for each in found]


def _holds(table: Any, name: str) -> bool:
    return any(_is_image(each) for each in table.values([name], 0, table.rows)[0])


def _is_image(value: Any) -> bool:
    if isinstance(value, bytes):
        return value.startswith(b"\x89PNG")
    return isinstance(getattr(value, "png", None), bytes) or (
        hasattr(value, "save") and hasattr(value, "mode")
    )


# -- progress -------------------------------------------------------------------------------------------


class _Watched:
    """A model whose latest requests can be looked at while they run."""

    def __init__(self, model: FrameModel) -> None:
        self._model = model
        self.streams: list[Stream] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def submit(self, request: Any) -> Stream:
        """Start a request."""
        stream = self._model.submit(request)
        self.streams = [each for each in self.streams if not each.done] + [stream]
        return stream


class PreviewSink(JupyterSink):
    """The progress of a notebook, with the image on its way below the bar."""

    def __init__(self, watched: _Watched) -> None:
        super().__init__()
        self._watched = watched
        self._step: ImageProgress | None = None
        self._preview: bytes | None = None

    def _look(self) -> None:
        """Take the steps that were done since the last look; the run itself waits for results only."""
        for stream in list(self._watched.streams):
            while not stream.done and (event := stream.next_event(timeout=0)) is not None:
                if isinstance(event, ImageProgress):
                    self._step = event
                    self._preview = event.preview or (self._preview if event.step > 1 else None)

    def html(self, progress: Progress) -> str:  # type: ignore[override]
        """Return the bar, the present step, and the picture."""
        self._look()
        shown = JupyterSink.html(progress)
        step = self._step
        if progress.state != "running" or step is None:
            return shown
        words = html_text.escape(f"step {step.step} of {step.steps}")
        picture = ""
        if self._preview is not None:
            data = base64.b64encode(self._preview).decode()
            picture = (
                f'<div><img alt="the image on its way" width="128" src="data:image/png;base64,{data}"></div>'
            )
        return f"{shown}<div><small>{words}</small></div>{picture}"
