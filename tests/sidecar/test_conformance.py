"""llama.cpp in this process, in the sidecar, and behind a server known by its address: the same answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.conformance import *  # noqa: F403 - the suite
from support.conformance import end_tokens
from support.sidecar import until

from nbinfer import session
from nbinfer.contract.errors import ContextOverflow, EngineClosed
from nbinfer.contract.requests import CompletionRequest, Sampling
from nbinfer.session import Model
from nbinfer.sidecar import discovery

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.sidecar import Sidecar

pytestmark = pytest.mark.engine

PLACES = ("kernel", "sidecar", "server")


def load(place: str, served: Sidecar, *, ref: str = "demo") -> Model:
    mode = "embedding" if "embed" in ref else "completion"
    if place == "server":
        # The very model that the sidecar loads, so that the settings are the same.
        return session.load(
            f"{ref}-sidecar",
            backend="openai",
            mode=mode,
            name=f"{ref}-server",
            base_url=served.address,
            api_key=served.token,
        )
    # Exact: else the last bits depend on what ran before, and at a high temperature tokens depend on them.
    more: dict[str, Any] = {} if mode == "embedding" else {"context_size": 1024, "exact": True}
    return session.load(ref, where=place, name=f"{ref}-{place}", threads=1, **more)


@pytest.fixture(scope="module")
def models(served: Sidecar) -> Iterator[dict[str, Model]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBINFER_RUNTIME_DIR", str(served.folder))
        made = {place: load(place, served) for place in PLACES}
        yield made
        for model in made.values():
            model.unload()


@pytest.fixture(params=PLACES)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]


@pytest.fixture(scope="module")
def kernel(models: dict[str, Model]) -> Model:
    """What the others are compared with."""
    return models["kernel"]


def test_the_sidecar_says_what_its_engine_really_uses(models: dict[str, Model]) -> None:
    assert models["sidecar"].info.effective == models["kernel"].info.effective


def test_a_stopped_wait_stops_the_engine_behind_it(models: dict[str, Model], shared: Sidecar) -> None:
    def busy() -> int:
        found = discovery.describe()
        assert found is not None
        return sum(each["busy"] for each in found["models"])

    stream = models["sidecar"].submit(
        CompletionRequest(
            messages=({"role": "user", "content": "Tell me a story."},),
            sampling=Sampling(logit_bias=dict.fromkeys(end_tokens(models["kernel"]), -100.0)),
            max_tokens=1000,
        )
    )
    until(lambda: busy() == 1 or stream.done)
    stream.cancel()
    until(lambda: busy() == 0, 5, "the runner stops when its client has gone")


def test_after_the_unload_requests_say_so(served: Sidecar, shared: Sidecar) -> None:
    for place in PLACES:
        model = load(place, served)
        copy = Model(engine=model.engine, name="gone", where=place)
        model.unload()
        with pytest.raises(EngineClosed, match="load it again"):
            copy.infer("x")
    # The module's own models were replaced by these: they are loaded again for the other tests.
    assert session.loaded() == [] or all(m.name.startswith("demo") for m in session.loaded())


def test_vectors_are_the_same(served: Sidecar, shared: Sidecar) -> None:
    texts = ["a cat", "a dog on a mat", "", "quantum chromodynamics " * 20]
    made = {place: load(place, served, ref="demo-embed") for place in PLACES}
    try:
        for options in ({}, {"normalize": False}, {"dims": 64}):
            expected = made["kernel"].embed(texts, **options)
            for place in ("sidecar", "server"):
                if place == "server" and "normalize" in options:
                    continue  # OpenAI's API has no such switch
                found = made[place].embed(texts, **options)
                assert found.dtype == np.float32
                assert found.shape == expected.shape
                np.testing.assert_allclose(found, expected, atol=1e-6)
        with pytest.raises(ContextOverflow):
            made["sidecar"].embed(["word " * 3000])
    finally:
        for model in made.values():
            model.unload()
