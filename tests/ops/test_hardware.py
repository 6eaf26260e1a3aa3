"""Cores, memory and instruction sets, read from made-up /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from gemel.ops import hardware

GIB = 2**30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})


def test_the_maker_of_the_processor(tmp_path: Path) -> None:
    text = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nvendor_id\t: other"
    root = tree(tmp_path, {"proc/cpuinfo": text})
    assert (hardware.vendor(root), hardware.cpu_name(root)) == ("AuthenticAMD", "AMD EPYC")
    assert hardware.vendor(tmp_path / "nowhere") == ""


def siblings(*lists: str) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in enumerate(lists)}


def test_without_proc_and_sys_the_affinity_mask_decides(tmp_path: Path, four_cpus: None) -> None:
    cores = hardware.cores(tmp_path)
    assert cores == hardware.Cores(logical=8, allowed=4, physical=4, quota=None)
    assert (cores.usable, cores.reason) == (4, "the affinity mask allows 4 of 8 CPUs")


def test_hyperthreads_of_a_core_count_once(tmp_path: Path, four_cpus: None) -> None:
    cores = hardware.cores(tree(tmp_path, siblings("0,2", "1,3", "0,2", "1,3")))
    assert (cores.usable, cores.reason) == (2, "4 CPUs are hyperthreads of 2 cores")


def test_hyperthread_whose_sibling_is_not_allowed_is_a_core(tmp_path: Path, four_cpus: None) -> None:
    assert hardware.cores(tree(tmp_path, siblings("0,4", "1,5", "2,6", "3,7"))).usable == 4


@pytest.mark.parametrize(("text", "usable"), [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1)])
def test_quota_of_cgroup_v2(tmp_path: Path, four_cpus: None, text: str, usable: int) -> None:
    assert hardware.cores(tree(tmp_path, {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": text})).usable == usable


def test_quota_of_an_outer_group_holds_too(tmp_path: Path, four_cpus: None) -> None:
    files = {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}
    cores = hardware.cores(tree(tmp_path, files))
    assert (cores.usable, cores.reason) == (3, "the control group allows 3 CPUs")


def test_quota_inside_a_container_that_sees_its_own_group_as_root(tmp_path: Path, four_cpus: None) -> None:
    assert hardware.cores(tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"})).usable == 2


def test_quota_of_cgroup_v1(tmp_path: Path, four_cpus: None) -> None:
    files = {"proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/x", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000"}
    files["sys/fs/cgroup/cpu/x/cpu.cfs_period_us"] = "50000"
    assert hardware.cores(tree(tmp_path, files)).usable == 2
    (tmp_path / "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us").write_text("-1\n")
    assert hardware.cores(tmp_path).usable == 4


def test_memory_respects_the_group(tmp_path: Path) -> None:
    assert hardware.memory(tmp_path).total_bytes == psutil.virtual_memory().total
    limit, used = GIB // 4, GIB // 8
    files = {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/memory.max": str(limit), "sys/fs/cgroup/a/memory.current": str(used)}
    assert hardware.memory(tree(tmp_path, files)) == hardware.Memory(limit, limit - used)
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("max\n")
    assert hardware.memory(tmp_path).total_bytes == psutil.virtual_memory().total


def test_instruction_sets_of_x86_and_arm(tmp_path: Path) -> None:
    x86 = tree(tmp_path / "x86", {"proc/cpuinfo": "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma avx512_bf16 lm"})
    assert hardware.isa(x86) == ("avx2", "fma", "avx512_bf16")
    assert hardware.cpu_name(x86) == "Some CPU"
    assert hardware.native_bf16(x86)
    arm = tree(tmp_path / "arm", {"proc/cpuinfo": "Features\t: fp asimd asimddp"})
    assert hardware.isa(arm) == ("asimd", "asimddp")
    assert not hardware.native_bf16(arm)
    assert hardware.isa(tmp_path / "nowhere") == ()


def test_this_machine_has_a_core_and_memory() -> None:
    assert 1 <= hardware.cores().usable <= (os.cpu_count() or 1)
    assert 0 < hardware.memory().available_bytes <= hardware.memory().total_bytes
