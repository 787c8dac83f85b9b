"""Split models: one header of all parts, or a clear word about the part that does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.gguf_bytes import STRING, U16, Entry, Tensor, small_model

from nbinfer.contract.errors import GGUFParseError
from nbinfer.gguf import data_size, read_header, stripped
from nbinfer.gguf.parse import parse
from nbinfer.gguf.source import MemorySource
from nbinfer.gguf.split import part_of

if TYPE_CHECKING:
    from pathlib import Path

    from support.gguf_bytes import File

WHOLE = small_model()


def part(number: int, count: int, **changes: Any) -> File:
    """Part ``number`` (from 1): the first has the metadata, each has some of the tensors."""
    tensors = [tensor for i, tensor in enumerate(WHOLE.tensors) if i % count == number - 1]
    said = [
        Entry("split.no", U16, changes.pop("no", number - 1)),
        Entry("split.count", U16, changes.pop("total", count)),
        Entry("split.tensors.count", U16, changes.pop("n", len(WHOLE.tensors))),
    ]
    entries = [*(WHOLE.entries if number == 1 else []), *said]
    return small_model(entries=entries, tensors=tensors).but(**changes)


def name(number: int, count: int = 3) -> str:
    return f"model-{number:05}-of-{count:05}.gguf"


def write(folder: Path, *parts: File, count: int = 3) -> list[Path]:
    paths = [folder / name(number, count) for number in range(1, len(parts) + 1)]
    for path, file in zip(paths, parts, strict=True):
        path.write_bytes(file.bytes())
    return paths


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_any_part_gives_the_header_of_all(tmp_path: Path, asked: int) -> None:
    paths = write(tmp_path, part(1, 3), part(2, 3), part(3, 3))
    header = read_header(paths[asked])
    assert header.files == tuple(map(str, paths))
    assert header.name == "a small model"
    assert sorted((t.name, t.part) for t in header.tensors) == [
        ("blk.0.attn_norm.weight", 2),
        ("blk.0.attn_q.weight", 1),
        ("blk.1.attn_q.weight", 0),
        ("output_norm.weight", 1),
        ("token_embd.weight", 0),
    ]
    assert header.file_size == sum(path.stat().st_size for path in paths)
    assert header.parameters == parse(MemorySource(WHOLE.bytes())).parameters


def test_one_part_can_be_read_alone(tmp_path: Path) -> None:
    paths = write(tmp_path, part(1, 3))
    assert len(read_header(paths[0], parts=False).tensors) == 2


def test_the_stripped_header_of_a_split_model_is_that_of_one_file(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, part(1, 3), part(2, 3), part(3, 3))[0])
    data = stripped(header)
    again = parse(MemorySource(data, size=len(data) + data_size(header)))
    assert {t.name: t.n_bytes for t in again.tensors} == {t.name: t.n_bytes for t in header.tensors}
    assert not any(key.startswith("split.") for key in again.metadata)


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([part(1, 3), part(2, 3)], r"part 3 of 3 is missing: there is no .*model-00003-of-00003.gguf"),
        ([part(1, 3), part(3, 3), part(2, 3)], "say 2 and 3, but its name says 1 "),
        ([part(1, 3), part(2, 3, total=4), part(3, 3)], "say 1 and 4, but its name says 1 "),
        ([part(1, 3, n=6), part(2, 3), part(3, 3)], "the parts hold 5 tensors instead of 6"),
        (
            [part(1, 3), part(2, 3, tensors=part(1, 3).tensors), part(3, 3, tensors=[Tensor("x", (1,))])],
            "in two parts",
        ),
        ([part(1, 3), part(2, 3, data=3), part(3, 3)], r"model-00002-of-00003.gguf: the file is cut off"),
        ([WHOLE, part(2, 3), part(3, 3)], "say 0 and 1, but its name says 0 "),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    tmp_path: Path, parts: list[File], problem: str
) -> None:
    paths = write(tmp_path, *parts)
    with pytest.raises(GGUFParseError, match=problem):
        read_header(paths[0])


def test_a_renamed_part_says_that_the_others_cannot_be_found(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(part(1, 3).bytes())
    with pytest.raises(GGUFParseError, match="one of 3 parts, but is not named like one"):
        read_header(path)


def test_a_file_cannot_name_parts_in_another_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    write(secret, part(1, 2), part(2, 2), count=2)
    (tmp_path / "open").mkdir()
    path = tmp_path / "open" / name(1, 2)
    path.write_bytes(part(1, 2).plus(Entry("split.path", STRING, "../secret/")).bytes())
    with pytest.raises(GGUFParseError, match=r"part 2 of 2 is missing: there is no .*/open/model-00002"):
        read_header(path)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("a-00001-of-00003.gguf", ("a", 1, 3)),
        ("a-b-00003-of-00003.GGUF", ("a-b", 3, 3)),
        ("a-00004-of-00003.gguf", None),
        ("a-00000-of-00003.gguf", None),
        ("a-1-of-3.gguf", None),
        ("a.gguf", None),
        ("-00001-of-00003.gguf", None),
    ],
)
def test_the_name_of_a_part_is_recognised(file: str, expected: tuple[str, int, int] | None) -> None:
    assert part_of(file) == expected
