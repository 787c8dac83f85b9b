"""From what a person wrote to the files of a model."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nbinfer.contract.errors import ModelNotFound
from nbinfer.gguf import read_header
from nbinfer.gguf.split import part_of
from nbinfer.models.digest import weights_digest
from nbinfer.models.files import Format, gguf_models, is_projector, safetensors_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nbinfer.gguf import Header

_MAX_LISTED = 8


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model's files, found.

    Attributes
    ----------
    ref
        What was asked for.
    name
        A short name to show.
    path
        What an engine opens: the first GGUF file, or the folder of a safetensors model.
    paths
        All weight files, in order.
    source
        Where it comes from: ``file``, ``demo``, ``huggingface``, ``ollama``, …
    format
        ``gguf`` or ``safetensors``.
    projector
        The image encoder of a vision model, when it is a file of its own.
    """

    ref: str
    name: str
    path: Path
    paths: tuple[Path, ...]
    source: str = "file"
    format: Format = "gguf"
    projector: Path | None = field(default=None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights; a file that is not known yet is read (about 1 s per GB)."""
        return weights_digest(self.paths)

    @cached_property
    def header(self) -> Header:
        """The GGUF header; raises ``GGUFParseError`` when it cannot be read or the model is not GGUF."""
        return read_header(self.path)


def resolve(ref: str | os.PathLike[str], *, aliases: Mapping[str, str] | None = None) -> ResolvedModel:
    """Find the files that a reference means.

    Parameters
    ----------
    ref
        ``demo``, ``demo-embed``, an alias, or the path of a GGUF file or of a folder with one model.
    aliases
        Names of the user's own, each for another reference.

    Raises
    ------
    ModelNotFound
        There is no such model; the message lists the nearest names.
    """
    from nbinfer.models.demo import DEMO_MODELS

    aliases = aliases or {}
    text = os.fspath(ref)
    target = _unalias(text, aliases)
    if target in DEMO_MODELS:
        path = DEMO_MODELS[target]()
        found = from_path(path, ref=text, source="demo")
        return replace(found, name=target)
    path = Path(target).expanduser()
    if path.exists():
        return from_path(path, ref=text)
    if looks_like_path(target):
        raise _missing(path)
    names = [*aliases, *DEMO_MODELS]
    raise ModelNotFound(f"there is no model {target!r}.{_nearest(target, names)}")


def _unalias(text: str, aliases: Mapping[str, str]) -> str:
    seen = [text]
    while (target := aliases.get(seen[-1])) is not None:
        if target in seen:
            raise ModelNotFound(f"the alias {text!r} leads in a circle: {' -> '.join([*seen, target])}.")
        seen.append(target)
    return seen[-1]


def looks_like_path(text: str) -> bool:
    """Whether a reference can only be meant as a path."""
    return (
        text.startswith((".", "~", "/"))
        or text.lower().endswith((".gguf", ".safetensors"))
        or os.sep in text
        or bool(os.altsep and os.altsep in text)
    )


def from_path(path: Path, *, ref: str, source: str = "file") -> ResolvedModel:
    """Resolve a file or a folder that exists.

    Raises
    ------
    ModelNotFound
        It holds no model, several, or a part of one.
    """
    if path.is_dir():
        return _from_folder(path, ref, source)
    if path.suffix.lower() == ".safetensors":
        return _from_folder(path.parent, ref, source)
    if is_projector(path.name):
        raise ModelNotFound(
            f"{path} is the projector of a vision model: name the model itself, it is found beside it."
        )
    part = part_of(path.name)
    first = path.with_name(part.sibling(1)) if part else path
    found = next((files for files in gguf_models(first.parent) if files.paths[0] == first), None)
    paths = found.paths if found else (path,)
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise ModelNotFound(
            f"{path.name} is one of {len(paths)} files, of which {_listed(missing)} is not in {path.parent}.",
        )
    stem = part.stem if part else path.stem
    return ResolvedModel(
        ref=ref,
        name=stem,
        path=paths[0],
        paths=paths,
        source=source,
        projector=found.projector if found else None,
    )


def _from_folder(folder: Path, ref: str, source: str) -> ResolvedModel:
    models = gguf_models(folder)
    if len(models) == 1:
        return from_path(models[0].paths[0], ref=ref, source=source)
    if models:
        names = [files.paths[0].name for files in models]
        raise ModelNotFound(f"{folder} holds {len(models)} models; name one of them: {_listed(names)}.")
    files = safetensors_model(folder)
    if files is None:
        raise ModelNotFound(f"{folder} holds no model: no *.gguf, and no config.json with *.safetensors.")
    return ResolvedModel(
        ref=ref,
        name=folder.resolve().name,
        path=folder,
        paths=files.paths,
        source=source,
        format="safetensors",
    )


def _missing(path: Path) -> ModelNotFound:
    folder = path.parent
    if not folder.is_dir():
        return ModelNotFound(f"there is no file {path}: the folder {folder} does not exist.")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() or p.suffix.lower() == ".gguf")
    return ModelNotFound(f"there is no file {path}.{_nearest(path.name, names, f'in {folder} there is')}")


def _nearest(asked: str, names: Iterable[str], start: str = "the nearest names are") -> str:
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(asked.lower(), by_lower, n=_MAX_LISTED, cutoff=0.4)
    listed = [by_lower[name] for name in near] or sorted(by_lower.values())
    return f"\n{start[0].upper()}{start[1:]} {_listed(listed)}." if listed else ""


def _listed(names: list[str]) -> str:
    more = f", … ({len(names) - _MAX_LISTED} more)" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
