"""What all tests start from."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest


@pytest.fixture(scope="session", autouse=True)
def _demo_models() -> None:
    """The embedding model is on this disk, as after its first use; on a fresh machine it is made then."""
    from nbinfer.contract.errors import ModelNotFound
    from nbinfer.models.demo import demo_embed_path

    with suppress(ModelNotFound):
        demo_embed_path()


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """Started in the background of a script, a process ignores SIGINT; tests send it to themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
