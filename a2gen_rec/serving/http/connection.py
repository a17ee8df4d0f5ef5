"""HTTP connections: uvicorn's protocol with bounds on time and memory for any client behavior."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEADER_TIMEOUT_S = 10.0
"""Maximum seconds without a complete request line and headers."""
WRITE_STALL_TIMEOUT_S = 20.0
"""Maximum seconds that a client may leave a full write buffer unread."""
MAX_HEADERS = 2**16
"""Maximum bytes of request line and headers, or of trailers, in addition to one read of the socket."""
MAX_PIPELINED_REQUESTS = 64
"""Maximum number of requests of a connection that wait for the previous one."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Protocol that closes connections with missing or endless headers, and connections with unread responses."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.access_log = False  # uvicorn's access log contains paths, and thus users
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._cycles: list[RequestResponseCycle] = []
        self._pending = 0  # bytes since the last parsed part of a request
        self._has_headers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        super().data_received(data)
        if self._pending > MAX_HEADERS:
            self.transport.abort()

    def on_message_begin(self) -> None:
        self._has_headers = False
        self._start_header_timer()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_headers:  # trailers would be added to the headers of the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._pending, self._has_headers = 0, True
        self._stop_header_timer()
        super().on_headers_complete()
        self._cycles = [*(cycle for cycle in self._cycles if not cycle.response_complete), self.cycle]
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
        self._write_timer = self.loop.call_later(WRITE_STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        for cycle in self._cycles:  # uvicorn notifies only the last one; the others would write
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
