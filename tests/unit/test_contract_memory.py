"""Required memory: bytes of RAM and of each GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nbinfer.contract.errors import ConfigError
from nbinfer.contract.memory import RequiredMemory

GIB = 2**30


@pytest.mark.parametrize(
    ("one", "two", "total"),
    [
        (RequiredMemory(), RequiredMemory(), RequiredMemory()),
        (RequiredMemory(1), RequiredMemory(2), RequiredMemory(3)),
        (RequiredMemory(1, (5,)), RequiredMemory(2, (7,)), RequiredMemory(3, (12,))),
        (RequiredMemory(1, (5,)), RequiredMemory(2, (7, 9)), RequiredMemory(3, (12, 9))),
        (RequiredMemory(1), RequiredMemory(0, (0, 9)), RequiredMemory(1, (0, 9))),
    ],
)
def test_needs_add_up_device_by_device(
    one: RequiredMemory, two: RequiredMemory, total: RequiredMemory
) -> None:
    assert one + two == total
    assert two + one == total
    assert sum([one, two], RequiredMemory()) == total


def test_only_memory_can_be_added_to_memory() -> None:
    with pytest.raises(TypeError):
        _ = RequiredMemory(1) + 1


@pytest.mark.parametrize(
    ("need", "free", "fits"),
    [
        (RequiredMemory(), RequiredMemory(), True),
        (RequiredMemory(5), RequiredMemory(5), True),
        (RequiredMemory(6), RequiredMemory(5), False),
        (RequiredMemory(0, (5,)), RequiredMemory(9), False),
        (RequiredMemory(0, (5, 5)), RequiredMemory(0, (10, 0)), False),
        (RequiredMemory(0, (5,)), RequiredMemory(0, (5, 5)), True),
        (RequiredMemory(0, (0, 0)), RequiredMemory(), True),
    ],
)
def test_a_need_fits_only_when_it_fits_on_every_device(
    need: RequiredMemory,
    free: RequiredMemory,
    fits: bool,
) -> None:
    assert need.fits(free) is fits


@pytest.mark.parametrize(
    "value", [RequiredMemory(), RequiredMemory(3 * GIB), RequiredMemory(1, (2 * GIB, 0, 7))]
)
def test_json_round_trips(value: RequiredMemory) -> None:
    assert RequiredMemory.from_json(json.loads(json.dumps(value.to_json()))) == value


def test_the_wire_form_lists_the_devices() -> None:
    assert RequiredMemory(1, (2, 3)).to_json() == {"ram": 1, "vram": [2, 3]}
    assert RequiredMemory(1, (2, 3)).total_vram == 5
    assert RequiredMemory.from_json({"ram": 1}) == RequiredMemory(1)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        5,
        "5",
        {"ram": -1},
        {"ram": 1.5},
        {"ram": True},
        {"ram": "5"},
        {"ram": None},
        {"vram": 5},
        {"vram": {"0": 5}},
        {"vram": [-1]},
        {"vram": [1, None]},
    ],
)
def test_anything_but_bytes_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError):
        RequiredMemory.from_json(value)
