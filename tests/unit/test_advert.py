"""The TXT record of an advertisement, and what is believed of a stranger's."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.advert import Advert, advert_of, read_advert
from cluster.discovery import dialable
from cluster.errors import UsageError
from cluster.limits import SIGHTING_ADDRESSES_MAX
from cluster.nodes import MemoryReport, NodeFacts, Pressure
from cluster.types import Backend, HostId, NodeId

FACTS = NodeFacts(
    id=NodeId("ab" * 16),
    name="Käthe's mini/0",
    cluster="home",
    host=HostId("cd" * 16),
    address="",
    backend=Backend.MLX,
    device="metal",
    memory=MemoryReport(0, 0, 0, 0, Pressure.NORMAL, ""),
    protocol=1,
    version="0.1.0",
    engine_version="",
    formats=frozenset(),
)


def _on_the_wire(advert: Advert) -> dict[bytes, bytes | None]:
    return {key.encode(): value.encode() for key, value in advert.txt().items()}


def test_what_is_written_is_read_back() -> None:
    advert = advert_of(FACTS)
    assert read_advert(_on_the_wire(advert)) == advert


def test_every_string_of_the_record_fits_dns() -> None:
    longest = dataclasses.replace(FACTS, name="n" * 63, cluster="c" * 63)
    assert all(len(f"{key}={value}".encode()) <= 255 for key, value in advert_of(longest).txt().items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", b"AB" * 16), ("id", b"ab"), ("id", b"ab" * 16 + b"\n"), ("host", b"../../etc"),
        ("name", b""), ("name", b"x" * 64), ("name", b"\xff\xfe"), ("name", b"red\x1b[31m"),
        ("name", "evil\u202egnp".encode()), ("name", b" mini"), ("cluster", b"a\nb"),
        ("backend", b"tensorflow"), ("protocol", b"-1"), ("protocol", "²".encode()), ("protocol", b"123456"),
        ("version", b"0.1.0 rm"), ("version", b"9" * 33),
    ],
)  # fmt: skip
def test_a_malformed_value_makes_it_no_advertisement(key: str, value: bytes) -> None:
    record = _on_the_wire(advert_of(FACTS))
    assert read_advert({**record, key.encode(): value}) is None


@pytest.mark.parametrize("key", Advert.__slots__)
def test_a_missing_value_makes_it_no_advertisement(key: str) -> None:
    record = _on_the_wire(advert_of(FACTS))
    assert read_advert({**record, key.encode(): None}) is None
    del record[key.encode()]
    assert read_advert(record) is None


def test_nodes_of_one_name_have_labels_of_their_own() -> None:
    other = dataclasses.replace(FACTS, id=NodeId("ef" * 16))
    assert advert_of(FACTS).label() != advert_of(other).label()


@pytest.mark.parametrize("name", ["x" * 63, "ä" * 31, "a.b\\c"])
def test_a_label_fits_dns_and_holds_no_dot(name: str) -> None:
    label = advert_of(dataclasses.replace(FACTS, name=name)).label()
    assert len(label.encode()) <= 63
    assert "." not in label and "\\" not in label


@pytest.mark.parametrize(("field", "option"), [("name", "--name"), ("cluster", "--cluster")])
def test_a_name_that_cannot_be_carried_names_its_option(field: str, option: str) -> None:
    with pytest.raises(UsageError, match=f"printable text for {option}, found"):
        advert_of(dataclasses.replace(FACTS, **{field: "x" * 64}))


def test_only_addresses_that_lead_somewhere_are_dialled_ipv4_first() -> None:
    heard = ["fe80::5", "::", "224.0.0.251", "127.0.0.1", "fe80::6%4", "fd00::2", "192.168.1.9", "192.168.1.9"]
    assert dialable(heard, 7433, loopback=False) == ("192.168.1.9:7433", "[fd00::2]:7433", "[fe80::6%4]:7433")
    assert dialable(["127.0.0.1"], 7433, loopback=True) == ("127.0.0.1:7433",)


def test_a_thousand_forged_addresses_are_cut_short() -> None:
    forged = [f"10.0.{number // 256}.{number % 256}" for number in range(1000)]
    assert len(dialable(forged, 1, loopback=False)) == SIGHTING_ADDRESSES_MAX
