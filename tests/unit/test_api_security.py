"""coordinator/api/security.py: pages of other sites cannot reach the API."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from coordinator.api.app import create_app
from tests.fake_generator import FakeGenerator


def status(host: str, *, bound: str = "127.0.0.1", allowed: tuple[str, ...] = (), **headers: str) -> int:
    client = TestClient(create_app(FakeGenerator(), host=bound, allowed_hosts=allowed))
    return client.get("/health", headers={"Host": host, **headers}).status_code


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.0.0.2", "[::1]:8000", "[::1]"])
@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])
def test_this_machines_own_names_are_accepted(host: str, bound: str) -> None:
    assert status(host, bound=bound) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8000", "192.168.1.5:8000", "", "127.0.0.1.evil.example", "box"]
)
def test_on_loopback_no_other_name_is(host: str) -> None:
    assert status(host) == 403


@pytest.mark.parametrize("host", ["192.168.1.5:8000", "[fe80::1]:8000", "coordinator:8000", "box.local", "box.lan"])
def test_on_the_network_addresses_and_private_names_are_accepted(host: str) -> None:
    assert status(host, bound="0.0.0.0") == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "", "local.evil.example"])
def test_on_the_network_public_names_are_not(host: str) -> None:
    assert status(host, bound="192.168.1.5") == 403


def test_a_name_that_the_operator_allows() -> None:
    assert status("Llm.Example.org", bound="0.0.0.0", allowed=("llm.example.org",)) == 200


def test_a_page_of_ours_may_ask_and_a_foreign_one_may_not() -> None:
    assert status("localhost:8000", Origin="http://localhost:8000") == 200
    for origin in ("http://evil.example", "null", "http://localhost:3000", "http://localhost"):
        assert status("localhost:8000", Origin=origin) == 403


def test_answers_carry_no_cors_headers() -> None:
    client = TestClient(create_app(FakeGenerator()), base_url="http://localhost")
    response = client.get("/v1/models", headers={"Origin": "http://localhost"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_refusal_has_openais_shape() -> None:
    client = TestClient(create_app(FakeGenerator()), base_url="http://evil.example")
    error = client.post("/v1/completions", json={"prompt": "x"}).json()["error"]
    assert error["code"] == "host_not_allowed"
    assert "evil.example" in error["message"]
