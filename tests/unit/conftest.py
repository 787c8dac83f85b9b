"""Fixtures that several unit test files ask for by name."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def results_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, so that no test finds another one's results."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NBINFER_CACHE", str(folder))
    yield folder
    if "nbinfer.frames.journal" in sys.modules:
        from nbinfer.frames.journal import close_all

        close_all()
