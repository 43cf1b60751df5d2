"""The token cache: keyed by contents, whole or absent, mended where damaged, safe for two at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from compresskit.assets.teacher_model import train_tokenizer
from compresskit.data.cache import STALE_S, Piece, build_entry, key_of
from compresskit.data.corpus import open_corpus
from compresskit.data.pack import packed
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError

PIECES = [Piece([1, 2, 3]), Piece([4]), Piece([5, 6])]
DIALOGUES = [Piece([1, 2, 3], [(1, 3)]), Piece([4], []), Piece([5, 6, 7, 8], [(0, 1), (3, 4)])]


def never() -> Iterator[Piece]:
    raise AssertionError("the entry was built again")
    yield Piece([])


def test_a_whole_entry_is_opened_and_not_built_again(tmp_path: Path) -> None:
    built = build_entry(tmp_path, "k", PIECES, dtype="<u2", notes=["a note"])
    again = build_entry(tmp_path, "k", never(), dtype="<u2")
    for entry in (built, again):
        assert entry.tokens.tolist() == [1, 2, 3, 4, 5, 6]
        assert entry.starts.tolist() == [0, 3, 4]
        assert entry.notes == ("a note",)
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


@pytest.mark.parametrize("name", ["tokens.bin", "starts.npy", "learnt.npy", "entry.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_entry_is_rebuilt_with_a_warning(tmp_path: Path, name: str, damage: str) -> None:
    folder = build_entry(tmp_path, "k", DIALOGUES, dtype="<u2").folder
    body = (folder / name).read_bytes()
    if damage == "remove":
        (folder / name).unlink()
    else:
        flipped = bytes([body[0] ^ 255]) + body[1:]
        (folder / name).write_bytes({"flip": flipped, "cut": body[:-1], "empty": b""}[damage])
        if (name, damage) == ("entry.json", "cut"):  # that was only the line end: cut deeper
            (folder / name).write_bytes(body[:-9])
    with pytest.warns(UserWarning, match="damaged"):
        entry = build_entry(tmp_path, "k", DIALOGUES, dtype="<u2")
    assert entry.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert entry.learnt is not None
    assert entry.learnt.tolist() == [[1, 3], [4, 5], [7, 8]]
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_an_entry_of_another_version_is_rebuilt(tmp_path: Path) -> None:
    folder = build_entry(tmp_path, "k", PIECES, dtype="<u2").folder
    facts = json.loads((folder / "entry.json").read_text())
    (folder / "entry.json").write_text(json.dumps(facts | {"version": 0}))
    with pytest.warns(UserWarning, match="version"):
        build_entry(tmp_path, "k", PIECES, dtype="<u2")


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Piece]:
        yield Piece([1])
        raise DataError("line 2 is bad")

    with pytest.raises(DataError):
        build_entry(tmp_path, "k", broken(), dtype="<u2")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_build_go_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.1.x.part", tmp_path / ".b.1.x.part"
    for path in (old, new):
        path.mkdir()
    stamp = os.stat(old).st_mtime - STALE_S - 60
    os.utime(old, (stamp, stamp))
    build_entry(tmp_path, "k", PIECES, dtype="<u2")
    assert not old.exists()
    assert new.exists()


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="folder that can be written"):
        build_entry(tmp_path / "file", "k", PIECES, dtype="<u2")


def test_two_processes_at_once_both_get_the_whole_entry(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from compresskit.data.cache import Piece, build_entry\n"
        "def pieces():\n"
        "    for i in range(40):\n"
        "        time.sleep(0.02); yield Piece([i] * 500)\n"
        "e = build_entry(Path(sys.argv[1]), 'k', pieces(), dtype='<u2')\n"
        "assert len(e.tokens) == 20000 and e.tokens[-1] == 39 and len(e.starts) == 40\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(p.communicate()[1], p.returncode) for p in both] == [("", 0), ("", 0)]
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_facts_are_kept_apart_in_the_key() -> None:
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of("a") == key_of("a")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["a b c d e f g\n" * 4], vocabulary=270)


def test_the_key_follows_contents_options_and_tokenizer_but_not_places(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("hello world\n")
    two.write_text("hello world\n")
    cache = tmp_path / "cache"

    def entries(spec: DataSpec, tok: PreTrainedTokenizerFast = tokenizer) -> int:
        packed(spec, tok, split="all", context_length=4, cache=cache)
        return len(list(cache.iterdir()))

    assert entries(DataSpec(source=str(one))) == 1
    assert entries(DataSpec(source=str(two))) == 1
    assert entries(DataSpec(source=str(one), cross_documents=True)) == 1
    assert entries(DataSpec(source=str(one), validation_fraction=0.5)) == 2
    assert entries(DataSpec(source=str(one)), train_tokenizer(["x y z"], vocabulary=262)) == 3
    two.write_text("hello there\n")
    assert entries(DataSpec(source=str(two))) == 4


def test_a_file_moved_to_validation_changes_the_fingerprint(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    before = open_corpus(DataSpec(source=str(tmp_path))).fingerprint()
    (tmp_path / "b.txt").rename(tmp_path / "b.valid.txt")
    assert open_corpus(DataSpec(source=str(tmp_path))).fingerprint() != before
