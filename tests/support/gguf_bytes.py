"""GGUF files written field by field, so that a test can make any field lie.

A file is a list of pieces; each numeric field is a piece of its own with a name, which is how tests and the
fuzzer find it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from struct import pack
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "?",
    U64: "Q",
    I64: "q",
    F64: "d",
}

TYPE_F32, TYPE_F16, TYPE_Q8_0, TYPE_Q4_K = 0, 1, 8, 12
SIZES = {TYPE_F32: (1, 4), TYPE_F16: (1, 2), TYPE_Q8_0: (32, 34), TYPE_Q4_K: (256, 144)}


class Piece(NamedTuple):
    """Some bytes of a file, and what they are."""

    role: str
    data: bytes


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return pack("<Q", len(raw)) + raw


@dataclass(frozen=True)
class Entry:
    """One metadata entry; ``kind`` is a value type, or (ARRAY, element type)."""

    key: str | bytes
    kind: int | tuple[int, int]
    value: Any

    def pieces(self) -> list[Piece]:
        key = self.key.encode() if isinstance(self.key, str) else self.key
        out = [Piece("key length", pack("<Q", len(key))), Piece("key", key)]
        if isinstance(self.kind, tuple):
            _, element = self.kind
            out += [
                Piece("value type", pack("<I", ARRAY)),
                Piece("element type", pack("<I", element)),
                Piece("array length", pack("<Q", len(self.value))),
            ]
            if element != STRING:
                return [*out, Piece("elements", pack(f"<{len(self.value)}{CODES[element]}", *self.value))]
            for string in self.value:
                raw = string.encode() if isinstance(string, str) else string
                out += [Piece("string length", pack("<Q", len(raw))), Piece("text", raw)]
            return out
        out.append(Piece("value type", pack("<I", self.kind)))
        if self.kind == STRING:
            raw = self.value.encode() if isinstance(self.value, str) else self.value
            return [*out, Piece("string length", pack("<Q", len(raw))), Piece("text", raw)]
        return [*out, Piece("scalar", pack("<" + CODES[self.kind], self.value))]


@dataclass(frozen=True)
class Tensor:
    """One tensor; without an offset, it follows the one before it."""

    name: str | bytes
    dims: tuple[int, ...]
    kind: int = TYPE_F32
    offset: int | None = None

    @property
    def n_bytes(self) -> int:
        block, size = SIZES.get(self.kind, (1, 4))
        n = 1
        for dim in self.dims:
            n *= dim
        return n // block * size


@dataclass(frozen=True)
class File:
    """A GGUF file to be."""

    entries: Sequence[Entry]
    tensors: Sequence[Tensor] = ()
    version: int = 3
    magic: bytes = b"GGUF"
    n_entries: int | None = None
    n_tensors: int | None = None
    alignment: int = 32
    data: int | None = None  # bytes of tensor data; None: as many as the tensors need
    extra: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> File:
        return replace(self, **changes)

    def plus(self, *entries: Entry) -> File:
        return replace(self, entries=[*self.entries, *entries])

    def header_pieces(self) -> list[Piece]:
        out = [
            Piece("magic", self.magic),
            Piece("version", pack("<I", self.version)),
            Piece(
                "tensor count", pack("<Q", len(self.tensors) if self.n_tensors is None else self.n_tensors)
            ),
            Piece("entry count", pack("<Q", len(self.entries) if self.n_entries is None else self.n_entries)),
        ]
        for entry in self.entries:
            out += entry.pieces()
        end = 0
        for tensor in self.tensors:
            name = tensor.name.encode() if isinstance(tensor.name, str) else tensor.name
            offset = end if tensor.offset is None else tensor.offset
            out += [
                Piece("name length", pack("<Q", len(name))),
                Piece("name", name),
                Piece("dimensions", pack("<I", len(tensor.dims))),
                *(Piece("dimension", pack("<Q", dim)) for dim in tensor.dims),
                Piece("tensor type", pack("<I", tensor.kind)),
                Piece("offset", pack("<Q", offset)),
            ]
            end = padded(offset + tensor.n_bytes, self.alignment)
        return out

    def header(self) -> bytes:
        """The header without padding."""
        return b"".join(piece.data for piece in self.header_pieces())

    def data_size(self) -> int:
        if self.data is not None:
            return self.data
        return sum(padded(tensor.n_bytes, self.alignment) for tensor in self.tensors)

    def bytes(self) -> bytes:
        header = self.header()
        if not self.tensors and not self.data:
            return header
        return header.ljust(padded(len(header), self.alignment), b"\0") + bytes(self.data_size())


def padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment if alignment else n


def small_model(**changes: Any) -> File:
    """A small file with one entry of every kind and tensors of several types."""
    tokens = [
        "<s>",
        "</s>",
        "",
        "a",
        "b" * 300,
        "\u0120hello",
        "\U0001f600",
        *(f"token{i}" for i in range(93)),
    ]
    entries = [
        Entry("general.architecture", STRING, "llama"),
        Entry("general.name", STRING, "a small model"),
        Entry("general.file_type", U32, 15),
        Entry("llama.block_count", U32, 2),
        Entry("llama.context_length", U32, 2048),
        Entry("llama.embedding_length", U32, 256),
        Entry("llama.attention.head_count", (ARRAY, I32), [4, 8]),
        Entry("llama.rope.freq_base", F32, 10000.0),
        Entry("test.flags", (ARRAY, BOOL), [True, False]),
        *(Entry(f"test.{code}", kind, 1) for kind, code in CODES.items()),
        Entry("test.words", (ARRAY, STRING), ["one", "", "three"]),
        Entry("tokenizer.ggml.model", STRING, "gpt2"),
        Entry("tokenizer.ggml.tokens", (ARRAY, STRING), tokens),
        Entry("tokenizer.ggml.token_type", (ARRAY, I32), [1] * len(tokens)),
        Entry("tokenizer.ggml.scores", (ARRAY, F32), [0.0] * len(tokens)),
        Entry("tokenizer.chat_template", STRING, "{{ messages }}"),
    ]
    tensors = [
        Tensor("token_embd.weight", (256, 100), TYPE_Q8_0),
        Tensor("blk.0.attn_q.weight", (256, 256), TYPE_Q4_K),
        Tensor("blk.0.attn_norm.weight", (256,)),
        Tensor("blk.1.attn_q.weight", (256, 64, 2), TYPE_F16),
        Tensor("output_norm.weight", (3,)),
    ]
    return File(entries, tensors).but(**changes)
