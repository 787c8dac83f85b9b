"""Mutated files: read or refused, never anything else, and refused whenever ggml refuses.

``NBINFER_FUZZ_CASES`` sets the number of cases (0.1 ms each), ``NBINFER_FUZZ_SEED`` where they begin.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import TYPE_CHECKING

import pytest
from support.ggml_reader import GgmlReader
from support.gguf_bytes import small_model
from support.gguf_fuzz import mutants

from nbinfer.contract.errors import GGUFParseError
from nbinfer.gguf import stripped
from nbinfer.gguf.parse import parse
from nbinfer.gguf.source import MemorySource
from nbinfer.gguf.types import tensor_types

if TYPE_CHECKING:
    from pathlib import Path

    from nbinfer.gguf import Header

CASES = int(os.environ.get("NBINFER_FUZZ_CASES", "200000" if os.environ.get("CI") else "50000"))
SEED = int(os.environ.get("NBINFER_FUZZ_SEED", "0"))

# What is refused here though ggml's reader of the container accepts it: it would fail or hurt later.
STRICTER = re.compile(
    "is not UTF-8 text|holds a zero byte|0 bytes long; 1 to 63|has 0 dimensions"
    "|is an array of arrays|general.alignment is|do not fit in a header"
    "|general.architecture is|; it must be|is larger than|header larger than"
    "|impossible shape|the file is cut off|bytes long; 1 to 65,535",
)


def needs_ggml() -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python, which carries ggml")


def parsed(data: bytes) -> Header | GGUFParseError:
    try:
        return parse(MemorySource(data), require_data=False)
    except GGUFParseError as error:
        return error


@pytest.mark.fuzz
@pytest.mark.timeout(0 if CASES > 50_000 else 180)
def test_a_mutated_file_is_read_or_refused_with_the_documented_error() -> None:
    read = 0
    for data in mutants(SEED, CASES):
        header = parsed(data)
        if isinstance(header, GGUFParseError):
            continue
        read += 1
        # What was accepted must hold for everything that is built on it.
        assert header.parameters >= 0
        assert header.n_vocab >= 0
        assert header.quantisation.label
        assert isinstance(header.modes, tuple)
        assert len(parse(MemorySource(stripped(header)), require_data=False).tensors) == len(header.tensors)
    assert CASES // 20 < read < CASES // 2  # neither trivial nor all refused


def test_tensor_types_are_as_large_as_ggml_makes_them() -> None:
    needs_ggml()
    with GgmlReader() as ggml:
        theirs = ggml.types()
    assert theirs == {str(number): [kind.block, kind.n_bytes] for number, kind in tensor_types().items()}


@pytest.mark.fuzz
def test_what_is_accepted_is_what_ggml_reads(tmp_path: Path) -> None:
    needs_ggml()
    path = tmp_path / "mutant.gguf"
    accepted = 0
    with GgmlReader() as ggml:
        for data in [small_model().bytes(), *mutants(SEED + 1, min(CASES, 10_000))]:
            path.write_bytes(data)
            ours, theirs = parsed(data), ggml.read(path)
            if isinstance(ours, GGUFParseError):
                assert not theirs["ok"] or STRICTER.search(str(ours)), f"{ours}: refused, but ggml reads it"
                continue
            if ours.tensors and ours.data_offset > len(data):
                continue  # cut within the padding before the data: fine for a header alone, not for ggml
            accepted += 1
            assert theirs["ok"], f"accepted, but ggml refuses it: {data!r}"
            numbers = {kind.name: number for number, kind in tensor_types().items()}
            assert theirs == {
                "ok": True,
                "n_kv": len(ours.metadata),
                "alignment": ours.alignment,
                # Without tensors there is no data, and ggml does not round up.
                "data_offset": ours.data_offset if ours.tensors else theirs["data_offset"],
                "tensors": [[t.name, numbers[t.type], t.offset, t.n_bytes] for t in ours.tensors],
            }
    assert accepted > 100
