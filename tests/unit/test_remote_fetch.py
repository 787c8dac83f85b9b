"""What is made of a server's answer that is an error: the error that it is, and nothing that it is not."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from nbinfer.contract.errors import (
    BackendUnavailable,
    DoesNotFit,
    EngineError,
    ModelLoadError,
    ModelNotFound,
    NbinferError,
)
from nbinfer.engines.remote.clients import Endpoint
from nbinfer.engines.remote.questions import fetch_json, list_models
from nbinfer.engines.remote.wire import NO_ANSWER, Busy

if TYPE_CHECKING:
    from collections.abc import Iterator


class Refusing(BaseHTTPRequestHandler):
    """Answers ``/<status>/<name of an error>`` with that."""

    def do_GET(self) -> None:
        _, status, name, *_rest = self.path.split("/")
        body = json.dumps({"error": {"message": "says no", "nbinfer": {"error": name}}}).encode()
        self.send_response(int(status))
        self.send_header("Retry-After", "7")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Say nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join(20)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ("507/DoesNotFit", DoesNotFit, "says no"),
        ("500/ModelLoadError", ModelLoadError, "says no"),
        ("500/other", EngineError, "says no"),
        ("404/other", ModelNotFound, "says no"),
        ("408/other", Busy, "says no"),
        ("425/other", Busy, "says no"),
        ("429/other", Busy, "says no"),
        ("503/other", Busy, "says no"),
        ("401/other", BackendUnavailable, "Check api_key"),
        ("403/other", BackendUnavailable, "Check api_key"),
    ],
)
def test_only_a_server_that_wants_another_key_is_said_to(
    address: str, answer: str, kind: type[NbinferError], words: str
) -> None:
    endpoint = Endpoint(base_url=f"{address}/{answer}", model="m")
    with pytest.raises(kind, match=words) as caught:
        list_models(endpoint, timeout=20)
    assert type(caught.value) is kind
    assert ("api_key" in str(caught.value)) is (kind is BackendUnavailable)
    if isinstance(caught.value, Busy):
        assert caught.value.retry_after == 7.0


def test_a_server_that_is_not_there_is_known_by_its_code() -> None:
    with pytest.raises(BackendUnavailable, match="no server answers") as caught:
        fetch_json(Endpoint(base_url="http://127.0.0.1:9/v1", model="m"), "/v1/models", timeout=20)
    assert getattr(caught.value, "code", None) == NO_ANSWER
