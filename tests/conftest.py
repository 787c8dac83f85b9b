"""What all tests start from."""

from __future__ import annotations

from contextlib import suppress

import pytest


@pytest.fixture(scope="session", autouse=True)
def _demo_models() -> None:
    """The embedding model is on this disk, as after its first use; on a fresh machine it is made then."""
    from nbinfer.contract.errors import ModelNotFound
    from nbinfer.models.demo import demo_embed_path

    with suppress(ModelNotFound):
        demo_embed_path()
