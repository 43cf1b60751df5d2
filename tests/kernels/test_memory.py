"""What memory is left, what of a model fits into it, and that freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from compresskit.kernels import memory
from compresskit.kernels.memory import Demand, free_bytes, give_back, group_free_bytes, shortage


def demand(
    free: int | None, device: str = "cpu", *, packed: int = 500, dense: int = 400, other: int = 100
) -> Demand:
    return Demand(device=device, free_bytes=free, packed_bytes=packed, dense_bytes=dense, other_bytes=other)


def test_dense_weights_are_kept_where_there_is_room_for_all() -> None:
    assert not shortage([demand(1101)])
    assert not shortage([demand(None)]), "nobody knows: as ever"
    assert not shortage([])


@pytest.mark.parametrize("over", [{"packed": 502}, {"dense": 402}, {"other": 102}])
def test_everything_that_comes_to_the_device_counts(over: dict[str, int]) -> None:
    assert shortage([demand(1101, **over)])


def test_a_shortage_names_its_device_and_the_way_back() -> None:
    said = shortage([demand(None), demand(10**9, "cuda:1", dense=10**9)])
    assert said.startswith("cuda:1 has 1.00 GB free, ")
    assert "takes 1.00 GB: only packed ones are kept" in said
    assert "resident='fastest'" in said
    assert "COMPRESSKIT_RESIDENT=fastest" in said


def group(place: Path, **files: object) -> None:
    """Write ``memory.max`` as ``max`` and so on."""
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / f"memory.{name}").write_text(f"{text}\n")


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    stat = "anon 900\nactive_file 30\ninactive_file 70\nfile 5000"
    group(tmp_path / "a" / "b", max="max", current=10, stat=stat)
    group(tmp_path / "a", max=1000, current=600, stat=stat)
    assert group_free_bytes("0::/a/b\n", tmp_path) == 500, "pages of files can be dropped"
    group(tmp_path / "a" / "b", max=800, current=500)
    assert group_free_bytes("0::/a/b\n", tmp_path) == 400
    group(tmp_path, max=100, current=900, stat="anon 900")
    assert group_free_bytes("0::/a/b\n", tmp_path) == 0
    assert group_free_bytes("0::/of/another/namespace\n", tmp_path) == 0, "the root is seen from within"


def test_groups_of_the_first_version(tmp_path: Path) -> None:
    place = tmp_path / "memory" / "a"
    group(place, limit_in_bytes=1000, usage_in_bytes=300, stat="inactive_file 9")
    text = "9:name=systemd:/x\n5:cpu,cpuacct:/x\n4:memory:/a\n0::/\n"
    assert group_free_bytes(text, tmp_path) == 700
    group(place, stat="inactive_file 9\ntotal_inactive_file 50\ntotal_active_file 1")
    assert group_free_bytes(text, tmp_path) == 751, "of groups within it too"


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert group_free_bytes("0::/\n", tmp_path) is None
    group(tmp_path, max="max", current=9, stat="anon 9")
    assert group_free_bytes("0::/\n3:cpu:/\n", tmp_path) is None


def test_what_a_cpu_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "self")
    there = free_bytes(torch.device("cpu"))
    assert there == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    (tmp_path / "self").write_text("0::/\n")
    group(tmp_path, max=1000, current=600, stat="anon 600")
    assert free_bytes(torch.device("cpu")) == 400
    assert free_bytes(torch.device("meta")) is None


HOLES = """
import ctypes
from compresskit.kernels.memory import give_back
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident_mb():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10
libc.free(libc.malloc(30 << 20))  # from now on blocks up to that size come from the heap
blocks = [libc.malloc(1 << 20) for _ in range(128)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 20)
before = resident_mb()
for block in blocks[:-1]:
    libc.free(block)
freed = resident_mb()
give_back()
print(before - freed, freed - resident_mb())
"""


@pytest.mark.skipif(memory._trimmer() is None, reason="the C library is not glibc")
def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    at_once_mb, given_back_mb = map(int, done.stdout.split())
    assert at_once_mb < 32, "malloc keeps it"
    assert given_back_mb > 96


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._trimmer.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory._trimmer() is None
    give_back()
    memory._trimmer.cache_clear()
