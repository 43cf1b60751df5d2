"""Runs the CUDA sources on the CPU, lane by lane: launchers and kernels as they are."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import mkdtemp

import pytest
import torch
from torch import Tensor

from compresskit.kernels.cuda import launch
from compresskit.kernels.cuda.compile import HERE
from compresskit.kernels.cuda.launch import Argument, Machine

COMPILER = which("g++")
HOPPER = Machine(capability=(9, 0), multiprocessors=1, shared_bytes=233472, block_shared_bytes=232448)
"""With one multiprocessor, so that its blocks have several strips to do."""
ADA = Machine(capability=(8, 9), multiprocessors=1, shared_bytes=102400, block_shared_bytes=101376)
SMALL = Machine(capability=(8, 6), multiprocessors=1, shared_bytes=65536, block_shared_bytes=51200)
"""No GPU is so small: inputs come in several chunks, and strips one after another."""


@pytest.fixture(params=[HOPPER, SMALL], ids=["hopper", "small"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A GPU played by the CPU; memory that is not written holds NaN."""
    if COMPILER is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(launch, "machine", lambda index: request.param)
    monkeypatch.setattr(launch, "start", starter(request.param))
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def starter(machine: Machine) -> Callable[..., None]:
    """What stands for ``launch.start`` on ``machine``."""

    def start(
        stem: str,
        defines: Mapping[str, int],
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        assert 0 <= shared_bytes <= machine.block_shared_bytes
        assert all(size > 0 for size in grid)
        if "tile.cuh" in (HERE / f"{stem}.cu").read_text():
            defines = {**defines, "__CUDA_ARCH__": 100 * machine.capability[0]}
        play(stem, defines, grid, threads, shared_bytes, arguments)

    return start


def play(
    stem: str,
    defines: Mapping[str, int],
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Argument],
) -> None:
    """Run a kernel to its end."""
    holders = [_holder(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(holders))(*(ctypes.addressof(holder) for holder in holders))
    run = _library(stem, tuple(sorted(defines.items()))).play
    run.restype = ctypes.c_char_p
    fault = run((ctypes.c_uint32 * 2)(*grid), threads, shared_bytes, pointers)
    assert fault is None, fault.decode()


def _holder(argument: Argument) -> ctypes.c_void_p | ctypes.c_uint32:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_void_p(None) if argument is None else ctypes.c_uint32(argument)


@cache
def _library(stem: str, defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    folder = Path(mkdtemp())
    (folder / "play.cpp").write_text(
        f'#include "lanes.h"\n#include "{stem}.cu"\n'
        'extern "C" const char* play(const unsigned* grid, unsigned threads, unsigned bytes, void** told) {\n'
        f"  return lanes::launch({stem}, grid, threads, bytes, told);\n}}\n"
    )
    told = [f"-D{name}={value}" for name, value in defines]
    flags = [
        "-std=c++17",
        "-O0",
        "-w",
        "-shared",
        "-fPIC",
        "-ffp-contract=off",
        f"-I{HERE}",
        f"-I{Path(__file__).parent}",
    ]
    subprocess.run(
        [str(COMPILER), *flags, *told, str(folder / "play.cpp"), "-o", str(folder / "play.so")], check=True
    )
    return ctypes.CDLL(str(folder / "play.so"))
