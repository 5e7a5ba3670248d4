"""Who a node is: a key pair made on its first start, and the machine that it runs on.

Owns the key file and the two fingerprints. Does not know how keys are used on a link.
"""

from __future__ import annotations

import hashlib
import platform
import re
import secrets
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cluster.errors import UsageError
from cluster.state_dir import StateDir, write_private
from cluster.types import HostId, NodeId

FINGERPRINT_CHARS: Final = 32
"""Hex digits of an id: 128 bits, which nobody can make a second key for, and which still fit on a line."""

_KEY_NAME: Final = "node.key"
_HOST_NAME: Final = "host"
_FINGERPRINT: Final = re.compile(rf"[0-9a-f]{{{FINGERPRINT_CHARS}}}")
_IOREG_UUID: Final = re.compile(r'"IOPlatformUUID"\s*=\s*"([0-9A-Fa-f-]{36})"')


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's id and the key that it is the fingerprint of."""

    id: NodeId
    private_key: Ed25519PrivateKey


def node_id_of(private_key: Ed25519PrivateKey) -> NodeId:
    """The fingerprint: the first 32 hex digits of the SHA-256 of the raw public key."""
    raw = private_key.public_key().public_bytes_raw()
    return NodeId(hashlib.sha256(raw).hexdigest()[:FINGERPRINT_CHARS])


def load_or_create_identity(state: StateDir) -> Identity:
    """The same identity for as long as the state folder lives. The caller holds its lock, so nobody races."""
    path = state.path / _KEY_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        key = Ed25519PrivateKey.generate()
        write_private(path, _encode(key))
        return Identity(node_id_of(key), key)
    except OSError as error:
        raise UsageError(
            f"cannot read this node's key {path}: {error.strerror}; "
            "run as the user who made it, or start a new node with --state DIR"
        ) from error
    _refuse_shared(path)
    key = _decode(data, path)
    return Identity(node_id_of(key), key)


def host_id(state: StateDir, *, read_machine_id: Callable[[], str | None] | None = None) -> HostId:
    """One id per machine, so that placement divides its memory once. Where the system has none, a random
    one kept in the state folder; several nodes on such a machine must be handed the same one."""
    native = (read_machine_id or _read_machine_id)()
    if native:
        # The machine's own number is private (machine-id(5)): only a hash of it leaves the machine.
        return HostId(hashlib.sha256(b"potluck host\0" + native.encode()).hexdigest()[:FINGERPRINT_CHARS])
    path = state.path / _HOST_NAME
    try:
        kept = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        kept = ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the machine's id {path}: {error}; remove the file and start again") from error
    if _FINGERPRINT.fullmatch(kept):
        return HostId(kept)
    made = secrets.token_hex(FINGERPRINT_CHARS // 2)
    write_private(path, made.encode() + b"\n")
    return HostId(made)


def machine_id_from_file(path: Path) -> str | None:
    """systemd's machine id; None where it is missing or not set yet (fresh images say `uninitialized`)."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{32}", text) else None


def machine_id_from_ioreg(output: str) -> str | None:
    """The platform's UUID from `ioreg -rd1 -c IOPlatformExpertDevice`."""
    match = _IOREG_UUID.search(output)
    return match[1].lower() if match else None


def _read_machine_id() -> str | None:
    if platform.system() != "Darwin":
        return machine_id_from_file(Path("/etc/machine-id"))
    try:
        result = subprocess.run(
            ["/usr/sbin/ioreg", "-rd1", "-c", "IOPlatformExpertDevice"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return machine_id_from_ioreg(result.stdout)


def _encode(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _decode(data: bytes, path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is not a private key; move it away to start again under a new id") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"expected an Ed25519 key in {path}, found another kind; move it away to get a new id")
    return key


def _refuse_shared(path: Path) -> None:
    """Whoever can read the key can be this node."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise UsageError(
            f"others can read this node's key: expected mode 600 on {path}, found {mode:o}; run `chmod 600 {path}`"
        )
