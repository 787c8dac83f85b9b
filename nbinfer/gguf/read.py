"""Reading a header by name: local path or address, whole or split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer.gguf.parse import parse
from nbinfer.gguf.source import FileSource

if TYPE_CHECKING:
    import os

    from nbinfer.gguf.header import Header


def read_header(path: str | os.PathLike[str], *, require_data: bool = True) -> Header:
    """Read the header of a GGUF file.

    Only the header is read, and of it only what is kept: a file of any size takes milliseconds.

    Parameters
    ----------
    path
        A file.
    require_data
        Whether the weights must be there too; False accepts a file that ends after its header.

    Raises
    ------
    GGUFParseError
        The file cannot be opened, is no GGUF file, or something in it is wrong; the message says what.
    """
    with FileSource(path) as source:
        return parse(source, require_data=require_data)
