"""What a node says about itself over mDNS: the TXT record, written and read.

Pure. Whatever is read comes from anyone on the network, so it is checked for length and character set, and
what does not fit is no advertisement at all. Knows nothing of sockets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cluster.errors import UsageError
from cluster.identity import FINGERPRINT_CHARS
from cluster.limits import NAME_BYTES_MAX
from cluster.nodes import NodeFacts
from cluster.types import Backend, HostId, NodeId

_FINGERPRINT: Final = re.compile(rf"[0-9a-f]{{{FINGERPRINT_CHARS}}}")
_PROTOCOL: Final = re.compile(r"[0-9]{1,5}")
_VERSION: Final = re.compile(r"[0-9A-Za-z.+_-]{1,32}")
_SHORT_ID_CHARS: Final = 8
_NOT_IN_A_LABEL: Final = re.compile(r"[.\\]")  # zeroconf takes a dot for the end of a label


@dataclass(frozen=True, slots=True)
class Advert:
    """The TXT record's facts."""

    id: NodeId
    name: str
    cluster: str
    host: HostId
    backend: Backend
    protocol: int
    version: str

    def txt(self) -> dict[str, str]:
        """The record's strings; each stays far below the 255 bytes that DNS allows."""
        return {
            "id": self.id,
            "name": self.name,
            "cluster": self.cluster,
            "host": self.host,
            "backend": self.backend.value,
            "protocol": str(self.protocol),
            "version": self.version,
        }

    def label(self) -> str:
        """The instance's name. Two nodes called alike still differ by the start of their ids."""
        suffix = f" {self.id[:_SHORT_ID_CHARS]}"
        readable = _NOT_IN_A_LABEL.sub("-", self.name).encode()[: NAME_BYTES_MAX - len(suffix)]
        return readable.decode(errors="ignore") + suffix


def advert_of(facts: NodeFacts) -> Advert:
    """What a node advertises. UsageError where its names cannot be carried."""
    return Advert(
        id=facts.id,
        name=check_name(facts.name, "--name"),
        cluster=check_name(facts.cluster, "--cluster"),
        host=facts.host,
        backend=facts.backend,
        protocol=facts.protocol,
        version=facts.version,
    )


def check_name(name: str, option: str) -> str:
    """A node's or cluster's name as typed by a person."""
    if not _is_name(name):
        raise UsageError(f"expected 1 to {NAME_BYTES_MAX} bytes of printable text for {option}, found {name!r}")
    return name


def read_advert(properties: Mapping[bytes, bytes | None]) -> Advert | None:
    """The facts in a TXT record; None when any of them is missing or malformed."""
    try:
        text = {key: (properties.get(key.encode()) or b"").decode() for key in Advert.__slots__}
        backend = Backend(text["backend"])
    except ValueError:  # not UTF-8, or an engine that we do not know
        return None
    well_formed = (
        _FINGERPRINT.fullmatch(text["id"])
        and _FINGERPRINT.fullmatch(text["host"])
        and _is_name(text["name"])
        and _is_name(text["cluster"])
        and _PROTOCOL.fullmatch(text["protocol"])
        and _VERSION.fullmatch(text["version"])
    )
    if not well_formed:
        return None
    return Advert(
        id=NodeId(text["id"]),
        name=text["name"],
        cluster=text["cluster"],
        host=HostId(text["host"]),
        backend=backend,
        protocol=int(text["protocol"]),
        version=text["version"],
    )


def _is_name(text: str) -> bool:
    """Printable keeps control and direction-changing characters off the terminals that show it."""
    return 0 < len(text.encode()) <= NAME_BYTES_MAX and text.isprintable() and text == text.strip()
