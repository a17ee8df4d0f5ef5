"""Error responses: an HTTP status, a code for programs and a message for people."""

import json

from starlette.exceptions import HTTPException
from starlette.responses import Response


class ApiError(HTTPException):
    """Error response.

    Args:
        status: HTTP status.
        code: Error code, one word.
        message: One line for the caller, never logged.
        retry_s: Value of ``Retry-After`` in seconds; 0 for none.
        closes: Whether to close the connection, if more of the request may follow.
    """

    def __init__(self, status: int, code: str, message: str, retry_s: int = 0, closes: bool = False) -> None:
        headers = {"Retry-After": str(retry_s)} if retry_s else {}
        super().__init__(status, message, headers | ({"Connection": "close"} if closes else {}))
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
