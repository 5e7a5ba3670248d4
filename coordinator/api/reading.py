"""Reads a request's body within limits, and understands it without holding up other requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NoReturn, TypeVar

from starlette.requests import Request

from cluster.errors import RequestError
from cluster.limits import HTTP_BODY_BYTES_MAX, HTTP_BODY_TIMEOUT_S
from cluster.quantities import format_bytes

_T = TypeVar("_T")

INLINE_BYTES_MAX: Final = 8192
"""Longer bodies are understood in a thread: parsing, rendering and tokenising this many bytes takes about 6 ms."""


class Reader:
    """Has one thread: a flood of giant bodies costs one core, and waits for itself."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="understand")

    async def understand(self, body: bytearray, work: Callable[[object], _T]) -> _T:
        """Parse the body as JSON and do `work` on its value."""

        def parsed() -> _T:
            return work(parse_json(body))

        if len(body) <= INLINE_BYTES_MAX:
            return parsed()
        return await asyncio.get_running_loop().run_in_executor(self._thread, parsed)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


async def read_body(request: Request) -> bytearray:
    """The whole body. Refused as soon as it is longer than the limit, announced or not."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > HTTP_BODY_BYTES_MAX:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(HTTP_BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > HTTP_BODY_BYTES_MAX:
                    raise _too_large()
    except TimeoutError:
        message = f"the body did not arrive within {HTTP_BODY_TIMEOUT_S:.0f} s"
        raise RequestError(message, code="body_timeout") from None
    return body


def parse_json(body: bytearray) -> object:
    """Strict JSON in UTF-8."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is invalid", code="invalid_utf8") from None
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or brackets nested thousands deep
        message = "the body is not sensible JSON: a number is too long or brackets nest too deep"
        raise RequestError(message, code="invalid_json") from None


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"the body is not JSON: {name} is not a JSON number", code="invalid_json")


def _too_large() -> RequestError:
    return RequestError(f"the body may have at most {format_bytes(HTTP_BODY_BYTES_MAX)}", code="body_too_large")
