"""Errors as clients of OpenAI's API expect them, and the boundary behind which nothing escapes unanswered.

Messages go to the client that caused them. A log gets the kind of an unexpected error and where it happened, never
its message: that may repeat a prompt.
"""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cluster.errors import AtCapacity, ClusterError, DeadlineExceeded, NotReady, RequestError

_LOG: Final = logging.getLogger("potluck.api")

NOT_READY_RETRY_S: Final = 5
"""When to come back while a plan is being installed; loading a model takes seconds to minutes."""

_STATUS_OF_CODE: Final = {"model_not_found": 404, "body_too_large": 413, "body_timeout": 408, "host_not_allowed": 403}


class ClientGone(Exception):
    """The client has closed the connection; nobody reads what would follow."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as the client sees it."""

    status: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """OpenAI's shape. ASCII, because a client's own words may hold what UTF-8 cannot."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def problem_of(error: Exception) -> Problem:
    """What to tell the client about an error of ours, or about one that nobody expected."""
    match error:
        case AtCapacity():
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return Problem(429, "rate_limit_error", str(error), None, error.code, headers)
        case RequestError():
            status = _STATUS_OF_CODE.get(error.code or "", 400)
            headers = {"Connection": "close"} if status in (408, 413) else {}  # the rest of the body was not read
            return Problem(status, "invalid_request_error", str(error), error.field, error.code, headers)
        case DeadlineExceeded():
            # Official clients try again after both, unless they are told not to. Only who waited for room alone may
            # find some; the others would have all of it computed once more.
            headers = {} if error.code == "queue_timeout" else {"x-should-retry": "false"}
            status = 504 if error.field is None else 408
            return Problem(status, "timeout_error", str(error), error.field, error.code, headers)
        case NotReady():
            return Problem(503, "server_error", str(error), None, "not_ready", {"Retry-After": str(NOT_READY_RETRY_S)})
        case ClusterError():
            return Problem(503, "server_error", str(error), None, "cluster_error")
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
            headers = dict(error.headers or {})
            return Problem(error.status_code, "invalid_request_error", error.detail, None, code, headers)
    where = " < ".join(f"{frame.name} {frame.filename}:{frame.lineno}" for frame in _frames(error))
    _LOG.error("unexpected %s in a request: %s", type(error).__name__, where)
    return Problem(500, "server_error", "the server made a mistake; its log says where", None, "internal_error")


def _frames(error: Exception) -> list[traceback.FrameSummary]:
    """Innermost first."""
    return list(reversed(traceback.extract_tb(error.__traceback__)))


Endpoint = Callable[[Request], Awaitable[Response]]


def guarded(endpoint: Endpoint) -> Endpoint:
    """Answer whatever the endpoint raises."""

    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)  # nobody is there to read it
        except Exception as error:  # noqa: BLE001 - the boundary of a request: every one is answered, none kills another.
            return problem_of(error).response()

    return answered


async def http_error(request: Request, error: Exception) -> Response:
    """The router's own errors: no such path, no such method."""
    return problem_of(error).response()
