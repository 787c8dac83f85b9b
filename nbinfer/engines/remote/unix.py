"""HTTP over a Unix socket: what a kernel and the service, and the service and its runners, talk with.

The protocol is h11's; here are only the connections. Importing it takes 30 ms where a whole HTTP client takes
200 to 400, which a kernel would wait for before its first answer from a model that is loaded already; and a
request takes a fourth of the processor time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import h11

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KEPT_CONNECTIONS = 16
_READ_BYTES = 65_536


class BrokenConnectionError(Exception):
    """The server is not there, went away, or does not speak HTTP."""


class Answer:
    """An answer whose head has arrived. :meth:`close` it, read or not.

    Attributes
    ----------
    status
        HTTP's.
    headers
        Names in lower case.
    """

    def __init__(self, client: UnixClient, connection: _Connection, head: h11.Response) -> None:
        self.status = head.status_code
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        self._client = client
        self._connection: _Connection | None = connection

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes.

        Raises
        ------
        BrokenConnectionError
            It ended in the middle.
        """
        while self._connection is not None:
            event = await self._connection.next_event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            else:
                return

    async def read(self) -> bytes:
        """Return the whole body, and close.

        Raises
        ------
        BrokenConnectionError
            It ended in the middle.
        """
        try:
            return b"".join([chunk async for chunk in self.chunks()])
        finally:
            self.close()

    def close(self) -> None:
        """Give the connection back, or break it off when not all was read; idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._client._take_back(connection)  # noqa: SLF001 - one module


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)

    @property
    def usable(self) -> bool:
        """Whether another request can be sent: the last answer was read, and the server has not closed."""
        return self._http.our_state is h11.IDLE and not self._reader.at_eof()

    async def ask(self, request: h11.Request, body: bytes) -> h11.Response:
        parts = [self._http.send(event) for event in (request, h11.Data(data=body), h11.EndOfMessage())]
        try:
            self._writer.write(b"".join(part for part in parts if part))
            await self._writer.drain()
        except OSError as error:
            raise BrokenConnectionError(str(error)) from error
        while True:
            event = await self.next_event()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise BrokenConnectionError("the connection was closed without an answer")

    async def next_event(self) -> object:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(_READ_BYTES))
        except (OSError, h11.RemoteProtocolError) as error:
            raise BrokenConnectionError(str(error)) from error
        return event

    def rest(self) -> bool:
        """Make ready for the next request; whether that is possible."""
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        return self.usable

    def close(self) -> None:
        self._writer.close()


class UnixClient:
    """Requests to one server, over connections that are kept open; for one event loop.

    Parameters
    ----------
    path
        The socket.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._idle: list[_Connection] = []
        self._closed = False

    async def request(self, method: str, target: str, body: bytes = b"") -> Answer:
        """Ask, and return the answer once its head is there. ``body`` is JSON.

        Raises
        ------
        BrokenConnectionError
            Nobody answers.
        """
        headers = [("Host", "localhost"), ("Accept", "*/*")]
        if body:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        asked = h11.Request(method=method, target=target, headers=headers)
        while True:
            kept = self._kept()
            connection = kept or await self._connect()
            try:
                return Answer(self, connection, await connection.ask(asked, body))
            except BrokenConnectionError:
                connection.close()
                # The server may close a connection that it has not used for long just as it is used again.
                if kept is None:
                    raise
            except BaseException:
                connection.close()
                raise

    async def _connect(self) -> _Connection:
        try:
            return _Connection(*await asyncio.open_unix_connection(self.path))
        except OSError as error:
            raise BrokenConnectionError(f"{self.path}: {error.strerror or error}") from error

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        return None

    def _take_back(self, connection: _Connection) -> None:
        if connection.rest() and not self._closed and len(self._idle) < KEPT_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close what is kept open; idempotent."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
