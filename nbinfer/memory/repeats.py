"""Which blocks of a model have to be laid out to know how large its graph gets: the rest repeats."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST_PATTERN = 12


def ends_kept(kinds: Sequence[object], ends: int) -> list[bool]:
    """Say which blocks stay when ``ends`` of each kind from either end do, and one more of an odd number."""
    alike: dict[object, list[int]] = {}
    for number, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(number)
    kept = {
        number
        for numbers in alike.values()
        for number in (*numbers[: ends + len(numbers) % 2], *numbers[-ends:])
    }
    return [number in kept for number in range(len(kinds))]


def rounds_kept(kinds: Sequence[object], *, alone: int, among: int) -> list[bool]:
    """Say which blocks stay when long repetitions of a pattern are cut in the middle, by an even number.

    ``among`` rounds of it stay at either end; of a single kind of block ``alone``.
    """
    kept = [True] * len(kinds)
    start = 0
    while start < len(kinds):
        length, rounds = 1, 1
        for period in range(1, min(_LONGEST_PATTERN, (len(kinds) - start) // 2) + 1):
            times = 1
            while kinds[start : start + period] == kinds[start + times * period :][:period]:
                times += 1
            if times > 1 and times * period > length * rounds:
                length, rounds = period, times
        stay = alone if length == 1 else among
        cut = max(0, (rounds - 2 * stay) // 2 * 2)
        first = start + stay * length
        kept[first : first + cut * length] = [False] * (cut * length)
        start += length * rounds
    return kept
