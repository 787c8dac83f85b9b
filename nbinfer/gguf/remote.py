"""Headers of files on a server, read through HTTP range requests: the weights stay where they are."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit, urlunsplit

from nbinfer.contract.errors import GGUFParseError
from nbinfer.gguf.parse import MAX_HEADER, as_parse_errors, parse
from nbinfer.gguf.read import check_whole
from nbinfer.gguf.source import SourceError
from nbinfer.gguf.split import join_parts, part_of
from nbinfer.gguf.summary import recall, remember

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    import httpx

    from nbinfer.gguf.header import Header

FIRST_WINDOW: Final = 1024**2
LARGEST_WINDOW: Final = 8 * 1024**2
MAX_PARTS: Final = 1000
PAUSES: Final = (0.5, 1.0, 2.0)  # seconds before each new attempt
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_PARTIAL, _WHOLE, _NOT_THERE, _NO_SUCH_RANGE = 206, 200, 404, 416
_REFUSED = (401, 403)
_BUSY = (408, 425, 429, 500, 502, 503, 504)


def read_remote_header(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    parts: bool = True,
    require_data: bool = True,
    timeout: float = 20.0,
    deadline: float = 300.0,
    max_download: int = MAX_HEADER,
    cache: Path | None = None,
) -> Header:
    """Read the header of a GGUF model on a server.

    The first MiB is asked for, then windows of twice the size, until the header is complete: 10 to 20 MB for
    a large vocabulary. A server without range requests works too: the connection is closed after the header.

    Parameters
    ----------
    url
        An ``http(s)://`` address. Of a split model, any of its parts.
    headers
        Sent with each request to this host, such as ``{"Authorization": "Bearer …"}``; a redirect to another
        host does not get the authorization.
    parts, require_data
        As for :func:`nbinfer.gguf.read_header`.
    timeout
        Seconds without a byte after which an attempt is given up.
    deadline
        Seconds for everything together.
    max_download
        Bytes that may be downloaded, all together.
    cache
        A folder for summaries of headers; a file that the server says is unchanged is not read again.

    Raises
    ------
    GGUFParseError
        The server does not give the file, or what it gives is no sound header.
    """
    part = part_of(urlsplit(url).path.rpartition("/")[2]) if parts else None
    reader = RemoteReader(headers, timeout=timeout, deadline=deadline, max_download=max_download)
    with as_parse_errors(), reader:
        if part is None or part.total == 1:
            header = _read_one(reader, url, require_data=require_data, cache=cache)
            if parts:
                check_whole(header)
            return header
        if part.total > MAX_PARTS:
            raise GGUFParseError(f"{url} is one of {part.total:,} parts; up to {MAX_PARTS:,} are possible.")
        return join_parts(
            [
                _read_one(reader, _sibling(url, part.sibling(n)), require_data=require_data, cache=cache)
                for n in range(1, part.total + 1)
            ],
        )


def _sibling(url: str, name: str) -> str:
    scheme, host, path, query, _ = urlsplit(url)
    return urlunsplit((scheme, host, path.rpartition("/")[0] + "/" + name, query, ""))


def _read_one(reader: RemoteReader, url: str, *, require_data: bool, cache: Path | None) -> Header:
    if not require_data:
        cache = None  # what is kept has passed every check
    source = reader.open(url, first=1 if cache else FIRST_WINDOW)
    known = recall(cache, source.identity) if cache and source.identity else None
    if known is not None:
        return known
    header = parse(source, require_data=require_data)
    if cache and source.identity:
        remember(cache, source.identity, header)
    return header


class RemoteReader:
    """A client and its budget of time and bytes; close it after use."""

    def __init__(
        self,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 20.0,
        deadline: float = 300.0,
        max_download: int = MAX_HEADER,
    ) -> None:
        import httpx

        self.client = httpx.Client(
            headers={**(headers or {}), "Accept-Encoding": "identity"},
            timeout=timeout,
            follow_redirects=True,
            max_redirects=5,
        )
        self.timeout = timeout
        self._until = time.monotonic() + deadline
        self._left = max_download
        self._limit = max_download
        self._deadline = deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()

    def open(self, url: str, first: int = FIRST_WINDOW) -> RemoteSource:
        """Ask for the first bytes of a file, which also tells its size."""
        return RemoteSource(self, url, first)

    def spend(self, n: int, name: str) -> None:
        """Count ``n`` downloaded bytes, and look at the clock."""
        self._left -= n
        if self._left < 0:
            raise SourceError(f"{name}: the header is not complete after {self._limit:,} bytes of download.")
        if time.monotonic() > self._until:
            raise SourceError(f"{name}: the header is not complete after {self._deadline:g} s.")


class RemoteSource:
    """A file on a server, as a :class:`~nbinfer.gguf.source.Source`.

    ``identity`` is what the server says about this version of the file; None when it says nothing.
    """

    def __init__(self, reader: RemoteReader, url: str, first: int = FIRST_WINDOW) -> None:
        self._reader = reader
        self._url = url
        # An address may carry a signature in its query: it is not shown.
        self.name = urlunsplit((*urlsplit(url)[:3], "", ""))
        self.size = -1  # not known yet
        self.etag: str | None = None
        self._window = FIRST_WINDOW
        self._head = self._fetch(0, first)

    @property
    def identity(self) -> str | None:
        """The address, version and size of the file, when the server names the version."""
        return f"{self._url}\n{self.etag}\n{self.size}" if self.etag else None

    def read(self, offset: int, n: int) -> bytes:
        """Return at least ``n`` bytes at ``offset``."""
        if offset + n <= len(self._head):
            return self._head[offset:]
        wanted = min(max(n, self._window), self.size - offset)
        self._window = min(2 * self._window, LARGEST_WINDOW)
        return self._fetch(offset, wanted)

    def _fetch(self, offset: int, n: int) -> bytes:
        """Download ``n`` bytes (fewer at the end of the file), going on where a broken connection stopped."""
        import httpx

        got = bytearray()
        failures = 0
        while self.size < 0 or len(got) < min(n, self.size - offset):
            before = len(got)
            try:
                self._get(offset, n, got)
                problem = "it sends nothing more"
            except httpx.TimeoutException:
                problem = f"it is silent for {self._reader.timeout:g} s"
            except httpx.TooManyRedirects:
                raise SourceError(f"{self.name}: the address leads in a circle.") from None
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                problem = str(error) or type(error).__name__
            except _BusyError as error:
                problem = str(error)
            if self.size >= 0 and len(got) > before:
                failures = 0
                continue
            if self.size == 0:
                break
            if failures == len(PAUSES):
                where = f" at byte {offset + len(got):,}" if got or offset else ""
                raise SourceError(f"{self.name}: the server does not give the file{where}: {problem}.")
            time.sleep(PAUSES[failures])
            failures += 1
            self._reader.spend(0, self.name)
        return bytes(got)

    def _get(self, offset: int, n: int, got: bytearray) -> None:
        """Make one request for what is missing in ``got``, and append what arrives."""
        start = offset + len(got)
        wanted = {"Range": f"bytes={start}-{offset + n - 1}"}
        with self._reader.client.stream("GET", self._url, headers=wanted) as response:
            skip = self._check(response, start)
            for chunk in response.iter_raw():
                self._reader.spend(len(chunk), self.name)
                # A server may send more than it was asked for, or all from the beginning.
                got += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(got) >= n:
                    del got[n:]
                    return

    def _check(self, response: httpx.Response, start: int) -> int:
        """Check an answer's headers; return how many bytes of its body come before ``start``."""
        status = response.status_code
        size, skip = self._size_in(response, start)
        if status in _BUSY:
            raise _BusyError(f"it answers {status}")
        if size is None:
            raise SourceError(f"{self.name}: {_refusal(status)}", missing=status == _NOT_THERE)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise SourceError(
                f"{self.name}: the server packs the file, so that its bytes cannot be addressed."
            )
        etag = response.headers.get("ETag")
        if self.size < 0:
            self.size, self.etag = size, etag
        elif (size, etag) != (self.size, self.etag):
            raise SourceError(f"{self.name}: the file changed on the server while its header was read.")
        return skip

    def _size_in(self, response: httpx.Response, start: int) -> tuple[int | None, int]:
        """Return the size of the whole file and the bytes to skip, if the answer carries the file."""
        if response.status_code == _PARTIAL:
            match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start or not start <= int(match[2]) < int(match[3]):
                said = response.headers.get("Content-Range")
                raise SourceError(f"{self.name}: asked for bytes from {start:,}, the server sends {said!r}.")
            return int(match[3]), 0
        if response.status_code == _WHOLE:
            length = response.headers.get("Content-Length", "")
            if not length.isdecimal():
                raise SourceError(f"{self.name}: the server does not say how large the file is.")
            return int(length), start
        if response.status_code == _NO_SUCH_RANGE and self.size < 0:
            return 0, 0
        return None, 0


class _BusyError(Exception):
    """The server asks to come back later."""


def _refusal(status: int) -> str:
    if status == _NOT_THERE:
        return "there is no such file on the server (404)."
    if status in _REFUSED:
        return f"the server refuses access ({status}); a private or gated file needs a token."
    if status == _NO_SUCH_RANGE:
        return "the file is shorter than the server said (416)."
    return f"the server answers {status} instead of the file."
