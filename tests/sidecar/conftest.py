"""Real services, runners and sockets; the tests clean up after themselves, or fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support import sidecar as support

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def served() -> Iterator[support.Sidecar]:
    """One service for all tests that do no harm to it, with the demo models on demand."""
    folder = support.make_folder()
    process = support.start(folder, "demo", "--port", "0", "--ram", "4G")
    try:
        yield support.ready(process, folder)
    finally:
        support.end(process, folder)


@pytest.fixture
def shared(served: support.Sidecar, monkeypatch: pytest.MonkeyPatch) -> support.Sidecar:
    """That service, as the one that loads in this process find."""
    monkeypatch.setenv(support.VARIABLE, str(served.folder))
    return served


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty runtime folder: the test's own service starts in it, and nothing of it may be left."""
    import shutil

    from nbinfer import session
    from nbinfer.sidecar import discovery

    folder = support.make_folder()
    monkeypatch.setenv(support.VARIABLE, str(folder))
    yield folder
    for model in session.loaded():
        if model.where == "sidecar":
            model.unload()
    discovery.stop()
    support.check_gone(folder)
    shutil.rmtree(folder)
