"""How long the header of a GGUF file takes: nbinfer, ggml's own reader in C++, and the gguf package.

    python benchmarks/header.py                      # vocabularies of 151,936 and 262,144 tokens
    python benchmarks/header.py --tokens 32000 --no-gguf-package

The files are synthetic: a vocabulary as real ones are shaped (with merges, as in most), 432 tensors, and a
hole where the weights would be. Times are the least of several runs, in milliseconds of processor time (CPU)
and of the clock (wall), taken in turns; the gguf package, which takes seconds, runs once.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING, NamedTuple

from gguf import GGUFReader
from rich.console import Console
from rich.table import Table

from nbinfer.gguf import read_header

if TYPE_CHECKING:
    from collections.abc import Callable

U32, I32, STRING, ARRAY = 4, 5, 8, 9
LAYERS = 36


class Timing(NamedTuple):
    """Milliseconds, the least of several runs."""

    cpu: float
    wall: float


def text(value: str) -> bytes:
    raw = value.encode()
    return pack("<Q", len(raw)) + raw


def strings(key: str, values: list[str]) -> bytes:
    return text(key) + pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(map(text, values))


def write_model(path: Path, n_tokens: int) -> int:
    """Write a header-only model; return the bytes of its header."""
    rng = random.Random(n_tokens)
    letters = "etaoinshrdlucmfwypvbgkjqxz\u0120\u00e9\u4e2d"
    tokens = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(n_tokens)]
    entries = [
        text("general.architecture") + pack("<I", STRING) + text("qwen3"),
        text("qwen3.block_count") + pack("<II", U32, LAYERS),
        strings("tokenizer.ggml.tokens", tokens),
        text("tokenizer.ggml.token_type") + pack("<IIQ", ARRAY, I32, n_tokens) + b"\1\0\0\0" * n_tokens,
        strings("tokenizer.ggml.merges", [f"{a} {b}" for a, b in zip(tokens, tokens[387:], strict=False)]),
    ]
    infos, offset = [], 0
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            infos.append(text(f"blk.{layer}.{name}.weight") + pack("<IQQIQ", 2, 1024, 1024, 1, offset))
            offset += 2 * 1024 * 1024
        for name in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm", "post_norm"):
            infos.append(text(f"blk.{layer}.{name}.weight") + pack("<IQIQ", 1, 1024, 0, offset))
            offset += 4 * 1024
    header = pack("<4sIQQ", b"GGUF", 3, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
    header += bytes(-len(header) % 32)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + offset)
    return len(header)


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Run each in turn, ``repeats`` times over."""
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start_cpu, start_wall = time.process_time(), time.perf_counter()
            run()
            cpu[name].append(time.process_time() - start_cpu)
            wall[name].append(time.perf_counter() - start_wall)
    return {name: Timing(1000 * min(cpu[name]), 1000 * min(wall[name])) for name in runs}


class Ggml:
    """gguf_init_from_file of the ggml that llama-cpp-python carries."""

    class Params(ctypes.Structure):
        """gguf_init_params."""

        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    def __init__(self) -> None:
        import llama_cpp.llama_cpp

        self._lib = ctypes.CDLL(llama_cpp.llama_cpp._lib._name)  # noqa: SLF001 - the copy that libllama uses
        self._lib.gguf_init_from_file.restype = ctypes.c_void_p
        self._lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, self.Params]
        self._lib.gguf_free.argtypes = [ctypes.c_void_p]

    def read(self, path: Path) -> None:
        """Read the header and free it."""
        handle = self._lib.gguf_init_from_file(str(path).encode(), self.Params(no_alloc=True, ctx=None))
        if not handle:
            raise RuntimeError(f"ggml does not read {path}")
        self._lib.gguf_free(handle)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[151_936, 262_144])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-gguf-package", action="store_true", help="skip the reader that takes seconds")
    options = parser.parse_args()

    table = Table(title="Header of a GGUF file, milliseconds")
    for column in ("reader", "tokens", "header MB", "CPU", "wall", "times nbinfer"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    ggml = Ggml()
    with tempfile.TemporaryDirectory() as folder:
        for n_tokens in options.tokens:
            path = Path(folder) / f"{n_tokens}.gguf"
            size = write_model(path, n_tokens)
            if read_header(path).n_vocab != n_tokens:
                sys.exit("the header was not read right")
            readers: dict[str, Callable[[], object]] = {
                "nbinfer": partial(read_header, path),
                "ggml (C++)": partial(ggml.read, path),
            }
            timings = measure(readers, options.repeats)
            if not options.no_gguf_package:
                timings |= measure({"gguf.GGUFReader": partial(GGUFReader, path)}, 1)
            ours = timings["nbinfer"]
            for name, timing in timings.items():
                table.add_row(
                    name,
                    f"{n_tokens:,}",
                    f"{size / 1e6:.1f}",
                    f"{timing.cpu:,.1f}",
                    f"{timing.wall:,.1f}",
                    f"{timing.cpu / ours.cpu:,.1f}",
                )
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
