"""Keys, fingerprints, the state folder and its lock."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.errors import UsageError
from cluster.identity import host_id, load_or_create_identity, machine_id_from_file, machine_id_from_ioreg
from cluster.state_dir import StateDir, default_state_path, holder_pid, write_private


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_identity_survives_a_restart(tmp_path: Path) -> None:
    with StateDir(tmp_path / "state") as state:
        first = load_or_create_identity(state)
    with StateDir(tmp_path / "state") as state:
        assert load_or_create_identity(state).id == first.id


def test_two_folders_give_two_identities(tmp_path: Path) -> None:
    with StateDir(tmp_path / "a") as a, StateDir(tmp_path / "b") as b:
        assert load_or_create_identity(a).id != load_or_create_identity(b).id


def test_an_id_is_the_first_half_of_the_public_keys_sha256(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        identity = load_or_create_identity(state)
    raw = identity.private_key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    assert identity.id == hashlib.sha256(raw).hexdigest()[:32]


def test_the_key_and_its_folder_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with StateDir(tmp_path / "state") as state:
            load_or_create_identity(state)
    finally:
        os.umask(before)
    assert _mode(tmp_path / "state") == 0o700
    assert _mode(tmp_path / "state" / "node.key") == 0o600


def test_a_folder_that_existed_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "srv").mkdir(mode=0o755)
    StateDir(tmp_path / "srv").close()
    assert _mode(tmp_path / "srv") == 0o755


def test_a_key_that_others_can_read_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        load_or_create_identity(state)
        (tmp_path / "node.key").chmod(0o640)
        with pytest.raises(UsageError, match=r"expected mode 600 .* found 640; run `chmod 600 "):
            load_or_create_identity(state)


@pytest.mark.parametrize(
    "damage", [b"", b"-----BEGIN PRIVATE KEY-----\nMC4CAQ\n-----END PRIVATE KEY-----\n", b"\xff" * 64]
)
def test_a_damaged_key_is_an_error_and_never_replaced(tmp_path: Path, damage: bytes) -> None:
    with StateDir(tmp_path) as state:
        write_private(tmp_path / "node.key", damage)
        with pytest.raises(UsageError, match="move it away"):
            load_or_create_identity(state)
    assert (tmp_path / "node.key").read_bytes() == damage


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with StateDir(tmp_path) as state:
        write_private(tmp_path / "node.key", pem)
        with pytest.raises(UsageError, match="expected an Ed25519 key"):
            load_or_create_identity(state)


def test_a_second_node_on_the_same_state_is_told_who_has_it_and_which_option_to_use(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state, pytest.raises(UsageError) as refused:
        StateDir(state.path)
    assert str(refused.value) == (
        f"another Potluck process (pid {os.getpid()}) uses {tmp_path}; "
        "use --state DIR for a second node on this machine"
    )


def test_a_closed_state_is_free_again(tmp_path: Path) -> None:
    StateDir(tmp_path).close()
    assert holder_pid(tmp_path) is None
    with StateDir(tmp_path):
        assert holder_pid(tmp_path) == os.getpid()


def test_a_file_where_the_state_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="found a file"):
        StateDir(tmp_path / "file")
    with pytest.raises(UsageError, match="choose a writable folder with --state DIR"):
        StateDir(tmp_path / "file" / "below")


def test_a_private_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_private(tmp_path / "kept", b"old")
    write_private(tmp_path / "kept", b"new")
    assert (tmp_path / "kept").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_potluck_home_is_the_default_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_state_path({"POTLUCK_HOME": "~/pool"}) == Path("/home/ada/pool")
    assert default_state_path({"POTLUCK_HOME": " "}) == Path("/home/ada/.potluck")


def test_a_host_id_hides_the_machine_id_and_is_the_same_for_every_state(tmp_path: Path) -> None:
    machine = "0123456789abcdef" * 2
    with StateDir(tmp_path / "a") as a, StateDir(tmp_path / "b") as b:
        first, second = (host_id(state, read_machine_id=lambda: machine) for state in (a, b))
    assert first == second
    assert machine not in first
    assert len(first) == 32


def test_a_machine_without_an_id_keeps_a_random_one(tmp_path: Path) -> None:
    with StateDir(tmp_path / "a") as a, StateDir(tmp_path / "b") as b:
        first = host_id(a, read_machine_id=lambda: None)
        assert host_id(a, read_machine_id=lambda: None) == first
        assert host_id(b, read_machine_id=lambda: None) != first


def test_a_fresh_images_machine_id_is_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "machine-id").write_text("uninitialized\n")
    assert machine_id_from_file(tmp_path / "machine-id") is None
    assert machine_id_from_file(tmp_path / "absent") is None
    (tmp_path / "machine-id").write_text("0" * 32 + "\n")
    assert machine_id_from_file(tmp_path / "machine-id") == "0" * 32


def test_macos_tells_its_platform_uuid_through_ioreg() -> None:
    output = '    | {\n    |   "IOPlatformUUID" = "F0E1D2C3-0000-1111-2222-333344445555"\n    | }\n'
    assert machine_id_from_ioreg(output) == "f0e1d2c3-0000-1111-2222-333344445555"
    assert machine_id_from_ioreg("No matches") is None
