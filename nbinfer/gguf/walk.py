"""Stepping over an array of strings without looking at the strings.

An array of n strings is n times (8-byte length, text). Nothing says where the array ends, so each length must
be visited. A vocabulary has 300,000 of them: a plain loop takes tens of milliseconds, this walk a few.
"""

from __future__ import annotations

from bisect import bisect_left
from struct import Struct

import numpy as np

_LENGTH = Struct("<Q")
_PREFIX = 8
_SHORT = 64
_MAX_BURST = 64
_WINDOW = 128 * 1024  # small enough to stay in the processor's cache while it is searched


def walk_plain(data: bytes, start: int, n: int, stop: int | None = None) -> tuple[int, int]:
    """Step over at most ``n`` strings that begin at ``start``.

    Parameters
    ----------
    data
        A window of the file.
    start
        Index in ``data`` of the first length.
    n
        How many strings to step over.
    stop
        Use ``data`` up to here only; None: all of it.

    Returns
    -------
    count, end
        How many were stepped over, and the index after the last of them. Fewer than ``n`` when the next
        length is not wholly inside ``data``; ``end`` may lie beyond ``data``, as only lengths are read.
    """
    limit = (len(data) if stop is None else stop) - _PREFIX
    unpack = _LENGTH.unpack_from
    pos, left = start, n
    while left and pos <= limit:
        pos += _PREFIX + unpack(data, pos)[0]
        left -= 1
    return n - left, pos


def walk(data: bytes, start: int, n: int) -> tuple[int, int]:
    """Do what :func:`walk_plain` does, faster on long arrays of short strings.

    The length of a string of 1 to 255 bytes is one non-zero byte and seven zeros, and among seven
    neighbouring bytes four form an aligned word: so every such length shows as an aligned zero word, and the
    last non-zero byte before it is where the length begins. That only *proposes* positions. A position is
    accepted when the walk reaches it: the accepted length before it points there exactly. Whatever is not
    proposed (empty or long strings, text with zeros inside) is stepped over by hand.
    """
    left, pos = n, start
    while left >= _SHORT and len(data) - pos >= _PREFIX * _SHORT:
        count, pos = _walk_window(data, pos, left, min(len(data), pos + _WINDOW))
        left -= count
    count, pos = walk_plain(data, pos, left)
    return n - left + count, pos


def _walk_window(data: bytes, start: int, n: int, stop: int) -> tuple[int, int]:
    at, after = _proposals(data, start, stop)
    broken = np.flatnonzero(after[:-1] != at[1:]).tolist()  # links that do not hold
    pos, left, burst = start, n, 1
    limit = stop - _PREFIX
    while left and pos <= limit:
        first = int(np.searchsorted(at, pos))
        if first < len(at) and at[first] == pos:
            nth = bisect_left(broken, first)
            last = broken[nth] if nth < len(broken) else len(at) - 1
            taken = min(left, last - first)
            pos, left = int(at[first + taken]), left - taken
            burst = 1 if taken > _SHORT else burst
        # The string at `pos` is irregular, or the last proposal. Where irregular strings crowd, step over
        # more and more of them before looking again, so that no input makes this slower than the plain loop.
        count, pos = walk_plain(data, pos, min(left, burst), stop)
        left -= count
        burst = min(2 * burst, _MAX_BURST)
    return n - left, pos


def _proposals(data: bytes, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return likely positions of lengths in ``data``, and where each length leads (-1: out of range)."""
    base = start & ~3
    words = np.frombuffer(data, "<u4", (stop - base) // 4, base)
    zero = np.flatnonzero(words[1:] == 0) + 1
    before = words[zero - 1]
    at = base + 4 * zero - 4 + (before >= 1 << 8) + (before >= 1 << 16) + (before >= 1 << 24)
    at = at[(before != 0) & (at >= start) & (at <= stop - _PREFIX)]
    # A view of the 8 bytes at every index; the length itself is read there, so a link is exact.
    view = np.ndarray((max(0, len(data) - _PREFIX + 1),), "<u8", data, strides=(1,))
    length = view[at]
    after = np.where(length < len(data), at + _PREFIX + length.astype(np.int64), -1)
    return at, after
