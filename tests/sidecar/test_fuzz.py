"""Requests made from the API's own description, valid and not: none may be the server's error."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from support.fake_engine import FakeEngine

from nbinfer.contract.modes import Mode
from nbinfer.sidecar.app import Served, make_app

ENGINES = {mode: FakeEngine(mode=mode, model=str(mode)) for mode in (Mode.COMPLETION, Mode.EMBEDDING)}


def _schema(mode: Mode) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(Served((str(mode),), ENGINES[mode])))


completion, embedding = _schema(Mode.COMPLETION), _schema(Mode.EMBEDDING)
few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def check(case: Any, mode: Mode) -> None:
    # Most made-up names are another model's, whose answer (421) says nothing about the rest of the body.
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = str(mode)
    response = case.call()
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.json()["error"]["message"]


@completion.parametrize()  # type: ignore[misc, unused-ignore]
@few
def test_the_completion_api_answers_everything(case: Any) -> None:
    check(case, Mode.COMPLETION)


@embedding.include(path="/v1/embeddings").parametrize()  # type: ignore[misc, unused-ignore]
@few
def test_the_embedding_api_answers_everything(case: Any) -> None:
    check(case, Mode.EMBEDDING)


@pytest.fixture(autouse=True, scope="module")
def _engines() -> Any:
    yield
    for engine in ENGINES.values():
        engine.close()
