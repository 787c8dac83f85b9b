"""Mutations of small GGUF files that know the format: they change fields, not only bytes."""

from __future__ import annotations

import random
from struct import pack
from typing import TYPE_CHECKING

from support.gguf_bytes import (
    ARRAY,
    F32,
    I32,
    STRING,
    TYPE_F16,
    TYPE_Q4_K,
    TYPE_Q8_0,
    U8,
    U32,
    U64,
    Entry,
    File,
    Piece,
    Tensor,
    padded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

BASES = (
    File(
        [
            Entry("general.architecture", STRING, "llama"),
            Entry("general.alignment", U32, 32),
            Entry("llama.block_count", U32, 2),
            Entry("llama.attention.head_count", (ARRAY, I32), [4, 8]),
            Entry("tokenizer.ggml.tokens", (ARRAY, STRING), ["<s>", "", "a", "b" * 40]),
            Entry("tokenizer.ggml.scores", (ARRAY, F32), [0.0] * 4),
        ],
        [
            Tensor("a.weight", (256, 3), TYPE_Q4_K),
            Tensor("b.weight", (4, 2, 2)),
            Tensor("c", (64,), TYPE_Q8_0),
        ],
    ),
    File(
        [
            Entry("general.architecture", STRING, "bert"),
            Entry("bert.pooling_type", U32, 1),
            Entry("x", (ARRAY, U8), list(range(20))),
            Entry("tokenizer.ggml.tokens", (ARRAY, STRING), [f"token {i}" for i in range(100)]),
            Entry("y", U64, 2**63),
        ],
        [Tensor("a", (32,), TYPE_F16)],
        version=2,
    ),
    File([Entry("general.architecture", STRING, "clip"), Entry("split.count", U32, 2)]),
)

NUMBERS = sorted(
    {
        n + d
        for k in (0, 3, 5, 6, 7, 8, 10, 16, 20, 24, 28, 30, 31, 32, 33, 48, 61, 62, 63, 64)
        for n in (2**k,)
        for d in (-1, 0, 1)
    }
    | set(range(20))
    | {2**64 - 8, 2**64 - 16, 2**64 - 32, 2**32 - 32},
)
FIELDS = {4: "<I", 8: "<Q"}


def mutants(seed: int, n: int) -> Iterator[bytes]:
    """Yield ``n`` mutated files, the same ones for the same seed."""
    rng = random.Random(seed)
    bases = [base.header_pieces() for base in BASES]
    for _ in range(n):
        pieces = list(rng.choice(bases))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _mutate(rng, pieces)
        data = bytearray(b"".join(piece.data for piece in pieces))
        if rng.random() < 0.1 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.05:
            del data[rng.randrange(len(data) + 1) :]
        elif rng.random() < 0.8:
            data.extend(bytes(padded(len(data), 32) - len(data) + rng.choice((0, 512, 4096))))
        yield bytes(data)


def _mutate(rng: random.Random, pieces: list[Piece]) -> None:
    if not pieces:
        return
    i = rng.randrange(len(pieces))
    piece = pieces[i]
    action = rng.random()
    if action < 0.75 and len(piece.data) in FIELDS:
        width = len(piece.data)
        value = (
            rng.choice(NUMBERS)
            if rng.random() < 0.8
            else int.from_bytes(piece.data, "little") + rng.choice((-1, 1))
        )
        pieces[i] = Piece(piece.role, pack(FIELDS[width], value % 2 ** (8 * width)))
    elif action < 0.82:
        del pieces[i]
    elif action < 0.89:
        pieces.insert(i, piece)
    elif action < 0.95:
        j = rng.randrange(len(pieces))
        pieces[i], pieces[j] = pieces[j], pieces[i]
    else:
        pieces[i] = Piece(piece.role, rng.randbytes(rng.choice((0, 1, 8, 64, 300))))
