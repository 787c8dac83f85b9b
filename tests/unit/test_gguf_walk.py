"""The vectorised walk over string arrays goes exactly where the plain loop goes."""

from __future__ import annotations

from struct import pack

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbinfer.gguf.walk import _proposals, walk, walk_plain

# What vocabularies hold, and what breaks the pattern the walk looks for.
ordinary = st.binary(min_size=1, max_size=12).map(lambda b: b.replace(b"\0", b"x"))
irregular = st.one_of(
    st.just(b""),
    st.sampled_from(
        [b"\0" * 7, b"\0" * 16, b"a" + b"\0" * 9, pack("<Q", 3), pack("<Q", 2**64 - 8), pack("<Q", 2**63)]
    ),
    st.integers(250, 270).map(lambda n: b"y" * n),
    st.just(b"z" * 65_536),
)
strings = st.lists(st.one_of(ordinary, ordinary, ordinary, irregular), min_size=0, max_size=200)


def array(texts: list[bytes]) -> bytes:
    return b"".join(pack("<Q", len(text)) + text for text in texts)


@settings(max_examples=300, deadline=None)
@given(texts=strings, start=st.integers(0, 9), cut=st.integers(0, 300), more=st.integers(-50, 300))
def test_it_equals_the_plain_loop_on_real_arrays_wherever_they_are_cut(
    texts: list[bytes], start: int, cut: int, more: int
) -> None:
    data = b"\xa5" * start + array(texts) + b"tail of the file"
    data = data[: max(start, len(data) - cut)]
    n = max(0, len(texts) + more)
    assert walk(data, start, n) == walk_plain(data, start, n)


@settings(max_examples=300, deadline=None)
@given(
    data=st.lists(
        st.sampled_from([b"\0", b"\0\0\0\0", b"\1", b"\7\0\0\0\0\0\0\0", b"abc", b"\xff" * 8]), max_size=400
    ),
    start=st.integers(0, 5),
    n=st.integers(0, 1000),
)
@example(data=[b"\xff" * 8] * 100, start=0, n=1000)
@example(data=[b"\0"] * 100, start=1, n=1000)
def test_it_equals_the_plain_loop_on_noise(data: list[bytes], start: int, n: int) -> None:
    joined = b"".join(data)
    assert walk(joined, start, n) == walk_plain(joined, start, n)


@pytest.mark.parametrize("wrap", range(1, 24))
def test_a_length_that_wraps_around_64_bits_links_to_nothing(wrap: int) -> None:
    # 2**64 - 8 + 16 would, with wrapping sums, point at the next length and seem to be proved.
    data = array([b"a" * 8] * 80) + pack("<Q", 2**64 - wrap) + b"q" * 8 + array([b"b" * 8] * 80)
    assert walk(data, 0, 500) == walk_plain(data, 0, 500)


def test_a_vocabulary_is_proposed_whole_so_the_walk_is_vectorised() -> None:
    texts = [f"token{i}".encode() for i in range(5000)]
    data = array(texts)
    at, after = _proposals(data, 0, len(data))
    assert len(at) == len(texts)
    assert np.array_equal(after[:-1], at[1:])
    assert walk(data, 0, 5000) == (5000, len(data))


def test_a_walk_over_many_windows_equals_the_plain_loop() -> None:
    texts = [b"w" * (i * 7919 % 301) for i in range(4000)] + [b"", b"x" * 300_000, b""] * 5
    data = array(texts)
    assert walk(data, 0, len(texts)) == walk_plain(data, 0, len(texts)) == (len(texts), len(data))
    assert walk(data, 0, len(texts) - 3) == walk_plain(data, 0, len(texts) - 3)


def test_what_is_longer_than_the_window_is_not_read() -> None:
    data = array([b"a"] * 100) + pack("<Q", 10**12) + b"only the start of it"
    assert walk(data, 0, 200) == (101, 900 + 8 + 10**12)
