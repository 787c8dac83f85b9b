"""Files that lie: each must be refused with the documented error, which says what is wrong."""

from __future__ import annotations

import tracemalloc
from struct import pack
from typing import TYPE_CHECKING

import pytest
from support.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    I64,
    STRING,
    TYPE_Q4_K,
    U8,
    U16,
    U32,
    U64,
    Entry,
    File,
    Tensor,
    small_model,
    text,
)

from nbinfer.contract.errors import GGUFParseError
from nbinfer.gguf import read_header
from nbinfer.gguf.parse import MAX_HEADER, parse
from nbinfer.gguf.source import MemorySource

if TYPE_CHECKING:
    from pathlib import Path

BASE = small_model()


def start(n_entries: int = 1, n_tensors: int = 0) -> bytes:
    return pack("<4sIQQ", b"GGUF", 3, n_tensors, n_entries)


def array_claim(element: int, n: int, rest: bytes = b"") -> bytes:
    return start() + text("k") + pack("<IIQ", ARRAY, element, n) + rest


def tensor_of(*tensors: Tensor, alignment: int = 32) -> bytes:
    return BASE.but(tensors=tensors, data=64, alignment=alignment).bytes()


def with_entry(key: str | bytes, kind: int | tuple[int, int], value: object) -> bytes:
    return BASE.plus(Entry(key, kind, value)).bytes()


def replaced(entries: dict[str, Entry]) -> bytes:
    return BASE.but(entries=[entries.get(str(e.key), e) for e in BASE.entries]).bytes()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "the file is empty"),
    "three bytes": (b"GGU", "does not begin with GGUF but with b'GGU'"),
    "magic alone": (b"GGUF", "needs 24 bytes, but the file ends after 4"),
    "old GGML file": (BASE.but(magic=b"lmgg").bytes(), "from before GGUF"),
    "web page": (b"<!DOCTYPE html><html></html>", "it is a web page"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "PyTorch checkpoint": (b"PK\x03\x04" + bytes(60), "a zip archive or a PyTorch checkpoint"),
    "version 0": (BASE.but(version=0).bytes(), "version 0 cannot be read"),
    "version 1": (BASE.but(version=1).bytes(), "version 1 cannot be read"),
    "version 4": (BASE.but(version=4).bytes(), "version 4 cannot be read"),
    "big-endian": (pack(">4sIQQ", b"GGUF", 3, 0, 0), "it is big-endian"),
    "2**63 entries": (
        BASE.but(n_entries=2**63).bytes(),
        "9,223,372,036,854,775,808 metadata entries do not fit",
    ),
    "2**64-1 tensors": (
        BASE.but(n_tensors=2**64 - 1).bytes(),
        "18,446,744,073,709,551,615 tensors do not fit",
    ),
    "one entry more than there are": (
        start(2) + text("k") + pack("<II", U32, 1) + bytes(15),
        "metadata key 1 is 0",
    ),
    "more entries than bytes": (start(9) + bytes(100), "9 metadata entries do not fit"),
    "key of 2**63 bytes": (start() + pack("<Q", 2**63) + bytes(40), "bytes long; 1 to 65,535 are possible"),
    "key longer than the file": (start() + pack("<Q", 100) + bytes(40), "but the file ends after 40"),
    "key without a name": (with_entry("", U32, 1), "0 bytes long"),
    "key that is not text": (with_entry(b"\xff\xfe", U32, 1), "is not UTF-8 text"),
    "key with a zero byte": (with_entry("general.name\0x", U32, 1), "holds a zero byte"),
    "key twice": (with_entry("general.name", STRING, "again"), "metadata key 'general.name' appears twice"),
    "unknown value type": (start() + text("k") + pack("<IQ", 13, 0), "'k' has the unknown value type 13"),
    "scalar cut off": (start() + text("kk") + pack("<I", U64) + bytes(4), "the uint64 of 'kk' needs 8 bytes"),
    "string of 2**64-1 bytes": (
        start() + text("k") + pack("<IQ", STRING, 2**64 - 1),
        "'k' needs 18,446,744,073",
    ),
    "49 bytes that claim 2**63": (
        array_claim(U8, 2**63),
        "9,223,372,036,854,775,808 elements of 'k'",
    ),
    "array whose size wraps to 0": (array_claim(U64, 2**61, bytes(64)), "2,305,843,009,213,693,952 elements"),
    "strings whose size wraps to 0": (array_claim(STRING, 2**61, bytes(64)), "strings of 'k' needs"),
    "array of arrays": (array_claim(ARRAY, 1, pack("<IQ", U8, 0)), "'k' is an array of arrays"),
    "array of an unknown type": (array_claim(99, 1, bytes(8)), "'k' has the unknown element type 99"),
    "string past the end, in an array": (
        array_claim(STRING, 2, text("ok") + pack("<Q", 1000) + b"short"),
        "string 1 of 2 of 'k' ends after the end of the file",
    ),
    "string of 2**63 bytes, in a long array": (
        array_claim(STRING, 100, text("ok") * 98 + pack("<Q", 2**63) + bytes(100)),
        "string 98 of 100 of 'k' ends after the end of the file",
    ),
    "long array that stops": (
        array_claim(STRING, 100, text("abcdefgh") * 50),
        "string 50 of 100 of 'k' needs 8 bytes",
    ),
    "alignment 0": (with_entry("general.alignment", U32, 0), "general.alignment is 0"),
    "alignment 48": (
        with_entry("general.alignment", U32, 48),
        "general.alignment is 48; it must be a power of two",
    ),
    "alignment 2**30": (with_entry("general.alignment", U32, 2**30), "general.alignment is 1,073,741,824"),
    "alignment as text": (
        with_entry("general.alignment", STRING, "32"),
        "not stored as an unsigned 32-bit number",
    ),
    "alignment as a list": (with_entry("general.alignment", (ARRAY, U32), [32]), "unsigned 32-bit number"),
    "no dimensions": (tensor_of(Tensor("t", ())), "tensor 't' has 0 dimensions"),
    "five dimensions": (tensor_of(Tensor("t", (1,) * 5)), "tensor 't' has 5 dimensions; 1 to 4 are possible"),
    "2**32-1 dimensions": (
        start(0, 1) + text("t") + pack("<I", 2**32 - 1) + bytes(90),
        "has 4,294,967,295 dimensions",
    ),
    "negative dimension": (tensor_of(Tensor("t", (2**63,))), "impossible shape"),
    "dimensions whose product wraps": (tensor_of(Tensor("t", (2**32, 2**32, 2**32))), "impossible shape"),
    "a zero hides an impossible dimension": (tensor_of(Tensor("t", (2**63, 0))), "impossible shape"),
    "unknown tensor type": (
        tensor_of(Tensor("t", (4,), 2**31)),
        "tensor 't' has the unknown type 2147483648",
    ),
    "removed tensor type": (tensor_of(Tensor("t", (32,), 31)), "tensor 't' has the unknown type 31"),
    "rows that do not fill blocks": (
        tensor_of(Tensor("t", (100, 256), TYPE_Q4_K)),
        "rows of 100, not a multiple",
    ),
    "tensor name of 64 bytes": (tensor_of(Tensor("n" * 64, (4,))), "64 bytes long; 1 to 63 are possible"),
    "tensor without a name": (tensor_of(Tensor("", (4,))), "0 bytes long; 1 to 63 are possible"),
    "tensor twice": (tensor_of(Tensor("t", (4,)), Tensor("t", (4,))), "tensor 't' appears twice"),
    "offset not aligned": (tensor_of(Tensor("t", (4,), offset=16)), "begins at 16 instead of 0"),
    "overlapping tensors": (
        tensor_of(Tensor("t", (16,)), Tensor("u", (4,), offset=32)),
        "begins at 32 instead of 64",
    ),
    "offset outside the file": (tensor_of(Tensor("t", (4,), offset=2**40)), "instead of 0"),
    "offset that wraps": (
        tensor_of(Tensor("t", (4,)), Tensor("u", (4,), offset=2**64 - 32)),
        "instead of 32",
    ),
    "data cut off": (BASE.but(data=1000).bytes(), "the file is cut off: 4,808 of 134,444 bytes are there"),
    "size beyond any file": (tensor_of(Tensor("t", (2**45,))), "cut off"),
    "architecture as a number": (
        replaced({"general.architecture": Entry("general.architecture", U32, 1)}),
        "general.architecture is 1; it must be a short name",
    ),
    "architecture as a list": (
        replaced({"general.architecture": Entry("general.architecture", (ARRAY, STRING), ["llama"])}),
        "general.architecture is an array of 1",
    ),
    "2**32-1 layers": (
        replaced({"llama.block_count": Entry("llama.block_count", U32, 2**32 - 1)}),
        "llama.block_count is 4294967295; it must be 1 to 512",
    ),
    "no layers": (
        replaced({"llama.block_count": Entry("llama.block_count", U32, 0)}),
        "llama.block_count is 0",
    ),
    "layers as text": (
        replaced({"llama.block_count": Entry("llama.block_count", STRING, "2")}),
        "is '2'; it must be",
    ),
    "layers as truth": (
        replaced({"llama.block_count": Entry("llama.block_count", BOOL, True)}),
        "is True; it must be",
    ),
    "negative heads of one layer": (
        replaced({"llama.attention.head_count": Entry("llama.attention.head_count", (ARRAY, I32), [4, -1])}),
        "llama.attention.head_count is an array of 2; it must be 0 to 65,536",
    ),
    "negative context": (
        replaced({"llama.context_length": Entry("llama.context_length", I64, -1)}),
        "llama.context_length is -1",
    ),
    "65535 parts": (with_entry("split.count", U16, 65_535), "one of 65535 parts, but is not named like one"),
    "tokens that are numbers": (
        replaced({"tokenizer.ggml.tokens": Entry("tokenizer.ggml.tokens", (ARRAY, U32), [1, 2])}),
        "tokenizer.ggml.tokens is an array of 2; it must be an array of strings",
    ),
    "scores of the wrong type": (
        replaced({"tokenizer.ggml.scores": Entry("tokenizer.ggml.scores", (ARRAY, U8), [0] * 100)}),
        "tokenizer.ggml.scores is an array of 100; it must be an array of float32",
    ),
    "fewer scores than tokens": (
        replaced({"tokenizer.ggml.scores": Entry("tokenizer.ggml.scores", (ARRAY, F32), [0.0] * 99)}),
        "with one element for each of the 100 tokens",
    ),
    "fewer token types than tokens": (
        replaced({"tokenizer.ggml.token_type": Entry("tokenizer.ggml.token_type", (ARRAY, I32), [1])}),
        "with one element for each of the 100 tokens",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_lying_file_is_refused_and_the_lie_is_named(tmp_path: Path, name: str) -> None:
    data, problem = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(GGUFParseError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"failed to parse GGUF: {path}")
    assert problem in message
    assert message.count("\n") == 0


def test_every_truncation_of_a_small_file_is_the_documented_error() -> None:
    whole = small_model(tensors=BASE.tensors[:2]).but(data=None)
    header, data = whole.header(), whole.bytes()
    for n in [*range(len(header)), *range(len(header), len(data), 997), len(data) - 1]:
        with pytest.raises(GGUFParseError):
            parse(MemorySource(data[:n]))
    assert len(parse(MemorySource(data)).tensors) == 2


class Counting(MemorySource):
    """Counts the bytes it hands out."""

    total = 0

    def read(self, offset: int, n: int) -> bytes:
        data = super().read(offset, n)[: max(n, 128 * 1024)]
        self.total += len(data)
        return data


def test_reading_is_bounded_by_the_size_of_the_header() -> None:
    # Strings and entries of awkward sizes, so that the reading window moves at the worst moments.
    entries = [Entry(f"k{i}", STRING, "v" * (i * 7919 % 300_000)) for i in range(40)]
    entries += [Entry(f"s{i}", (ARRAY, STRING), ["w" * (i * 31 % 700)] * 5) for i in range(800)]
    data = File(entries).bytes()
    source = Counting(data)
    parse(source)
    assert source.total < 4 * len(data)


@pytest.mark.parametrize(
    "data",
    [
        array_claim(STRING, 500_000, bytes(8 * 500_000)),
        array_claim(STRING, 1_000_000, text("a") * 1_000_000),
        array_claim(U64, 1_000_000, b"\xff" * 8_000_000),
        start() + text("k") + pack("<I", STRING) + text("x" * 16_000_000),
        start(4000)
        + b"".join(text(f"k{i}") + pack("<IIQ", ARRAY, U8, 4096) + b"\7" * 4096 for i in range(4000)),
        array_claim(U8, 2**63),
        array_claim(STRING, 2**60, bytes(1000)),
    ],
    ids=[
        "empty strings",
        "short strings",
        "numbers",
        "one string",
        "kept arrays",
        "claim",
        "claim of strings",
    ],
)
def test_memory_is_a_small_multiple_of_the_file(data: bytes) -> None:
    source = Counting(data)
    tracemalloc.start()
    try:
        parse(source)
    except GGUFParseError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 * len(data) + 8 * 1024**2


def test_a_header_may_not_be_larger_than_its_limit() -> None:
    class Endless(MemorySource):
        def read(self, offset: int, n: int) -> bytes:
            return (start() + text("k") + pack("<IQ", STRING, 2**40))[offset:] + bytes(n)

    with pytest.raises(GGUFParseError, match=r"makes the header larger than 256 MiB"):
        parse(Endless(b"", size=2**50))
    assert MAX_HEADER == 256 * 1024**2
