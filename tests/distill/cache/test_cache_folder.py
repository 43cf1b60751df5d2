"""The folder of a cache: refused where it is another's or damaged, continued where it was broken off."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from taught import VOCABULARY, Some, cached
from tiny import tiny_llama

from compresskit.distill.cache import build, parts
from compresskit.distill.cache.provider import Cached
from compresskit.distill.cache.store import agree
from compresskit.distill.teacher import Replica
from compresskit.errors import DataError, OutputError, PlanError

PATIENCE_S = 300.0
KEEPS: tuple[dict[str, Any], ...] = (
    {"k": 6},
    {"keep": "sampled", "k": 6},
    {"keep": "hidden"},
)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PART_BYTES", 900)
    monkeypatch.setattr(build, "PASS_TOKENS", 24)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each pass of the teacher."""
    seen: list[int] = []
    real = Replica.signal

    def counted(self: Replica, inputs: Any) -> Any:
        seen.append(len(inputs["labels"]))
        return real(self, inputs)

    monkeypatch.setattr(Replica, "signal", counted)
    return seen


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def part_of(folder: Path, number: int = 1) -> Path:
    (found,) = folder.glob(f"part-{number:05d}-*")
    return found


@pytest.mark.parametrize("kept", KEEPS)
def test_it_is_made_once_and_read_again(
    teacher: Path, rows: Some, tmp_path: Path, asked: list[int], kept: dict[str, Any]
) -> None:
    first = cached(teacher, **kept).prepare([rows], tmp_path, "cpu")
    assert sum(asked) > 20
    asked.clear()
    assert cached(teacher, **kept).prepare([rows], tmp_path, "cpu") == first
    assert asked == []
    (folder,) = (path for path in (tmp_path / "teacher").iterdir() if path.name != "files")
    assert len(list(folder.glob("part-*"))) > 2
    figures = first.figures
    assert figures["rows"] == 22, "one row has no supervised token, and one is there twice"
    assert figures["bytes"] == sum(path.stat().st_size for path in folder.glob("part-*"))
    assert "bytes a token" in first.notes[0]
    assert not [path for path in folder.rglob("*.partial")]


def test_broken_off_it_continues_at_the_next_part_and_ends_with_the_same_bytes(
    teacher: Path, rows: Some, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kept in KEEPS:
        whole, broken = tmp_path / f"whole{len(kept)}{kept}", tmp_path / f"broken{len(kept)}{kept}"
        asked.clear()
        cached(teacher, dir=str(whole), **kept).prepare([rows], tmp_path, "cpu")
        undisturbed, number = sum(asked), len(list(whole.glob("part-*")))
        written: list[Path] = []
        real = build.write_part

        def until(*args: Any, real: Any = real, written: list[Path] = written) -> Path:
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(real(*args))
            return written[-1]

        with monkeypatch.context() as patched:
            patched.setattr(build, "write_part", until)
            with pytest.raises(KeyboardInterrupt):
                cached(teacher, dir=str(broken), **kept).prepare([rows], tmp_path, "cpu")
        assert number > 3
        assert not (broken / "report.json").exists()
        stamps = {path: path.stat().st_mtime_ns for path in written}
        asked.clear()
        cached(teacher, dir=str(broken), **kept).prepare([rows], tmp_path, "cpu")
        assert sum(asked) < undisturbed, "finished parts were made again"
        assert {path: path.stat().st_mtime_ns for path in written} == stamps
        assert contents(broken) == contents(whole)


BUILDER = """
import sys, time
from pathlib import Path
from taught import Some, cached
from compresskit.distill.cache import build
place, stops = Path(sys.argv[1]), sys.argv[2] == "stops"
build.PART_BYTES, build.PASS_TOKENS, real = 900, 24, build.write_part
def some(folder, number, tensors):
    if stops and number == 2:
        time.sleep(3600)
    return real(folder, number, tensors)
build.write_part = some
cached(place / "teacher", k=6, dir=str(place / "killed")).prepare([Some()], place, "cpu")
"""


@pytest.mark.slow
def test_killed_its_builder_is_followed_by_the_process_that_waited(rows: Some, tmp_path: Path) -> None:
    """SIGKILL of the one that holds the lock; the other goes on where it was, with the same bytes."""
    folder, teacher = tmp_path / "killed", tiny_llama(tmp_path / "teacher", initializer_range=0.2)
    here, started = Path(__file__).parent, list[subprocess.Popen[bytes]]()

    def start(how: str) -> Path:
        paths = os.pathsep.join([str(here), str(here.parents[1]), str(here.parents[2])])
        command = [sys.executable, "-c", BUILDER, str(tmp_path), how]
        with (tmp_path / f"{how}.log").open("wb") as log:
            process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stderr=log)
        started.append(process)
        return tmp_path / f"{how}.log"

    def wait_until(true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert not any(process.poll() for process in started)
            assert time.monotonic() < deadline
            time.sleep(0.02)

    try:
        start("stops")
        wait_until(lambda: len(list(folder.glob("part-*"))) == 2)
        log = start("waits")
        wait_until(lambda: "waiting for it" in log.read_text())
        started[0].kill()
        assert started[1].wait(PATIENCE_S) == 0, log.read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert len(list(folder.glob("part-*"))) > 3
    cached(teacher, k=6, dir=str(tmp_path / "whole")).prepare([rows], tmp_path, "cpu")
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 7}, r"expected k 7, got k 6\. Name another folder, or leave dir out"),
        ({"temperature": 2.0}, r"expected temperature 2\.0, got temperature 1\.0\."),
        ({"keep": "hidden"}, r"expected keep hidden, got keep top_k\."),
        ({"vocabulary": 257}, r"expected vocabulary 257, got vocabulary 258\."),
        ({"rows": Some(seed=1)}, r"expected data \w{32}, got data \w{32}\."),
        ({"rows": Some(width=11)}, r"context_length 11, got data \w{32}, context_length 12\."),
        ({"teacher": "other"}, r"expected teacher \w{32}, got teacher \w{32}\."),
    ],
)
def test_a_cache_of_something_else_is_refused(
    teacher: Path, rows: Some, tmp_path: Path, asked: list[int], changes: dict[str, Any], named: str
) -> None:
    """By name it is refused; where none was named there is room for both."""
    folder = tmp_path / "cache"
    cached(teacher, k=6, dir=str(folder)).prepare([rows], tmp_path, "cpu")
    before, given = contents(folder), {"k": 6, **changes}
    other_rows = given.pop("rows", rows)
    if given.pop("teacher", None):
        teacher = tiny_llama(tmp_path / "other", seed=1, initializer_range=0.2)
    folders: list[str | None] = [str(folder), None]
    named_one, unnamed = (
        Cached(**{"directory": str(teacher), "vocabulary": VOCABULARY, "dir": place, **given})
        for place in folders
    )
    asked.clear()
    with pytest.raises(DataError, match=f"teacher cache .*{named}"):
        named_one.prepare([other_rows], tmp_path, "cpu")
    assert asked == []
    assert contents(folder) == before
    unnamed.prepare([other_rows], tmp_path, "cpu")
    assert contents(folder) == before


def test_the_same_teacher_elsewhere_is_the_same_teacher(
    teacher: Path, rows: Some, tmp_path: Path, asked: list[int]
) -> None:
    cached(teacher).prepare([rows], tmp_path, "cpu")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in teacher.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    asked.clear()
    cached(copy).prepare([rows], tmp_path, "cpu")
    assert asked == []


@pytest.mark.parametrize("harm", ["damaged", "cut"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_harmed_part_is_told_and_made_again_once_deleted(
    teacher: Path, rows: Some, tmp_path: Path, asked: list[int], harm: str, finished: bool
) -> None:
    folder = tmp_path / "cache"
    made = cached(teacher, k=6, dir=str(folder))
    made.prepare([rows], tmp_path, "cpu")
    whole = contents(folder)
    path = part_of(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data) if harm == "damaged" else data[:-40])
    if not finished:
        (folder / "report.json").unlink()
    with pytest.raises(DataError, match=rf"{path.name}: expected contents .*Delete this file") as error:
        cached(teacher, k=6, dir=str(folder)).prepare([rows], tmp_path, "cpu")
    assert error.value.exit_code == 2
    path.unlink()
    asked.clear()
    cached(teacher, k=6, dir=str(folder)).prepare([rows], tmp_path, "cpu")
    assert contents(folder) == whole
    assert 0 < sum(asked) < 24 + 22


def test_a_harmed_index_report_or_facts_is_told(teacher: Path, rows: Some, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    made = cached(teacher, k=6, dir=str(folder))
    made.prepare([rows], tmp_path, "cpu")
    whole = contents(folder)
    for name in ("index.npy", "report.json"):
        (folder / name).write_bytes(whole[name][:-9])
        with pytest.raises(DataError, match=rf"{name}: expected contents"):
            made.prepare([rows], tmp_path, "cpu")
        (folder / name).unlink()
        made.prepare([rows], tmp_path, "cpu")
        assert contents(folder) == whole
    (folder / "facts.json").write_bytes(whole["facts.json"][:-9])
    with pytest.raises(DataError, match=r"facts\.json: expected contents .*: delete the folder, and it"):
        made.prepare([rows], tmp_path, "cpu")


def test_killed_as_it_began_or_as_it_wrote_leaves_nothing_in_the_way(
    teacher: Path, rows: Some, tmp_path: Path
) -> None:
    """Half of its facts, and half of a part that this machine would not have made."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in (".lock", ".facts.json.partial"):
        (folder / name).write_bytes(b"{")
    made = cached(teacher, k=6, dir=str(folder))
    made.prepare([rows], tmp_path, "cpu")
    (folder / ".part-00001-0.safetensors.partial").write_bytes(b"{")
    (folder / "report.json").unlink()
    made.prepare([rows], tmp_path, "cpu")
    assert not list(folder.glob(".*.partial"))


def test_ranks_that_begin_together_have_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ranks = os.fsync, 6
    together = Barrier(ranks)

    def slow(handle: int) -> None:
        time.sleep(0.05)
        real(handle)

    def rank(number: int) -> None:
        together.wait()
        agree(tmp_path / "cache", {"version": 1})

    monkeypatch.setattr(parts.os, "fsync", slow)
    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(rank, range(ranks)))
    assert contents(tmp_path / "cache").keys() == {"facts.json"}


def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    teacher: Path, rows: Some, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tmp_path / "cache", [0]
    real = os.fsync

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patched:
        patched.setattr(parts.os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left on device\. Make room, or name another folder"):
            cached(teacher, k=6, dir=str(folder)).prepare([rows], tmp_path, "cpu")
    assert list(folder.glob("part-*"))
    assert not list(folder.glob(".*.partial"))
    cached(teacher, k=6, dir=str(folder)).prepare([rows], tmp_path, "cpu")
    cached(teacher, k=6, dir=str(tmp_path / "whole")).prepare([rows], tmp_path, "cpu")
    assert contents(folder) == contents(tmp_path / "whole")


def test_too_small_a_disk_is_told_before_the_teacher_is_asked(
    teacher: Path, rows: Some, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[int]
) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(build.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(OutputError, match=r"room for 5,200 bytes, got 100 bytes free"):
        cached(teacher, k=6).prepare([rows], tmp_path, "cpu")
    assert asked == []


def test_a_folder_of_something_else_is_left_alone(teacher: Path, rows: Some, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("whole")
    with pytest.raises(DataError, match="an empty folder, got other files"):
        cached(teacher, dir=str(tmp_path / "thesis")).prepare([rows], tmp_path, "cpu")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_rows_without_supervision_and_leaking_teachers_are_refused(
    teacher: Path, rows: Some, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Some()
    nothing.labels[:] = -100
    with pytest.raises(DataError, match="a row with a supervised token"):
        cached(teacher).prepare([nothing], tmp_path, "cpu")
    monkeypatch.setattr(Replica, "hidden", lambda self, ids, at: torch.cumsum(ids[..., None].float(), 1))
    with pytest.raises(PlanError, match="keeps documents apart"):
        cached(teacher).prepare([rows], tmp_path, "cpu")


def test_faithfulness_is_the_mean_over_tokens(teacher: Path, tmp_path: Path) -> None:
    """Against full distributions token by token, in float64."""
    rows = Some(rows=6)
    told = cached(teacher, k=6).prepare([rows], tmp_path, "cpu").figures
    live = Replica(directory=str(teacher), vocabulary=VOCABULARY)
    masses, divergences = [], []
    for index in (0, 2, 4, 5):
        batch = {name: tensor[None] for name, tensor in rows[index].items()}
        says = live.signal(batch).says
        logits = says.states_BTE @ says.head.weight_VD.T
        for at in range(11):
            if batch["labels"][0, at + 1] != -100:
                p = logits[0, at].double().softmax(-1)
                best, ids = p.topk(6)
                q = torch.full_like(p, float(1 - best.sum()) / (VOCABULARY - 6)).scatter(-1, ids, best)
                masses.append(float(best.sum()))
                divergences.append(float((p * (p / q).log()).sum()))
    assert told["compared_tokens"] == len(masses) == told["tokens"]
    assert told["kept_mass"] == pytest.approx(sum(masses) / len(masses), rel=1e-5)
    assert told["kl"] == pytest.approx(sum(divergences) / len(divergences), rel=2e-3)
    assert told["entries"] == 6
