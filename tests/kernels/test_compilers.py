"""Compilers as users have them: old ones, broken ones, and what stands in the variable CC."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from compresskit.kernels import dispatch
from compresskit.kernels.bitmap import unpack
from compresskit.kernels.cpu import build, library
from compresskit.kernels.cpu.build import Unavailable
from compresskit.kernels.packed.bitmap import BitmapRows
from tests.kernels.packed_cases import draw, weight

pytestmark = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C compiler here")
Script = Callable[[str], Path]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """``compiler(lines)``: CC is a script of these lines, then cc. Nothing compiled before is remembered."""
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path))
    caches = (library.attempt, library.paths, dispatch.refusal)

    def forget() -> None:
        dispatch.forget()
        for one in caches:
            one.cache_clear()

    def write(lines: str) -> Path:
        script = tmp_path / "compiler"
        script.write_bytes(f'#!/bin/sh\n{lines}\nexec cc "$@"\n'.encode("latin-1"))
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        return tmp_path

    forget()
    yield write
    forget()


def test_a_variable_that_is_no_command_is_said(compiler: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler("")
    monkeypatch.setenv("CC", "cc 'x")
    assert library.refusal("bitmap_linear") == "the variable CC is no command (No closing quotation): cc 'x"


def test_a_compiler_may_speak_in_any_encoding(compiler: Script) -> None:
    compiler('case "$*" in *--version*) echo "version \xe9";; *) echo "erreur \xe9" >&2; exit 1;; esac')
    assert library.refusal("bitmap_linear").endswith("cannot compile features.c: erreur \ufffd")


def test_flags_that_hide_the_functions_are_said(compiler: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler("")
    monkeypatch.setenv("CC", "cc -fvisibility=hidden")
    said = "what was compiled has no function supports; see the flags in CC"
    assert library.refusal("bitmap_linear") == said


def test_a_compiler_that_asks_gets_no_answer_and_waits_for_none(compiler: Script) -> None:
    compiler("read answer")
    code = "from compresskit.kernels.cpu.build import load; load('features.c')"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        try:
            assert process.wait(60) == 0
        finally:
            process.stdin.close()  # type: ignore[union-attr]


def test_without_a_temporary_folder_the_cache_is_not_to_blame(
    compiler: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(Unavailable, match=r"^features.c cannot be compiled \(.*missing"):
        build.load("features.c")


def test_machines_of_two_kinds_may_share_a_cache(compiler: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler("")
    first = build.built("features.c")
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert build.built("features.c") != first


def test_a_compiler_that_does_not_know_the_newest_instructions_compiles_the_others(compiler: Script) -> None:
    names = "-U__clang_major__ -D__clang_major__=8 -U__GNUC__ -D__GNUC__=9"
    refuse = 'echo "error: avx512bf16: no such processor feature" >&2; exit 1'
    compiler(f"if cc {names} -E features.c | grep -q '\"avx512bf16\"'; then {refuse}; fi")
    assert set(library.PATHS) >= set(library.paths()) >= {"portable"}


def test_values_that_cannot_be_compiled_for_are_multiplied_by_the_reference(compiler: Script) -> None:
    """As where the disk is full by then; whether the op can be had at all was asked with other values."""
    place = compiler(
        'case "$*" in *VALUE_TYPE=0*) echo >> "$(dirname "$0")/tries"; echo "no space" >&2; exit 1;; esac'
    )
    layout, sparse, x = BitmapRows(), weight((5, 13), torch.float32), draw((2, 13), 4)
    packed = layout.pack(sparse, torch.device("cpu"))
    with pytest.warns(UserWarning, match="bitmap_linear does without its cpu implementation.* no space"):
        made = layout.linear(x, packed, None)
    assert torch.allclose(layout.linear(x, packed, None), made)  # and warns once
    assert torch.allclose(made, x @ unpack(sparse).T, atol=1e-5)
    assert dispatch.used()["bitmap_linear"] == "reference"
    assert (place / "tries").read_text() == "\n", "nor is it tried at every product"
