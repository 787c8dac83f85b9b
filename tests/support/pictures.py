"""PNG files drawn without a library: a disc on a background."""

from __future__ import annotations

import struct
import zlib

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}


def disc(colour: str, background: str, size: int = 96) -> bytes:
    """A PNG of ``size`` x ``size`` pixels with a disc in the middle."""
    rows = bytearray()
    for y in range(size):
        rows.append(0)
        for x in range(size):
            inside = ((x + 0.5) / size - 0.5) ** 2 + ((y + 0.5) / size - 0.5) ** 2 < 0.09
            rows += bytes(COLOURS[colour if inside else background])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(rows)))
        + chunk(b"IEND", b"")
    )
