"""CPU counts under quotas, from made-up trees of /proc and /sys."""

import os
import subprocess
import sys

import pytest

from meta_deploy import cpus
from meta_deploy.cpus import Share, cpu_count

CORES = 64
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "33 31 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    monkeypatch.setattr(cpus, "_affinity", lambda: CORES)


def tree(root, mounts, group, files):
    """A root folder whose process is in `group`."""
    for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": group, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(root, group, quotas, top="/"):
    files = {f"sys/fs/cgroup/{folder}cpu.max": text for folder, text in quotas.items()}
    return tree(root, V2.format(top=top), f"0::{group}\n", files)


def v1(root, group, quotas, top="/"):
    files = {}
    for folder, (quota, period) in quotas.items():
        files[f"sys/fs/cgroup/cpu,cpuacct/{folder}cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"sys/fs/cgroup/cpu,cpuacct/{folder}cpu.cfs_period_us"] = f"{period}\n"
    return tree(
        root, V1.format(top=top), f"5:memory:{group}\n3:cpu,cpuacct:{group}\n1:name=systemd:/\n", files
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),  # one thread could not use it up
        ("10000 100000", 1),
        ("max 100000", CORES),
        ("99900000 100000", CORES),
        ("", CORES),
        ("nonsense", CORES),
        ("100000 0", CORES),
    ],
)
def test_a_container_of_its_own_sees_its_quota(tmp_path, text, count):
    assert cpu_count(v2(tmp_path, "/", {"": text})) == count


def test_the_least_quota_on_the_way_up_holds(tmp_path):
    quotas = {"a/b/": "max 100000", "a/": "300000 100000", "": "800000 100000"}
    assert cpu_count(v2(tmp_path, "/a/b", quotas)) == 3


def test_a_container_that_sees_its_hosts_path(tmp_path):
    assert cpu_count(v2(tmp_path, "/docker/abc", {"": "200000 100000"}, top="/docker/abc")) == 2


def test_the_older_groups(tmp_path):
    assert cpu_count(v1(tmp_path, "/docker/abc", {"docker/abc/": (250000, 100000), "": (-1, 100000)})) == 3
    assert cpu_count(v1(tmp_path, "/docker/abc", {"": (50000, 50000)}, top="/docker/abc")) == 1


def test_no_control_groups_no_quota(tmp_path):
    assert cpu_count(tmp_path) == CORES


def test_models_beside_each_other_divide(monkeypatch):
    monkeypatch.setattr(Share, "_open", type(Share._open)())
    first = Share()
    assert first.threads == 0  # the library's own choice: all
    second, third = Share(), Share()
    assert (second.threads, third.threads) == (CORES // 2, CORES // 3)
    second.close()
    third.close()
    assert Share(5).threads == 5
    del first
    assert Share().threads == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_is_followed():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from meta_deploy.cpus import cpu_count; print(cpu_count())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"
