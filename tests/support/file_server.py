"""A local HTTP server that serves one file, well or badly."""

from __future__ import annotations

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    Behaviour = Callable[["Request"], None]


class Request:
    """One GET or HEAD, with what a behaviour needs to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler, server: FileServer) -> None:
        self.handler = handler
        self.server = server
        self.path = handler.path
        self.data = server.files.get(handler.path.partition("?")[0])
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        self.range = (int(match[1]), int(match[2])) if match else None

    def send(self, status: int, body: bytes = b"", **headers: Any) -> None:
        self.handler.send_response(status)
        headers.setdefault("Content_Length", len(body))
        for key, value in headers.items():
            if value is not None:
                self.handler.send_header(key.replace("_", "-"), str(value))
        self.handler.end_headers()
        if self.handler.command == "HEAD":
            return
        try:
            self.handler.wfile.write(body)
        except OSError:
            self.handler.close_connection = True  # the client had enough

    def drop(self) -> None:
        """Close the connection, whatever was promised."""
        self.handler.wfile.flush()
        self.handler.close_connection = True


class FileServer:
    """Serves ``files`` (path to bytes) with a behaviour; records the requests."""

    def __init__(self, files: dict[str, bytes], behaviour: Behaviour | None = None) -> None:
        self.files = files
        self.behaviour = behaviour or ranges
        self.requests: list[dict[str, str]] = []
        self.stop = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append({"path": self.path, **dict(self.headers.items())})
                outer.behaviour(Request(self, outer))

            def do_HEAD(self) -> None:
                outer.requests.append({"path": self.path, "method": "HEAD", **dict(self.headers.items())})
                outer.behaviour(Request(self, outer))

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


def ranges(request: Request, *, size: int | None = None, etag: str | None = '"v1"') -> None:
    """Serve ranges as a server should; ``size`` is what it claims the file to be."""
    if request.data is None:
        request.send(404)
        return
    total = len(request.data) if size is None else size
    first, last = request.range or (0, total - 1)
    if first >= total:
        request.send(416, Content_Range=f"bytes */{total}")
        return
    last = min(last, total - 1)
    body = request.data[first : last + 1]
    request.send(
        206, body, Content_Range=f"bytes {first}-{last}/{total}", ETag=etag, Content_Length=last - first + 1
    )
    if len(body) <= last - first:
        request.drop()


def whole(request: Request) -> None:
    """Serve the whole file whatever is asked, as a server without ranges."""
    assert request.data is not None
    request.send(200, request.data, ETag='"v1"')


def stall(request: Request) -> None:
    """Promise the file and send nothing."""
    assert request.data is not None
    request.handler.send_response(206)
    request.handler.send_header("Content-Range", f"bytes 0-{len(request.data) - 1}/{len(request.data)}")
    request.handler.send_header("Content-Length", str(len(request.data)))
    request.handler.end_headers()
    request.handler.wfile.flush()
    request.server.stop.wait(30)


def drip(request: Request) -> None:
    """Send a byte now and then, so that no single wait is long."""
    assert request.data is not None
    request.handler.send_response(206)
    request.handler.send_header("Content-Range", f"bytes 0-{len(request.data) - 1}/{len(request.data)}")
    request.handler.send_header("Content-Length", str(len(request.data)))
    request.handler.end_headers()
    for byte in request.data:
        if request.server.stop.is_set():
            return
        try:
            request.handler.wfile.write(bytes([byte]))
        except OSError:
            return
        time.sleep(0.02)
