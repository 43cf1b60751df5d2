"""CUDA sources are compiled without a GPU, once, and kept as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compresskit.errors import EngineError, OutputError
from compresskit.kernels import cache
from compresskit.kernels.cuda import compile as compiler
from compresskit.kernels.cuda.variants import TARGETS, Variant, variants

WHY_NOT = compiler.missing()
needs_nvrtc = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "NVRTC is here")
SUM = ("parts_sum", {"BF16": 1})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def name_of(variant: Variant) -> str:
    return "-".join([variant[0], *(f"{name}{value}" for name, value in variant[1].items())])


@needs_nvrtc
@pytest.mark.parametrize("variant", list(variants()), ids=name_of)
def test_every_kernel_is_compiled_for_every_gpu_and_keeps_its_registers(variant: Variant) -> None:
    for target in TARGETS:
        code, log = compiler.translate(*variant, target)
        (usage,) = compiler.parsed_usage(log).values()
        assert code[:4] == b"\x7fELF"
        assert "warning" not in log, log
        assert 16 <= usage.registers <= 255
        assert (usage.stack_bytes, usage.spill_store_bytes, usage.spill_load_bytes) == (0, 0, 0), target


@needs_nvrtc
def test_a_kernel_is_compiled_once_and_again_when_its_file_is_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compiler.cubin(*SUM, "sm_90a")
    (file,) = folder.glob("parts_sum-sm_90a-*.cubin")
    whole = file.read_bytes()
    monkeypatch.setattr(compiler, "translate", lambda *a: pytest.fail("compiled again"))
    assert compiler.cubin(*SUM, "sm_90a") == code
    monkeypatch.undo()
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(folder.parent))
    for damaged in (whole[:-5], b"", whole[:100] + b"?" + whole[101:]):
        file.write_bytes(damaged)
        assert compiler.cubin(*SUM, "sm_90a") == code
        assert file.read_bytes() == whole
    assert [p for p in folder.iterdir() if p.suffix != ".lock"] == [file]


@needs_nvrtc
def test_defines_targets_and_compilers_have_files_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.cubin(*SUM, "sm_90a")
    compiler.cubin("parts_sum", {"BF16": 0}, "sm_90a")
    compiler.cubin(*SUM, "sm_80")
    monkeypatch.setattr(compiler, "version", lambda: "0.1")
    compiler.cubin(*SUM, "sm_80")
    assert len(list(folder.glob("*.cubin"))) == 4


@needs_nvrtc
def test_what_the_compiler_says_is_told() -> None:
    with pytest.raises(EngineError, match=r"fragment_linear\.cu for sm_90a(.|\n)*TOKEN_BLOCKS"):
        compiler.translate("fragment_linear", {"BF16": 1}, "sm_90a")
    with pytest.raises(EngineError, match=r"parts_sum\.cu for sm_0"):
        compiler.translate(*SUM, "sm_0")


def test_only_gpus_that_the_kernels_are_written_for() -> None:
    assert compiler.too_old((7, 5)) == "the GPU is sm_75, the CUDA kernels need sm_80 or newer"
    assert not compiler.too_old((8, 0))
    assert [compiler.architecture(c) for c in ((8, 0), (9, 0), (12, 0))] == ["sm_80", "sm_90a", "sm_120"]


def test_two_processes_make_one_file(folder: Path) -> None:
    code = (
        "import os, time, pathlib; from compresskit.kernels.cache import kept, directory\n"
        "def make():\n"
        "    directory().joinpath(f'made-{os.getpid()}').touch(); time.sleep(1); return b'code'\n"
        "print(kept('kernel.bin', make).stat().st_size)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    assert [run.communicate()[0].strip() for run in runs] == [b"36", b"36"]
    assert len(list(folder.glob("made-*"))) == 1
    assert cache.content(folder / "kernel.bin") == b"code"


def test_a_cache_that_cannot_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="Set COMPRESSKIT_CACHE"):
        cache.kept("kernel.bin", lambda: b"code")


def test_a_key_tells_parts_and_their_borders_apart() -> None:
    keys = {cache.key_of(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"))}
    assert len(keys) == 4
