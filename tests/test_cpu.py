"""Usable CPUs: the quota files of both cgroup versions as texts, no container needed."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from apphost import cpu

V2_NAMESPACE = {
    "/proc/self/cgroup": "0::/\n",
    "/proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup ro,nosuid shared:9 - cgroup2 cgroup rw,nsdelegate\n",
}
V2_SYSTEMD = {
    "/proc/self/cgroup": "0::/system.slice/shop.service\n",
    "/proc/self/mountinfo": (
        "25 30 0:23 / /proc rw,nosuid shared:14 - proc proc rw\n"
        "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
    ),
}
V1_DOCKER = {
    "/proc/self/cgroup": "5:memory:/docker/ab12\n4:cpu,cpuacct:/docker/ab12\n1:name=systemd:/docker/ab12\n",
    "/proc/self/mountinfo": (
        "36 31 0:33 /docker/ab12 /sys/fs/cgroup/memory ro master:16 - cgroup cgroup rw,memory\n"
        "37 31 0:34 /docker/ab12 /sys/fs/cgroup/cpu,cpuacct ro master:17 - cgroup cgroup rw,cpu,cpuacct\n"
    ),
}
HYBRID = {
    "/proc/self/cgroup": "2:cpu:/app\n0::/app\n",
    "/proc/self/mountinfo": (
        "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    ),
}


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("max 100000\n", None),
        ("max", None),
        ("150000 100000\n", 1.5),
        ("50000 100000\n", 0.5),
        ("400000 200000\n", 2.0),
        ("200000", 2.0),  # the period may be left out; its default is 100 ms
        ("", None),
        ("garbage here", None),
        ("100000 0", None),
    ],
)
def test_v2_quota(text: str, cpus: float | None) -> None:
    assert cpu.parse_v2(text) == cpus


@pytest.mark.parametrize(
    ("quota_us", "period_us", "cpus"),
    [
        ("-1\n", "100000\n", None),
        ("250000\n", "100000\n", 2.5),
        ("0\n", "100000\n", None),
        ("100000\n", "0\n", None),
        ("", "", None),
        ("100000\n", "", None),
    ],
)
def test_v1_quota(quota_us: str, period_us: str, cpus: float | None) -> None:
    assert cpu.parse_v1(quota_us, period_us) == cpus


@pytest.mark.parametrize(
    ("affinity", "quota", "usable"),
    [(8, None, 8), (8, 1.5, 2), (8, 2.0, 2), (2, 6.0, 2), (4, 0.2, 1), (0, None, 1), (1, 0.01, 1)],
)
def test_the_smaller_limit_rounded_up_and_at_least_one(affinity: int, quota: float | None, usable: int) -> None:
    assert cpu.combine(affinity, quota) == usable


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"/proc/self/cgroup": "0::/\n"}, None),
        (V2_NAMESPACE, None),
        ({**V2_NAMESPACE, "/sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        ({**V2_SYSTEMD, "/sys/fs/cgroup/system.slice/shop.service/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                **V2_SYSTEMD,
                "/sys/fs/cgroup/system.slice/shop.service/cpu.max": "max 100000\n",
                "/sys/fs/cgroup/system.slice/cpu.max": "200000 100000\n",
            },
            2.0,
        ),
        (
            {
                **V1_DOCKER,
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                **HYBRID,
                "/sys/fs/cgroup/cpu/app/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/app/cpu.cfs_period_us": "100000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1.0,
        ),
    ],
    ids=["no proc", "no mounts", "v2 none", "v2 container", "v2 unit", "v2 parent", "v1 docker", "hybrid parent"],
)
def test_quota_of_the_group_and_its_ancestors(files: Mapping[str, str], cpus: float | None) -> None:
    assert cpu.quota(files.get) == cpus


def test_mount_points_are_unescaped_and_foreign_paths_fall_back_to_the_mount() -> None:
    mounts = "31 23 0:28 /kubepods/a /mnt/my\\040cgroup rw - cgroup2 cgroup rw\nnonsense\n1 2 3:4 / / rw - \n"
    assert cpu.cpu_groups("0::/kubepods/b\nbroken\n", mounts) == [cpu.CpuGroup(2, "/mnt/my cgroup")]


def test_this_machine() -> None:
    assert 1 <= cpu.usable_cpus() <= (os.cpu_count() or 1)
