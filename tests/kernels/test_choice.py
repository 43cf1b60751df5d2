"""Which layout multiplies: what follows from times, that they are kept, and that they are measured at all."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compresskit.errors import EngineError
from compresskit.kernels import choice, remembered
from compresskit.kernels.bitmap import Bitmap, pack
from compresskit.kernels.choice import CLASSES, ENDS, Choice, Wish, choose, decide, kind_of, table, wish_here
from compresskit.kernels.contest import EXPANDED, Run, contest, expand, in_turn
from compresskit.kernels.packed import LAYOUTS
from compresskit.kernels.packed.base import Case
from compresskit.kernels.packed.bitmap import BitmapRows

POINTS = tuple(tokens for ends in ENDS for tokens in ends)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No times of another test or user, and none of the user's wishes."""
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
    for name in ("LAYOUT", "RESIDENT", "CHOICE_SECONDS"):
        monkeypatch.delenv(f"COMPRESSKIT_{name}", raising=False)
    monkeypatch.setattr(choice, "_known", {})


def weight(
    share: float = 0.6, rows: int = 24, inputs: int = 70, dtype: torch.dtype = torch.float32
) -> Bitmap:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(rows, inputs, generator=generator) >= share
    return pack((torch.randn(rows, inputs, generator=generator) * keep).to(dtype))


def flat(ms: float, upto: int = POINTS[-1]) -> dict[int, float]:
    return {tokens: ms for tokens in POINTS if tokens <= upto}


class Clock:
    """Times that the test says, by name and tokens; counts how often it was asked."""

    def __init__(self, says: Callable[[str, int], float]) -> None:
        self.says = says
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, runs: Mapping[str, Run], device: torch.device) -> dict[str, float]:
        self.asked.append(tuple(runs))
        return {name: self.says(name, run().shape[0]) for name, run in runs.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("times", "steps"),
    [
        ({"dense": flat(1.0), "a": flat(0.5)}, ("a",) * 5),
        ({"dense": flat(1.0), "a": flat(1.0)}, ("dense",) * 5),
        ({"dense": flat(1.0), "a": flat(0.999)}, ("dense",) * 5),  # asking costs more than this saves
        ({"dense": flat(1.0), "a": flat(1.01)}, ("dense",) * 5),
        ({"dense": flat(1.0), "a": flat(0.5, upto=4)}, ("a", "a", "dense", "dense", "dense")),
        ({"dense": flat(1.0), "a": flat(0.5) | {4: 1.1}}, ("a", "dense", "a", "a", "a")),
        ({"dense": flat(1.0), "a": flat(0.5) | {2: 1.1}}, ("a", "dense", "a", "a", "a")),
        ({"dense": flat(1.0, upto=1), "a": flat(0.5)}, ("a", "dense", "dense", "dense", "dense")),
        ({"dense": flat(1.0), "a": flat(0.5), "b": flat(0.4)}, ("b",) * 5),
        ({"dense": flat(1.0), "a": flat(0.5), "b": flat(0.6) | {1: 0.4}}, ("b", "a", "a", "a", "a")),
        ({"dense": flat(1.0), "a": flat(0.50), "b": flat(0.52) | {1: 0.4}}, ("b",) * 5),
        ({"dense": flat(1.0), "a": flat(0.5), "a expanded": flat(0.1)}, ("a",) * 5),
        ({"dense": {}}, ("dense",) * 5),
        ({}, ("dense",) * 5),
    ],
)
def test_dense_is_taken_wherever_nothing_is_faster(
    times: dict[str, dict[int, float]], steps: tuple[str, ...]
) -> None:
    made = decide(times)
    assert made.steps == steps
    for name, ends in zip(made.steps, ENDS, strict=True):
        for tokens in ends:
            if tokens in times.get(name, {}):
                assert times[name][tokens] <= times["dense"][tokens]


def test_packed_alone_keeps_one_layout_and_expands_where_that_is_faster() -> None:
    times = {
        "dense": flat(1.0),
        "a": flat(0.5, upto=17) | {16: 3.0, 17: 9.0},
        "a expanded": flat(2.0),
        "b": flat(0.6),
    }
    made = decide(times, "packed")
    assert made.steps == ("a", "a", "a", "a expanded", "a expanded")
    assert made.resident == ("a",)
    assert decide({"dense": flat(1.0)}, "packed").steps == ("dense",) * 5
    assert decide(times).resident == ("a", "b")


def test_every_number_of_tokens_has_its_class() -> None:
    made = Choice(steps=CLASSES)
    ends = {0: "1", 1: "1", 2: "2-4", 4: "2-4", 5: "5-16", 16: "5-16", 17: "17-64", 64: "17-64", 65: "65+"}
    assert {tokens: made.at(tokens) for tokens in ends} == ends
    assert made.at(10**6) == "65+"
    assert str(Choice(steps=("dense",) * 5)) == "dense"
    assert str(Choice(steps=("a", *("dense",) * 4))).startswith("1: a, 2-4: dense, ")


def test_layers_are_timed_once_for_their_kind_and_the_times_are_kept() -> None:
    clock = Clock(lambda name, tokens: {"dense": 1.0}.get(name, 0.5))
    made = [choose(weight(share), inputs=torch.float32, device=CPU, timer=clock) for share in (0.60, 0.61)]
    assert made[0] == made[1]
    assert len(clock.asked) == len(POINTS), "zeros are rounded: both layers are of one kind"
    assert set(made[0].times_ms) == {"dense", "bitmap"}
    assert made[0].steps == ("bitmap",) * 5
    choose(weight(0.8), inputs=torch.float32, device=CPU, timer=clock)
    choose(weight(0.6), inputs=torch.bfloat16, device=CPU, timer=clock)
    choose(weight(0.6, rows=25), inputs=torch.float32, device=CPU, timer=clock)
    assert len(clock.asked) == 4 * len(POINTS)
    assert len(list(remembered.place().glob("*.json"))) == 4
    choice._known.clear()
    again = choose(weight(), inputs=torch.float32, device=CPU, timer=clock)
    assert again == made[0]
    assert len(clock.asked) == 4 * len(POINTS), "read from the disk"


@pytest.mark.parametrize("harm", ["", "{", "[]", '{"key": 3}', "cut", "digit", "other", "minus", "words"])
def test_a_file_that_cannot_be_read_is_made_again(harm: str) -> None:
    clock = Clock(lambda name, tokens: {"dense": 1.0}.get(name, 0.5))
    first = choose(weight(), inputs=torch.float32, device=CPU, timer=clock)
    (path,) = remembered.place().glob("*.json")
    whole = path.read_text()
    said = {name: value for name, value in json.loads(whole).items() if name != "sha256"}
    other = {"other": {**said, "key": {**said["key"], "torch": "0"}}}
    other["minus"] = {**said, "times_ms": {**said["times_ms"], "dense": {"1": -1.0}}}
    other["words"] = {**said, "times_ms": {"dense": {"one": "fast"}}}
    texts = {name: json.dumps({**one, "sha256": remembered._digest(one)}) for name, one in other.items()}
    texts |= {"cut": whole[:100], "digit": whole.replace("0.5", "0.9")}
    path.write_text(texts.get(harm, harm))
    choice._known.clear()
    assert choose(weight(), inputs=torch.float32, device=CPU, timer=clock) == first
    assert len(clock.asked) == 2 * len(POINTS)
    assert path.read_text() == whole


def test_times_that_cannot_be_kept_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "file"))
    made = choose(weight(), inputs=torch.float32, device=CPU, timer=Clock(lambda *_: 1.0))
    assert any("could not be kept" in note for note in made.notes)
    assert "note: Times of layouts could not be kept" in table({"a": made})


def test_the_key_has_all_that_times_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(out_features=1, in_features=2, values=torch.int8, inputs=torch.float32, zero_fraction=0.5)
    key = remembered.key_of(case, CPU, {"bytes": 3})
    assert key["case"]["values"] == "torch.int8"
    assert (key["torch"], key["bytes"]) == (torch.__version__, 3)
    assert key["device"]
    changes = {"torch.__version__": "0", "torch.get_num_threads": lambda: 99}
    for name, value in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            assert remembered.key_of(case, CPU, {"bytes": 3}) != key
    monkeypatch.setattr(remembered, "_kernels", lambda: "other")
    assert remembered.key_of(case, CPU, {"bytes": 3}) != key


@pytest.mark.parametrize(
    ("side", "shape", "filled"),
    [
        (16, (64, 96), True),
        (32, (64, 96), True),
        (16, (1000, 1030), True),
        (8, (64, 96), False),
        (1, (64, 96), False),
    ],
)
def test_zeros_that_fill_blocks_are_found_for_a_gpu(side: int, shape: tuple[int, int], filled: bool) -> None:
    rows, inputs = shape
    keep = torch.rand(-(-rows // side), -(-inputs // side), generator=torch.Generator().manual_seed(3)) < 0.4
    keep = keep.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :inputs]
    made = pack(torch.ones(shape) * keep)
    assert kind_of(made, torch.float32, None, torch.device("cuda")).block == ((16, 16) if filled else None)
    assert kind_of(made, torch.float32, None, CPU).block is None
    assert kind_of(pack(torch.ones(shape)), torch.float32, None, torch.device("cuda")).block is None


def test_another_kernel_and_other_groups_of_scales_are_timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda name, _: 1.0)
    whole, halves = (integers(groups) for groups in (1, 2))

    def asked(weight: Bitmap) -> int:
        choice._known.clear()
        clock.asked.clear()
        choose(weight, inputs=torch.float32, device=CPU, timer=clock)
        return len(clock.asked)

    assert asked(whole) > 0
    assert asked(whole) == 0, "it lies on the disk"
    assert asked(halves) > 0
    monkeypatch.setenv("COMPRESSKIT_CPU_PATH", "portable")
    assert asked(whole) > 0
    monkeypatch.setattr("compresskit.kernels.dispatch.choose", lambda op, device: "reference")
    assert asked(whole) > 0


def integers(groups: int) -> Bitmap:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(16, 128, generator=generator) >= 0.6
    return pack(torch.randint(1, 100, (16, 128), dtype=torch.int8) * keep, torch.ones(16, groups))


def test_two_processes_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    code = (
        "import torch; from compresskit.kernels.bitmap import pack;"
        "from compresskit.kernels.choice import choose;"
        "torch.manual_seed(0); w = pack(torch.randn(64, 64) * (torch.rand(64, 64) < 0.4));"
        "print(choose(w, inputs=torch.float32, device=torch.device('cpu')).steps)"
    )
    both = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (path,) = remembered.place().iterdir()
    assert remembered.read(json.loads(path.read_text())["key"]) is not None


def test_what_is_hopeless_is_not_tried_on_more_tokens() -> None:
    clock = Clock(lambda name, tokens: 1.0 if name == "dense" else 0.5 if tokens < 5 else 50.0)
    made = choose(weight(), inputs=torch.float32, device=CPU, timer=clock)
    assert made.steps == ("bitmap", "bitmap", "dense", "dense", "dense")
    assert [("bitmap" in names) for names in clock.asked] == [True] * 4 + [False] * 5


def test_time_that_is_over_leaves_the_rest_dense_and_says_so() -> None:
    def slow(name: str, tokens: int) -> float:
        time.sleep(0.02)
        return 1.0 if name == "dense" else 0.5

    began = time.perf_counter()
    wish = Wish(budget_s=0.2, kinds=2)
    made = choose(weight(), inputs=torch.float32, device=CPU, wish=wish, timer=Clock(slow))
    assert made.steps[0] == "bitmap"
    assert made.steps[-1] == "dense"
    assert time.perf_counter() - began < 60
    assert any("was not timed for" in n and "where it is dense: its 0.1 s were over" in n for n in made.notes)
    assert not list(remembered.place().glob("*")), "another process may have longer"


def test_a_layout_that_fails_or_errs_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda name, tokens: 1.0 if name == "dense" else 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(BitmapRows, "linear", lambda self, x, packed, bias: torch.ones(len(x), 24))
        wrong = choose(weight(), inputs=torch.float32, device=CPU, timer=clock)
    assert wrong.steps == ("dense",) * 5
    assert any("Layout bitmap is left out: its output is off by" in note for note in wrong.notes)

    def fail(*_: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(BitmapRows, "pack", fail)
    broken = choose(weight(0.9), inputs=torch.float32, device=CPU, timer=clock)
    assert broken.steps == ("dense",) * 5
    assert "Layout bitmap is left out: RuntimeError: no compiler" in broken.notes


def test_users_may_ask_for_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda name, tokens: 1.0 if name == "dense" else 50.0)
    for name in ("bitmap", "dense"):
        made = choose(weight(), inputs=torch.float32, device=CPU, wish=Wish(layout=name), timer=clock)
        assert made.steps == (name,) * 5
    monkeypatch.setenv("COMPRESSKIT_LAYOUT", "bitmap")
    monkeypatch.setenv("COMPRESSKIT_RESIDENT", "packed")
    monkeypatch.setenv("COMPRESSKIT_CHOICE_SECONDS", "2.5")
    assert wish_here() == Wish(layout="bitmap", resident="packed", budget_s=2.5)
    assert wish_here(layout="dense", kinds=3).layout == "dense"
    assert choose(weight(), inputs=torch.float32, device=CPU, timer=clock).steps == ("bitmap",) * 5
    assert not clock.asked
    with pytest.raises(
        EngineError, match=r"layout two_four: expected one that .* 24x70, 6.% zeros, got a refusal: "
    ):
        choose(weight(), inputs=torch.float32, device=CPU, wish=Wish(layout="two_four"))
    with pytest.raises(EngineError, match=r"1. resident: expected fastest or packed.*\n2. layout: expected"):
        Wish(resident="both", layout="bitmp")
    monkeypatch.setenv("COMPRESSKIT_CHOICE_SECONDS", "long")
    with pytest.raises(EngineError, match="CHOICE_SECONDS: expected seconds, got 'long'"):
        wish_here()
    for seconds in ("nan", "-1"):
        monkeypatch.setenv("COMPRESSKIT_CHOICE_SECONDS", seconds)
        with pytest.raises(EngineError, match=f"budget_s: expected seconds, 0 or more, got {seconds}"):
            wish_here()


def test_where_memory_is_short_packed_alone_stays_unless_someone_says_what_is_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = wish_here(shortage="No room.")
    assert (short.resident, short.notes) == ("packed", ("No room.",))
    assert wish_here(shortage="No room.", resident="fastest") == Wish()
    assert wish_here(shortage="No room.", resident="packed") == Wish(resident="packed")
    assert wish_here(shortage="No room.", layout="bitmap") == Wish(layout="bitmap")
    monkeypatch.setenv("COMPRESSKIT_RESIDENT", "fastest")
    assert wish_here(shortage="No room.") == Wish()
    clock = Clock(lambda name, tokens: 1.0 if name == "dense" else 0.5 if tokens < 5 else 2.0)
    patient = replace(short, budget_s=1e6)
    made = choose(weight(), inputs=torch.float32, device=CPU, wish=patient, timer=clock)
    assert made.resident == ("bitmap",)
    assert made.notes == ("No room.",)
    choice._known.clear()
    later = choose(weight(), inputs=torch.float32, device=CPU, wish=Wish(resident="packed"), timer=clock)
    assert not later.notes, "the note is of one load, not of the times that are kept"
    assert len(clock.asked) == len(POINTS)


def test_copies_are_read_in_turn_by_all_that_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = weight(rows=64, inputs=64)
    size = sum(t.nbytes for t in BitmapRows().pack(made, CPU))
    case = Case(
        out_features=64, in_features=64, values=torch.float32, inputs=torch.float32, zero_fraction=0.6
    )
    read: list[int] = []

    def noted(of: Callable[..., object]) -> Callable[..., object]:
        def noting(*given: object) -> object:
            read.append(next(one for one in given if isinstance(one, tuple))[0].data_ptr())
            return of(*given)

        return noting

    monkeypatch.setattr(BitmapRows, "linear", noted(BitmapRows.linear))
    monkeypatch.setattr("compresskit.kernels.contest.expand", noted(expand))

    def turns(runs: Mapping[str, Run], device: torch.device) -> dict[str, float]:
        for name in ("bitmap", "bitmap" + EXPANDED):
            runs[name]()
        return dict.fromkeys(runs, 1.0)

    contest(made, case, (1, 2, 3), device=CPU, budget_s=60, model_bytes=5 * size, expanded=True, timer=turns)
    compared, *timed = read
    assert len(set(timed[:5])) == 5, "five copies, whichever way reads them"
    assert timed[5:] == timed[:1] == [compared], "the copy that was read longest ago comes next"


def test_a_layout_that_takes_few_tokens_alone_leaves_the_rest_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BitmapRows, "refusal", lambda self, case: "too many" if case.tokens > 4 else "")
    clock = Clock(lambda name, tokens: 1.0 if name == "dense" else 0.5)
    steps = ("bitmap", "bitmap", "dense", "dense", "dense")
    assert choose(weight(), inputs=torch.float32, device=CPU, timer=clock).steps == steps
    asked = choose(weight(), inputs=torch.float32, device=CPU, wish=Wish(layout="bitmap"))
    assert asked.steps == steps
    assert asked.notes == ("Layout bitmap takes no larger batches: those are dense.",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_are_measured(dtype: torch.dtype) -> None:
    made = weight(dtype=dtype)
    case = Case(out_features=24, in_features=70, values=dtype, inputs=dtype, zero_fraction=0.6)
    times, notes = contest(made, case, (1, 3), device=CPU, budget_s=60, model_bytes=1 << 16, expanded=True)
    assert set(times) == {"dense", "bitmap", "bitmap" + EXPANDED}
    assert not notes
    assert all(ms > 0 for by in times.values() for ms in by.values())
    assert set(times["dense"]) == {1, 3}


def test_each_run_takes_its_turn() -> None:
    order: list[str] = []
    slow = {"a": lambda: (order.append("a"), time.sleep(0.002)), "b": lambda: order.append("b")}
    times = in_turn(slow, CPU)
    assert times["a"] >= 2.0 > times["b"]
    assert order[:4] == ["a", "b", "a", "b"]
    assert order.count("a") < order.count("b")


@pytest.mark.parametrize("name", ["bitmap", "dense"])
def test_what_is_expanded_is_the_dense_weight(name: str) -> None:
    made = weight()
    layout = LAYOUTS[name]()
    dense = torch.zeros(24, 70)
    keep = made.mask_OB.repeat_interleave(8, 1)[:, :70] >> (torch.arange(70) % 8).to(torch.uint8) & 1
    dense[keep.bool()] = made.values_K
    assert torch.equal(expand(layout, layout.pack(made, CPU), 70, torch.float32), dense)


def test_the_table_names_every_kind_once() -> None:
    same = decide({"dense": {1: 2.0, 2: 4.0}, "bitmap": {1: 1.0}})
    text = table({"q": same, "k": same, "v": Choice(steps=("dense",) * 5, notes=("A note.",))})
    assert text.splitlines() == [
        "q and 1 more: 1: bitmap, 2-4: dense, 5-16: dense, 17-64: dense, 65+: dense",
        "    dense, ms by tokens: 1: 2, 2: 4",
        "    bitmap, ms by tokens: 1: 1",
        "v: dense",
        "note: A note.",
    ]
