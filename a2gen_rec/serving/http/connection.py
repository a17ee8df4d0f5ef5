"""A connection of the service: uvicorn's, but bounded in time and memory whatever a client sends or leaves undone."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEADER_TIMEOUT_S = 10.0
"""For which a connection may be without a complete request line and headers."""
WRITE_STALL_TIMEOUT_S = 20.0
"""For which a client may leave unread more of its answers than is kept for it."""
MAX_HEADERS = 2**16
"""Bytes of request line and headers, or of what follows a body, beyond what one read of the socket brings."""
MAX_PIPELINED_REQUESTS = 64
"""Requests of a connection that wait for the one before."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Ends connections whose headers do not come or do not end, and those whose answers nobody reads."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.access_log = False  # uvicorn's own, which has paths and so names users, whatever logging is set to
        self._headers_due: asyncio.TimerHandle | None = None
        self._read_due: asyncio.TimerHandle | None = None
        self._begun: list[RequestResponseCycle] = []
        self._pending = 0  # bytes since the last that were of use
        self._has_headers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        super().data_received(data)
        if self._pending > MAX_HEADERS:
            self.transport.abort()

    def on_message_begin(self) -> None:
        self._has_headers = False
        self._expect_headers()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_headers:  # what comes after a body would be taken for a header of the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._pending, self._has_headers = 0, True
        self._have_headers()
        super().on_headers_complete()
        self._begun = [*(each for each in self._begun if not each.response_complete), self.cycle]
        if len(self.pipeline) > MAX_PIPELINED_REQUESTS:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._pending = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_due = self.loop.call_later(WRITE_STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_headers()
        self._is_read()
        for cycle in self._begun:  # uvicorn tells the last one only, and the others would write
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    def _have_headers(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _is_read(self) -> None:
        if self._read_due is not None:
            self._read_due.cancel()
            self._read_due = None
