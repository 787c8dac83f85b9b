"""Which files of a directory make up a model."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Literal, NamedTuple

from nbinfer.gguf.split import part_of, part_paths

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Format = Literal["gguf", "safetensors", "diffusers"]

_QUANT = re.compile(
    r"[-._]((?:UD-)?(?:I?Q[1-8](?:_[0-9A-Z]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|B?F16|FP16|F32|FP32))$",
    re.IGNORECASE,
)


class ModelFiles(NamedTuple):
    """The files of one model: its weights in order, and the projector of a vision model."""

    format: Format
    paths: tuple[Path, ...]
    projector: Path | None = None

    @property
    def path(self) -> Path:
        """What an engine opens: the first GGUF file, a DDUF file, or the folder of any other model."""
        first = self.paths[0]
        return first if self.format == "gguf" or is_dduf(first.name) else first.parent

    @property
    def missing(self) -> list[str]:
        """Names of weight files that are not there: deleted, or not downloaded yet."""
        return [path.name for path in self.paths if not path.is_file()]


def stem_and_quant(name: str) -> tuple[str, str | None]:
    """Split a GGUF file name into the model's name and its quantisation.

    >>> stem_and_quant("Qwen3-0.6B-Q4_K_M-00001-of-00002.gguf")
    ('Qwen3-0.6B', 'Q4_K_M')
    """
    part = part_of(name)
    stem = part.stem if part else re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)
    match = _QUANT.search(stem)
    return (stem[: match.start()], match[1].upper()) if match else (stem, None)


def is_projector(name: str) -> bool:
    """Whether a file is named as the projector (image encoder) of a vision model."""
    return "mmproj" in name.lower()


def is_dduf(name: str) -> bool:
    """Whether a file is named as an image pipeline in one file."""
    return name.lower().endswith(".dduf")


def pipeline_model(folder: Path) -> ModelFiles | None:
    """Return the image pipeline in a directory: all its plain files, for each of them shapes the images.

    None when there is no ``model_index.json``.
    """
    from nbinfer.gguf.pipeline import INDEX, PLAIN_SUFFIXES, folder_files

    if not (folder / INDEX).is_file():
        return None
    inside = [name for name in folder_files(folder) if "/" in name and name.endswith(PLAIN_SUFFIXES)]
    return ModelFiles("diffusers", (folder / INDEX, *(folder / name for name in inside)))


def gguf_models(folder: Path) -> list[ModelFiles]:
    """Return the GGUF models in a directory, the parts of a split one together, sorted by name."""
    names = sorted(name for name in _names(folder) if name.lower().endswith(".gguf"))
    firsts = [
        name for name in names if not is_projector(name) and ((p := part_of(name)) is None or p.number == 1)
    ]
    projectors = [name for name in names if is_projector(name)]
    # One model in several quantisations shares its projector; among several, the name says whose it is.
    alone = len({stem_and_quant(name)[0] for name in firsts}) == 1
    return [
        ModelFiles("gguf", part_paths(folder / name), projector_for(folder, name, projectors, alone=alone))
        for name in firsts
    ]


def projector_for(folder: Path, name: str, projectors: Iterable[str], *, alone: bool) -> Path | None:
    """Choose the projector that belongs to the model file ``name``, F16 before others."""
    stem = _plain(stem_and_quant(name)[0])
    fitting = [p for p in projectors if alone or stem == _plain(stem_and_quant(p)[0])]
    fitting.sort(key=lambda p: ((stem_and_quant(p)[1] or "") not in ("F16", "FP16"), p))
    return folder / fitting[0] if fitting else None


def _plain(stem: str) -> str:
    return re.sub(r"[-._]+", "-", stem.lower().replace("mmproj", "-")).strip("-")


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def safetensors_model(folder: Path) -> ModelFiles | None:
    """Return the safetensors model in a directory, or None when it holds none.

    Its index says which files belong to it, also those that are missing; without one it is all of them, or
    ``model.safetensors`` alone where other layouts of the same weights lie beside it.
    """
    names = sorted(name for name in _names(folder) if name.endswith(".safetensors"))
    if not (folder / "config.json").is_file():
        return None
    names = _indexed(folder) or (["model.safetensors"] if "model.safetensors" in names else names)
    return ModelFiles("safetensors", tuple(folder / name for name in names)) if names else None


def _indexed(folder: Path) -> list[str]:
    try:
        files = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))[
            "weight_map"
        ]
        return sorted({name for name in files.values() if re.fullmatch(r"[^/\\:]+\.safetensors", name)})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
