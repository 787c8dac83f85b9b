"""Models that are split into several files, ``name-00001-of-00003.gguf`` and so on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nbinfer.contract.errors import GGUFParseError

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from nbinfer.gguf.header import Header

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)


class Part(NamedTuple):
    """What the name of a part says: the common stem, which part (from 1), of how many."""

    stem: str
    number: int
    total: int

    def sibling(self, number: int) -> str:
        """Return the name of another part."""
        return f"{self.stem}-{number:05}-of-{self.total:05}.gguf"


def part_of(name: str) -> Part | None:
    """Read a file name; None when it is not that of a part."""
    match = _PART.fullmatch(name)
    if match is None:
        return None
    part = Part(match["stem"], int(match["number"]), int(match["count"]))
    return part if 1 <= part.number <= part.total else None


def part_paths(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return the paths of all parts of a model, given any of them; the path alone when it is not a part.

    They lie in one directory by definition: nothing in a file can name another place. Whether they exist is
    not looked at.
    """
    path = Path(path)
    part = part_of(path.name)
    if part is None:
        return (path,)
    return tuple(path.with_name(part.sibling(number)) for number in range(1, part.total + 1))


def join_parts(headers: Sequence[Header]) -> Header:
    """Make one header of the headers of all parts, in order.

    Raises
    ------
    GGUFParseError
        The parts do not belong together.
    """
    first = headers[0]
    for number, header in enumerate(headers):
        said = (header.metadata.get("split.no", 0), header.metadata.get("split.count", 1))
        if said != (number, len(headers)):
            raise GGUFParseError(
                f"{header.source}: split.no and split.count say {said[0]} and {said[1]}, but its name says"
                f" {number} (counted from 0) and {len(headers)}.",
            )
    tensors = tuple(
        tensor._replace(part=part) for part, header in enumerate(headers) for tensor in header.tensors
    )
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise GGUFParseError(
            f"{first.source}: the parts hold {len(tensors):,} tensors instead of {expected}."
        )
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GGUFParseError(f"{first.source}: a tensor appears in two parts.")
    return replace(
        first,
        tensors=tensors,
        file_size=sum(header.file_size for header in headers),
        files=tuple(header.source for header in headers),
    )
