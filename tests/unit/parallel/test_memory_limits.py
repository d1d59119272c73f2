"""How much memory there is: limits of control groups, of both versions and at every height, and of `ulimit`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from luban.parallel.memory_limits import _groups, free_memory, resident_memory

GB = 10**9


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.mark.parametrize("path", ["/", "/user.slice/job.scope"])
def test_the_second_version_of_control_groups(tmp_path, path):
    group(tmp_path / "proc/self", cgroup=f"0::{path}")
    base = tmp_path / "sys/fs/cgroup"
    group(base, memory__max="max", memory__current=1)
    assert list(_groups(tmp_path)) == []
    inner = base / path.lstrip("/")
    group(inner, memory__max=3 * GB, memory__high=2 * GB, memory__current=GB, memory__stat="anon 5\ninactive_file 1000")
    assert sorted(_groups(tmp_path)) == [GB + 1000, 2 * GB + 1000]
    if path != "/":  # a limit of the slice holds for all that is in it
        group(inner.parent, memory__max=GB + 7, memory__current=GB)
        assert min(_groups(tmp_path)) == 7


def test_the_first_version_and_a_container_that_sees_the_host_s_path(tmp_path):
    group(tmp_path / "proc/self", cgroup="9:name=systemd:/\n4:cpuset,memory:/docker/abc\n0::/")
    base = tmp_path / "sys/fs/cgroup/memory"
    files = {"memory__usage_in_bytes": GB, "memory__stat": "inactive_file 7\ntotal_inactive_file 3000"}
    group(base, memory__limit_in_bytes=9223372036854771712, **files)
    assert list(_groups(tmp_path)) == []
    group(base, memory__limit_in_bytes=4 * GB)  # /docker/abc isn't there: its files are mounted at the top
    assert list(_groups(tmp_path)) == [3 * GB + 3000]
    group(base / "docker/abc", memory__limit_in_bytes=2 * GB, **files)
    assert min(_groups(tmp_path)) == GB + 3000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_ulimit_counts(kind):
    assert resident_memory() > 0 and free_memory(torch.device("cpu")) > GB / 10
    script = f"""
import resource, torch
from luban.parallel.memory_limits import _pages, free_memory
used = _pages()[0 if "{kind}" == "RLIMIT_AS" else 5]
resource.setrlimit(resource.{kind}, (used + 10**9, used + 10**9))
free = free_memory(torch.device("cpu"))
assert 0.9e9 < free <= 1e9, free
torch.empty(8 * 10**8, dtype=torch.uint8)
try:
    torch.empty(11 * 10**8, dtype=torch.uint8)
except RuntimeError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "refused" in done.stdout, done.stderr
