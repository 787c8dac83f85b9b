"""vLLM in this process keeps to the suite that every engine keeps to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.conformance import *  # noqa: F403 - the suite
from support.vllm_engine import SETTINGS

from nbinfer import session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.session import Model

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def kernel() -> Iterator[Model]:
    made = session.load(
        "demo-hf",
        backend="vllm",
        where="kernel",
        name="demo-kernel",
        context_size=1024,
        exact=True,
        **SETTINGS,
    )
    yield made
    made.unload()


@pytest.fixture
def model(kernel: Model) -> Model:
    return kernel
