"""vLLM, in this process and behind its own server, keeps to the suite that every engine keeps to."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from support import sidecar
from support.conformance import *  # noqa: F403 - the suite
from support.vllm_engine import SETTINGS

from nbinfer import session
from nbinfer.sidecar import discovery

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.session import Model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def load(where: str) -> Model:
    # Exact: else the last bits depend on what ran before, and at a high temperature tokens depend on them.
    return session.load(
        "demo-hf",
        backend="vllm",
        where=where,
        name=f"demo-{where}",
        context_size=1024,
        exact=True,
        **SETTINGS,
    )


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Model]]:
    folder = sidecar.make_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sidecar.VARIABLE, str(folder))
        made = {where: load(where) for where in ("kernel", "sidecar")}
        yield made
        for model in made.values():
            model.unload()
        discovery.stop()
    sidecar.check_gone(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def kernel(models: dict[str, Model]) -> Model:
    return models["kernel"]


@pytest.fixture(params=["kernel", "sidecar"])
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]
