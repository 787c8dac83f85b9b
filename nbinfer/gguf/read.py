"""Reading a header by name: local path or address, whole or split."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import GGUFParseError
from nbinfer.gguf.parse import as_parse_errors, parse
from nbinfer.gguf.source import FileSource
from nbinfer.gguf.split import join_parts, part_paths

if TYPE_CHECKING:
    from nbinfer.gguf.header import Header


def read_header(
    path: str | os.PathLike[str], *, parts: bool = True, require_data: bool = True, **remote: Any
) -> Header:
    """Read the header of a GGUF model.

    Only the header is read, and of it only what is kept: a file of any size takes milliseconds.

    Parameters
    ----------
    path
        A file, or an ``http(s)://`` address. Of a split model, any of its parts.
    parts
        Whether to read all parts of a split model, which lie beside each other; False reads one file alone.
    require_data
        Whether the weights must be there too; False accepts a file that ends after its header.
    remote
        Options of :func:`nbinfer.gguf.remote.read_remote_header`, for an address.

    Raises
    ------
    GGUFParseError
        The file cannot be opened, is no GGUF file, or something in it is wrong; the message says what.
    """
    text = os.fspath(path)
    if is_address(text):
        from nbinfer.gguf.remote import read_remote_header

        return read_remote_header(text, parts=parts, require_data=require_data, **remote)
    if remote:
        raise TypeError(f"{', '.join(remote)}: only for an address.")
    paths = part_paths(path) if parts else ()
    if len(paths) <= 1:
        header = _read_one(path, require_data=require_data)
        if parts:
            check_whole(header)
        return header
    headers = []
    for number, part in enumerate(paths, 1):
        if not part.is_file():
            raise GGUFParseError(f"part {number} of {len(paths)} is missing: there is no {part}.")
        headers.append(_read_one(part, require_data=require_data))
    return join_parts(headers)


def is_address(text: str) -> bool:
    """Whether a reference is an ``http://`` or ``https://`` address."""
    return text[:8].lower().startswith(("http://", "https://"))


def _read_one(path: str | os.PathLike[str], *, require_data: bool) -> Header:
    with as_parse_errors(), FileSource(path) as source:
        return parse(source, require_data=require_data)


def check_whole(header: Header) -> None:
    """Check that a file which is not named as a part is not one.

    Raises
    ------
    GGUFParseError
        It is: the other parts cannot be found.
    """
    count = header.metadata.get("split.count", 1)
    if count not in (0, 1):
        raise GGUFParseError(
            f"{header.source} is one of {count} parts, but is not named like one"
            " (…-00001-of-00003.gguf): the others cannot be found.",
        )
