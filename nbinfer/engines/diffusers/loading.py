"""From files to a pipeline: only data is read, and only code that diffusers itself brings is run."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ConfigError, ModelLoadError, NotSupported
from nbinfer.gguf.pipeline import INDEX, dduf_entries, read_pipeline
from nbinfer.models.cache import cache_dir
from nbinfer.models.hushed import hushed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from nbinfer.gguf.pipeline import PipelineHeader

DTYPES = ("float32", "float16", "bfloat16")
_BLOCK = 8 * 2**20
_LOCK_SECONDS = 1800.0


@dataclass(frozen=True, eq=False)
class Loaded:
    """A pipeline that is ready.

    Attributes
    ----------
    pipeline
        diffusers' object, on its device.
    header
        What its files say.
    accepts
        Names of the options that a call of it takes, with their defaults.
    origin
        What to call the model in the images' metadata.
    """

    pipeline: Any
    header: PipelineHeader
    device: str
    dtype: str
    accepts: dict[str, Any]
    origin: str


def load(
    path: Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Loaded:
    """Load a pipeline; see :func:`nbinfer.engines.diffusers.open_engine`."""
    header = read_pipeline(path)
    place, kind = choose_device(device, dtype)
    tell = on_progress or (lambda _: None)
    tell(0.0)
    with hushed():
        _check_class(header)
        folder = path if path.is_dir() else unpacked(path)
        tell(0.1)
        pipeline = _from_files(folder, header, kind)
        tell(0.7)
        try:
            pipeline.to(place)
        except RuntimeError as error:  # torch's own for too little memory on the device
            raise ModelLoadError(
                f"{path.name} cannot be put on {place}: {_first_line(error)}\nTry device='cpu'."
            ) from None
    pipeline.set_progress_bar_config(disable=True)
    tell(1.0)
    return Loaded(pipeline, header, place, kind, _accepts(pipeline), _origin(path))


def choose_device(device: str | None = None, dtype: str | None = None) -> tuple[str, str]:
    """Return the device and the number type to use: what was asked for, else the best that is here.

    Raises
    ------
    NotSupported
        The device that was asked for is not here.
    ConfigError
        There is no such device, or no such type.
    """
    import torch

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r:.60} is not known: use {', '.join(DTYPES)}.")
    mps = torch.backends.mps.is_available()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cuda", "mps", "cpu") or (number and not (kind == "cuda" and number.isdigit())):
        raise ConfigError(f"device={device!r:.60} is not known: use cuda, cuda:1, mps or cpu.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise NotSupported(f"device={device!r}: torch finds {torch.cuda.device_count()} NVIDIA GPUs here.")
    if kind == "mps" and not mps:
        raise NotSupported("device='mps': this is no Mac with an Apple GPU that torch can use.")
    if dtype is None:
        dtype = "float32" if kind == "cpu" else "float16"
        if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            # As fast, and nothing overflows in it.
            dtype = "bfloat16"
    return device, dtype


def _check_class(header: PipelineHeader) -> None:
    """Refuse what is no text-to-image pipeline of diffusers, before any of it is loaded.

    Raises
    ------
    NotSupported
        It is none.
    """
    import diffusers

    found = getattr(diffusers, header.architecture, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise NotSupported(
            f"{header.architecture} is no pipeline of the installed diffusers {diffusers.__version__}; "
            "code that a model brings is never run."
        )
    options = inspect.signature(found.__call__).parameters
    needed = [
        name
        for name, option in options.items()
        if option.default is option.empty and name not in ("self", "prompt", "args", "kwargs")
    ]
    wanted = {"prompt", "num_inference_steps", "callback_on_step_end", "width", "height", "generator"}
    if needed or "image" in options or not wanted <= set(options):
        raise NotSupported(f"{header.architecture} does not make images from text alone.")
    for part in header.components.values():
        if part.library not in ("diffusers", "transformers") and not hasattr(
            diffusers.pipelines, part.library
        ):
            raise NotSupported(
                f"{part.name} asks for code of {part.library}, which is not part of diffusers and never run."
            )


def _from_files(folder: Path, header: PipelineHeader, dtype: str) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    variants = sorted({part.variant for part in header.components.values() if part.variant})
    if len(variants) > 1:
        raise ModelLoadError(f"{folder}: its weights are of several variants ({', '.join(variants)}).")
    try:
        return DiffusionPipeline.from_pretrained(
            str(folder),
            dtype=getattr(torch, dtype),
            variant=variants[0] if variants else None,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except ImportError as error:
        # Some pipelines need a package more: sentencepiece, ftfy…
        raise ModelLoadError(f"{header.architecture}: {_first_line(error)}") from None
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ModelLoadError(f"{folder} cannot be loaded: {_first_line(error)}") from error


def unpacked(path: Path) -> Path:
    """Return a folder with the files of a DDUF file, made in the cache on first use.

    Raises
    ------
    SafetensorsParseError
        It is no sound DDUF file.
    ModelLoadError
        There is not enough room, or the cache folder cannot be written.
    """
    from filelock import FileLock, Timeout

    from nbinfer.models.digest import file_digest
    from nbinfer.models.hub import check_room

    entries = dduf_entries(path)
    folder = cache_dir("dduf", file_digest(path)[:32])
    if (folder / INDEX).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock"), timeout=_LOCK_SECONDS):
            if (folder / INDEX).is_file():
                return folder
            check_room(f"unpacking {path.name}", path.stat().st_size, folder.parent)
            part = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            _unpack(path, entries, part)
            part.replace(folder)
    except (OSError, Timeout) as problem:
        raise ModelLoadError(f"{path.name} cannot be unpacked to {folder.parent}: {problem}.") from problem
    return folder


def _unpack(path: Path, entries: Mapping[str, tuple[int, int]], folder: Path) -> None:
    with path.open("rb") as file:
        for name, (offset, left) in entries.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            file.seek(offset)
            with target.open("wb") as out:
                for _ in range(0, left, _BLOCK):
                    data = file.read(min(left - out.tell(), _BLOCK))
                    out.write(data)


def _accepts(pipeline: Any) -> dict[str, Any]:
    options = inspect.signature(type(pipeline).__call__).parameters.values()
    return {option.name: option.default for option in options if option.name != "self"}


def _origin(path: Path) -> str:
    """Return the name of a model: of the hub's cache, the repository; else that of its folder or file."""
    for folder in path.parents:
        if folder.name.startswith("models--"):
            return folder.name.removeprefix("models--").replace("--", "/")
    return path.stem if path.is_file() else path.name


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
