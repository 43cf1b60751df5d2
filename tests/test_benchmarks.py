"""The results of benchmarks are appended to, never edited."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from compresskit.errors import InputError
from compresskit.measure import read_records
from compresskit.recipe import load_recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECIPES = sorted((BENCHMARKS / "recipes").glob("*.yaml"))

# The benchmarks are not installed with the package, so their runner is loaded from its file.
spec = importlib.util.spec_from_file_location("benchmarks_run", BENCHMARKS / "run.py")
assert spec is not None
assert spec.loader is not None
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
append, benchmarks, main = runner.append_record, runner.benchmarks, runner.main


def test_records_are_appended(tmp_path: Path) -> None:
    first = append("kill", {"runs": [{"same": True}]}, subject="a", results=tmp_path)
    before = json.loads(first.read_text())
    second = append("kill", {"runs": []}, subject="b", results=tmp_path, settings={"steps": 3})
    assert first == second
    assert json.loads(second.read_text())[0] == before[0]
    assert [r.subject for r in read_records(second)] == ["a", "b"]
    assert {"load_average", "steps"} <= set(read_records(second)[1].settings)


def test_a_damaged_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = append("kill", {}, subject="a", results=tmp_path)
    path.write_text("[{")
    with pytest.raises(InputError, match="records in JSON"):
        append("kill", {}, subject="b", results=tmp_path)
    assert path.read_text() == "[{"


def test_names_that_are_no_file_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="letters, digits and dashes"):
        append("../kill", {}, subject="a", results=tmp_path)


def test_values_that_are_no_plain_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="threads"):
        append("kill", {}, subject="a", results=tmp_path, threads=0)
    assert not list(tmp_path.iterdir())


def test_an_unknown_benchmark_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "latency" in benchmarks()
    with pytest.raises(SystemExit):
        main(["latancy"])
    assert "Known: latency" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_load(path: Path) -> None:
    assert load_recipe(path, {"model": "somewhere"}).stages


def test_of_larger_batches_the_bytes_of_a_weight_are_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    cpu = importlib.import_module("benchmarks.kernels.cpu")
    assert cpu.limit_of("bitmap bf16", "0.5", 1) == pytest.approx(16 / 9)
    assert cpu.limit_of("bitmap bf16", "0.5", 4) is None
    assert cpu.limit_of("torch bf16", "0.5", 1) is None


def test_packed_models_are_generated_with_in_both_residencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    decode = importlib.import_module("benchmarks.decode")
    assert decode.cells_of(("dense", "2:4"), ("fastest", "packed")) == {
        "dense": (0, ""),
        "2:4 fastest": (1, "fastest"),
        "2:4 packed": (1, "packed"),
    }
    sizes = ("load_peak", "loaded_anonymous", "loaded_file", "peak", "anonymous", "file")
    answer = {"prompt_ms": 2.0, **{f"{size}_bytes": 5 for size in sizes}, **dict.fromkeys(decode.KEPT, 1)}
    found = {
        "dense": [{**answer, "tokens_per_s": [2.0]}],
        "2:4 packed": [{**answer, "tokens_per_s": [6.0, 8.0], "load_peak_bytes": n} for n in (9, 7)],
    }
    values, quartiles = decode.summed_up(found)
    assert values["2:4 packed"]["speedup"] == 3.5
    assert values["2:4 packed"]["load_peak_bytes"] == 9, "the worst round"
    assert quartiles["2:4 packed_tokens_per_s"][1] == 7.0
    now = decode.memory()
    assert now["VmHWM"] >= now["RssAnon"] > 0


def test_chains_under_engines_are_compared_with_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))
    engines = importlib.import_module("benchmarks.chain_engines")

    def faults(**changes: Any) -> list[str]:
        counts = {"zeros": 8, "zeros_kept": 8, "broken_groups": 0}
        one = {"perplexity": {"0-source": 5.0, "1-prune": 9.0}, "engine": "single", **counts}
        found = {engines.ONE: one, "DDP": {**one, "engine": "ddp", **changes}}
        said: list[str] = engines.compared(found)
        assert found[engines.ONE]["difference_fraction"] == 0
        return said

    assert faults() == faults(perplexity={"1-prune": 9.08}) == []
    for last in (9.1, 8.9, float("nan")):
        assert faults(perplexity={"1-prune": last}) == [f"DDP: perplexity {last:.4f}, in one process 9.0000"]
    assert faults(engine="single") == ["DDP: ddp was asked for, single ran"]
    for lost in ({"zeros_kept": 7}, {"broken_groups": 1}, {"zeros": 0, "zeros_kept": 0}):
        (said,) = faults(**lost)
        assert "zeros are left" in said
