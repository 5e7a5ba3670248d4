"""`potluck chat` as a process, against an endpoint that answers slowly enough to be interrupted."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

_SAID = "Once upon a time"


class _Endpoint(ThreadingHTTPServer):
    """Streams its one answer; the first time it does not come to the end before it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[list[dict[str, str]]] = []
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: _Endpoint

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "tiny", "object": "model"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body: Any = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body["messages"])
        self.send_response(200)
        self.end_headers()
        self._say(_SAID)
        if len(self.server.asked) == 1:
            with contextlib.suppress(OSError):
                while not self.server.hung_up.wait(0.05):
                    self._say("")  # fails once the other end is gone
            self.server.hung_up.set()
            return
        self.wfile.write(b"data: [DONE]\n\n")

    def _say(self, text: str) -> None:
        event = {"choices": [{"index": 0, "delta": {"content": text}}]}
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Not on the test's output."""


@pytest.fixture
def endpoint() -> Iterator[_Endpoint]:
    with _Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.hung_up.set()
        server.shutdown()
        thread.join()


def _chat(endpoint: _Endpoint, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli.main", "chat", "--url", endpoint.url, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_ctrl_c_stops_an_answer_and_not_the_conversation(endpoint: _Endpoint) -> None:
    with _chat(endpoint) as chat:
        assert chat.stdin is not None and chat.stdout is not None
        chat.stdin.write("tell me a story\n")
        chat.stdin.flush()
        assert chat.stdout.read(len(_SAID)) == _SAID
        chat.send_signal(signal.SIGINT)
        assert endpoint.hung_up.wait(20), "the stream stayed open, so the cluster would go on computing"
        rest, _ = chat.communicate("go on\n\n", timeout=20)
        assert chat.returncode == 0
    assert rest.endswith(f"{_SAID}\n")
    assert [message["content"] for message in endpoint.asked[1]] == ["tell me a story", _SAID, "go on"]


def test_ctrl_c_ends_a_single_question(endpoint: _Endpoint) -> None:
    with _chat(endpoint, "tell me a story") as chat:
        assert chat.stdout is not None
        assert chat.stdout.read(len(_SAID)) == _SAID
        chat.send_signal(signal.SIGINT)
        assert chat.wait(20) == 130
