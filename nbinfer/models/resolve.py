"""From what a person wrote to the files of a model."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nbinfer.contract.errors import ModelNotFound
from nbinfer.gguf import read_header
from nbinfer.gguf.read import is_address
from nbinfer.gguf.split import part_of
from nbinfer.models.digest import weights_digest
from nbinfer.models.files import (
    Format,
    ModelFiles,
    gguf_models,
    is_dduf,
    is_projector,
    pipeline_model,
    safetensors_model,
    stem_and_quant,
)
from nbinfer.models.refs import SCHEMES, HubRef, hub_ref, hub_ref_of_address, listed, nearest
from nbinfer.models.stores import FoundModel, discover

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.gguf import Header
    from nbinfer.gguf.pipeline import PipelineHeader
    from nbinfer.gguf.safetensors import SafetensorsHeader
    from nbinfer.models.hub import Confirm, RemoteModel


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
        What an engine opens: the first GGUF file, a DDUF file, or the folder of any other model.
    paths
        All weight files, in order; of an image pipeline, all its files.
    source
        Where it comes from: ``file``, ``demo``, ``huggingface``, ``ollama``, …
    format
        ``gguf``, ``safetensors`` or ``diffusers`` (an image pipeline).
    projector
        The image encoder of a vision model, when it is a file of its own.
    """

    ref: str
    name: str
    path: Path
    paths: tuple[Path, ...]
    source: str = "file"
    format: Format = "gguf"
    projector: Path | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights; a file that is not known yet is read (about 1 s per GB)."""
        return weights_digest(self.paths)

    @cached_property
    def header(self) -> Header | SafetensorsHeader | PipelineHeader:
        """What its header says; raises ``GGUFParseError`` or ``SafetensorsParseError`` when unreadable."""
        if self.format == "diffusers":
            from nbinfer.gguf.pipeline import read_pipeline

            return read_pipeline(self.path)
        if self.format == "safetensors":
            from nbinfer.gguf.safetensors import read_safetensors

            return read_safetensors(self.path)
        return read_header(self.path)


def resolve(
    ref: str | os.PathLike[str],
    *,
    aliases: Mapping[str, str] | None = None,
    download: bool = True,
    confirm: Confirm | None = None,
) -> ResolvedModel:
    """Find the files that a reference means, and download them if they are not here.

    Parameters
    ----------
    ref
        ``demo``, ``demo-hf``, ``demo-embed``, ``demo-vision``; the path of a GGUF file or of a folder with
        one model; an alias; ``hf:OWNER/REPO`` with ``:Q4_K_M``, ``@REVISION`` or ``/FILE.gguf``;
        ``ollama:NAME[:TAG]``, ``lmstudio:PUBLISHER/MODEL[:QUANT]``, ``docker:NAME[:TAG]``,
        ``llama.cpp:FILE``; an ``https://`` address of a GGUF file; or a name that ``nbinfer.models()`` shows.
    aliases
        Names of the user's own, each for another reference.
    download
        Whether to download what is not on this disk.
    confirm
        Called with a :class:`~nbinfer.models.hub.RemoteModel` before the first byte of weights; it raises to
        refuse.

    Raises
    ------
    ModelNotFound
        There is no such model; the message lists the nearest names.
    ModelLoadError
        It cannot be downloaded: there is no room, or it is not what its server says it is.
    """
    target = _unalias(os.fspath(ref), aliases or {})
    found = _on_disk(target, os.fspath(ref), list(aliases or ()))
    if isinstance(found, ResolvedModel):
        return found
    if not download:
        raise ModelNotFound(f"{target} is not on this disk.\nDownload it with: %nbinfer pull {target}")
    if isinstance(found, str):
        from nbinfer.models.download import fetch_file, remote_file

        path = fetch_file(remote_file(found), confirm=confirm)
        return from_path(path, ref=os.fspath(ref), source="download")
    from nbinfer.models import hub

    remote = hub.remote(found)
    files = hub.fetch(remote, found, confirm=confirm)
    return _resolved(os.fspath(ref), remote.name, "huggingface", files)


def pull(
    ref: str | os.PathLike[str],
    *,
    aliases: Mapping[str, str] | None = None,
    confirm: Confirm | None = None,
) -> ResolvedModel:
    """Download a model if it is not on this disk, and return its files; see :func:`resolve`."""
    return resolve(ref, aliases=aliases, confirm=confirm)


def peek(
    ref: str | os.PathLike[str], *, aliases: Mapping[str, str] | None = None
) -> ResolvedModel | RemoteModel:
    """Find a model without downloading it: its files if they are here, else what its server says.

    Both have a ``header``.

    Raises
    ------
    ModelNotFound
        There is no such model, here or there.
    """
    target = _unalias(os.fspath(ref), aliases or {})
    found = _on_disk(target, os.fspath(ref), list(aliases or ()))
    if isinstance(found, ResolvedModel):
        return found
    if isinstance(found, str):
        from nbinfer.models.download import remote_file

        return remote_file(found)
    from nbinfer.models.hub import remote

    return remote(found)


def _on_disk(target: str, ref: str, aliases: list[str]) -> ResolvedModel | HubRef | str:
    """Return a model that is here; else where it can be had: the reference on the hub, or the address."""
    from nbinfer.models.demo import DEMO_MODELS

    if not target.strip():
        raise ModelNotFound("the name of the model is empty; nbinfer.models() lists what is here.")
    if target in DEMO_MODELS:
        return replace(from_path(DEMO_MODELS[target](), ref=ref, source="demo"), name=target)
    if is_address(target):
        from nbinfer.models.download import downloaded

        hub = hub_ref_of_address(target)
        if hub is not None:
            return _on_hub(hub, ref)
        here = downloaded(target)
        return target if here is None else from_path(here, ref=ref, source="download")
    scheme, colon, rest = target.partition(":")
    if colon and scheme == "hf":
        return _on_hub(hub_ref(rest), ref)
    if colon and scheme in SCHEMES:
        return _in_store(SCHEMES[scheme], rest, ref)
    path = Path(target).expanduser()
    if path.exists():
        return from_path(path, ref=ref)
    if looks_like_path(target):
        raise _missing(path)
    return _by_name(target, ref, aliases)


def _on_hub(hub: HubRef, ref: str) -> ResolvedModel | HubRef:
    from nbinfer.models.hub import local

    files = local(hub)
    if files is None:
        return hub
    name = hub.repo.rpartition("/")[2]
    quant = stem_and_quant(files.paths[0].name)[1] if files.format == "gguf" else None
    return _resolved(ref, f"{name}:{quant}" if quant else name, "huggingface", files)


def _in_store(source: str, name: str, ref: str) -> ResolvedModel:
    models = discover(source)
    return _the_one(name, _called(models, name), models, ref, f"{source} has no model {name!r}")


def _by_name(name: str, ref: str, aliases: list[str]) -> ResolvedModel:
    """Find a model that any program keeps here, by the name it has there."""
    from nbinfer.models.demo import DEMO_MODELS

    models = discover()
    fitting = _called(models, name)
    if fitting:
        return _the_one(name, fitting, models, ref, "")
    known = [*aliases, *DEMO_MODELS, *(model.name for model in models if model.problem is None)]
    hint = f"\nTo download it from Hugging Face: hf:{name}" if name.count("/") == 1 else ""
    raise ModelNotFound(f"there is no model {name!r}.{nearest(name, known)}{hint}")


def _called(models: list[FoundModel], name: str) -> list[FoundModel]:
    """Return the models of that name; where none has it, those that are also known by it."""
    exact = [model for model in models if model.name.lower() == name.lower()]
    return exact or [m for m in models if name.lower() in (known.lower() for known in m.names)]


def _the_one(
    name: str, fitting: list[FoundModel], models: list[FoundModel], ref: str, problem: str
) -> ResolvedModel:
    sound = [model for model in fitting if model.problem is None]
    # The same file under several names, or in two stores through links, is one model.
    if len({os.path.realpath(model.path) for model in sound}) > 1:
        raise ModelNotFound(
            f"{name!r} is several models; name one of them: {listed([m.ref for m in sound])}."
        )
    if sound:
        files = ModelFiles(sound[0].format, sound[0].paths, sound[0].projector)
        short = sound[0].name.rpartition("/")[2].removesuffix(".gguf")
        return _resolved(ref, short, sound[0].source, files)
    if fitting:
        raise ModelNotFound(f"{fitting[0].ref} cannot be used: {fitting[0].problem}.")
    raise ModelNotFound(
        f"{problem}.{nearest(name, [model.name for model in models if model.problem is None])}"
    )


def _resolved(ref: str, name: str, source: str, files: ModelFiles) -> ResolvedModel:
    return ResolvedModel(
        ref=ref,
        name=name,
        path=files.path,
        paths=files.paths,
        source=source,
        format=files.format,
        projector=files.projector,
    )


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
        or text.lower().endswith((".gguf", ".safetensors", ".dduf"))
        or (os.sep != "/" and os.sep in text)
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
    if is_dduf(path.name):
        return _resolved(ref, path.stem, source, ModelFiles("diffusers", (path,)))
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
    missing = found.missing if found else []
    if missing:
        raise ModelNotFound(
            f"{path.name} is one of {len(paths)} files, of which {listed(missing)} is not in {path.parent}.",
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
        raise ModelNotFound(f"{folder} holds {len(models)} models; name one of them: {listed(names)}.")
    files = pipeline_model(folder) or safetensors_model(folder)
    if files is None:
        raise ModelNotFound(
            f"{folder} holds no model: no *.gguf, no config.json with *.safetensors, no model_index.json."
        )
    if files.missing:
        raise ModelNotFound(f"{folder} is not whole: {listed(files.missing)} is missing.")
    return _resolved(ref, folder.resolve().name, source, files)


def _missing(path: Path) -> ModelNotFound:
    folder = path.parent
    if not folder.is_dir():
        return ModelNotFound(f"there is no file {path}: the folder {folder} does not exist.")
    names = [files.paths[0].name for files in gguf_models(folder)]
    return ModelNotFound(f"there is no file {path}.{nearest(path.name, names, f'in {folder} there is')}")
