"""Who and what is kept out: other users, web pages, strangers on this machine, and requests made to harm."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.sidecar import processes, until

from nbinfer import session
from nbinfer.contract.errors import ConfigError, ModelNotFound, NbinferError
from nbinfer.engines.remote.control import call, call_status

if TYPE_CHECKING:
    from support.sidecar import Sidecar

pytestmark = pytest.mark.engine

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def ask(
    served: Sidecar,
    *,
    path: str = "/v1/models",
    method: str = "GET",
    body: bytes | None = None,
    **headers: str | None,
) -> tuple[int, Any]:
    """Make a request on TCP; headers given as None are left out, and underscores are hyphens."""
    address = served.address.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(address, timeout=30)
    usual: dict[str, str | None] = {"authorization": f"Bearer {served.token}", "host": address}
    sent = usual | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None:
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    finally:
        connection.close()


def test_sockets_and_files_are_this_users_only(shared: Sidecar) -> None:
    until(lambda: len(list(shared.folder.glob("*.sock"))) >= 2, what="the service's and a runner's socket")
    assert stat.S_IMODE(shared.folder.stat().st_mode) == 0o700
    for path in shared.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_cut_off_though_the_socket_was_opened_to_it(shared: Sidecar) -> None:
    stranger = f"""
import os, socket
os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX)
s.connect({shared.socket!r})
s.sendall(b"GET /v1/models HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
print(len(s.recv(4096)))
"""
    # Without the modes of the folder and the socket, which would stop it before.
    paths = (shared.folder, Path(shared.socket))
    modes = [path.stat().st_mode for path in paths]
    try:
        for path in paths:
            path.chmod(0o777)
        done = subprocess.run(
            [sys.executable, "-c", stranger], capture_output=True, text=True, check=False, cwd="/"
        )
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)
    cut = ("ConnectionResetError", "BrokenPipeError")
    assert done.stdout.strip() == "0" or any(word in done.stderr for word in cut), done
    assert call(shared.socket, "GET", "/nbinfer/health")["ok"]


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic {}", "Bearer {}x", "bearer\t{}", "{}"]
)
def test_a_missing_or_wrong_token_is_refused(served: Sidecar, given: str | None) -> None:
    header = None if given is None else given.format(served.token)
    for path in ("/v1/models", "/nbinfer/ps", "/metrics", "/health"):
        status, body = ask(served, path=path, authorization=header)
        assert status == 401
        assert served.token not in json.dumps(body)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil", "", "[::2]", "192.0.2.1"],
)
def test_a_page_that_rebinds_its_name_is_refused(served: Sidecar, host: str) -> None:
    assert ask(served, host=host)[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1234", "LOCALHOST", "[::1]:80"])
def test_this_machines_names_are_served(served: Sidecar, host: str) -> None:
    assert ask(served, host=host)[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:8888", "http://127.0.0.1"]
)
def test_web_pages_are_refused_whatever_their_origin(served: Sidecar, shared: Sidecar, origin: str) -> None:
    assert ask(served, origin=origin)[0] == 403
    status, _ = ask(served, origin=origin, method="OPTIONS", path="/v1/chat/completions")
    assert status == 403


def test_a_body_that_is_too_large_is_refused_before_it_is_read(served: Sidecar) -> None:
    status, _ = ask(served, method="POST", path="/v1/chat/completions", content_length=str(10**12), body=None)
    assert status == 413


def test_a_body_of_unknown_length_is_cut_off(served: Sidecar) -> None:
    host, _, port = served.address.removeprefix("http://").removesuffix("/v1").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            + f"Authorization: Bearer {served.token}\r\n".encode()
            + b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"%x\r\n%s\r\n" % (2**20, b"x" * 2**20)
        try:
            for _ in range(64):
                connection.sendall(chunk)
            answer = connection.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            answer = connection.recv(4096) if _readable(connection) else b"HTTP/1.1 413"
    assert answer.startswith(b"HTTP/1.1 413")


def _readable(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../../etc/passwd",
        "./model.gguf",
        "file:///etc/passwd",
        "demo/../../x",
        "demo\0x",
        "\ud800",
        "~/x",
        "C:\\x",
        "hf:owner/repo",
        "x" * 5000,
    ],
    ids=ascii,
)
def test_a_request_cannot_name_a_path_or_a_download(shared: Sidecar, name: str) -> None:
    before = {process.pid for process in processes(shared.folder)}
    status, body = call_status(shared.socket, "POST", "/v1/chat/completions", {**CHAT, "model": name})
    assert status in (400, 404)
    assert "error" in body
    assert {process.pid for process in processes(shared.folder)} <= before
    status, _ = call_status(shared.socket, "GET", "/v1/models/..%2f..%2fetc%2fpasswd")
    assert status == 404


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"path": "relative.gguf"}, ConfigError),
        ({"path": "/nowhere/x.gguf"}, ModelNotFound),
        ({"path": 7}, ConfigError),
        ({"name": ""}, ConfigError),
        ({"name": "x\ny"}, ConfigError),
        ({"backend": "nonsense"}, ConfigError),
        ({"mode": "Completion"}, ConfigError),
        ({"config": {"context-size": 0}}, ConfigError),
        ({"config": {"nonsense": 1}}, ConfigError),
        ({"config": {"runtime-flags": ["--model", "/etc/passwd"]}}, ConfigError),
        ({"config": {"runtime-flags": ["--threads=/etc/passwd"]}}, ConfigError),
        ({"config": {"runtime-flags": ["--threads", "4", "/etc/passwd"]}}, ConfigError),
        ({"config": {"runtime-flags": ["--threads=--log-file"]}}, ConfigError),
        ({"config": {"runtime-flags": ["--host=0.0.0.0"]}}, ConfigError),
        ({"config": {"runtime-flags": ["--nonsense"]}}, ConfigError),
        ({"config": {"runtime-flags": ["--threads", "four"]}}, ConfigError),
        ({"options": ["x"]}, ConfigError),
        ({"options": {"nonsense": 1}}, ConfigError),
    ],
    ids=str,
)
def test_a_load_that_smuggles_is_refused(
    shared: Sidecar, wanted: dict[str, Any], error: type[NbinferError]
) -> None:
    from nbinfer.engines.remote.control import EventStream
    from nbinfer.engines.remote.wire import error_from_json
    from nbinfer.models.demo import demo_path

    whole = {
        "path": str(demo_path()),
        "name": "smuggled",
        "backend": "llamacpp",
        "mode": "completion",
        **wanted,
    }

    def load() -> None:
        stream = EventStream(shared.socket, "/nbinfer/hold", whole)
        *_, last = stream
        stream.detach()
        assert last["event"] == "error"
        raise error_from_json(last)

    with pytest.raises(error):
        load()


def test_runtime_flags_reach_the_engine(shared: Sidecar) -> None:
    from nbinfer.engines.remote.control import EventStream
    from nbinfer.models.demo import demo_path

    flags = ["--threads", "1", "-c=512", "--parallel", "2", "--gpu-layers", "-1"]
    stream = EventStream(
        shared.socket,
        "/nbinfer/hold",
        {
            "path": str(demo_path()),
            "name": "flagged",
            "backend": "llamacpp",
            "mode": "completion",
            "config": {"runtime-flags": flags, "keep_alive": "0"},
        },
    )
    last = next(event for event in stream if event["event"] != "progress")
    stream.close()
    stream.detach()
    assert last["event"] == "ready", last
    assert last["info"]["context_size"] == 512
    assert last["info"]["effective"]["threads"] == 1
    assert last["info"]["parallel"] == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Content-Length: 50\r\n\r\nabcde",
        b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    ],
    ids=range(8),
)
def test_broken_http_ends_the_connection_and_not_the_service(shared: Sidecar, raw: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(shared.socket)
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    assert answer == b"" or answer.split()[1].startswith(b"4")
    assert call(shared.socket, "GET", "/nbinfer/health")["ok"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "demo", "messages": ' + b'[{"content": ' * 5000,
        b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 4000 + b"}",
        b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "n": 100000}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "logit_bias": {"x": 1}}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": 1}}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], '
        b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}}',
        b'{"model": "demo", "messages": [{"role": "root", "content": "x"}]}',
        b'{"model": "demo", "messages": [{"role": "user", "content": {"x": 1}}]}',
        b'{"model": "demo", "messages": 5}',
        b'{"model": ["demo"], "messages": []}',
    ],
    ids=range(20),
)
def test_a_bad_body_is_the_clients_error_in_openais_shape(shared: Sidecar, body: bytes) -> None:
    status, found = ask(shared, method="POST", path="/v1/chat/completions", body=body)
    assert 400 <= status < 500
    assert isinstance(found["error"]["message"], str)
    assert len(found["error"]["message"]) < 2000


def test_a_kernel_cannot_be_told_to_run_code_from_its_folder(runtime: Path) -> None:
    # The service runs in its folder; a module that somebody left there must not be imported.
    (runtime / "psutil.py").write_text("raise SystemExit('imported from the folder')")
    try:
        model = session.load("demo", where="sidecar", threads=1, context_size=256, keep_alive="0")
        assert model.infer("Hi", max_tokens=2).text
    finally:
        (runtime / "psutil.py").unlink()
