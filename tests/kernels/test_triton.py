"""The twins in Triton, interpreted on the CPU and compiled without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from compresskit.kernels import dispatch, triton

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(task: str, **variables: str) -> None:
    """In a process of its own: triton decides when it is imported whether it interprets."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, str(Path(__file__).with_name("triton_twins.py")), task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
def test_interpreted_twins_give_the_exact_product_up_to_rounding() -> None:
    run("interpret", TRITON_INTERPRET="1")


@needs_triton
def test_twins_are_compiled_for_a_gpu(tmp_path: Path) -> None:
    run("compile", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


def test_twins_that_cannot_be_had_are_passed_over_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.refusal.cache_clear()
    dispatch.forget()
    monkeypatch.setattr(triton, "refusal", lambda op: "triton is not installed")
    with pytest.warns(UserWarning, match="bitmap_linear does without its triton implementation"):
        assert dispatch.choose("bitmap_linear", "cuda") == "reference"
    dispatch.refusal.cache_clear()
    dispatch.forget()


def test_triton_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert triton.refusal("bitmap_linear") == "triton is not installed"
    monkeypatch.setattr(triton, "find_spec", lambda name: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton.refusal("bitmap_linear") == "there is no GPU, and TRITON_INTERPRET=1 is not set"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.refusal("bitmap_linear") == ""
