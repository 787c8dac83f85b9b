"""A JupyterLab per module: see ``support/lab.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.lab import Lab, open_lab

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with open_lab(tmp_path_factory.mktemp("lab")) as opened:
        yield opened
