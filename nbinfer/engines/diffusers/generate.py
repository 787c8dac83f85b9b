"""The image engine: a queue of requests, and one thread that owns the pipeline."""

from __future__ import annotations

import gc
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import (
    DoesNotFit,
    EngineClosed,
    EngineError,
    NbinferError,
    NotSupported,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import ImageRequest
from nbinfer.contract.results import Finished, GeneratedImage, ImageDone, ImageProgress, ImageResult
from nbinfer.engines.alive import register
from nbinfer.engines.diffusers.pictures import png, preview
from nbinfer.engines.jobs import Jobs
from nbinfer.engines.protocol import EngineInfo, EngineLoad
from nbinfer.engines.stream import Stream

if TYPE_CHECKING:
    from nbinfer.contract.requests import CompletionRequest, Request
    from nbinfer.engines.diffusers.loading import Loaded

_SEEDS = 2**32


class _Stopped(Exception):  # noqa: N818 - leaves diffusers' loop between two steps
    """Nobody wants the image any more."""


@dataclass(eq=False, slots=True)
class _Job:
    request: ImageRequest
    stream: Stream
    settings: dict[str, Any]
    images: list[GeneratedImage] = field(default_factory=list)


class ImageEngine:
    """Serves images of one pipeline. See :class:`nbinfer.engines.protocol.Engine`.

    Image ``i`` of a request is made from the seed ``seed + i`` by a generator of its own, on the CPU wherever
    the pipeline runs: the same seed gives the same image alone and among others.

    Parameters
    ----------
    loaded
        The pipeline.
    batch
        Images of one request that are computed at once.
    """

    def __init__(self, loaded: Loaded, *, name: str, digest: str = "", batch: int = 1) -> None:
        import diffusers

        self._loaded = loaded
        self._name = name
        self._batch = batch
        width, height = loaded.header.image_size
        self.info = EngineInfo(
            backend="diffusers",
            model=name,
            mode=Mode.IMAGE_GENERATION,
            context_size=0,
            parallel=batch,
            digest=digest,
            version=f"diffusers {diffusers.__version__}",
            effective={
                "pipeline": loaded.header.architecture,
                "device": loaded.device,
                "dtype": loaded.dtype,
                "batch": batch,
                "size": f"{width}x{height}",
                "steps": loaded.accepts.get("num_inference_steps"),
                "guidance": loaded.accepts.get("guidance_scale"),
                "scheduler": type(loaded.pipeline.scheduler).__name__,
            },
        )
        self._jobs: Jobs[_Job] = Jobs(name)
        self._made = 0
        self._forked = False
        self._thread = threading.Thread(target=self._run, name=f"nbinfer-{name}", daemon=True)
        self._thread.start()
        register(self)

    # -- callers' side ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Start a request for images; returns at once.

        Raises
        ------
        NotSupported
            It is no request for images, or asks for something that this pipeline has not.
        EngineClosed
            The engine was closed.
        """
        if not isinstance(request, ImageRequest):
            raise NotSupported(
                f"{self._name} is loaded for {self.info.mode}: load a model in the mode you need."
            )
        job = _Job(request, Stream(), self._settings(request))
        if self._forked:
            raise EngineClosed(
                f"{self._name} was loaded before this process was forked: load it anew here, or use "
                'where="sidecar".'
            )
        self._jobs.put(job)
        return job.stream

    def _settings(self, request: ImageRequest) -> dict[str, Any]:
        """Return what the images are made with, every default filled in, as the result records it."""
        accepts = self._loaded.accepts
        if request.negative_prompt and "negative_prompt" not in accepts:
            raise NotSupported(f"{self.info.effective['pipeline']} takes no negative prompt.")
        if request.guidance is not None and "guidance_scale" not in accepts:
            raise NotSupported(f"{self.info.effective['pipeline']} takes no guidance.")
        width, height = request.size or self._loaded.header.image_size
        steps, guidance = self.info.effective["steps"], self.info.effective["guidance"]
        seed = random.randrange(_SEEDS) if request.seed is None else request.seed  # noqa: S311 - no secret
        return {
            "negative_prompt": request.negative_prompt,
            "size": f"{width}x{height}",
            "n": request.n,
            "steps": steps if request.steps is None else request.steps,
            "guidance": guidance if request.guidance is None else float(request.guidance),
            "seed": seed,
        }

    def render(self, request: CompletionRequest) -> tuple[str, int]:
        """Raise ``NotSupported``: an image pipeline has no chat."""
        del request
        raise NotSupported(f"{self._name} is loaded for {self.info.mode}: it has no prompt to show.")

    def load(self) -> EngineLoad:
        """Return what is running now."""
        return EngineLoad(running=self._jobs.running, waiting=self._jobs.waiting, images_generated=self._made)

    def measured(self) -> dict[str, dict[str, int]]:
        """Return the bytes of the weights that are held, by device and component."""
        held: dict[str, dict[str, int]] = {}
        for name, part in {} if self._jobs.closing else dict(self._loaded.pipeline.components).items():
            tensors = [*part.parameters(), *part.buffers()] if hasattr(part, "parameters") else []
            for tensor in tensors:
                parts = held.setdefault("RAM" if tensor.device.type == "cpu" else str(tensor.device), {})
                parts[name] = parts.get(name, 0) + tensor.nbytes
        return held

    def close(self) -> None:
        """End what runs with ``EngineClosed``, after its present step, and free the memory; idempotent."""
        if self._forked:
            return
        self._jobs.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def abandon(self) -> None:
        """Refuse all use: this is a forked child, where the engine's thread does not exist."""
        self._forked = True

    # -- the engine's thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._jobs.serve(self._serve, self._translated)
        finally:
            self._jobs.fail()
            self._free()

    def _translated(self, error: BaseException, job: _Job) -> NbinferError:
        import torch

        if isinstance(error, NbinferError):
            return error
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return DoesNotFit(
                f"{self._name} ran out of memory on {self._loaded.device} at {job.settings['size']}, "
                f"{min(self._batch, job.request.n)} at once.\nAsk for a smaller size, or load with batch=1."
            )
        return EngineError(f"{self._name} failed: {type(error).__name__}: {error!s:.300}")

    def _serve(self, job: _Job) -> None:
        began = time.perf_counter()
        reason = "stop"
        for first in range(0, job.request.n, self._batch):
            try:
                if job.stream.cancelled or self._jobs.closing:
                    raise _Stopped  # noqa: TRY301 - as between two steps
                self._make(job, first, min(self._batch, job.request.n - first))
            except _Stopped:
                if self._jobs.closing:
                    raise self._jobs.unloaded() from None
                reason = "interrupted"
                break
        job.stream.put(
            Finished(
                ImageResult(
                    images=tuple(job.images),
                    prompt=job.request.prompt,
                    finish_reason="stop" if reason == "stop" else "interrupted",
                    params=job.settings,
                    model=self._name,
                    seconds=time.perf_counter() - began,
                )
            )
        )

    def _make(self, job: _Job, first: int, count: int) -> None:
        """Make images ``first`` to ``first + count`` of a request."""
        import torch

        request, settings = job.request, job.settings
        width, height = map(int, settings["size"].split("x"))
        seeds = [(settings["seed"] + first + i) % _SEEDS for i in range(count)]
        options: dict[str, Any] = {
            "prompt": [request.prompt] * count,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "num_inference_steps": settings["steps"],
            "width": width,
            "height": height,
            "output_type": "pil",
            "callback_on_step_end": self._on_step(job, first),
        }
        if request.negative_prompt:
            options["negative_prompt"] = [request.negative_prompt] * count
        if settings["guidance"] is not None:
            options["guidance_scale"] = settings["guidance"]
        made = self._loaded.pipeline(**options)
        flags = getattr(made, "nsfw_content_detected", None) or [False] * count
        for i, (image, seed) in enumerate(zip(made.images, seeds, strict=True)):
            params = {key: value for key, value in settings.items() if key != "n" and value is not None}
            file = png(
                image,
                params
                | {
                    "prompt": request.prompt,
                    "seed": seed,
                    "scheduler": self.info.effective["scheduler"],
                    "model": self._loaded.origin,
                },
            )
            done = GeneratedImage(file, seed, image.width, image.height, bool(flags[i]))
            job.images.append(done)
            self._made += 1
            job.stream.put(ImageDone(first + i, done))

    def _on_step(self, job: _Job, first: int) -> Any:
        request, total = job.request, int(job.settings["steps"])
        shown = preview_steps(total, request.previews)
        seen = 0

        def on_step(pipeline: Any, step: int, time_step: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal seen
            del step, time_step
            if job.stream.cancelled or self._jobs.closing:
                raise _Stopped
            # Counted here: schedulers that take two calls a step number them in their own way.
            seen += 1
            small = preview(pipeline, tensors["latents"]) if seen in shown else None
            job.stream.put(ImageProgress(first, request.n, seen, max(total, seen), small))
            return tensors

        return on_step

    def _free(self) -> None:
        import torch

        device = self._loaded.device
        self._loaded.pipeline.__dict__.clear()
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        elif device == "mps":
            torch.mps.empty_cache()


def preview_steps(total: int, previews: int) -> set[int]:
    """Return the steps, from 1, after which a preview is made: evenly spread, the last one excluded.

    >>> sorted(preview_steps(20, 3))
    [5, 10, 15]
    """
    wanted = min(previews, total - 1)
    return {round(total * (i + 1) / (wanted + 1)) for i in range(wanted)}
