"""What does a client hear when something is wrong?

Always the same form, OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden_host",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    499: "client_closed_request",
    500: "internal_error",
    503: "engine_stopped",
    504: "deadline_exceeded",
}
LONGEST_ECHO = 100
"""Characters of what a client sent that an answer repeats: enough to find it, however long it is."""


class ErrorDetail(BaseModel):
    """What was expected, what came, and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer other than 200, raised wherever that becomes clear."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, str(self.detail), self.param, self.code)

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def explain(faults: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """One line about the first field of a body that does not fit its schema, and the field's place in the body.

    Where several types are allowed, there is a fault for each: the one that got furthest says what was meant.
    """
    same_field = [fault for fault in faults if fault["loc"][:2] == faults[0]["loc"][:2]]
    fault = max(same_field, key=lambda fault: (len(_place(fault, body)), not fault["type"].endswith("_type")))
    param = ".".join(map(str, _place(fault, body)))[:LONGEST_ECHO] or None
    message = f"{param or 'body'}: {fault['msg']}".replace("Value error, ", "")
    if fault["type"] not in ("missing", "value_error"):
        message += f", got {repr(fault.get('input'))[:LONGEST_ECHO]}"
    return message, param


def _place(fault: Mapping[str, Any], body: Any) -> list[str | int]:
    """Keys and indices down to a fault; the names of types, which stand among them, are left out."""
    place: list[str | int] = []
    for step in fault["loc"][1:]:
        if (isinstance(body, dict) and step in body) or (isinstance(body, list) and isinstance(step, int)):
            place.append(step)
            body = body[step]
        elif fault["type"] == "missing":
            place.append(step)
    return place
