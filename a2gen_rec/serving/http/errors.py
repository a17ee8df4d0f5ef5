"""Error responses (an HTTP status, a code for programs, a message for people) and the exceptions mapped to them."""

import json
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from a2gen_rec.errors import UserError
from a2gen_rec.serving.engine.batching import DeadlineExceeded, QueueFull
from a2gen_rec.serving.engine.service import ModelLoadError
from a2gen_rec.serving.engine.workers import WorkerDied
from a2gen_rec.serving.metrics import Metrics
from a2gen_rec.serving.stores.base import StoreBusy, StoreError, StoreFull

MAX_REPORTED_ERRORS = 3
"""Maximum number of validation errors in a message."""
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")

ERRORS = (
    HTTPException,
    RequestValidationError,
    UserError,
    ModelLoadError,
    QueueFull,
    DeadlineExceeded,
    WorkerDied,
    StoreError,
)
"""Exceptions whose message is returned to the caller."""


class ApiError(HTTPException):
    """Error response.

    Args:
        status: HTTP status.
        code: Error code, one word.
        message: One line for the caller, never logged.
        retry_s: Value of ``Retry-After`` in seconds; 0 for none.
        closes: Whether to close the connection, if more of the request may follow.
        headers: More response headers.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        retry_s: int = 0,
        closes: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        all_headers = dict(headers or {})
        if retry_s:
            all_headers["Retry-After"] = str(retry_s)
        if closes:
            all_headers["Connection"] = "close"
        super().__init__(status, message, all_headers)
        self.code, self.message = code, message

    def response(self, request_id: str) -> Response:
        """Return the response ``{"error": {"code", "message", "request_id"}}``."""
        error = {"error": {"code": self.code, "message": self.message, "request_id": request_id}}
        # ASCII: a message may quote the request, whose lone surrogates have no UTF-8 encoding.
        return Response(json.dumps(error), self.status_code, self.headers, media_type="application/json")


def service_unavailable(code: str, message: str) -> ApiError:
    """Return a 503 with ``Retry-After``."""
    return ApiError(503, code, message, retry_s=1)


INTERNAL_ERROR = ApiError(500, "internal", "internal error; see the service log")


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Let an application respond to :data:`ERRORS` by :func:`to_api_error`, and to other exceptions by a 500."""

    def handle(request: Request, error: Exception) -> Response:
        api_error = to_api_error(error)
        if api_error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # Starlette names only the methods of the first route with this path.
            api_error.headers = {"Allow": ", ".join(_allowed_methods(app, request))}
        metrics.errors.labels(api_error.code).inc()
        return api_error.response(request.state.request_id)

    def handle_unexpected(request: Request, error: Exception) -> Response:
        return INTERNAL_ERROR.response(request.state.request_id)  # the guard, which also receives it, logs it

    for kind in ERRORS:
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(Exception, handle_unexpected)


def _allowed_methods(app: FastAPI, request: Request) -> list[str]:
    """Return the methods of all routes with the path of the request. Other paths are those of the page's files."""
    methods = [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in app.routes)
    ] or ["GET"]
    return [*methods, "HEAD"] if "GET" in methods else methods


def to_api_error(error: Exception) -> ApiError:
    """Return the response of one of :data:`ERRORS`."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
            return ApiError(error.status_code, code, error.detail)
        case RequestValidationError():
            return ApiError(422, "invalid_request", _format_validation_errors(error))
        case UserError():
            return ApiError(422, "invalid_request", " ".join(str(error).split()))
        case QueueFull():
            return queue_full()
        case WorkerDied():
            return worker_died()
        case DeadlineExceeded():
            return ApiError(504, "timeout", "deadline exceeded")
        case StoreFull():
            return ApiError(507, "store_full", str(error))
        case StoreBusy():
            return service_unavailable("store_busy", str(error))
        case ModelLoadError():
            return ApiError(409, "model_rejected", " ".join(str(error).split()))
    return service_unavailable("store_unavailable", str(error))


def queue_full() -> ApiError:
    """Return the error of a request that finds the ranking queue full."""
    return service_unavailable("overloaded", "the ranking queue is full")


def worker_died() -> ApiError:
    """Return the error of a request that no worker can rank."""
    return service_unavailable("worker_died", "a ranking worker died and is being restarted")


def _format_validation_errors(error: RequestValidationError) -> str:
    """Return the fields and rules of validation errors, without the offending values."""
    errors = error.errors()
    messages = [
        f"{'.'.join(str(part) for part in error_details['loc'])}: {error_details['msg']}"
        for error_details in errors[:MAX_REPORTED_ERRORS]
    ]
    more = [f"and {len(errors) - MAX_REPORTED_ERRORS} more"] if len(errors) > MAX_REPORTED_ERRORS else []
    return "; ".join([*messages, *more])
