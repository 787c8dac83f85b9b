"""The pinned closure is whole, and nothing that the tests add moved a pin."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
PINS = Path(__file__).parents[2] / "requirements" / "torch-cpu.txt"


def pins() -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in PINS.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def test_every_pin_is_installed_at_its_version() -> None:
    found = {name: metadata.version(name) for name in pins()}
    assert found == pins()
