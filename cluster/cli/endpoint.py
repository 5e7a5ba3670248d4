"""A small HTTP client for our own endpoint: JSON answers and server-sent events, from the standard library.

The command line talks to the endpoint like any other client would.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from cluster.errors import ClusterError, RequestError, UsageError
from cluster.limits import FIRST_STEP_TIMEOUT_S

_TIMEOUT_S = FIRST_STEP_TIMEOUT_S + 60.0
"""Longer than the endpoint is silent over a running answer. One that waits in a long queue may take longer still."""


class Endpoint:
    """One OpenAI-compatible endpoint."""

    def __init__(self, url: str, timeout_s: float = _TIMEOUT_S, key: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            is_ours = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # brackets that do not close, or a port that is no number
            is_ours = False
        if not is_ours:
            raise UsageError(f"expected a URL such as http://127.0.0.1:8000, found {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._parts = urlsplit(self.url)
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def get(self, path: str) -> Mapping[str, object]:
        """The JSON answer; what went wrong is raised in the endpoint's words."""
        with self._request("GET", path, None) as response:
            body = _object(response.read())
            if response.status != http.client.OK:
                raise RequestError(f"{self.url}{path}: {_message(body)}")
            return body

    def chat_model(self) -> str:
        """The model that is served."""
        data = self.get("/v1/models").get("data")
        first = data[0] if isinstance(data, list) and data else None
        name = first.get("id") if isinstance(first, dict) else None
        if not isinstance(name, str):
            raise ClusterError(f"{self.url} serves no model yet; see `potluck status`")
        return name

    def stream(self, path: str, body: Mapping[str, object]) -> Generator[Mapping[str, object], None, None]:
        """The events of a streamed answer; an error, at once or midway, is raised."""
        with self._request("POST", path, {**body, "stream": True}) as response:
            if response.status != http.client.OK:
                raise RequestError(_message(_object(response.read())))
            for line in response:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = _object(line[6:])
                if "error" in event:
                    raise ClusterError(_message(event))
                yield event

    @contextmanager
    def _request(self, method: str, path: str, body: Mapping[str, object] | None) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout_s)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, self._parts.path + path, payload, self._headers)
            yield connection.getresponse()
        except TimeoutError as error:
            raise ClusterError(
                f"{self.url} has not answered for {self._timeout_s:.0f} s; `potluck status --url {self.url}` tells why"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ClusterError(
                f"nothing answers at {self.url} ({error or type(error).__name__}); is `potluck serve`, or whatever you "
                "want to talk to, running there?"
            ) from error
        finally:
            connection.close()


def delta_text(event: Mapping[str, object]) -> str:
    """The new text of a chat chunk."""
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return ""
    delta = choices[0].get("delta") or {}
    return str(delta.get("content") or "")


def _object(data: bytes) -> Mapping[str, object]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ClusterError(f"the endpoint answered with something that is not JSON: {data[:80]!r}") from error
    if not isinstance(value, dict):
        raise ClusterError(f"the endpoint answered with a JSON {type(value).__name__}, not an object")
    return value


def _message(body: Mapping[str, object]) -> str:
    error = body.get("error")
    return str(error.get("message", error)) if isinstance(error, dict) else str(body)
