"""Reading the header of one GGUF file, trusting nothing in it.

Every length is compared with the bytes that are left before anything is read, allocated or repeated, so the
work is bounded by the size of the header and the memory by a few fixed limits. Whatever is wrong raises
:class:`~nbinfer.contract.errors.GGUFParseError`.
"""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from struct import Struct, unpack_from
from typing import TYPE_CHECKING, Any, Final, NoReturn

from nbinfer.contract.errors import GGUFParseError
from nbinfer.gguf.header import ArraySummary, Header, TensorInfo
from nbinfer.gguf.source import SourceError
from nbinfer.gguf.types import ARRAY, STRING, UINT32, tensor_types, value_types
from nbinfer.gguf.walk import walk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.gguf.source import Source

MAX_HEADER: Final = 256 * 1024**2
MAX_ENTRIES: Final = 65_536
MAX_TENSORS: Final = 131_072
MAX_KEY: Final = 65_535
MAX_NAME: Final = 63  # ggml stores names in 64 bytes
MAX_DIMS: Final = 4
MAX_ALIGNMENT: Final = 1024**2
DEFAULT_ALIGNMENT: Final = 32

KEEP_ARRAY: Final = 4096  # bytes; per-layer head counts and the like are smaller
KEEP_STRING: Final = 1024**2  # bytes; chat templates are tens of KiB
KEEP_ALL: Final = 16 * 1024**2  # bytes that kept strings and arrays take in Python, roughly
_OBJECT = 40  # bytes that an element of a tuple takes, with the tuple's pointer to it

_U32 = Struct("<I")
_U64 = Struct("<Q")
_START = Struct("<4sIQQ")
_DIMS = tuple(Struct(f"<{n}QIQ") for n in range(MAX_DIMS + 1))
_SMALLEST_ENTRY = 14  # key length, one character, type, one byte
_SMALLEST_TENSOR = 33  # name length, one character, dimensions, one of them, type, offset
_MAX_ELEMENTS = 2**48  # beyond it ggml's own sums of bytes wrap around
_MAX_SHOWN = 80
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,63}")

_OTHER_FILES = (
    (b"lmgg", "it is a GGML file from before GGUF; convert it with a current llama.cpp"),
    (b"tjgg", "it is a GGJT file from before GGUF; convert it with a current llama.cpp"),
    (b"fmgg", "it is a GGMF file from before GGUF; convert it with a current llama.cpp"),
    (b"PK\x03\x04", "it is a zip archive or a PyTorch checkpoint"),
    (b"vers", "it is a Git LFS pointer: the file itself was not downloaded (git lfs pull)"),
    (b"<!DO", "it is a web page: the download went to a page, not to the file"),
    (b"<htm", "it is a web page: the download went to a page, not to the file"),
)

# Numbers that other code counts with or allocates for, by key after the architecture: (least, most).
# LLAMA_MAX_LAYERS is 512 and LLAMA_MAX_EXPERTS 1024 in llama.cpp.
_RANGES = {
    "block_count": (1, 512),
    "context_length": (0, 2**31 - 1),
    "embedding_length": (1, 2**20),
    "embedding_length_out": (0, 2**20),
    "feed_forward_length": (0, 2**24),
    "attention.head_count": (0, 65_536),
    "attention.head_count_kv": (0, 65_536),
    "attention.key_length": (0, 65_536),
    "attention.value_length": (0, 65_536),
    "expert_count": (0, 1024),
    "expert_used_count": (0, 1024),
    "vocab_size": (0, 2**24),
    "attention.sliding_window": (0, 2**31 - 1),
}


def parse(source: Source, *, require_data: bool = True) -> Header:
    """Parse the header of one file.

    Parameters
    ----------
    source
        The file.
    require_data
        Whether the tensor data must lie inside the file; False accepts a header without its weights.

    Raises
    ------
    GGUFParseError
        Something in the header is wrong; the message names it and the byte where it is.
    """
    with as_parse_errors():
        return _Parser(source).parse(require_data=require_data)


@contextmanager
def as_parse_errors() -> Iterator[None]:
    """Say in the words of this format that bytes cannot be had."""
    try:
        yield
    except SourceError as error:
        raise GGUFParseError(str(error)) from error.__cause__


class _Parser:
    """A position in a window of the file; `_need` moves the window."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._size = source.size
        self._end = min(self._size, MAX_HEADER)
        self._pos = 0  # in the file
        self._base = 0  # where the window begins in the file
        self._data = b""
        self._kept = 0
        self._plain: list[bytes] = []
        self._plain_bytes = 0

    # -- bytes ------------------------------------------------------------------------------------------

    def _fail(self, problem: str, at: int | None = None) -> NoReturn:
        where = self._pos if at is None else at
        raise GGUFParseError(f"{self._source.name}: {problem} (at byte {where:,}).")

    def _need(self, n: int, what: str) -> int:
        """Make the next ``n`` bytes available; return their index in the window."""
        index = self._pos - self._base
        if index >= 0 and index + n <= len(self._data):
            return index
        self._check_left(n, what)
        self._data = self._source.read(self._pos, n)
        self._base = self._pos
        return 0

    def _check_left(self, n: int, what: str) -> None:
        """Fail unless ``n`` bytes are left of the header."""
        if n <= self._end - self._pos:
            return
        if self._pos + n > self._size:
            self._fail(f"{what} needs {n:,} bytes, but the file ends after {self._size - self._pos:,}")
        self._fail(f"{what} makes the header larger than {MAX_HEADER >> 20} MiB")

    def _u32(self, what: str) -> int:
        index = self._need(4, what)
        self._pos += 4
        number: int = _U32.unpack_from(self._data, index)[0]
        return number

    def _u64(self, what: str) -> int:
        index = self._need(8, what)
        self._pos += 8
        number: int = _U64.unpack_from(self._data, index)[0]
        return number

    def _label(self, what: str, longest: int) -> str:
        """Read a key or a tensor name."""
        start = self._pos
        n = self._u64(f"the length of {what}")
        if not 0 < n <= longest:
            self._fail(f"{what} is {n:,} bytes long; 1 to {longest:,} are possible", start)
        index = self._need(n, what)
        raw = self._data[index : index + n]
        self._pos += n
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8 text", start)
        if "\0" in text:
            self._fail(f"{what} holds a zero byte", start)
        return text

    # -- the header -------------------------------------------------------------------------------------

    def parse(self, *, require_data: bool) -> Header:
        version, n_tensors, n_entries = self._start()
        metadata = self._entries(n_entries)
        alignment = self._alignment(metadata)
        self._check_tokenizer(metadata)
        self._check_ranges(metadata)
        tensors = self._tensors(n_tensors, alignment)
        data_offset = -(-self._pos // alignment) * alignment
        if tensors and require_data:
            self._check_data(tensors, data_offset)
        return Header(
            source=self._source.name,
            version=version,
            alignment=alignment,
            data_offset=data_offset,
            file_size=self._size,
            metadata=metadata,
            tensors=tensors,
            files=(self._source.name,),
            _plain_entries=None if self._plain_bytes > KEEP_ALL else b"".join(self._plain),
            _n_plain_entries=len(self._plain),
        )

    def _start(self) -> tuple[int, int, int]:
        if not self._size:
            self._fail("the file is empty")
        self._need(min(4, self._size), "the magic")
        magic = self._data[:4]
        if magic != b"GGUF":
            hint = next((hint for start, hint in _OTHER_FILES if magic == start), None)
            self._fail(f"it does not begin with GGUF but with {magic!r}" + (f": {hint}" if hint else ""))
        index = self._need(_START.size, "the start of the header")
        _, version, n_tensors, n_entries = _START.unpack_from(self._data, index)
        if version and version & 0xFFFF == 0:
            self._fail("it is big-endian; only little-endian files can be run here", 4)
        if version not in (2, 3):
            self._fail(f"GGUF version {version} cannot be read; versions 2 and 3 can", 4)
        self._pos += _START.size
        left = self._end - self._pos
        if n_entries > min(MAX_ENTRIES, left // _SMALLEST_ENTRY):
            self._fail(f"{n_entries:,} metadata entries do not fit in a header of at most {left:,} bytes", 16)
        if n_tensors > min(MAX_TENSORS, left // _SMALLEST_TENSOR):
            self._fail(f"{n_tensors:,} tensors do not fit in a header of at most {left:,} bytes", 8)
        return version, n_tensors, n_entries

    def _entries(self, n: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for number in range(n):
            start = self._pos
            key = self._label(f"metadata key {number}", MAX_KEY)
            if key in metadata:
                self._fail(f"metadata key {key!r} appears twice", start)
            metadata[key] = self._value(key)
            if not (key.startswith(("tokenizer.", "split.")) or key.endswith(".vocab_size")):
                self._keep_entry(start)
        return metadata

    def _keep_entry(self, start: int) -> None:
        """Keep an entry's own bytes for `stripped`, unless it is very large."""
        n = self._pos - start
        self._plain_bytes += n
        if self._plain_bytes > KEEP_ALL:
            return
        index = start - self._base
        if index >= 0 and index + n <= len(self._data):
            self._plain.append(self._data[index : index + n])
        else:
            self._plain.append(self._source.read(start, n)[:n])

    def _value(self, key: str) -> Any:
        kind = self._u32(f"the type of {key!r}")
        if key == "general.alignment" and kind != UINT32:
            self._fail("general.alignment is not stored as an unsigned 32-bit number", self._pos - 4)
        if kind == STRING:
            return self._string(key)
        if kind == ARRAY:
            return self._array(key)
        name, code = value_types().get(kind, ("", ""))
        if not code:
            self._fail(f"{key!r} has the unknown value type {kind}", self._pos - 4)
        scalar = Struct("<" + code)
        index = self._need(scalar.size, f"the {name} of {key!r}")
        self._pos += scalar.size
        return scalar.unpack_from(self._data, index)[0]

    def _string(self, key: str) -> str | ArraySummary:
        n = self._u64(f"the length of {key!r}")
        self._check_left(n, f"the text of {key!r}")
        start = self._pos
        if n > KEEP_STRING or self._kept + n > KEEP_ALL:
            self._pos += n
            return ArraySummary("char", n, start)
        self._kept += n
        index = self._need(n, f"the text of {key!r}")
        self._pos += n
        # Text is shown, never used to find things: a broken character must not make the model unusable.
        return self._data[index : index + n].decode(errors="replace")

    def _array(self, key: str) -> tuple[Any, ...] | ArraySummary:
        kind = self._u32(f"the element type of {key!r}")
        n = self._u64(f"the length of {key!r}")
        name, code = value_types().get(kind, ("", ""))
        if kind == ARRAY:
            self._fail(f"{key!r} is an array of arrays, which no model uses", self._pos - 12)
        if not name:
            self._fail(f"{key!r} has the unknown element type {kind}", self._pos - 12)
        if kind == STRING:
            return self._strings(key, n)
        width = Struct("<" + code).size
        what = f"the {n:,} elements of {key!r}"
        self._check_left(n * width, what)
        start = self._pos
        if n * width > KEEP_ARRAY or self._kept + n * _OBJECT > KEEP_ALL:
            self._pos += n * width
            return ArraySummary(name, n, start)
        self._kept += n * _OBJECT
        index = self._need(n * width, what)
        self._pos += n * width
        return unpack_from(f"<{n}{code}", self._data, index)

    def _strings(self, key: str, n: int) -> tuple[str, ...] | ArraySummary:
        start = self._pos
        self._check_left(8 * n, f"the {n:,} strings of {key!r}")
        left = n
        while left:
            what = f"string {n - left:,} of {n:,} of {key!r}"
            index = self._need(8, what)
            count, end = walk(self._data, index, left)
            left -= count
            step = self._base + end - self._pos
            if step > self._end - self._pos:
                self._fail_in_string(key, n, left, step)
            self._pos += step
        size = self._pos - start
        if size > KEEP_ARRAY or self._kept + size + n * _OBJECT > KEEP_ALL:
            return ArraySummary("string", n, start)
        self._kept += size + n * _OBJECT
        end, self._pos = self._pos, start
        index = self._need(size, f"the strings of {key!r}")
        texts = []
        for _ in range(n):
            length = _U64.unpack_from(self._data, index)[0]
            texts.append(self._data[index + 8 : index + 8 + length].decode(errors="replace"))
            index += 8 + length
        self._pos = end
        return tuple(texts)

    def _fail_in_string(self, key: str, n: int, left: int, step: int) -> NoReturn:
        past = (
            "ends after the end of the file"
            if self._pos + step > self._size
            else "ends after the largest header"
        )
        self._fail(f"string {n - left - 1:,} of {n:,} of {key!r} {past}")

    # -- what the entries must say ----------------------------------------------------------------------

    def _alignment(self, metadata: dict[str, Any]) -> int:
        value: int = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            self._fail(f"general.alignment is {value:,}; it must be a power of two up to {MAX_ALIGNMENT:,}")
        return value

    def _check_tokenizer(self, metadata: dict[str, Any]) -> None:
        """Check the arrays that engines index by token without looking at their length."""
        tokens = metadata.get("tokenizer.ggml.tokens")
        if tokens is None:
            return
        n = _length_of(tokens, "string")
        if n is None:
            self._fail(f"tokenizer.ggml.tokens is {_short(tokens)}; it must be an array of strings")
        for key, kinds in (("scores", ("float32",)), ("token_type", ("int32", "uint32"))):
            values = metadata.get(f"tokenizer.ggml.{key}")
            if values is None:
                continue
            m = _length_of(values, *kinds)
            if m is None or m < n:
                self._fail(
                    f"tokenizer.ggml.{key} is {_short(values)}; it must be an array of {kinds[0]}"
                    f" with one element for each of the {n:,} tokens",
                )

    def _check_ranges(self, metadata: dict[str, Any]) -> None:
        arch = metadata.get("general.architecture")
        if arch is None:
            return
        if not isinstance(arch, str) or not _ARCHITECTURE.fullmatch(arch):
            self._fail(f"general.architecture is {_short(arch)}; it must be a short name")
        for key, (least, most) in _RANGES.items():
            value = metadata.get(f"{arch}.{key}")
            for number in value if isinstance(value, tuple) else (value,):
                if number is None:
                    continue
                if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
                    self._fail(f"{arch}.{key} is {_short(value)}; it must be {least:,} to {most:,}")

    # -- tensors ----------------------------------------------------------------------------------------

    def _tensors(self, n: int, alignment: int) -> tuple[TensorInfo, ...]:
        kinds = tensor_types()
        tensors: list[TensorInfo] = []
        names: set[str] = set()
        end = 0  # where the data of the next tensor begins: llama.cpp, too, accepts nothing else
        for number in range(n):
            start = self._pos
            name = self._label(f"the name of tensor {number}", MAX_NAME)
            if name in names:
                self._fail(f"tensor {name!r} appears twice", start)
            names.add(name)
            *shape, type_number, offset = self._dimensions(name)
            kind = kinds.get(type_number)
            if kind is None:
                self._fail(
                    f"tensor {name!r} has the unknown type {type_number}; a newer gguf package may know it",
                    start,
                )
            n_elements = math.prod(shape)
            if max(shape) > _MAX_ELEMENTS or n_elements > _MAX_ELEMENTS:
                self._fail(f"tensor {name!r} has the impossible shape {shape}", start)
            if shape[0] % kind.block:
                self._fail(
                    f"tensor {name!r} has rows of {shape[0]:,}, not a multiple of {kind.name}'s {kind.block}",
                    start,
                )
            if offset != end:
                self._fail(f"the data of tensor {name!r} begins at {offset:,} instead of {end:,}", start)
            n_bytes = n_elements // kind.block * kind.n_bytes
            tensors.append(TensorInfo(name, tuple(shape), kind.name, offset, n_bytes))
            end = -(-(offset + n_bytes) // alignment) * alignment
        return tuple(tensors)

    def _dimensions(self, name: str) -> tuple[int, ...]:
        """Read what follows a tensor's name: its shape, the number of its type, its offset."""
        n_dims = self._u32(f"the number of dimensions of tensor {name!r}")
        if not 0 < n_dims <= MAX_DIMS:
            self._fail(
                f"tensor {name!r} has {n_dims:,} dimensions; 1 to {MAX_DIMS} are possible", self._pos - 4
            )
        record = _DIMS[n_dims]
        index = self._need(record.size, f"the shape of tensor {name!r}")
        self._pos += record.size
        return record.unpack_from(self._data, index)

    def _check_data(self, tensors: tuple[TensorInfo, ...], data_offset: int) -> None:
        # The last tensor need not be padded to the alignment.
        end = data_offset + max(tensor.offset + tensor.n_bytes for tensor in tensors)
        if end > self._size:
            self._fail(f"the file is cut off: {self._size:,} of {end:,} bytes are there", self._size)


def _length_of(array: object, *kinds: str) -> int | None:
    """Return the length of an array of one of the given element types, else None."""
    if isinstance(array, ArraySummary):
        return array.length if array.element_type in kinds else None
    if not isinstance(array, tuple):
        return None
    python = {"string": str, "float32": float}
    return len(array) if all(type(value) is python.get(kinds[0], int) for value in array) else None


def _short(value: object) -> str:
    text = f"an array of {len(value):,}" if isinstance(value, tuple) else repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
