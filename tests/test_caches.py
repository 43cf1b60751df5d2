"""What the caches hold is listed, checked by those who made it, and removed whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from compresskit import caches
from compresskit.caches import DAY_S, KINDS, cached, chosen, fault_of, remove, sweep
from compresskit.calibration.costs import Store
from compresskit.cli import main
from compresskit.data.cache import Piece, build_entry, key_of
from compresskit.errors import InputError, OutputError
from compresskit.home import VARIABLE
from compresskit.kernels import cache as compiled
from compresskit.kernels import remembered


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One entry of each kind, made by those who make them where that is quick."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    build_entry(tmp_path, key_of("a"), [Piece(list(range(5000)))], dtype="<u2")
    compiled.kept("gap_linear-0123.cubin", lambda: b"code" * 100)
    remembered.write({"device": "a"}, {"dense": {1: 2.0}}, ())
    (tmp_path / "latency").mkdir()
    (tmp_path / "latency" / f"{'ab' * 16}.json").write_text("{}")
    Store(tmp_path / "costs", {"weights": "ab"}).add({"head": {"w4a16": 0.25}})
    (tmp_path / "built" / "0a1b").mkdir(parents=True)
    (tmp_path / "built" / "0a1b" / "config.json").write_text("{}")
    (tmp_path / "teacher" / ("c" * 64)).mkdir(parents=True)
    (tmp_path / "teacher" / "files").mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    return tmp_path


def test_one_entry_of_each_kind_is_found_and_whole(home: Path) -> None:
    found = cached()
    assert sorted(entry.kind for entry in found) == sorted(KINDS)
    assert [fault_of(entry) for entry in found] == [""] * len(found)
    assert found[0].kind == "tokens", "the largest comes first"
    whole = sum(f.stat().st_size for f in found[0].path.iterdir())
    assert found[0].nbytes == whole > 10_000
    assert cached(["latency"])[0].path.parent == home / "latency"


@pytest.mark.parametrize(
    ("kind", "file", "told"),
    [
        ("tokens", "tokens.bin", "tokens.bin differs from its checksum"),
        ("costs", "", "Expecting value"),
        ("kernels", "", "other bytes"),
        ("choices", "", "Expecting value"),
        ("built", "config.json", "no config.json"),
    ],
)
def test_damage_is_told_by_who_made_the_entry(kind: str, file: str, told: str, home: Path) -> None:
    (entry,) = cached([kind])
    path = entry.path / file if file else entry.path
    if kind == "built":
        path.unlink()
    else:
        path.write_bytes(b"x" + path.read_bytes()[1:])
    assert told in fault_of(entry)
    result = CliRunner().invoke(main, ["cache", "ls", "--verify", "--json"])
    assert result.exit_code == 2
    told_of = {row["name"]: row["fault"] for row in json.loads(result.output.splitlines()[-1])["entries"]}
    assert [name for name, fault in told_of.items() if fault] == [entry.name]


def test_what_is_removed_is_gone_and_the_rest_stays(home: Path) -> None:
    before = {entry.name: entry for entry in cached()}
    gone = chosen(["tokens", "kernels/gap"])
    assert {entry.kind for entry in gone} == {"tokens", "kernels"}
    assert remove(gone) == sum(entry.nbytes for entry in gone)
    assert {entry.name for entry in cached()} == before.keys() - {entry.name for entry in gone}
    assert remove(gone) == 0, "another process was first"
    assert (home / "notes.txt").exists()
    assert (home / "teacher" / "files").is_dir()
    assert {path.name for path in home.rglob(".*")} == {".gap_linear-0123.cubin.lock", ".lock"}


def test_only_what_is_old_goes(home: Path) -> None:
    (entry,) = cached(["choices"])
    assert chosen(["choices"], older_than_days=2, now_s=entry.made_s + 1.9 * DAY_S) == []
    assert chosen(["choices"], older_than_days=2, now_s=entry.made_s + 2.1 * DAY_S) == [entry]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["token"], "nearest: tokens"),
        (["kernels/gone"], "expected one entry of the caches, got none"),
        (["kernels/"], "got 2 entries whose names begin so"),
    ],
)
def test_a_name_of_no_entry_or_of_several_is_refused(names: list[str], told: str, home: Path) -> None:
    compiled.kept("gap_linear-0456.cubin", lambda: b"code")
    with pytest.raises(InputError, match=told):
        chosen(names)
    assert len(cached()) == len(KINDS) + 1


def test_what_killed_processes_left_goes_after_a_day(home: Path) -> None:
    for name, age_s in ((".old.part", 2 * DAY_S), (".new.part", 0.0), (".x.removed", 2 * DAY_S)):
        path = home / name
        path.mkdir()
        (path / "tokens.bin").write_bytes(b"12345")
        when = path.stat().st_mtime - age_s
        for part in (path / "tokens.bin", path):
            os.utime(part, (when, when))
    assert sweep() == 10
    assert {path.name for path in home.glob(".*")} == {".new.part"}


def test_an_entry_that_cannot_be_removed_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match=r"not yours.*by hand"):
        remove(cached(["tokens"]))


def test_the_command_lists_and_removes(home: Path) -> None:
    run = CliRunner()
    assert "tokens: 1 x a data source as token ids" in run.invoke(main, ["cache", "ls"]).output
    assert "would free" in run.invoke(main, ["cache", "rm", "--all", "--dry-run"]).output
    assert len(cached()) == len(KINDS)
    refused = run.invoke(main, ["cache", "rm"])
    assert refused.exit_code == 2
    assert "--all" in refused.output
    assert run.invoke(main, ["cache", "rm", "kernels"]).output.splitlines()[-1] == "freed 432 B"
    assert run.invoke(main, ["cache", "rm", "--all"]).exit_code == 0
    assert cached() == []
    wrong = run.invoke(main, ["cache", "ls", "tokns"])
    assert wrong.exit_code == 2
    assert "tokens" in wrong.output


def test_no_caches_at_all_are_no_fault(tmp_path: Path) -> None:
    assert caches.cached(home=tmp_path / "none") == []
    assert caches.sweep(home=tmp_path / "none") == 0


def test_one_module_says_where_caches_are() -> None:
    sources = Path(caches.__file__).parent.rglob("*.py")
    assert [p.name for p in sources if '"~/.cache/compresskit"' in p.read_text("utf-8")] == ["home.py"]
