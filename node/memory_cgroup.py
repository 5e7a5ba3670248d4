"""How much memory the process's control groups leave it, where containers or services limit it.

Reads versions 1 and 2 of the kernel's interface below a root folder. A group's limit binds all its children, so
every group from the process's own up to the top counts. Knows nothing of budgets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

_UNLIMITED_BYTES: Final = 1 << 60
"""Version 1 writes the largest page-aligned number for "no limit"; no machine has an exbibyte."""


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The limit of one of the process's groups, and what it leaves."""

    limit_bytes: int
    available_bytes: int
    id: str = ""  # of the kernel's own folder: every container calls its group `/`


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the files are called. The cache counter is what the kernel gives up before it kills anyone."""

    limit: str
    usage: str
    cache: str


_V1: Final = _Layout("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2: Final = _Layout("memory.max", "memory.current", "inactive_file")


def read_cgroups(root: Path = Path("/")) -> tuple[CgroupMemory, ...]:
    """Those that limit this process, the outermost first."""
    return tuple(
        memory
        for layout, mount, group in _hierarchies(root)
        for folder in reversed(_upwards(mount, group))
        if (memory := _read_group(folder, layout)) is not None
    )


def _hierarchies(root: Path) -> list[tuple[_Layout, Path, PurePosixPath]]:
    """For each hierarchy that counts memory: its files' names, where it is mounted, the process's group in it."""
    groups = _own_groups(_read(root / "proc/self/cgroup"))
    result = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # proc(5): ID parent major:minor ROOT MOUNT-POINT options [tags] - TYPE source SUPER-OPTIONS
        before, separator, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6 or len(tail) < 3:
            continue
        if tail[0] == "cgroup2":
            layout, group = _V2, groups.get("")
        elif tail[0] == "cgroup" and "memory" in tail[2].split(","):
            layout, group = _V1, groups.get("memory")
        else:
            continue
        if group is not None:
            mount = root / _unescape(fields[4]).lstrip("/")
            result.append((layout, mount, _below(PurePosixPath(_unescape(fields[3])), group)))
    return result


def _own_groups(text: str) -> dict[str, PurePosixPath]:
    """The process's group by controller; version 2's has the empty name."""
    groups = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            groups[controller] = PurePosixPath(path)
    return groups


def _below(mount_root: PurePosixPath, group: PurePosixPath) -> PurePosixPath:
    """The group's place under the mount. Inside a container the mount shows only the container's own group."""
    try:
        relative = group.relative_to(mount_root)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in relative.parts else relative


def _upwards(mount: Path, group: PurePosixPath) -> list[Path]:
    return [mount / group, *(mount / parent for parent in group.parents)]


def _read_group(folder: Path, layout: _Layout) -> CgroupMemory | None:
    limit = _read_count(folder / layout.limit)
    if limit is None or limit >= _UNLIMITED_BYTES:
        return None
    usage = _read_count(folder / layout.usage) or 0
    cache = re.search(rf"^{layout.cache} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    held = usage - int(cache[1]) if cache else usage
    place = folder.stat()
    return CgroupMemory(limit, max(0, limit - max(0, held)), f"{place.st_dev}:{place.st_ino}")


def _read_count(path: Path) -> int | None:
    """A number of bytes; None for `max` and for files that are not there."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _unescape(field: str) -> str:
    """mountinfo writes blanks and backslashes as octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
