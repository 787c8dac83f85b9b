"""Headers of image pipelines: a folder with ``model_index.json``, or the same folder in one DDUF file.

Each component (text encoder, denoiser, VAE…) is a folder of its own with a configuration and, where it has
weights, safetensors files. Nothing is loaded, and nothing that could run code is looked at.
"""

from __future__ import annotations

import re
import struct
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbinfer.contract.errors import SafetensorsParseError
from nbinfer.contract.modes import Mode
from nbinfer.gguf.header import Quantisation, TensorInfo
from nbinfer.gguf.safetensors import MAX_CONFIG, MAX_FILES, MAX_HEADER, parse_safetensors, read_json
from nbinfer.gguf.source import FileSource, Source, SourceError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from nbinfer.gguf.safetensors import Opener

INDEX: Final = "model_index.json"
PLAIN_SUFFIXES: Final = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Files of a pipeline that are data and nothing else."""

# One folder deep; no name that means another place.
_NAME = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]*/)?[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
_ZIP_HEADER = 30


@dataclass(frozen=True)
class Component:
    """One part of a pipeline.

    Attributes
    ----------
    name
        Its role there: ``text_encoder``, ``unet``, ``transformer``, ``vae``, ``scheduler``…
    library, class_name
        The class that it is loaded with.
    config
        Its configuration; empty for a part that has none in ``config.json``.
    tensors
        Its weights; empty for a scheduler or a tokenizer.
    files
        Its weight files, relative to the pipeline.
    variant
        The variant that its files are of (``fp16``); empty for the plain ones.
    """

    name: str
    library: str
    class_name: str
    config: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...] = ()
    files: tuple[str, ...] = ()
    variant: str = ""

    @cached_property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(tensor.n_elements for tensor in self.tensors)

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(tensor.n_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class PipelineHeader:
    """What the files of an image pipeline say about it.

    Attributes
    ----------
    source
        The folder or file.
    index
        ``model_index.json`` as it is.
    components
        Its parts by name, in the order of the index.
    file_size
        Bytes of the weight files.
    """

    source: str
    index: Mapping[str, Any]
    components: Mapping[str, Component]
    file_size: int

    @property
    def architecture(self) -> str:
        """The class of the pipeline, such as ``StableDiffusionPipeline``."""
        return str(self.index["_class_name"])

    @property
    def context_length(self) -> None:
        """None: an image pipeline has no context."""
        return

    @cached_property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """All tensors of all components."""
        return tuple(tensor for part in self.components.values() for tensor in part.tensors)

    @cached_property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(part.parameters for part in self.components.values())

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(part.weights_bytes for part in self.components.values())

    @cached_property
    def quantisation(self) -> Quantisation:
        """The type with most bytes, and the mix."""
        return Quantisation.of(self.tensors)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Image generation, when there is something that makes images."""
        return (Mode.IMAGE_GENERATION,) if self.denoiser is not None else ()

    @property
    def denoiser(self) -> Component | None:
        """The part that does the steps."""
        return self.components.get("unet") or self.components.get("transformer")

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """The parts that read the prompt."""
        parts = self.components.values()
        return tuple(part for part in parts if part.name.startswith("text_encoder") and part.tensors)

    @property
    def vae_scale(self) -> int:
        """Pixels of one side of a latent cell: of an ``AutoencoderKL``, 2 for each level but the last."""
        vae = self.components.get("vae")
        config: Mapping[str, Any] = {} if vae is None else vae.config
        levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        return 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else 8

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) in pixels that the pipeline makes when no size is asked for."""
        side = None if self.denoiser is None else self.denoiser.config.get("sample_size")
        if isinstance(side, list) and len(side) == 2:  # noqa: PLR2004 - height and width
            return (int(side[1]) * self.vae_scale, int(side[0]) * self.vae_scale)
        # Some transformers do not say it; 1024 pixels is then the default of their pipelines.
        return (side * self.vae_scale,) * 2 if isinstance(side, int) and side > 0 else (1024, 1024)


def read_pipeline(path: str | os.PathLike[str]) -> PipelineHeader:
    """Read the headers of a pipeline on disk.

    Parameters
    ----------
    path
        Its folder, or a DDUF file.

    Raises
    ------
    SafetensorsParseError
        Something is missing or wrong, its weights are pickles, or it brings code of its own.
    """
    place = Path(path)
    with ExitStack() as stack:
        if place.is_dir():
            names = folder_files(place)
            return read_parts(str(place), lambda name: stack.enter_context(FileSource(place / name)), names)
        try:
            file = stack.enter_context(FileSource(place))
            entries = dduf_entries(place)
        except SourceError as error:
            raise SafetensorsParseError(str(error)) from None
        return read_parts(str(place), lambda name: _Part(file, name, entries), list(entries))


def read_remote_pipeline(url: str, names: Iterable[str], **options: Any) -> PipelineHeader:
    """Read the headers of a pipeline on a server; the weights stay there.

    Parameters
    ----------
    url
        Address of its folder.
    names
        Its files.
    options
        Options of :class:`nbinfer.gguf.remote.RemoteReader`.

    Raises
    ------
    SafetensorsParseError
        As :func:`read_pipeline`, or the server does not give a file.
    """
    from nbinfer.gguf.remote import RemoteReader

    there = set(names)
    with RemoteReader(**options) as reader:

        def open_file(name: str) -> Source:
            if name not in there:
                raise SourceError(f"{url}: there is no {name}.", missing=True)
            return reader.open(f"{url.rstrip('/')}/{name}")

        return read_parts(url, open_file, sorted(there))


def folder_files(folder: Path) -> list[str]:
    """Return the names of a pipeline's files, one folder deep, with ``/``."""
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return sorted(each.relative_to(folder).as_posix() for each in found if each.is_file())


class _Part:
    """A stored entry of a DDUF file, as a source of its own."""

    def __init__(self, file: Source, name: str, entries: Mapping[str, tuple[int, int]]) -> None:
        if name not in entries:
            raise SourceError(f"{file.name}: there is no {name} in it.", missing=True)
        self._file = file
        self._offset, self.size = entries[name]
        self.name = f"{file.name}:{name}"

    def read(self, offset: int, n: int) -> bytes:
        return self._file.read(self._offset + offset, n)[:n]


def dduf_entries(path: Path) -> dict[str, tuple[int, int]]:
    """Return the entries of a DDUF file: (offset, size) of each by name.

    A DDUF file is a ZIP file whose entries are stored as they are, at most one folder deep.

    Raises
    ------
    SafetensorsParseError
        It is none, or it holds something else than data under a plain name.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            infos = archive.infolist()
            if len(infos) > MAX_FILES:
                raise SafetensorsParseError(
                    f"{path.name}: {len(infos):,} entries; {MAX_FILES:,} are possible."
                )
            size = path.stat().st_size
            entries: dict[str, tuple[int, int]] = {}
            for info in infos:
                name = info.filename
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise SafetensorsParseError(f"{path.name}: {name[:80]!r} is compressed or encrypted.")
                if not _NAME.fullmatch(name) or not name.endswith(PLAIN_SUFFIXES):
                    raise SafetensorsParseError(f"{path.name}: {name[:80]!r} has no place in a DDUF file.")
                if name in entries:
                    raise SafetensorsParseError(f"{path.name}: {name[:80]!r} is in it twice.")
                file.seek(info.header_offset)
                head = file.read(_ZIP_HEADER)
                lengths = struct.unpack("<HH", head[26:]) if len(head) == _ZIP_HEADER else (size, size)
                offset = info.header_offset + _ZIP_HEADER + sum(lengths)
                if head[:4] != b"PK\3\4" or offset + info.file_size > size:
                    raise SafetensorsParseError(f"{path.name}: {name[:80]!r} lies outside the file.")
                entries[name] = (offset, info.file_size)
            if sum(length for _, length in entries.values()) > size:
                raise SafetensorsParseError(f"{path.name}: its entries overlap.")
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        if isinstance(error, SafetensorsParseError):
            raise
        raise SafetensorsParseError(f"{path.name}: no DDUF file: {error}.") from None
    return entries


def read_parts(source: str, open_file: Opener, names: Iterable[str]) -> PipelineHeader:
    """Read a pipeline through ``open_file``; ``names`` are all its files.

    Raises
    ------
    SafetensorsParseError
        As :func:`read_pipeline`.
    """
    names = list(names)
    try:
        index = read_json(open_file, INDEX, MAX_CONFIG)
        if index is None:
            raise SafetensorsParseError(f"{source}: there is no {INDEX}.")
        if not isinstance(index.get("_class_name"), str) or not _IDENTIFIER.fullmatch(index["_class_name"]):
            raise SafetensorsParseError(
                f"{source}: {INDEX} names no pipeline of diffusers; code that a model brings is never run."
            )
        components: dict[str, Component] = {}
        size = 0
        for name, entry in index.items():
            named = isinstance(entry, list) and len(entry) == 2 and not name.startswith("_")  # noqa: PLR2004
            if not named or entry == [None, None]:
                continue
            part, n_bytes = _component(source, open_file, names, name, entry)
            components[name] = part
            size += n_bytes
    except SourceError as error:
        raise SafetensorsParseError(str(error)) from error.__cause__
    return PipelineHeader(source, index, components, size)


def _component(
    source: str, open_file: Opener, names: list[str], name: str, entry: list[Any]
) -> tuple[Component, int]:
    words = (name, *entry)
    if not all(isinstance(word, str) and _IDENTIFIER.fullmatch(word) for word in words):
        raise SafetensorsParseError(f"{source}: {INDEX} names {str(entry)[:80]} for {name[:80]!r}: no class.")
    library, class_name = entry
    if f"{name}/{library}.py" in names or f"{library}.py" in names:
        raise SafetensorsParseError(
            f"{source}: {name} brings code of its own ({library}.py), which is never run."
        )
    config = read_json(open_file, f"{name}/config.json", MAX_CONFIG) or {}
    own = [each for each in names if each.startswith(f"{name}/")]
    settings = (read_json(open_file, each, MAX_CONFIG) or {} for each in own if each.endswith("config.json"))
    if any(each.endswith(".py") for each in own) or any("auto_map" in found for found in settings):
        raise SafetensorsParseError(f"{source}: {name} brings code of its own, which is never run.")
    files, variant = weight_files(own)
    if not files:
        pickles = [each for each in own if each.endswith(_PICKLES)]
        if pickles:
            raise SafetensorsParseError(
                f"{source}: the weights of {name} are pickles ({pickles[0]}), which can run code: they are "
                "never loaded.\nTake a revision with safetensors files, or convert it."
            )
        if config and library in ("diffusers", "transformers") and "feature" not in name:
            raise SafetensorsParseError(f"{source}: {name} has no safetensors files.")
        return Component(name, library, class_name, config), 0
    tensors: list[TensorInfo] = []
    size = 0
    for number, each in enumerate(files):
        file = open_file(each)
        tensors += parse_safetensors(file, number)
        size += file.size
    _check_shards(open_file, name, own, files)
    return Component(name, library, class_name, config, tuple(tensors), tuple(files), variant), size


def weight_files(names: Iterable[str]) -> tuple[list[str], str]:
    """Return a component's weight files and their variant: the plain ones where there are any.

    ``model.safetensors`` and ``model-00001-of-00002.safetensors`` are plain, ``model.fp16.safetensors`` is
    of the variant ``fp16``; a component may come in several.
    """
    by_variant: dict[str, list[str]] = {}
    for name in sorted(names):
        if not name.endswith(".safetensors"):
            continue
        shard = _SHARD.fullmatch(name)
        stem = (shard[1] if shard else name.removesuffix(".safetensors")).rpartition("/")[2]
        by_variant.setdefault(stem.partition(".")[2], []).append(name)
    if not by_variant:
        return [], ""
    variant = "" if "" in by_variant else "fp16" if "fp16" in by_variant else min(by_variant)
    return by_variant[variant], variant


def _check_shards(open_file: Opener, name: str, own: list[str], files: list[str]) -> None:
    """Check that all files are there that the component's index names."""
    for each in own:
        if not each.endswith(".safetensors.index.json"):
            continue
        index = read_json(open_file, each, MAX_HEADER) or {}
        wanted = index.get("weight_map")
        shards = {f"{name}/{file}" for file in wanted.values()} if isinstance(wanted, dict) else set()
        missing = sorted(shards - set(files))
        if missing and shards & set(files):
            raise SafetensorsParseError(f"{missing[0]} is missing; {each} names it.")
