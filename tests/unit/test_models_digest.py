"""The digest keys cached results: it must change with the weights, and be taken once."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest
from support.model_stores import isolate, sha256, write

from nbinfer.models import weights_digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OLD = 1_600_000_000 * 10**9


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return isolate(monkeypatch, tmp_path / "home")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often a file is read to its end."""
    done: list[int] = []
    real: Callable[..., object] = hashlib.file_digest

    def counting(*args: object, **kwargs: object) -> object:
        done.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return done


def settled(path: Path, data: bytes) -> Path:
    write(path, data)
    os.utime(path, ns=(OLD, OLD))
    return path


def test_the_digest_is_the_sha256_and_is_read_once(home: Path, reads: list[int]) -> None:
    path = settled(home / "m.gguf", b"weights")
    assert [weights_digest([path]) for _ in range(3)] == [sha256(b"weights")] * 3
    assert len(reads) == 1


def test_of_several_files_the_order_counts(home: Path) -> None:
    a, b = settled(home / "a", b"a"), settled(home / "b", b"b")
    assert (
        len({weights_digest([a, b]), weights_digest([b, a]), weights_digest([a]), weights_digest([b])}) == 4
    )


@pytest.mark.parametrize("change", ["content", "time", "another file"])
def test_a_changed_file_is_read_again(home: Path, reads: list[int], change: str) -> None:
    path = settled(home / "m.gguf", b"weights")
    weights_digest([path])
    if change == "content":
        path.write_bytes(b"WEIGHTS")
    elif change == "time":
        os.utime(path, ns=(OLD + 1, OLD + 1))
    else:
        settled(home / "other", b"WEIGHTS").replace(path)
    assert weights_digest([path]) == sha256(path.read_bytes())
    assert len(reads) == 2


def test_a_file_written_just_now_is_not_remembered(home: Path, reads: list[int]) -> None:
    # It may be written again within the resolution of its time.
    path = write(home / "m.gguf", b"weights")
    weights_digest([path])
    weights_digest([path])
    assert len(reads) == 2


@pytest.mark.parametrize("layout", ["blobs/{}", "blobs/sha256-{}", "blobs/sha256/{}"])
def test_a_content_addressed_file_has_its_digest_in_its_name(
    home: Path, reads: list[int], layout: str
) -> None:
    blob = write(home / "store" / layout.format(sha256(b"weights")), b"weights")
    link = home / "m.gguf"
    link.symlink_to(blob)
    assert weights_digest([link]) == sha256(b"weights")
    assert reads == []


@pytest.mark.parametrize(
    "name", ["blobs/abc", "blobs/" + "g" * 64, "other/" + "a" * 64, "blobs/" + "a" * 64 + ".incomplete"]
)
def test_a_name_that_is_no_digest_is_not_taken_for_one(home: Path, name: str) -> None:
    assert weights_digest([write(home / name, b"weights")]) == sha256(b"weights")


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"sha256": 3}', "not JSON"])
def test_a_broken_record_is_made_again(home: Path, record: str) -> None:
    path = settled(home / "m.gguf", b"weights")
    weights_digest([path])
    (known,) = (home / "nbinfer-cache" / "digests").glob("*.json")
    known.write_text(record)
    assert weights_digest([path]) == sha256(b"weights")


def test_a_cache_folder_that_cannot_be_written_costs_time_only(home: Path) -> None:
    write(home / "nbinfer-cache", b"a file, not a folder")
    assert weights_digest([settled(home / "m.gguf", b"weights")]) == sha256(b"weights")


def test_a_missing_file_is_an_error(home: Path) -> None:
    with pytest.raises(FileNotFoundError):
        weights_digest([home / "none.gguf"])
