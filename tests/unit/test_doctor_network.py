"""Doctor's verdicts on ports, interfaces, multicast, permissions and firewalls."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli.check import Status
from cluster.cli.doctor_network import (
    active_firewalls,
    check_congestion,
    check_firewall,
    check_interfaces,
    check_local_network,
    check_multicast,
    check_port,
    congestion_algorithm,
    known_peers,
)
from cluster.interfaces import Interface


def test_a_port_in_use_names_its_owner_and_the_option() -> None:
    check = check_port("port", 8000, free=False, owner="process 7 (nginx)", option="--port")
    assert (check.status, check.found) == (Status.WARN, "8000 is in use by process 7 (nginx)")
    assert "--port" in check.do


def test_interfaces_list_what_is_used_and_why_the_others_are_not() -> None:
    table = (Interface("eno1", 2, ("192.168.1.20",)), Interface("docker0", 3, ("172.17.0.1",)))
    check = check_interfaces(table)
    assert check.status is Status.OK
    assert check.found == "eno1 192.168.1.20 (not used: docker0: a network of containers on this machine)"


def test_a_machine_with_loopback_alone_is_warned() -> None:
    assert check_interfaces((Interface("lo", 1, ("127.0.0.1",), is_loopback=True),)).status is Status.WARN


def test_silent_multicast_names_the_way_without_it() -> None:
    check = check_multicast((Interface("eno1", 2, ("192.168.1.20",)),), works=False)
    assert check.status is Status.FAIL
    assert "--coordinator HOST:PORT" in check.do and "--peer HOST:PORT" in check.do


def test_a_machine_without_any_interface_fails_the_multicast_check() -> None:
    assert check_multicast((), works=False).found == "there is no interface to try it on"


def _answers(code: int) -> Callable[[str], int]:
    return lambda host: code


@pytest.mark.parametrize(
    ("gateway_answers", "peers", "code", "expected"),
    [
        (True, ["192.168.1.9"], errno.EHOSTUNREACH, Status.FAIL),
        (True, ["192.168.1.9"], errno.ECONNREFUSED, Status.OK),
        (True, ["192.168.1.9"], 0, Status.OK),
        (True, ["192.168.1.9"], errno.ETIMEDOUT, Status.OK),
        (True, [], errno.EHOSTUNREACH, Status.OK),
        (False, ["192.168.1.9"], errno.EHOSTUNREACH, Status.WARN),
    ],
)
def test_macos_denies_the_local_network_when_only_the_gateway_answers(
    gateway_answers: bool, peers: list[str], code: int, expected: Status
) -> None:
    check = check_local_network("192.168.1.1", lambda host: gateway_answers, peers, _answers(code))
    assert check.status is expected


def test_one_reachable_peer_clears_macos() -> None:
    codes = {"192.168.1.8": errno.EHOSTUNREACH, "192.168.1.9": errno.ECONNREFUSED}
    assert check_local_network("192.168.1.1", lambda host: True, list(codes), codes.__getitem__).status is Status.OK


def test_the_denial_names_the_setting() -> None:
    check = check_local_network("192.168.1.1", lambda host: True, ["192.168.1.9"], _answers(errno.EHOSTUNREACH))
    assert "Privacy & Security > Local Network" in check.do


def test_peers_come_from_the_arp_table_without_gateway_multicast_and_ourselves() -> None:
    table = (
        "? (192.168.1.1) at a4:91:b1:0:0:1 on en0 ifscope [ethernet]\n"
        "? (192.168.1.9) at a4:83:e7:1:2:3 on en0 ifscope [ethernet]\n"
        "? (192.168.1.10) at (incomplete) on en0 ifscope [ethernet]\n"
        "? (192.168.1.30) at 3c:22:fb:1:2:3 on en0 ifscope permanent [ethernet]\n"
        "? (192.168.1.255) at ff:ff:ff:ff:ff:ff on en0 ifscope [ethernet]\n"
        "? (192.168.64.2) at 1a:2b:3c:4d:5e:6f on bridge100 ifscope [bridge]\n"
        "? (224.0.0.251) at 1:0:5e:0:0:fb on en0 ifscope permanent [ethernet]\n"
    )
    assert known_peers("192.168.1.1", table) == ["192.168.1.9"]


def test_an_active_firewall_is_a_hint_and_no_failure(tmp_path: Path) -> None:
    (tmp_path / "etc/ufw").mkdir(parents=True)
    (tmp_path / "etc/ufw/ufw.conf").write_text("# ENABLED=no\nENABLED=yes\n")
    (tmp_path / "run/firewalld").mkdir(parents=True)
    check = check_firewall(active_firewalls(tmp_path))
    assert (check.status, check.found) == (Status.WARN, "ufw, firewalld is on")
    assert "UDP 5353" in check.do
    assert check_firewall([]).status is Status.OK


@pytest.mark.parametrize("algorithm", ["bbr", "bbr2"])
def test_pacing_that_takes_late_frames_for_a_slow_link_is_told_with_another(algorithm: str) -> None:
    check = check_congestion(algorithm)
    assert check.status is Status.WARN
    assert algorithm in check.found and "tcp_congestion_control=cubic" in check.do


def test_other_pacing_is_no_finding(tmp_path: Path) -> None:
    setting = tmp_path / "proc" / "sys" / "net" / "ipv4" / "tcp_congestion_control"
    setting.parent.mkdir(parents=True)
    setting.write_text("cubic\n")
    algorithm = congestion_algorithm(tmp_path)
    assert algorithm == "cubic"
    assert check_congestion(algorithm).status is Status.OK


def test_a_system_without_the_setting_is_not_asked_about_it(tmp_path: Path) -> None:
    assert congestion_algorithm(tmp_path) is None
