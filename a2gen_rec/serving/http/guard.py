"""Request guard: authentication, limits of size and time, and the access log.

Log lines contain no user or item, only method, route, status, duration and request id.
"""

import asyncio
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, urlsplit

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from a2gen_rec.serving.http.errors import INTERNAL_ERROR, ApiError, service_unavailable
from a2gen_rec.serving.logs import format_location
from a2gen_rec.serving.metrics import Metrics

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
MAX_DISCARD_FACTOR = 8
"""Multiple of the body limit that is read and discarded, so that the client receives the error response."""
HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[^][@/?#\\:,\s]*)(:\d*)?")
SINGLE_HEADERS = (
    b"host",
    b"origin",
    b"authorization",
    b"x-api-key",
    b"content-type",
    b"content-encoding",
    b"transfer-encoding",
)
"""Headers that decide about access or parsing. With two of them, a proxy may have decided by the other one."""
PROBE_PATHS = {"/healthz", "/readyz", "/metrics"}
MAX_QUOTED = 32
"""Maximum characters of a header in a message."""
CLIENT_CLOSED_REQUEST = 499
"""Logged instead of a status if the client disconnected before the response."""

HEADERS = (
    (b"content-security-policy", b"default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
     b"frame-ancestors 'none'"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)  # fmt: skip

access_log = logging.getLogger("a2gen_rec.serving.access")
log = logging.getLogger(__name__)


class ClientDisconnected(Exception):
    """The client has disconnected."""


class RequestGuard:
    """ASGI middleware.

    Args:
        app: Application to guard.
        keys: Accepted API keys; the list may change. Without keys, only requests to a local host name are accepted, so
            that no web page can reach the service under its own name (DNS rebinding); IP addresses cannot be rebound.
        max_body: Maximum bytes of a request body.
        read_timeout_s: Maximum seconds to receive a request body.
        max_requests: Maximum number of concurrent requests.
        metrics: Metrics of the service.
        root_path: Prefix that is removed from paths.
        admission_check: Returns the error for a method and path before the body is read; None accepts the request.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        max_body: int,
        read_timeout_s: float,
        max_requests: int,
        metrics: Metrics,
        root_path: str = "",
        admission_check: Callable[[str, str], ApiError | None] = lambda method, path: None,
    ) -> None:
        self.app, self.metrics, self.admission_check = app, metrics, admission_check
        self.keys, self.root_path = keys, root_path
        self.max_body, self.read_timeout_s, self.max_requests = max_body, read_timeout_s, max_requests
        self.in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, headers, method = time.perf_counter(), dict(scope["headers"]), scope["method"]
        # A copy: the server must still see HEAD, for which it sends no body.
        scope = dict(scope, method="GET" if method == "HEAD" else method, path=self._remove_root(scope["path"]))
        client_id = headers.get(b"x-request-id", b"")
        request_id = client_id.decode() if REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [*HEADERS, (b"x-request-id", request_id.encode())]
                if not any(name.lower() == b"cache-control" for name, _ in message["headers"]):
                    extra.append((b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        self.in_progress += 1
        try:
            self._check(scope, headers)
            if self.root_path and scope["path"] == self.root_path:
                await RedirectResponse(f"{self.root_path}/", 308)(scope, receive, send_with_headers)
                return
            body = await self._read_body(headers, receive)
            await self.app(scope, _replay(body, receive), send_with_headers)
        except ApiError as error:
            self.metrics.errors.labels(error.code).inc()
            await error.response(request_id)(scope, receive, send_with_headers)
        except ClientDisconnected:
            status = CLIENT_CLOSED_REQUEST
        except Exception as error:
            log.error("%s in request %s\n%s", type(error).__name__, request_id, format_location(error))
            if not status:
                await INTERNAL_ERROR.response(request_id)(scope, receive, send_with_headers)
        finally:
            self.in_progress -= 1
            seconds, route = time.perf_counter() - start, getattr(scope.get("route"), "path", "other")
            self.metrics.request_seconds.labels(route, str(status)).observe(seconds)
            access_log.info("%s %s %d %.1f ms %s", method, route, status, 1000 * seconds, request_id)

    def _remove_root(self, path: str) -> str:
        return path[len(self.root_path) :] if path.startswith(f"{self.root_path}/") else path

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise an ApiError for a request that is rejected before its body is read."""
        path, host = scope["path"], _split(b"//" + headers.get(b"host", b""))
        names = [name for name, _ in scope["headers"]]
        for name in SINGLE_HEADERS:
            if names.count(name) > 1:
                raise ApiError(400, "invalid_header", f"duplicate header {name.decode().title()}")
        if b"host" in headers:
            if not self.keys and not _is_local(host.hostname or ""):
                raise ApiError(421, "unknown_host", "without an API key only localhost may connect")
            if not HOST.fullmatch(headers[b"host"]):
                raise ApiError(400, "invalid_header", "invalid header Host")
        elif scope["http_version"] != "1.0" or path not in PROBE_PATHS:  # some monitors send HTTP/1.0 without Host
            raise ApiError(400, "invalid_header", "missing header Host")
        origin = headers.get(b"origin")
        if origin is not None and _split(origin).netloc != host.netloc:
            raise ApiError(
                403, "cross_origin", "the headers Origin and Host differ; a reverse proxy must forward Host unchanged"
            )
        if self.keys and (path.startswith("/v1/") or path == "/metrics") and not self._has_key(headers):
            raise ApiError(
                401, "unauthorized", "missing or invalid API key; send Authorization: Bearer KEY, or X-Api-Key: KEY"
            )
        if path in PROBE_PATHS:
            return
        if self.in_progress > self.max_requests:
            raise service_unavailable("overloaded", "too many concurrent requests")
        if error := self.admission_check(scope["method"], path):
            raise error

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        candidate = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # All keys are compared, each in constant time, so that timing reveals nothing.
        return sum(hmac.compare_digest(candidate, key.encode()) for key in self.keys) > 0

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        declared = headers.get(b"content-length", b"0")
        max_discarded = MAX_DISCARD_FACTOR * self.max_body
        size, parts, more = int(declared) if declared.isdigit() else 0, [], True
        too_large = f"request body exceeds {self.max_body} bytes"
        if size > max_discarded:
            raise ApiError(413, "too_large", too_large, closes=True)
        size = 0
        try:
            async with asyncio.timeout(self.read_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    more, part = message.get("more_body", False), message.get("body", b"")
                    size += len(part)
                    if size > max_discarded:
                        raise ApiError(413, "too_large", too_large, closes=True)
                    if size <= self.max_body:
                        parts.append(part)
        except TimeoutError:
            raise ApiError(
                408, "too_slow", f"request body not received within {self.read_timeout_s} s", closes=True
            ) from None
        if size > self.max_body:
            raise ApiError(413, "too_large", too_large)
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if size and kind != b"application/json":
            raise ApiError(415, "not_json", "the request body must be JSON with content type application/json")
        for name, supported in ((b"content-encoding", b"identity"), (b"transfer-encoding", b"chunked")):
            encoding = headers.get(name, b"").strip().lower()
            if size and encoding not in (b"", supported):
                reason = f"unsupported {name.decode().title()} {encoding[:MAX_QUOTED].decode('latin-1')!r}"
                raise ApiError(
                    415, "encoded", f"{reason}; send the body uncompressed", headers={"Accept-Encoding": "identity"}
                )
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive channel that yields a body read before, then further messages."""
    is_replayed = False

    async def replay() -> Message:
        nonlocal is_replayed
        if is_replayed:
            return await receive()
        is_replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(address: bytes) -> SplitResult:
    """Return the parsed address; an empty one if it is invalid."""
    try:
        split = urlsplit(address.decode("latin-1"))
        split.hostname  # noqa: B018  -- validates brackets
        return split
    except ValueError:
        return urlsplit("")
