"""Files of times: whole, and nothing beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.kernels import remembered


def test_what_cannot_be_kept_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path))
    key, times = {"device": "a"}, {"dense": {1: 2.0}, "bitmap": {1: 0.1}}
    assert remembered.write(key, times, ("said",)) == ()
    assert remembered.read(key) == (times, ("said",))
    (path,) = remembered.place().iterdir()
    path.unlink()
    path.mkdir()
    assert "could not be kept" in remembered.write(key, times, ())[0]
    assert list(remembered.place().iterdir()) == [path]
