"""Headers of safetensors files that cannot be: refused before a tensor is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compresskit.errors import ModelError
from compresskit.formats.shards import read_header

Header = dict[str, Any]


def change(path: Path, harm: Callable[[Header], object]) -> None:
    """Write another header before the same tensors."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    harm(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """``a`` at bytes 0 to 16, ``b`` at 16 to 32, ``c`` at 32 to 40, and ``none``, which has no byte."""
    tensors = {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(2), "none": torch.ones(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda h: h["b"].update(data_offsets=[0, 16]), "expected b at byte 16 of its tensors, got byte 0"),
        (lambda h: h["b"].update(data_offsets=[8, 24]), "expected b at byte 16 of its tensors, got byte 8"),
        (lambda h: h.pop("b"), "expected c at byte 16 of its tensors, got byte 32"),
        (lambda h: h["none"].update(data_offsets=[-4, -4]), "none has no whole numbers"),
        (lambda h: h["a"].update(shape=[-2, -2]), "a has no whole numbers"),
        (lambda h: h["a"].update(shape=[4.0]), "a has no whole numbers"),
        (lambda h: h["a"].update(shape="4"), "a has no whole numbers"),
    ],
)
def test_places_that_cannot_be_are_refused(harm: Callable[[Header], object], told: str, path: Path) -> None:
    assert sorted(read_header(path)) == ["a", "b", "c", "none"]
    change(path, harm)
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):  # nor does their own reader
        pass
    with pytest.raises(ModelError, match=told):
        read_header(path)


def test_a_header_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    deep = b"[" * 200_000
    (tmp_path / "x").write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(ModelError, match="expected a safetensors header, got one that cannot be read"):
        read_header(tmp_path / "x")


def test_a_tensor_is_read_to_the_cpu_whatever_the_default_device_is(path: Path) -> None:
    stored = read_header(path)
    with torch.device("meta"):
        assert stored["a"].read().tolist() == [1.0] * 4
