"""Costs that are kept: read to the bit, missed by all that they depend on, measured again where damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor

from compresskit.caches import cached, chosen, fault_of, remove
from compresskit.calibration import costs as module
from compresskit.calibration.costs import Store, costs_of
from compresskit.calibration.sensitivity import Change, measure_costs
from compresskit.data.spec import DataSpec
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.quant.auto import rounding
from compresskit.quant.scheme import Scheme, parse
from compresskit.quant.stage import Quantize
from compresskit.sparse.magnitude import Magnitude
from compresskit.sparse.pattern import LayerUnstructured
from compresskit.sparse.stage import Prune
from compresskit.sparse.survey import _said_of
from compresskit.stage import Stage, StageContext, StageResult

FOUR, EIGHT = parse("w4a16-g32"), parse("w8a16")
LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj", "lm_head")
TEXT = "Once upon a time there was a little girl who liked to count to ten. "
Rows = list[dict[str, Tensor]]
Costs = dict[str, dict[Scheme, float]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(tiny_llama(tmp_path_factory.mktemp("model"), tie_word_embeddings=False))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT * 20)
    return path


@pytest.fixture
def rows() -> Rows:
    return rows_of(0)


def rows_of(seed: int) -> Rows:
    ids = torch.randint(0, 258, (2, 24), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row} for row in ids]


def counted(change: Change[Scheme], seen: list[str]) -> Change[Scheme]:
    """``change``, which says what it is asked to do."""

    def weight(layer: str, weight_OI: Tensor, scheme: Scheme) -> Tensor:
        seen.append(f"{layer} {scheme}")
        return change.weight(layer, weight_OI, scheme)

    return replace(change, weight=weight)


def kept(
    source: ModelSource,
    rows: Rows,
    place: Path,
    *schemes: Scheme,
    model: Any = None,
    change: Change[Scheme] | None = None,
) -> tuple[Costs, list[str]]:
    """What roundings cost, and those that were made to find out."""
    seen: list[str] = []
    change = counted(change or rounding(dict.fromkeys(LAYERS, torch.float32)), seen)
    candidates = dict.fromkeys(LAYERS, schemes)
    places = {"cache": place, "scratch": place / "scratch"}
    found = costs_of(model or load_model(source), source, candidates, rows, change, **places)
    told = json.loads((place / "scratch" / "record.json").read_text())
    total = len(LAYERS) * len(schemes)
    assert told == {"costs_measured": len(seen), "costs_read": total - len(seen)}
    return found, seen


def measured(source: ModelSource, rows: Rows, *schemes: Scheme) -> Costs:
    change = rounding(dict.fromkeys(LAYERS, torch.float32))
    return measure_costs(load_model(source), source.anatomy, dict.fromkeys(LAYERS, schemes), rows, change)


def test_a_second_recipe_measures_what_is_missing_and_reads_the_rest_to_the_bit(
    source: ModelSource, rows: Rows, tmp_path: Path
) -> None:
    first, seen = kept(source, rows, tmp_path, EIGHT)
    assert seen == [f"{layer} w8a16" for layer in LAYERS]
    second, seen = kept(source, rows, tmp_path, FOUR, EIGHT)
    assert seen == [f"{layer} w4a16-g32" for layer in LAYERS]
    assert second == measured(source, rows, FOUR, EIGHT)
    assert all(second[layer][EIGHT] == first[layer][EIGHT] > 0 for layer in LAYERS)
    assert kept(source, rows, tmp_path, EIGHT, FOUR) == (second, [])


def test_a_cost_is_the_same_alone_and_among_others(source: ModelSource, rows: Rows) -> None:
    """Blocks between are then passed at once, not one by one."""
    change = rounding(dict.fromkeys(source.anatomy.linears, torch.float32))
    every = dict.fromkeys(source.anatomy.linears, (FOUR, EIGHT))
    model = load_model(source)
    together = measure_costs(model, source.anatomy, every, rows, change)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        alone = measure_costs(model, source.anatomy, {layer: (EIGHT,)}, rows, change)
        assert alone == {layer: {EIGHT: together[layer][EIGHT]}}


def test_all_that_a_cost_depends_on_misses(
    source: ModelSource, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(source, rows, tmp_path, EIGHT)
    every = [f"{layer} w8a16" for layer in LAYERS]
    changed = load_model(source)
    with torch.no_grad():
        changed.get_parameter("model.norm.weight")[0] += 1e-3
    half = rounding(dict.fromkeys(LAYERS, torch.bfloat16))
    other = open_model(tiny_llama(tmp_path / "other", tie_word_embeddings=False, rms_norm_eps=1e-3))
    copytree(source.directory, tmp_path / "coded")
    (tmp_path / "coded" / "modeling.py").write_text("EPSILON = 1e-3\n")
    misses: list[dict[str, Any]] = [
        {"model": changed},
        {"model": load_model(source, dtype="bfloat16")},
        {"rows": rows_of(1)},
        {"rows": [{**row, "attention_mask": torch.ones(24)} for row in rows]},
        {"change": half},
        {"change": replace(rounding(dict.fromkeys(LAYERS, torch.float32)), kind="another")},
        {"source": other},
        {"source": open_model(tmp_path / "coded")},
    ]
    for differing in misses:
        given = {"source": source, "rows": rows, "place": tmp_path} | differing
        assert kept(given.pop("source"), given.pop("rows"), given.pop("place"), EIGHT, **given)[1] == every
    with monkeypatch.context() as patch:
        patch.setattr(module, "_package", lambda: "other code")
        assert kept(source, rows, tmp_path, EIGHT)[1] == every
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert kept(source, rows, tmp_path, EIGHT)[1] == every
    finally:
        torch.set_num_threads(threads)
    assert kept(source, rows, tmp_path, EIGHT)[1] == [], "all those stand beside it"


@pytest.mark.parametrize("part", ["calibration/sweep.py", "formats/grid.py", "kernels/ops.py", "targets.py"])
def test_the_code_of_every_room_counts(part: str, tmp_path: Path) -> None:
    place = Path(module.__file__).parents[1]
    (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / part).write_bytes((place / part).read_bytes())
    before = module._code(tmp_path)
    (tmp_path / part).write_text("ROUNDED = 1\n")
    assert module._code(tmp_path) != before


def test_every_module_that_is_loaded_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those behind a rounding among them, wherever they are."""
    read: set[Path] = set()
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.add(path), real(path))[1])
    module._package.cache_clear()
    module._package()
    names = [name for name in sys.modules if name.startswith("compresskit.")]
    loaded = {Path(str(sys.modules[name].__file__)) for name in names}
    assert {path.parent.name for path in loaded} >= {"formats", "kernels", "modeling", "quant", "sparse"}
    assert loaded <= read


def test_where_a_model_lies_and_how_it_is_sharded_are_no_matter(
    source: ModelSource, rows: Rows, tmp_path: Path
) -> None:
    kept(source, rows, tmp_path, EIGHT)
    load_model(source).save_pretrained(tmp_path / "moved", max_shard_size="50KB")
    assert len(list((tmp_path / "moved").glob("*.safetensors"))) > 1
    assert kept(open_model(tmp_path / "moved"), rows, tmp_path, EIGHT)[1] == []


@pytest.mark.parametrize("damage", ["figure", "cut", "name"])
def test_a_damaged_entry_is_measured_again_and_told(
    damage: str, source: ModelSource, rows: Rows, tmp_path: Path
) -> None:
    want, _ = kept(source, rows, tmp_path, EIGHT)
    (entry,) = cached(["costs"], home=tmp_path)
    said = entry.path.read_text()
    if damage == "figure":
        entry.path.write_text(said.replace(repr(want["lm_head"][EIGHT]), "0.5"))
    elif damage == "cut":
        entry.path.write_text(said[: len(said) // 2])
    else:
        kept(source, rows_of(1), tmp_path, EIGHT)
        (other,) = (e.path for e in cached(["costs"], home=tmp_path) if e.path != entry.path)
        other.replace(entry.path)
    assert fault_of(entry)
    with pytest.warns(UserWarning, match=r"is damaged \(.*\); costs are measured again"):
        got, seen = kept(source, rows, tmp_path, EIGHT)
    assert (got, len(seen)) == (want, len(LAYERS))
    assert fault_of(entry) == ""
    assert kept(source, rows, tmp_path, EIGHT) == (want, [])


def test_what_is_removed_is_measured_again(source: ModelSource, rows: Rows, tmp_path: Path) -> None:
    kept(source, rows, tmp_path, EIGHT)
    assert remove(chosen(["costs"], home=tmp_path)) > 0
    assert cached(["costs"], home=tmp_path) == []
    assert len(kept(source, rows, tmp_path, EIGHT)[1]) == len(LAYERS)


def test_a_folder_that_cannot_be_written_is_told_once_and_costs_are_measured(
    source: ModelSource, rows: Rows, tmp_path: Path
) -> None:
    (tmp_path / "costs").write_text("a file where the folder goes")
    with pytest.warns(UserWarning, match="Measured costs are not kept in") as told:
        got, seen = kept(source, rows, tmp_path, EIGHT)
    assert (got, len(seen)) == (measured(source, rows, EIGHT), len(LAYERS))
    assert len(told) == 1


def test_what_is_there_is_read_where_nothing_can_be_written(
    source: ModelSource, rows: Rows, tmp_path: Path
) -> None:
    want, _ = kept(source, rows, tmp_path, EIGHT)
    (tmp_path / "costs" / ".lock").unlink()
    (tmp_path / "costs" / ".lock").mkdir()
    assert kept(source, rows, tmp_path, EIGHT) == (want, [])
    with pytest.warns(UserWarning, match="Measured costs are not kept in"):
        assert kept(source, rows, tmp_path, EIGHT, FOUR)[0] == measured(source, rows, EIGHT, FOUR)


def test_those_who_fill_one_entry_together_lose_nothing(tmp_path: Path) -> None:
    def fill(who: int) -> None:
        store = Store(tmp_path, {"weights": "ab"})
        for n in range(20):
            store.add({f"layer{n}": {f"{who}": n / 7}})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(4)))
    want = {f"layer{n}": {f"{who}": n / 7 for who in range(4)} for n in range(20)}
    assert Store(tmp_path, {"weights": "ab"}).read() == want


@dataclass(frozen=True, kw_only=True)
class Foreign(Magnitude):
    """Scores of another package, which may read the pattern."""


@pytest.mark.parametrize(("cls", "counts"), [(Magnitude, False), (Foreign, True)])
def test_the_pattern_counts_where_scores_may_read_it(cls: type[Magnitude], counts: bool) -> None:
    half, more = (_said_of(cls(pattern=LayerUnstructured(fraction))) for fraction in (0.5, 0.6))
    assert (half != more) == counts
    assert cls.__name__ in half


KILLED = """
import os, signal, sys
from pathlib import Path
from test_costs import *
place, directory = map(Path, sys.argv[1:])
plain = rounding(dict.fromkeys(LAYERS, torch.float32))
def weight(layer, weight_OI, scheme):
    if layer == "lm_head":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain.weight(layer, weight_OI, scheme)
kept(open_model(directory), rows_of(0), place, EIGHT, change=replace(plain, weight=weight))
"""


def test_a_run_that_is_killed_keeps_the_blocks_it_measured(
    source: ModelSource, rows: Rows, tmp_path: Path
) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(source.directory)]
    path = [*map(str, (here, here.parent)), *sys.path]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": ":".join(path), **threads}, check=False)
    assert done.returncode == -signal.SIGKILL
    (entry,) = cached(["costs"], home=tmp_path)
    assert fault_of(entry) == ""
    got, seen = kept(source, rows, tmp_path, EIGHT)
    assert seen == ["lm_head w8a16"]
    assert got == measured(source, rows, EIGHT)


def run(stage: Stage, source: ModelSource, text: Path, place: Path, cache: Path) -> tuple[StageResult, Any]:
    (place / "out").mkdir(parents=True)
    context = StageContext(
        out=place / "out",
        scratch=place / "scratch",
        original=source.directory,
        data=DataSpec(source=str(text)),
        cache=cache,
    )
    return stage.run(source, context), json.loads((place / "scratch" / "record.json").read_text())


def weights(place: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in (place / "out").glob("*.safetensors")}


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_another_zero_fraction_measures_the_levels_that_are_new(
    method: str, source: ModelSource, text: Path, tmp_path: Path
) -> None:
    """30% to 70% in five levels, then 40% to 80%: of five, four were measured."""
    stage = Prune(method, pattern="50%:layer", allocation="sensitivity", samples=2, context_length=32)
    layers = len(stage.layers(source))
    _, told = run(stage, source, text, tmp_path / "first", tmp_path)
    assert told == {"costs_measured": 5 * layers, "costs_read": 0}
    more = replace(stage, pattern="60%:layer")
    result, told = run(more, source, text, tmp_path / "second", tmp_path)
    assert told == {"costs_measured": layers, "costs_read": 4 * layers}
    fresh, told = run(more, source, text, tmp_path / "fresh", tmp_path / "empty")
    assert told == {"costs_measured": 5 * layers, "costs_read": 0}
    assert result == fresh
    assert weights(tmp_path / "second") == weights(tmp_path / "fresh") != weights(tmp_path / "first")
    fewer = replace(more, targets=("*mlp*",))
    _, told = run(fewer, source, text, tmp_path / "fewer", tmp_path)
    assert told == {"costs_measured": 0, "costs_read": 5 * len(fewer.layers(source))}
    _, told = run(replace(more, samples=1), source, text, tmp_path / "rows", tmp_path)
    assert told["costs_read"] == 0


def test_another_budget_of_bits_measures_nothing(source: ModelSource, text: Path, tmp_path: Path) -> None:
    stage = Quantize(
        scheme="auto", candidates=("w4a16-g32", "w8a16"), target_bits=6.0, samples=2, context_length=32
    )
    _, told = run(stage, source, text, tmp_path / "first", tmp_path)
    assert told["costs_read"] == 0
    total = told["costs_measured"]
    more = replace(stage, target_bits=7.0)
    result, told = run(more, source, text, tmp_path / "second", tmp_path)
    assert told == {"costs_measured": 0, "costs_read": total}
    assert result == run(more, source, text, tmp_path / "fresh", tmp_path / "empty")[0]
