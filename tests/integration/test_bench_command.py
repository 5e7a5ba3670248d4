"""`potluck bench` as a process: against an endpoint whose timing is known, and against a real cluster."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cluster.cli.bench_client import Target
from cluster.cli.bench_endpoint import BenchedEndpoint
from tests.integration.live import Coordinator, eventually

_FIRST_S, _GAP_S = 0.3, 0.05


class _Endpoint(ThreadingHTTPServer):
    """Waits, then sends one token after the other; counts a word as two tokens and its template as ten."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.knows_ignore_eos = True
        self.full = False
        self.key = ""
        self.is_proxy_without_server = False
        self.is_silent = False
        self.most_tokens = 1000
        self.space = " "
        self.prompts: list[str] = []  # without those that find out what the endpoint understands
        self.asked_to_last: set[bool] = set()  # by the same
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: _Endpoint

    def _is_let_in(self) -> bool:
        key = self.server.key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            self._whole(401, {"error": {"message": "who are you?"}})
            return False
        return True

    def do_GET(self) -> None:
        if not self._is_let_in():
            return
        found = self.path == "/v1/models"
        self._whole(200 if found else 404, {"data": [{"id": "tiny"}]} if found else {"error": {"message": "no"}})

    def do_POST(self) -> None:
        body: Any = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_let_in():
            return None
        if self.server.is_proxy_without_server:
            return self._send(502, b"<html>Bad Gateway</html>")
        if body["max_tokens"] > 4:
            self.server.prompts.append(body["messages"][0]["content"])
            self.server.asked_to_last.add(body.get("ignore_eos", False))
        if "ignore_eos" in body and not self.server.knows_ignore_eos:
            return self._whole(400, {"error": {"message": "ignore_eos is unknown here"}})
        if self.server.full and body["max_tokens"] > 4:
            return self._whole(429, {"error": {"message": "come back later"}})
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        self.send_response(200)
        self.end_headers()
        if self.server.is_silent:
            self.wfile.write(b"data: [DONE]\n\n")
            return None
        time.sleep(_FIRST_S)
        tokens = min(body["max_tokens"], self.server.most_tokens)
        for _ in range(tokens):
            self._event({"choices": [{"delta": {"content": "x"}}]})
            time.sleep(_GAP_S)
        words = len(body["messages"][0]["content"].split())
        usage = {"prompt_tokens": 10 + 2 * words, "completion_tokens": tokens}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(f"data:{self.server.space}[DONE]\n\n".encode())
        with self.server.lock:
            self.server.at_once -= 1
        return None

    def _whole(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _event(self, value: object) -> None:
        self.wfile.write(f"data:{self.server.space}{json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Not on the test's output."""


@pytest.fixture
def endpoint() -> Iterator[_Endpoint]:
    with _Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _bench(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli.main", "bench", "--url", url, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_what_is_measured_is_what_the_endpoint_did(endpoint: _Endpoint) -> None:
    done = _bench(endpoint.url, "--users", "1,3", "--prompt", "90", "--output", "6", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    alone, three = json.loads(done.stdout)["results"]
    for result, users in ((alone, 1), (three, 3)):
        assert result["requests"] == users and result["tokens"] == 6 * users
        assert result["prompt_tokens"] == 90, "as long as it was asked for, by the endpoint's own count"
        # Late by what a busy machine adds, never early.
        assert _FIRST_S <= result["first"]["p50_s"] < _FIRST_S + 0.5
        assert 0.8 * _GAP_S <= result["gap"]["p50_s"] < _GAP_S + 0.1
        assert result["inside"] is None
    assert endpoint.most_at_once == 3
    assert endpoint.asked_to_last == {True}
    assert three["tokens_s"] > 1.5 * alone["tokens_s"]


def test_an_answer_is_known_by_its_text_too(endpoint: _Endpoint) -> None:
    target = Target("tiny", urlsplit(endpoint.url), "tiny", None)
    benched = BenchedEndpoint(target, seed=0, timeout_s=30.0)
    answer = asyncio.run(benched.ask(benched.prompt(50), 3))
    assert (answer.problem, answer.text, len(answer.pieces_s)) == ("", "xxx", 3)


def test_an_endpoint_that_refuses_ignore_eos_is_measured_without(endpoint: _Endpoint) -> None:
    endpoint.knows_ignore_eos = False
    done = _bench(endpoint.url, "--users", "1", "--output", "5", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stderr and "failed" not in done.stdout
    assert endpoint.asked_to_last == {False}


def test_a_key_opens_every_door_of_an_endpoint(endpoint: _Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.key = "secret"
    options = ("--users", "1", "--output", "4", "--rounds", "1")
    assert "who are you?" in _bench(endpoint.url, *options).stderr
    monkeypatch.setenv("POTLUCK_BENCH_KEY", "secret")
    done = _bench(endpoint.url, *options)
    assert done.returncode == 0, done.stderr


def test_each_endpoint_gets_its_own_key(endpoint: _Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.key = "secret"
    monkeypatch.setenv("POTLUCK_BENCH_KEY", "secret")
    options = ("--users", "1", "--output", "4", "--rounds", "1", "--against", f"llama.cpp={endpoint.url}")
    assert "who are you?" in _bench(endpoint.url, *options).stderr, "ours was not sent there"
    monkeypatch.setenv("POTLUCK_BENCH_KEY_LLAMA_CPP", "secret")
    assert _bench(endpoint.url, *options).returncode == 0


def test_answers_that_end_early_are_shown_as_long_as_they_were(endpoint: _Endpoint) -> None:
    endpoint.most_tokens = 6
    done = _bench(endpoint.url, "--users", "1", "--output", "12", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    (row,) = (line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["potluck"])
    assert row[3] == "6"
    assert "answers ended before the 12 tokens" in done.stdout


def test_what_was_measured_before_it_was_stopped_is_written(endpoint: _Endpoint, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli.main", "bench", "--url", endpoint.url, "--json", "--rounds", "1"]
    command += ["--users", "1", "--output", "5,900", "--plot", str(tmp_path / "page.html")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as bench:
        eventually(lambda: len(endpoint.prompts) == 2, "the second load has begun", 60.0)
        bench.send_signal(signal.SIGINT)
        said, _ = bench.communicate(timeout=60)
    assert bench.returncode == 130
    assert [result["load"]["output_tokens"] for result in json.loads(said)["results"]] == [5]
    assert "5 out" in (tmp_path / "page.html").read_text()


def test_refusals_are_counted_and_told_and_fail_the_command(endpoint: _Endpoint) -> None:
    endpoint.full = True
    done = _bench(endpoint.url, "--users", "2", "--output", "8", "--rounds", "1")
    assert done.returncode == 1
    assert "2 of 2 failed: HTTP 429: come back later" in done.stdout


def test_a_run_asks_what_no_other_has_asked_unless_it_is_given_its_seed(endpoint: _Endpoint) -> None:
    """An endpoint with a prefix cache would otherwise be measured with answers to prompts that it knows."""
    options = ("--users", "1", "--output", "5", "--rounds", "1", "--json")
    first, other = (json.loads(_bench(endpoint.url, *options).stdout) for _ in range(2))
    _bench(endpoint.url, *options, "--seed", str(first["seed"]))
    assert first["seed"] != other["seed"]
    assert endpoint.prompts[0] == endpoint.prompts[2] != endpoint.prompts[1]


def test_events_without_a_space_are_read_too(endpoint: _Endpoint) -> None:
    endpoint.space = ""
    done = _bench(endpoint.url, "--users", "1", "--output", "5", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["gap"]["p50_s"] >= 0.8 * _GAP_S


def test_an_answer_without_a_token_is_none(endpoint: _Endpoint) -> None:
    endpoint.is_silent = True
    done = _bench(endpoint.url, "--users", "1")
    assert done.returncode == 1
    assert "holds no tokens" in done.stderr


def test_what_a_proxy_says_is_told_with_its_status(endpoint: _Endpoint) -> None:
    endpoint.is_proxy_without_server = True
    done = _bench(endpoint.url, "--users", "1")
    assert done.returncode == 1
    assert "HTTP 502" in done.stderr and "Bad Gateway" in done.stderr


def test_two_endpoints_stand_in_one_table_and_on_one_page(endpoint: _Endpoint, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    options = ("--users", "1", "--output", "4", "--rounds", "1", "--against", f"other={endpoint.url}")
    done = _bench(endpoint.url, *options, "--plot", str(page))
    assert done.returncode == 0, done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.split()[1:2] == ["1"]]
    assert rows == ["potluck", "other"]
    assert page.read_text().count("<svg") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--users", "0"), "--users"),
        (("--prompt", "many"), "--prompt"),
        (("--against", "http://127.0.0.1:1"), "NAME=URL"),
        (("--plot", "page.png"), "FILE.html"),
        (("--plot", "no-such-folder/page.html"), "folder"),
        (("--against", "other=http://127.0.0.1:port"), "expected a URL"),
        (("--against", "potluck=http://127.0.0.1:1"), "name of its own"),
    ],
)
def test_a_wrong_option_is_named(options: tuple[str, ...], said: str) -> None:
    done = _bench("http://127.0.0.1:1", *options)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_of_a_cluster_it_tells_how_busy_the_stages_were(mixed: Coordinator) -> None:
    done = _bench(mixed.url, "--users", "2", "--prompt", "60", "--output", "24", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    (result,) = json.loads(done.stdout)["results"]
    assert result["tokens"] == 48
    stages = mixed.status()["plan"]["stages"]
    assert len(result["inside"]["busy"]) == len(stages) == 3
    assert all(0 < share < 1 for share in result["inside"]["busy"])
    assert result["inside"]["hops_s"] > 0
