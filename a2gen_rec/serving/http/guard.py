"""What stands before every request: who may ask, how much, how slowly; and one line about it in the log.

No line names a user or an item: a request is told by method, route, status, time and its identifier.
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

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from a2gen_rec.serving.http.errors import INTERNAL_ERROR, ApiError, service_unavailable
from a2gen_rec.serving.logs import format_location
from a2gen_rec.serving.metrics import Metrics

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
MAX_DISCARD_FACTOR = 8
"""Times the limit that is read of a body too large and thrown away, so that its sender hears why."""
PROBE_PATHS = {"/healthz", "/readyz", "/metrics"}
CLIENT_CLOSED_REQUEST = 499
"""In place of a status, where the client left before there was one."""

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
    """No one waits for an answer any more."""


class RequestGuard:
    """ASGI middleware.

    Args:
        keys: each lets a caller in; they may change. None asks for none, and then only requests sent to a local name
            are taken, so that no web page can reach the service under a name of its own (DNS rebinding); an address
            cannot be rebound.
        admit: of a method and path, why a request is not taken, before its body is read; None takes it.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        max_body: int,
        read_timeout_s: float,
        max_requests: int,
        metrics: Metrics,
        admission_check: Callable[[str, str], ApiError | None] = lambda method, path: None,
    ) -> None:
        self.app, self.metrics, self.admit = app, metrics, admission_check
        self.keys = keys
        self.max_body, self.read_timeout_s, self.max_requests = max_body, read_timeout_s, max_requests
        self.in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.perf_counter(), dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [*HEADERS, (b"x-request-id", request_id.encode())]
                if not any(name.lower() == b"cache-control" for name, _ in message["headers"]):
                    own.append((b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *own]
            await send(message)

        self.in_progress += 1
        try:
            self._check(scope, headers)
            body = await self._body(headers, receive)
            await self.app(scope, _replay(body, receive), tell)
        except ApiError as refusal:
            self.metrics.refused.labels(refusal.code).inc()
            await refusal.response(request_id)(scope, receive, tell)
        except ClientDisconnected:
            status = CLIENT_CLOSED_REQUEST
        except Exception as error:
            log.error("%s in request %s\n%s", type(error).__name__, request_id, format_location(error))
            if not status:
                await INTERNAL_ERROR.response(request_id)(scope, receive, tell)
        finally:
            self.in_progress -= 1
            seconds, route = time.perf_counter() - began, getattr(scope.get("route"), "path", "other")
            self.metrics.seconds.labels(route, str(status)).observe(seconds)
            access_log.info("%s %s %d %.1f ms %s", scope["method"], route, status, 1000 * seconds, request_id)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise a Refusal for a request that is not taken, whatever it holds."""
        path, host = scope["path"], _split(b"//" + headers.get(b"host", b""))
        if not self.keys and not _is_local(host.hostname or ""):
            raise ApiError(421, "unknown_host", "without an API key, only requests to localhost are taken")
        origin = headers.get(b"origin")
        if origin is not None and _split(origin).netloc != host.netloc:
            raise ApiError(403, "cross_origin", "requests of another site's pages are not taken")
        if self.keys and (path.startswith("/v1/") or path == "/metrics") and not self._has_key(headers):
            raise ApiError(401, "unauthorized", "needs an API key: Authorization: Bearer KEY, or X-Api-Key: KEY")
        if path in PROBE_PATHS:
            return
        if self.in_progress > self.max_requests:
            raise service_unavailable("overloaded", "too many requests in progress")
        if refusal := self.admit(scope["method"], path):
            raise refusal

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # All keys are compared, each in constant time: how long it takes tells nothing of any.
        return sum(hmac.compare_digest(given, key.encode()) for key in self.keys) > 0

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        declared = headers.get(b"content-length", b"0")
        most = MAX_DISCARD_FACTOR * self.max_body
        size, parts, more = int(declared) if declared.isdigit() else 0, [], True
        too_large = f"a request may have {self.max_body} bytes"
        if size > most:
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
                    if size > most:
                        raise ApiError(413, "too_large", too_large, closes=True)
                    if size <= self.max_body:
                        parts.append(part)
        except TimeoutError:
            raise ApiError(
                408, "too_slow", f"a request may take {self.read_timeout_s} s to send", closes=True
            ) from None
        if size > self.max_body:
            raise ApiError(413, "too_large", too_large)
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if size and kind != b"application/json":
            raise ApiError(415, "not_json", "a request's body must be JSON, of the content type application/json")
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body that has been read, then whatever comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(address: bytes) -> SplitResult:
    """An address; an empty one where it is none."""
    try:
        split = urlsplit(address.decode("latin-1"))
        split.hostname  # noqa: B018  -- brackets are looked at only now
        return split
    except ValueError:
        return urlsplit("")
