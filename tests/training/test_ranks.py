"""What ranks know of each other: threads stand for processes, over one store."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch.distributed import TCPStore

from compresskit import pipeline
from compresskit.artifact import write_json
from compresskit.errors import CompressKitError, Fault, OutputError, PlanError, WorkerError
from compresskit.modeling import ModelSource
from compresskit.planned import Plan
from compresskit.planner import plan
from compresskit.recipe import Recipe
from compresskit.stage import Forecast, Outlook, StageContext, StageResult
from compresskit.training import agreement, ranks
from compresskit.training.agreement import require_same, require_shared
from compresskit.training.ranks import Ranks

RANKS = 3


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


@pytest.fixture
def port(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ranks, "BEAT_S", 0.05)
    monkeypatch.setattr(ranks, "LOST_S", 1.0)
    monkeypatch.setattr(ranks, "GRACE_S", 30.0)
    monkeypatch.setattr(agreement, "SEEN_S", 0.5)
    return int(server.port)


def company(port: int, rank: int) -> Ranks:
    def client() -> TCPStore:
        return TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=20))

    return Ranks((client(), client()), rank, RANKS)


def on_all(port: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What ``work`` returns on each rank, or the error that it raises there."""

    def one(rank: int) -> Any:
        us, failure = company(port, rank), None
        try:
            us.start()
            return work(us)
        except CompressKitError as error:
            failure = error
            return error
        finally:
            us.leave(failure)

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(one, range(RANKS)))


def test_rank_0_judges_what_all_say_and_all_hear_it(port: int) -> None:
    def work(us: Ranks) -> tuple[str, str]:
        return us.judged("sum", str(us.rank), lambda said: "+".join(said)), us.told("word", f"of {us.rank}")

    assert on_all(port, work) == [("0+1+2", "of 0")] * RANKS


def test_a_second_company_on_the_same_store_hears_nothing_of_the_first(port: int) -> None:
    for word in ("one", "two"):
        assert on_all(port, lambda us, word=word: us.told("word", word)) == [word] * RANKS


def test_a_rank_that_asks_of_another_matter_ends_all_at_once(port: int) -> None:
    for error in on_all(port, lambda us: us.told("run B" if us.rank == 2 else "run A", "")):
        assert isinstance(error, WorkerError)
        assert "training process 2 of 3: expected the same steps as process 0, got run B" in str(error)


def test_the_same_matter_may_come_up_again(port: int) -> None:
    assert on_all(port, lambda us: [us.told("run", word) for word in "ab"]) == [["a", "b"]] * RANKS


def test_ranks_that_differ_are_named_with_what_differs(port: int) -> None:
    def work(us: Ranks) -> None:
        versions = {"version of torch": "2.13" if us.rank < 2 else "2.12"}
        require_same(us, "plan", {"recipe stages[0].steps": "4" if us.rank == 0 else "5", **versions})

    for error in on_all(port, work):
        assert isinstance(error, PlanError)
        assert len(error.faults) == 2
        assert "recipe stages[0].steps: expected 4, as on rank 0" in str(error)
        assert "got 5 on ranks 1, 2" in str(error)
        assert "version of torch: expected 2.13, as on ranks 0, 1" in str(error)
        assert "got 2.12 on rank 2" in str(error)


def test_equal_ranks_pass_and_a_missing_fact_differs(port: int) -> None:
    assert on_all(port, lambda us: require_same(us, "plan", {"model": "x"})) == [None] * RANKS
    for error in on_all(port, lambda us: require_same(us, "plan", {} if us.rank == 1 else {"model": "x"})):
        assert "got none on rank 1" in str(error)


def test_a_directory_that_is_not_the_same_everywhere_is_refused(port: int, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()

    def work(us: Ranks) -> None:
        require_shared(us, tmp_path / "own" if us.rank == 2 else tmp_path, "out")

    for error in on_all(port, work):
        assert isinstance(error, OutputError)
        assert "on rank 2" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["own"], "the probe stays"
    assert on_all(port, lambda us: require_shared(us, tmp_path, "out")) == [None] * RANKS


def test_copies_of_a_model_may_differ_in_age_and_work_begun_elsewhere_goes_on(
    port: int, tmp_path: Path
) -> None:
    """Rank 0 may be on another machine after a restart, with a copy of the model of another time."""
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()

    def key(us: Ranks) -> str:
        plan: Any = SimpleNamespace(facts={"model": "same"}, resume_key=f"key of {us.rank}")
        return pipeline._shared_key(plan, out, work, us, overwrite=False)

    assert on_all(port, key) == ["key of 0"] * RANKS
    write_json(work / pipeline.KEY, "key of 2")
    assert on_all(port, key) == ["key of 2"] * RANKS
    write_json(work / pipeline.KEY, "key of another plan")
    assert on_all(port, key) == ["key of 0"] * RANKS


def wait_for_word(us: Ranks) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        us.check()
        time.sleep(0.01)


def test_a_rank_that_fails_is_told_to_the_others_with_its_error(port: int) -> None:
    def work(us: Ranks) -> None:
        if us.rank == 1:
            raise OutputError("no disk here")
        wait_for_word(us)

    first, second, third = on_all(port, work)
    assert isinstance(second, OutputError)
    for error in (first, third):
        assert isinstance(error, WorkerError)
        assert "training process 1 of 3" in str(error)
        assert "OutputError: no disk here" in str(error)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_ends_in_peace_is_missed_by_those_that_wait_for_it(port: int, gone: int) -> None:
    """Rank 0 waits for what the others say, and they wait for what it judges."""

    def work(us: Ranks) -> str:
        return "done" if us.rank == gone else us.told("word", "")

    found = on_all(port, work)
    assert found.pop(gone) == "done"
    assert [type(error) for error in found] == [WorkerError] * 2
    assert any(f"training process {gone} of 3" in str(e) and "got its end, before" in str(e) for e in found)


def test_a_rank_that_falls_silent_is_lost(port: int) -> None:
    """Its thread ends without a goodbye, as at a kill; the third, which only rank 0 looks at."""

    def work(us: Ranks) -> None:
        if us.rank == 2:
            us._is_ending.set()
            us.leave = lambda error: None  # type: ignore[method-assign]
            return
        wait_for_word(us)

    first, second, _ = on_all(port, work)
    for error in (first, second):
        assert isinstance(error, WorkerError)
        assert "training process 2 of 3" in str(error)
        assert "expected a sign of life, got silence for 1 s" in str(error)


def test_a_rank_that_waits_for_ever_is_ended_and_says_why(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It does not look, as one that waits in a collective."""
    codes: list[int] = []
    over = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        if len(codes) == RANKS - 1:
            over.set()

    monkeypatch.setattr(ranks, "GRACE_S", 0.2)
    monkeypatch.setattr(ranks.os, "_exit", end)

    def work(us: Ranks) -> None:
        if us.rank == 1:
            raise OutputError("no disk here")
        over.wait(20)

    on_all(port, work)
    assert codes == [3, 3]
    assert capfd.readouterr().err.count("error: training process 1 of 3") == 2


def test_the_transports_complaint_is_explained_by_who_is_lost(port: int) -> None:
    def work(us: Ranks) -> BaseException | None:
        if us.rank == 1:
            raise OutputError("no disk here")
        return us.explained(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))

    first, _, third = on_all(port, work)
    assert "training process 1 of 3" in str(first)
    assert "training process 1 of 3" in str(third)
    own = ZeroDivisionError("own")
    assert company(port, 0).explained(own) is own


def test_ranks_that_never_come_are_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "JOIN_S", 0.3)
    with pytest.raises(WorkerError, match=r"all within 0 s, got 1; missing: 1, 2"):
        company(port, 0).start()


@dataclass(frozen=True)
class Joined:
    """A stage that all ranks take part in, or none gets on; rank 0 writes."""

    kind: ClassVar[str] = "joined"
    trains: ClassVar[bool] = True
    reshapes: ClassVar[bool] = False
    met: ClassVar[threading.Barrier] = threading.Barrier(RANKS, timeout=5.0)

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        return []

    def forecast(self, model: Outlook) -> Forecast:
        return Forecast(after=model, layers=1, memory_bytes=0)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        if self.met.wait() == 0:
            self.ran.append(model.directory.name)
        if HERE.us.rank == 0:
            shutil.copytree(model.directory, context.out, dirs_exist_ok=True)
            (context.out / "stage.json").unlink(missing_ok=True)
            tensors = load_file(context.out / "model.safetensors")
            tensors["model.norm.weight"] *= 2
            save_file(tensors, context.out / "model.safetensors", {"format": "pt"})
        self.met.wait()
        return StageResult()

    ran: ClassVar[list[str]] = []


HERE = threading.local()
"""``us``: the ranks as this thread sees them."""


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(pipeline, "accompanied", lambda: nullcontext(HERE.us))
    monkeypatch.setattr(pipeline, "POLL_S", 0.01)
    Joined.met.reset()
    Joined.ran.clear()
    (tmp_path / "text.txt").write_text("Some text.")
    tiny_llama(tmp_path / "model")
    stages = (Joined(), Joined())
    return plan(Recipe(model=str(tmp_path / "model"), stages=stages, data=str(tmp_path / "text.txt")))


def run_on_all(port: int, planned: Plan, out: Path, *, overwrite: bool) -> list[Any]:
    def work(us: Ranks) -> Any:
        HERE.us = us
        return pipeline.run(planned, out, overwrite=overwrite)

    return on_all(port, work)


def test_all_ranks_replace_an_artifact_of_the_same_run(port: int, planned: Plan, tmp_path: Path) -> None:
    """Beside what another plan has left of its own first stage."""
    out, work = tmp_path / "out", tmp_path / ".out.work"
    first = run_on_all(port, planned, out, overwrite=False)
    assert Joined.ran == ["model", "1-joined"]
    (work / "1-joined").mkdir(parents=True)
    (work / "1-joined" / "stage.json").write_text("{}")
    write_json(work / pipeline.KEY, "key of another plan")
    again = run_on_all(port, planned, out, overwrite=True)
    assert Joined.ran == ["model", "1-joined"] * 2
    assert len({artifact.digest for artifact in (*first, *again)}) == 1
    assert not work.exists()
    run_on_all(port, planned, out, overwrite=False)
    assert len(Joined.ran) == 4, "it is done already"


def test_no_rank_ends_well_where_rank_0_has_failed(
    port: int, planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OutputError("no disk here")

    out = tmp_path / "out"
    run_on_all(port, planned, out, overwrite=False)
    real = pipeline.assemble
    monkeypatch.setattr(pipeline, "assemble", full)
    first, *others = run_on_all(port, planned, out, overwrite=True)
    assert isinstance(first, OutputError)
    for error in others:
        assert isinstance(error, WorkerError)
        assert "OutputError: no disk here" in str(error)
    monkeypatch.setattr(pipeline, "assemble", real)
    made = run_on_all(port, planned, out, overwrite=True)
    assert len({artifact.digest for artifact in made}) == 1
    assert len(Joined.ran) == 4, "both stages were finished"
