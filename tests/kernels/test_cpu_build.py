"""Compiling at first use: once, whole, and said where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compresskit.kernels import dispatch
from compresskit.kernels.cpu import build, library
from compresskit.kernels.cpu.build import Unavailable
from compresskit.kernels.packed.bitmap import BitmapRows
from tests.kernels.packed_cases import draw, weight

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C compiler here")
COMPILE = "from compresskit.kernels.cpu.build import built; print(built('features.c'))"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a line whenever it compiles; the file of these lines."""
    log, script = tmp_path / "calls", tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) ;; *) echo >> ' + f'"{log}"; sleep 0.3 ;; esac\nexec cc "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return log


@needs_compiler
def test_two_processes_compile_once(home: Path, counted: Path) -> None:
    started = [subprocess.Popen([sys.executable, "-c", COMPILE], stdout=subprocess.PIPE) for _ in range(3)]
    places = {process.communicate()[0] for process in started}
    assert len(places) == 1
    assert counted.read_text() == "\n"
    assert len(list(home.glob("*.so"))) == len(list(home.iterdir())) - 1  # and a lock


@needs_compiler
@pytest.mark.parametrize("harm", ["truncated", "changed", "empty", "gone"])
def test_what_is_damaged_is_compiled_again(home: Path, harm: str) -> None:
    path = build.built("features.c")
    whole = path.read_bytes()
    if harm == "truncated":
        path.write_bytes(whole[:100])
    elif harm == "changed":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    assert build.built("features.c") == path
    assert build.load("features.c").supports(0) == 1
    assert build.built("features.c").stat().st_size == len(whole)


@needs_compiler
def test_other_flags_and_other_sources_are_other_libraries(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.built("features.c")
    assert build.built("features.c") == first
    assert build.built("features.c", ["-DX=1"]) != first
    sources = tmp_path / "sources"
    shutil.copytree(build.HERE, sources)
    monkeypatch.setattr(build, "HERE", sources)
    assert build.built("features.c") == first
    with (sources / "numbers.h").open("a") as header:
        header.write("/* changed */\n")
    assert build.built("features.c") != first


@needs_compiler
def test_what_does_not_compile_leaves_nothing(home: Path) -> None:
    with pytest.raises(Unavailable, match=r"cannot compile features.c: .*unknown_option"):
        build.built("features.c", ["-funknown_option"])
    assert not [path for path in home.iterdir() if path.suffix == ".so"]


@needs_compiler
def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(Unavailable, match="Set COMPRESSKIT_CACHE to a folder that can be written"):
        build.load("features.c")


@pytest.fixture
def no_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None is found, and nothing of an earlier one is remembered."""
    caches = (library.attempt, library.paths, dispatch.refusal)
    for one in caches:
        one.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    dispatch.forget()
    yield
    dispatch.forget()
    for one in caches:
        one.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reference_runs_and_says_so() -> None:
    layout, packed = BitmapRows(), weight((5, 13), torch.float32)
    tensors = layout.pack(packed, torch.device("cpu"))
    with pytest.warns(UserWarning, match="bitmap_linear does without its cpu implementation"):
        layout.linear(draw((2, 13), 4), tensors, None)
    layout.linear(draw((2, 13), 4), tensors, None)  # and warns once
    assert dispatch.used()["bitmap_linear"] == "reference"
    assert dispatch.passed_over() == (
        "bitmap_linear does without its cpu implementation, which would be faster: there is no C compiler, "
        "no-such-compiler; install one, or name it by the variable CC.",
    )


@needs_compiler
def test_a_compiler_that_is_named_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    found = build.find_compiler("cc -pipe", os.environ["PATH"])
    assert found[0] == ("cc", "-pipe")
    assert found[1]
