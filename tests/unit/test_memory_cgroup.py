"""Control groups' limits, as the kernel tells them, in both of its versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.quantities import GIB
from node.memory_cgroup import read_cgroups


def _tree(root: Path, groups: str, mountinfo: str, files: dict[str, object]) -> Path:
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mountinfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def test_version_2_counts_every_group_from_the_top(tmp_path: Path) -> None:
    at = "sys/fs/cgroup/user.slice"
    root = _tree(tmp_path, "0::/user.slice/app.scope", V2_MOUNT, {
        f"{at}/memory.max": 4 * GIB, f"{at}/memory.current": 3 * GIB,
        f"{at}/memory.stat": f"anon 1\ninactive_file {GIB}",
        f"{at}/app.scope/memory.max": 6 * GIB, f"{at}/app.scope/memory.current": 5 * GIB,
    })  # fmt: skip
    outer, inner = read_cgroups(root)
    assert (outer.limit_bytes, outer.available_bytes) == (4 * GIB, (4 - (3 - 1)) * GIB)
    assert (inner.limit_bytes, inner.available_bytes) == (6 * GIB, 1 * GIB)
    assert outer.id != inner.id
    assert read_cgroups(root) == (outer, inner)


def test_version_2_without_a_limit_is_none(tmp_path: Path) -> None:
    files: dict[str, object] = {"sys/fs/cgroup/a/memory.max": "max", "sys/fs/cgroup/a/memory.current": GIB}
    assert read_cgroups(_tree(tmp_path, "0::/a", V2_MOUNT, files)) == ()


def test_version_1_is_found_by_its_controller_and_its_huge_number_is_no_limit(tmp_path: Path) -> None:
    at = "sys/fs/cgroup/memory"
    root = _tree(tmp_path, "7:cpu,cpuacct:/x\n4:memory:/svc/one\n0::/", f"{V1_MOUNT}\n{V2_MOUNT}", {
        f"{at}/memory.limit_in_bytes": 9223372036854771712,
        f"{at}/svc/one/memory.limit_in_bytes": 2 * GIB, f"{at}/svc/one/memory.usage_in_bytes": GIB,
        f"{at}/svc/one/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB // 2}",
    })  # fmt: skip
    (found,) = read_cgroups(root)
    assert (found.limit_bytes, found.available_bytes) == (2 * GIB, 2 * GIB - GIB // 2)


@pytest.mark.parametrize(
    ("group", "mount_root"),
    [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../other", "/"), ("/elsewhere", "/docker/abc")],
)
def test_a_container_finds_its_own_group_at_the_mount(tmp_path: Path, group: str, mount_root: str) -> None:
    mount = f"30 23 0:26 {mount_root} /sys/fs/cgroup ro - cgroup2 cgroup rw"
    files: dict[str, object] = {"sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 0}
    (found,) = read_cgroups(_tree(tmp_path, f"0::{group}", mount, files))
    assert (found.limit_bytes, found.available_bytes) == (GIB, GIB)


def test_a_machine_without_control_groups_is_unlimited(tmp_path: Path) -> None:
    assert read_cgroups(tmp_path) == ()


def test_nonsense_in_proc_is_no_limit(tmp_path: Path) -> None:
    assert read_cgroups(_tree(tmp_path, "garbage\n::", "30 23 -\n - cgroup2\n\n", {})) == ()
