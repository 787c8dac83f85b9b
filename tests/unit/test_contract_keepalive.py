"""Keep-alive: Go's durations in and out, and what never means."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbinfer.contract.errors import ConfigError
from nbinfer.contract.keepalive import KeepAlive

SECOND = 10**9
LONGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("value", "nanoseconds"),
    [
        ("5m", 300 * SECOND),
        ("30s", 30 * SECOND),
        ("1h30m", 5400 * SECOND),
        ("24h", 86400 * SECOND),
        ("1.5h", 5400 * SECOND),
        ("100ms", SECOND // 10),
        ("5m0s", 300 * SECOND),
        ("0", 0),
        ("0s", 0),
        ("0h0m0s", 0),
        ("+0", 0),
        ("-0", 0),
        ("-0s", 0),
        ("+5m", 300 * SECOND),
        (".5s", SECOND // 2),
        ("5.s", 5 * SECOND),
        ("1m1m", 120 * SECOND),
        ("1s1h", 3601 * SECOND),
        ("3ns", 3),
        ("2us", 2000),
        ("2\u00b5s", 2000),
        ("2\u03bcs", 2000),
        ("0.3ns", 0),
        ("1.0000000001s", SECOND),
        ("-1", -1),
        ("-1m", -1),
        ("-1.5h", -1),
        ("-1ns", -1),
        ("9223372036854775807ns", LONGEST),
        (0, 0),
        (5, 5 * SECOND),
        (1.5, 3 * SECOND // 2),
        (0.1, SECOND // 10),
        (-1, -1),
        (-0.25, -1),
        (-7, -1),
        (timedelta(minutes=5), 300 * SECOND),
        (timedelta(microseconds=1), 1000),
        (timedelta(days=-1), -1),
        (timedelta(0), 0),
        (KeepAlive(7), 7),
    ],
)
def test_durations_are_read(value: Any, nanoseconds: int) -> None:
    assert KeepAlive.parse(value).nanoseconds == nanoseconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "abc",
        "5",
        "-2",
        "--1",
        "1",
        "5 m",
        " 5m",
        "5m ",
        "5m\n",
        "1h 30m",
        "5M",
        "5d",
        "1w",
        "1e3s",
        ".s",
        ".",
        "-",
        "+",
        "m",
        "1.5.5h",
        "1,5h",
        "1h-30m",
        "never",
        "inf",
        "\u0665m",
        "9223372036854775808ns",
        "2562048h",
        10**30,
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        None,
        [],
        b"5m",
    ],
)
def test_anything_else_is_refused_and_named(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        KeepAlive.parse(value)
    message = str(caught.value)
    assert (repr(value) in message) or ("too long" in message)
    assert len(message.splitlines()) <= 5


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1100, "1.1\u00b5s"),
        (2_200_000, "2.2ms"),
        (100_000_000, "100ms"),
        (999_999_999, "999.999999ms"),
        (SECOND, "1s"),
        (3_300_000_000, "3.3s"),
        (30 * SECOND, "30s"),
        (60 * SECOND, "1m0s"),
        (300 * SECOND, "5m0s"),
        (245 * SECOND, "4m5s"),
        (245_001_000_000, "4m5.001s"),
        (3600 * SECOND, "1h0m0s"),
        (5400 * SECOND, "1h30m0s"),
        (86400 * SECOND, "24h0m0s"),
        (18_367_001_000_000, "5h6m7.001s"),
        (8 * 60 * SECOND + 1, "8m0.000000001s"),
        (LONGEST, "2562047h47m16.854775807s"),
        (-1, "-1"),
        (-300 * SECOND, "-1"),
    ],
)
def test_text_follows_gos_rules(nanoseconds: int, text: str) -> None:
    assert str(KeepAlive(nanoseconds)) == text
    assert KeepAlive(nanoseconds).to_json() == text


@given(st.integers(min_value=-(2**40), max_value=LONGEST))
def test_json_round_trips(nanoseconds: int) -> None:
    made = KeepAlive(nanoseconds)
    assert KeepAlive.from_json(made.to_json()) == made


@pytest.mark.parametrize("value", [300, -1, 0, 1.5, None, True, {"seconds": 5}])
def test_json_takes_strings_only(value: Any) -> None:
    with pytest.raises(ConfigError, match="in JSON it is a string"):
        KeepAlive.from_json(value)


def test_never_is_infinite_and_has_no_deadline() -> None:
    never = KeepAlive.parse("-1m")
    assert never == KeepAlive.NEVER
    assert never.never
    assert never.seconds == math.inf
    assert never.deadline(100.0) == math.inf


def test_the_deadline_counts_from_the_last_use() -> None:
    assert KeepAlive.parse("1.5s").deadline(100.0) == 101.5
    assert KeepAlive.IMMEDIATE.deadline(100.0) == 100.0
    assert not KeepAlive.IMMEDIATE.never


def test_the_default_is_five_minutes() -> None:
    assert KeepAlive.DEFAULT.seconds == 300
