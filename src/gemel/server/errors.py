"""Every refusal in one shape, the one that OpenAI clients read: {"error": {"message", "type", "param", "code"}}.

`ApiError` is what the server raises itself; `as_api_error` turns whatever else came up into one. What we did not foresee becomes a 500
that says nothing about our insides and is logged with its traceback, under the id that the client was given.
"""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from gemel.config.errors import CapacityError, GemelError, RequestError

log = logging.getLogger("gemel.server")

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}
RETRY_AFTER_S = 1


class ApiError(Exception):
    """A refusal with its HTTP status. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}
        if status == 503:
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_S))

    @property
    def body(self) -> dict[str, object]:
        """The JSON that the client gets."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole HTTP answer."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """The refusal that `error` means to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CapacityError):
        return ApiError(503, str(error), code="overloaded")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, GemelError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return _from_starlette(error)
    log.error("request %s failed", request_id, exc_info=error)
    return ApiError(
        500, f"The server failed on this request and goes on. The log has the reason under {request_id}.", code="internal_error"
    )


def _from_starlette(error: HTTPException) -> ApiError:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return ApiError(
            404, "There is no such route. The routes are listed in the documentation of the server.", code="unknown_route", headers=headers
        )
    if error.status_code == 405:
        allowed = headers.get("Allow", "another method")
        return ApiError(405, f"This route does not take this method; it takes {allowed}.", code="method_not_allowed", headers=headers)
    return ApiError(error.status_code, str(error.detail), headers=headers)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Starlette's exception handler for everything that a route raises."""
    from gemel.server.access import record_of

    return as_api_error(error, record_of(request.scope).id).response()
