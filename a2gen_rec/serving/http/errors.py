"""What the service answers when it does not do what was asked: a status, a code for programs and a line for people."""

import json

from starlette.exceptions import HTTPException
from starlette.responses import Response


class ApiError(HTTPException):
    """An answer other than the one asked for.

    Args:
        status: of HTTP; code: what is wrong, in a word; message: one line for the caller, never logged.
        retry_s: when it may be asked again.
        closes: whether to end the connection, where more of the request may follow.
    """

    def __init__(self, status: int, code: str, message: str, retry_s: int = 0, closes: bool = False) -> None:
        headers = {"Retry-After": str(retry_s)} if retry_s else {}
        super().__init__(status, message, headers | ({"Connection": "close"} if closes else {}))
        self.code, self.message = code, message

    def response(self, request_id: str) -> Response:
        """``{"error": {"code", "message", "request_id"}}``."""
        error = {"error": {"code": self.code, "message": self.message, "request_id": request_id}}
        # ASCII: a message may repeat what was sent, half a surrogate pair included, which has no UTF-8.
        return Response(json.dumps(error), self.status_code, self.headers, media_type="application/json")


def service_unavailable(code: str, message: str) -> ApiError:
    return ApiError(503, code, message, retry_s=1)


INTERNAL_ERROR = ApiError(500, "internal", "something is wrong with the service; see its log")
