"""The standard library as a corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.data.stdlib import held_out, stdlib_files, stdlib_root, stdlib_split
from compresskit.errors import DataError


def test_the_corpus_of_this_python() -> None:
    names = [path.relative_to(stdlib_root()).as_posix() for path in stdlib_files()]
    size = sum(path.stat().st_size for path in stdlib_files())
    assert 300 < len(names) < 1200
    assert 5e6 < size < 3e7
    assert names == sorted(names)
    assert "ast.py" in names
    assert "json/decoder.py" in names
    unwanted = ("/test/", "site-packages", "idlelib", "lib2to3", "turtledemo", "_sysconfigdata", "/tests/")
    assert not [name for name in names if any(word in f"/{name}" for word in unwanted)]
    train, validation = ([name for name, _ in stdlib_split(s, 0.05)] for s in ("train", "validation"))
    assert sorted(train + validation) == names
    assert 0.02 < len(validation) / len(names) < 0.09


def test_the_split_is_the_same_everywhere() -> None:
    chosen = [
        n
        for n in ("ast.py", "chunk.py", "json/decoder.py", "opcode.py", "re.py")
        if held_out(n.encode(), 0.05)
    ]
    assert chosen == ["chunk.py", "opcode.py"]
    assert not held_out(b"anything", 0.0)
    assert held_out(b"anything", 1.0)


def test_what_is_left_out(tmp_path: Path) -> None:
    kept = ["a.py", "pkg/__init__.py", "pkg/mod.py"]
    dropped = ["test/x.py", "pkg/tests/y.py", "site-packages/z.py", "config-3.11-linux/w.py", "empty.py"]
    for name in (*kept, *dropped, "_sysconfigdata__linux.py", "data.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.py" else "x = 1\n")
    assert [p.relative_to(tmp_path).as_posix() for p in stdlib_files(tmp_path)] == kept


def test_a_python_without_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected the \.py files"):
        stdlib_files(tmp_path)
