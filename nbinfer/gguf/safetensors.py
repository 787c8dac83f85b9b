"""Headers of safetensors models and their ``config.json``, for engines that run those."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from nbinfer.contract.errors import SafetensorsParseError
from nbinfer.contract.modes import Mode
from nbinfer.gguf.header import Quantisation, TensorInfo
from nbinfer.gguf.source import FileSource, Source, SourceError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

MAX_HEADER: Final = 32 * 1024**2  # bytes; 100,000 tensors take about half of it
MAX_CONFIG: Final = 4 * 1024**2
MAX_FILES: Final = 1000

# Bits of one element, by dtype.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_FILE = re.compile(r"[^/\\:\0]{1,200}\.safetensors")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

Opener: TypeAlias = Callable[[str], Source]
"""Opens a file of the model's folder by its name; raises ``SourceError``."""


@dataclass(frozen=True)
class SafetensorsHeader:
    """What the headers and the configuration of a safetensors model say.

    Attributes
    ----------
    source
        The folder, or its address.
    config
        ``config.json`` as it is; empty when there is none.
    tensors
        All tensors; ``shape`` is outermost first, ``offset`` counts from the start of the data of its file.
    files
        Names of the weight files, in the order of ``part``.
    file_size
        Bytes of all weight files.
    """

    source: str
    config: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    files: tuple[str, ...]
    file_size: int

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the configuration; of a vision model, that of its language model goes first."""
        text = self.config.get("text_config")
        if isinstance(text, dict) and key in text:
            return text[key]
        return self.config.get(key, default)

    def _number(self, key: str) -> int | None:
        value = self.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def architecture(self) -> str:
        """The first of ``architectures``, such as ``LlamaForCausalLM``, else ``model_type``, else empty."""
        names = self.config.get("architectures")
        name = names[0] if isinstance(names, list) and names else self.config.get("model_type")
        return name if isinstance(name, str) else ""

    @property
    def context_length(self) -> int | None:
        """Trained context in tokens."""
        return self._number("max_position_embeddings")

    @property
    def n_layers(self) -> int | None:
        """Number of layers."""
        return self._number("num_hidden_layers")

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary, or 0 when it is not said."""
        return self._number("vocab_size") or 0

    @cached_property
    def parameters(self) -> int:
        """Number of stored elements; weights packed several to an element count once per element."""
        return sum(tensor.n_elements for tensor in self.tensors)

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @cached_property
    def quantisation(self) -> Quantisation:
        """The quantisation method of the configuration, else the type with most bytes; and the mix."""
        quantised = self.get("quantization_config")
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        return Quantisation.of(self.tensors, method if isinstance(method, str) else None)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What the model can be loaded for, by the name of its architecture."""
        name = self.architecture
        if name.endswith("ForSequenceClassification"):
            return (Mode.RERANKING,)
        if name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
            return (Mode.COMPLETION,)
        return (Mode.EMBEDDING,) if name.endswith(("Model", "ForMaskedLM")) else ()


def read_safetensors(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read the headers of a safetensors model on disk.

    Parameters
    ----------
    path
        The model's folder, or one of its files.

    Raises
    ------
    SafetensorsParseError
        A file is missing, or something in it is wrong; the message says what.
    """
    folder = Path(path)
    if folder.suffix == ".safetensors":
        folder = folder.parent
    with ExitStack() as stack:

        def open_file(name: str) -> Source:
            return stack.enter_context(FileSource(folder / name))

        names = sorted(p.name for p in folder.glob("*.safetensors")) if folder.is_dir() else []
        return read_model(str(folder), open_file, names)


def read_remote_safetensors(url: str, **options: Any) -> SafetensorsHeader:
    """Read the headers of a safetensors model on a server; the weights stay there.

    Parameters
    ----------
    url
        Address of the model's folder, such as ``https://huggingface.co/OWNER/REPO/resolve/main``.
    options
        Options of :class:`nbinfer.gguf.remote.RemoteReader`.

    Raises
    ------
    SafetensorsParseError
        A file is missing, the server does not give it, or something in it is wrong.
    """
    from nbinfer.gguf.remote import RemoteReader

    with RemoteReader(**options) as reader:
        return read_model(url, lambda name: reader.open(f"{url.rstrip('/')}/{name}"), [_SINGLE])


def read_model(source: str, open_file: Opener, names: list[str]) -> SafetensorsHeader:
    """Read a model through ``open_file``; ``names`` are the weight files to expect without an index.

    Raises
    ------
    SafetensorsParseError
        A file is missing, or something in it is wrong.
    """
    try:
        config = read_json(open_file, "config.json", MAX_CONFIG)
        index = read_json(open_file, _INDEX, MAX_HEADER)
        if index is not None:
            names = _files_of(index)
        elif _SINGLE in names:
            names = [_SINGLE]
        if not names:
            raise SafetensorsParseError(f"{source}: there is no {_SINGLE}, and no {_INDEX}.")
        tensors: list[TensorInfo] = []
        size = 0
        for part, name in enumerate(names):
            file = open_file(name)
            tensors += parse_safetensors(file, part)
            size += file.size
    except SourceError as error:
        raise SafetensorsParseError(str(error)) from error.__cause__
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise SafetensorsParseError(f"{source}: a tensor appears in two files.")
    return SafetensorsHeader(source, config or {}, tuple(tensors), tuple(names), size)


def _files_of(index: dict[str, Any]) -> list[str]:
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise SafetensorsParseError(f"{_INDEX} has no weight_map.")
    names = {name if isinstance(name, str) else repr(name) for name in files.values()}
    # A file may only name files beside it.
    strange = next((name for name in names if not _FILE.fullmatch(name)), None)
    if strange is not None:
        raise SafetensorsParseError(
            f"{_INDEX} names {strange[:80]!r}, which is no safetensors file beside it."
        )
    if len(names) > MAX_FILES:
        raise SafetensorsParseError(f"{_INDEX} names {len(names):,} files; up to {MAX_FILES:,} are possible.")
    return sorted(names)


def parse_safetensors(source: Source, part: int = 0) -> list[TensorInfo]:
    """Parse the header of one safetensors file: its tensors, in the order of their data.

    Raises
    ------
    SafetensorsParseError
        Something in the header is wrong.
    SourceError
        The bytes cannot be had.
    """
    prefix = 8
    if source.size < prefix:
        raise SafetensorsParseError(f"{source.name}: {source.size} bytes are no safetensors file.")
    n = int.from_bytes(source.read(0, prefix)[:prefix], "little")
    if n > min(source.size - prefix, MAX_HEADER):
        raise SafetensorsParseError(
            f"{source.name}: a header of {n:,} bytes is announced; the file has {source.size:,},"
            f" and {MAX_HEADER:,} are possible.",
        )
    raw = source.read(prefix, n)[:n] if n else b""
    if not raw.startswith(b"{"):
        raise SafetensorsParseError(f"{source.name}: its header does not begin with a brace.")
    table = _loads(raw, source.name)
    table.pop("__metadata__", None)
    tensors = sorted(
        (_tensor(name, entry, source.name, part) for name, entry in table.items()),
        key=lambda t: (t.offset, t.n_bytes),
    )
    end = 0
    for tensor in tensors:
        if tensor.offset != end:
            raise SafetensorsParseError(
                f"{source.name}: the data of {tensor.name!r} begins at {tensor.offset:,} instead of {end:,}.",
            )
        end += tensor.n_bytes
    there = source.size - prefix - n
    if there < end:
        whole = prefix + n + end
        raise SafetensorsParseError(
            f"{source.name}: the file is cut off: {source.size:,} of {whole:,} bytes are there."
        )
    if there > end:
        raise SafetensorsParseError(f"{source.name}: {there - end:,} bytes belong to no tensor.")
    return tensors


def _tensor(name: str, entry: object, file: str, part: int) -> TensorInfo:
    shown = name[:80]
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsParseError(f"{file}: {shown!r} has other fields than dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise SafetensorsParseError(f"{file}: {shown!r} has the unknown dtype {str(dtype)[:40]!r}.")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:  # noqa: PLR2004 - begin and end
        raise SafetensorsParseError(f"{file}: {shown!r} has a shape or offsets that are no counts.")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise SafetensorsParseError(
            f"{file}: {shown!r} needs {bits / 8:,.10g} bytes by its shape, and has {end - begin:,}.",
        )
    return TensorInfo(name, tuple(shape), dtype, begin, bits // 8, part)


def _counts(values: object) -> bool:
    """Whether ``values`` is a short list of counts."""
    most = 16
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def read_json(open_file: Opener, name: str, limit: int) -> dict[str, Any] | None:
    """Read a JSON object; None when there is no such file."""
    try:
        source = open_file(name)
    except SourceError as error:
        if error.missing:
            return None
        raise
    if source.size > limit:
        raise SafetensorsParseError(f"{source.name}: {source.size:,} bytes; up to {limit:,} are possible.")
    return _loads(source.read(0, source.size)[: source.size] if source.size else b"", source.name)


def _loads(raw: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise SafetensorsParseError(f"{name}: no valid JSON: {str(error)[:120]}.") from None
    if not isinstance(value, dict):
        raise SafetensorsParseError(f"{name}: the JSON is no object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice[:80]!r} appears twice")
    return table
