"""What a header says: values, tensors, and the views that other rooms read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
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
    Entry,
    File,
    Tensor,
    small_model,
)

from nbinfer.contract.errors import GGUFParseError
from nbinfer.contract.modes import Mode
from nbinfer.gguf import ArraySummary, data_size, read_header, stripped
from nbinfer.gguf.parse import parse
from nbinfer.gguf.source import MemorySource
from nbinfer.models.demo import demo_path

if TYPE_CHECKING:
    from nbinfer.gguf import Header


def header_of(file: File) -> Header:
    return parse(MemorySource(file.bytes()))


def written(tmp_path: Path, file: File, name: str = "model.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(file.bytes())
    return path


def test_scalars_strings_and_small_arrays_are_kept_as_python_values() -> None:
    metadata = header_of(small_model()).metadata
    assert metadata["general.name"] == "a small model"
    assert metadata["llama.rope.freq_base"] == 10000.0
    assert metadata["llama.attention.head_count"] == (4, 8)
    assert metadata["test.flags"] == (True, False)
    assert metadata["test.words"] == ("one", "", "three")
    assert metadata["test.?"] is True
    assert metadata["test.q"] == 1
    assert metadata["test.d"] == 1.0
    assert len(metadata) == len(small_model().entries)


@pytest.mark.parametrize(
    ("kind", "values", "element_type"),
    [
        ((ARRAY, I32), [1] * 1025, "int32"),
        ((ARRAY, U8), [1] * 4097, "uint8"),
        ((ARRAY, F32), [1.0] * 50_000, "float32"),
        ((ARRAY, STRING), ["word"] * 342, "string"),
    ],
)
def test_arrays_beyond_4_kib_are_summarised_with_their_place(
    kind: tuple[int, int], values: list[Any], element_type: str
) -> None:
    file = File([Entry("before", U32, 1), Entry("big", kind, values), Entry("after", U32, 2)])
    header = header_of(file)
    summary = header.metadata["big"]
    assert summary == ArraySummary(element_type, len(values), summary.offset)
    first = Entry("big", kind, values).pieces()[5:][0].data
    assert file.bytes()[summary.offset :].startswith(first)
    assert header.metadata["after"] == 2


def test_text_of_any_length_before_a_value_does_not_move_it() -> None:
    long = "x" * (1024**2 + 1)
    header = header_of(
        File([Entry("long", STRING, long), Entry("short", STRING, long[:-1]), Entry("end", U32, 7)])
    )
    assert header.metadata["long"] == ArraySummary("char", len(long), 24 + 8 + 4 + 4 + 8)
    assert header.metadata["short"] == long[:-1]
    assert header.metadata["end"] == 7


def test_broken_utf8_in_a_value_is_replaced_because_it_is_only_shown() -> None:
    assert header_of(File([Entry("general.name", STRING, b"caf\xe9")])).name == "caf\ufffd"


def test_tensors_have_shape_type_offset_and_bytes() -> None:
    header = header_of(small_model())
    assert [tuple(tensor) for tensor in header.tensors] == [
        ("token_embd.weight", (256, 100), "Q8_0", 0, 27_200, 0),
        ("blk.0.attn_q.weight", (256, 256), "Q4_K", 27_200, 36_864, 0),
        ("blk.0.attn_norm.weight", (256,), "F32", 64_064, 1024, 0),
        ("blk.1.attn_q.weight", (256, 64, 2), "F16", 65_088, 65_536, 0),
        ("output_norm.weight", (3,), "F32", 130_624, 12, 0),
    ]
    assert header.parameters == 25_600 + 65_536 + 256 + 32_768 + 3
    assert header.weights_bytes == 27_200 + 36_864 + 1024 + 65_536 + 12


def test_the_frame_of_tensors_has_typed_columns() -> None:
    frame = header_of(small_model()).tensors_frame()
    assert list(frame.columns) == ["name", "layer", "shape", "type", "elements", "bytes", "offset", "part"]
    assert frame["layer"].tolist()[1:4] == [0, 0, 1]
    assert frame["layer"].isna().tolist() == [True, False, False, False, True]
    assert int(frame["bytes"].sum()) == 130_636


def test_the_demo_model_reads_as_the_gguf_package_reads_it() -> None:
    header = read_header(demo_path())
    reader = gguf.GGUFReader(demo_path())
    for key, stored in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        ours, theirs = header.metadata[key], stored.contents()
        if isinstance(ours, ArraySummary):
            assert ours.length == len(theirs)
        else:
            assert ours == (tuple(theirs) if isinstance(theirs, list) else theirs)
    assert [(t.name, t.shape, t.type, t.n_bytes) for t in header.tensors] == [
        (t.name, tuple(int(n) for n in t.shape), t.tensor_type.name, int(t.n_bytes)) for t in reader.tensors
    ]
    assert header.data_offset == reader.data_offset


def test_the_demo_model_described() -> None:
    header = read_header(demo_path())
    assert (header.architecture, header.n_layers, header.context_length, header.n_vocab) == (
        "llama",
        4,
        1024,
        1024,
    )
    assert header.parameters == 918_656
    assert header.quantisation.label == "Q8_0"
    assert header.modes == (Mode.COMPLETION,)
    assert header.chat_template is not None
    assert header.get("attention.head_count_kv") == 1
    assert header.get("general.name") == "tiny-chat"
    assert header.get("no.such.key", -1) == -1
    assert header.kind == "model"


def test_a_file_written_by_the_gguf_package_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(3)
    writer.add_custom_alignment(128)
    writer.add_token_list([f"t{i}" for i in range(2000)])
    writer.add_array("qwen2.per_layer", [1, 2, 3])
    writer.add_tensor("a.weight", np.zeros((5, 32), dtype=np.float32))
    writer.add_tensor("b.weight", np.zeros((3, 2, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    assert (header.alignment, header.n_vocab, header.n_layers) == (128, 2000, 3)
    assert header.get("per_layer") == (1, 2, 3)
    assert [t.shape for t in header.tensors] == [(32, 5), (64, 2, 3)]
    assert header.file_size == path.stat().st_size


@pytest.mark.parametrize(
    ("entries", "label"),
    [
        ([Entry("general.file_type", U32, 15)], "Q4_K_M"),
        ([Entry("general.file_type", U32, 1024 + 7)], "Q8_0"),
        ([Entry("general.file_type", U32, 0)], "F32"),
        ([Entry("general.file_type", U32, 999)], "F16"),
        ([Entry("general.file_type", STRING, "Q4")], "F16"),
        ([], "F16"),
    ],
)
def test_the_quantisation_label_is_the_files_own_or_the_type_with_most_bytes(
    entries: list[Entry], label: str
) -> None:
    tensors = [Tensor("a", (256,), TYPE_Q4_K), Tensor("b", (256,), TYPE_F16), Tensor("c", (32,), TYPE_Q8_0)]
    quantisation = header_of(File(entries, tensors)).quantisation
    assert quantisation.label == str(quantisation) == label
    assert list(quantisation.mix.items()) == [("F16", 512), ("Q4_K", 144), ("Q8_0", 34)]


@pytest.mark.parametrize(
    ("entries", "kind", "modes"),
    [
        ([("general.architecture", STRING, "llama")], "model", (Mode.COMPLETION,)),
        (
            [("general.architecture", STRING, "qwen3"), ("qwen3.pooling_type", U32, 3)],
            "model",
            (Mode.EMBEDDING,),
        ),
        (
            [("general.architecture", STRING, "qwen3"), ("qwen3.pooling_type", U32, 0)],
            "model",
            (Mode.COMPLETION,),
        ),
        ([("general.architecture", STRING, "bert")], "model", (Mode.EMBEDDING,)),
        (
            [("general.architecture", STRING, "bert"), ("bert.pooling_type", U32, 4)],
            "model",
            (Mode.RERANKING,),
        ),
        (
            [("general.architecture", STRING, "llama"), ("llama.pooling_type", U32, 77)],
            "model",
            (Mode.COMPLETION,),
        ),
        ([("general.architecture", STRING, "clip")], "projector", ()),
        ([("general.architecture", STRING, "llama"), ("general.type", STRING, "adapter")], "adapter", ()),
        ([("general.type", STRING, "imatrix")], "other", ()),
    ],
)
def test_modes_follow_from_the_kind_of_file_and_its_pooling(
    entries: list[tuple[str, int, Any]], kind: str, modes: tuple[Mode, ...]
) -> None:
    header = header_of(File([Entry(*entry) for entry in entries], [Tensor("a", (4,))]))
    assert header.kind == kind
    assert header.modes == modes


def test_a_file_of_metadata_alone_is_a_vocabulary() -> None:
    header = header_of(small_model(tensors=()))
    assert header.kind == "vocabulary"
    assert header.tensors == ()
    assert header.n_vocab == 100


def test_a_header_without_its_weights_is_read_only_when_asked(tmp_path: Path) -> None:
    path = written(tmp_path, small_model(data=0))
    with pytest.raises(GGUFParseError, match=r"cut off: 3,808 of 134,444 bytes"):
        read_header(path)
    assert len(read_header(path, require_data=False).tensors) == 5


def test_the_last_tensor_need_not_be_padded() -> None:
    assert header_of(small_model(data=130_636)).tensors
    with pytest.raises(GGUFParseError, match="cut off"):
        header_of(small_model(data=130_635))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_versions_2_and_3_and_any_alignment_are_read(version: int, alignment: int) -> None:
    file = small_model(version=version, alignment=alignment).plus(Entry("general.alignment", U32, alignment))
    header = header_of(file)
    assert (header.version, header.alignment) == (version, alignment)
    assert header.data_offset % alignment == 0


def test_a_stripped_header_keeps_everything_but_the_tokenizer() -> None:
    header = header_of(small_model())
    again = parse(MemorySource(stripped(header)), require_data=False)
    kept = {k: v for k, v in header.metadata.items() if not k.startswith("tokenizer.")}
    assert again.metadata == kept | {"tokenizer.ggml.model": "no_vocab", "llama.vocab_size": 100}
    assert again.tensors == header.tensors
    assert len(stripped(header)) == again.data_offset
    assert data_size(header) == 130_656


def test_a_declared_vocabulary_size_gives_way_to_the_number_of_tokens() -> None:
    header = header_of(small_model().plus(Entry("llama.vocab_size", U32, 64)))
    again = parse(MemorySource(stripped(header)), require_data=False)
    assert again.n_vocab == header.n_vocab == 100
    assert again.metadata["llama.vocab_size"] == 100


def test_entries_longer_than_the_reading_window_survive_stripping(tmp_path: Path) -> None:
    file = small_model().plus(Entry("llama.big", (ARRAY, U32), list(range(100_000))))
    again = parse(MemorySource(stripped(written(tmp_path, file))), require_data=False)
    assert again.metadata["llama.big"].length == 100_000


def test_megabytes_of_foreign_metadata_are_not_stripped_half() -> None:
    header = header_of(small_model().plus(Entry("llama.big", STRING, "x" * 17_000_000)))
    with pytest.raises(GGUFParseError, match="too large to be copied"):
        stripped(header)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "zero byte in its path"])
def test_a_path_that_is_no_file_is_the_documented_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("needs named pipes")
        os.mkfifo(path)
    elif kind == "zero byte in its path":
        path = Path("bad\0name.gguf")
    with pytest.raises(GGUFParseError, match=r"failed to parse GGUF: .*(cannot be opened|is not a file)"):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_the_documented_error(tmp_path: Path) -> None:
    from nbinfer.gguf.source import FileSource

    path = written(tmp_path, small_model())
    with FileSource(path) as source:
        os.truncate(path, 100)
        with pytest.raises(
            GGUFParseError, match=r"ended at byte 100 of 134,464: it was cut while it was read"
        ):
            parse(source)


def test_importing_the_room_reads_no_tables_and_no_frame_library() -> None:
    code = (
        "import sys, nbinfer.gguf; "
        "print([m for m in ('pandas', 'gguf', 'httpx', 'llama_cpp', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
