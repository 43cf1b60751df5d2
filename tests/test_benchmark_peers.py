"""The side-by-side benchmarks: the same tokens on both sides, watched processes, tables; no peer needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

from benchmarks import cost_peer, quality, sparsity, training
from benchmarks.peers import call
from benchmarks.random_llama import MODEL, TEXT, word_tokenizer, write_random_llama
from compresskit.measure import read_records
from compresskit.quant.scheme import parse
from tests.tiny import tiny_llama

SMALL = {"vocabulary": 300, "width": 64, "layers": 1, "heads": 2}


def run_main(module: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.delenv(call.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "argv", [module.__name__, *options])
    module.main()


def test_a_random_llama_is_the_same_whenever_it_is_written(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_random_llama(tmp_path / name, rows=2, context_length=8, **SMALL)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_the_peer_gets_the_ids_that_are_written_down(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_random_llama(tmp_path, rows=3, context_length=16, **SMALL)
    path = call.save_ids(
        tmp_path / MODEL, str(tmp_path / TEXT), rows=3, context_length=16, place=tmp_path / "place"
    )
    texts = [json.loads(line)["text"] for line in (tmp_path / TEXT).read_text().splitlines()]
    written = [[int(word[1:]) for word in text.split()] for text in texts]
    # The second document is held out of every source.
    assert load_file(path)["input_ids"].tolist() == [written[0], *written[2:]]


def test_both_sides_read_the_same_rows(tmp_path: Path) -> None:
    """What a stage calibrates on, row by row, is what the file for the peer holds."""
    from safetensors.torch import load_file

    import compresskit as ck
    from compresskit.calibration.oneshot import calibration_rows
    from compresskit.calibration.rows import Documents
    from compresskit.modeling import open_model

    model = tiny_llama(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Story {i}. " * 9}) + "\n" for i in range(40)))
    path = call.save_ids(model, str(text), rows=5, context_length=32, place=tmp_path)
    stage = ck.Quantize("rtn", samples=5, context_length=32)
    rows, _, _ = calibration_rows(
        stage, open_model(model), call.calibration_data(str(text)), cache=tmp_path / "c", scratch=tmp_path
    )
    alone = Documents(rows)
    ids = torch.cat([alone[i]["input_ids"] for i in range(len(alone))])
    assert torch.equal(ids.int(), load_file(path)["input_ids"])


def test_words_are_their_own_ids() -> None:
    assert word_tokenizer(50)("w7 w0 w49 w50")["input_ids"] == [7, 0, 49, 0]


@pytest.mark.parametrize("preset", ["W8A8", "W8A16", "W4A16", "W4A16_ASYM", "FP8_DYNAMIC"])
def test_schemes_are_the_presets_of_compressed_tensors(preset: str) -> None:
    ours = {"W4A16_ASYM": "w4a16-g128-asym", "FP8_DYNAMIC": "fp8"}.get(preset, preset.lower())
    made = QuantizationScheme(**call.config_groups(parse(ours))["group_0"])
    known = preset_name_to_scheme(preset, ["Linear"])
    if preset == "W8A16":  # whose groups of 128 there are a row's own scale here
        known.weights = known.weights.model_copy(update={"strategy": "channel", "group_size": None})
    assert made.weights == known.weights
    assert made.input_activations == known.input_activations


@pytest.mark.parametrize("module", [cost_peer, quality, sparsity])
def test_a_missing_peer_is_told_with_its_cure(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = () if module is cost_peer else ("--model", "m", "--train", "t", "--evaluate", "e")
    for python in ((), ("--peer-python", sys.executable)):
        with pytest.raises(SystemExit) as stop:
            run_main(module, monkeypatch, *needed, *python)
        assert stop.value.code == 2
        assert "make_env.py llmcompressor DIR" in capsys.readouterr().err


def test_memory_of_a_process_and_of_its_children_is_seen(tmp_path: Path) -> None:
    child = "x = b'a' * 150_000_000; import time; time.sleep(1.5)"
    code = (
        "import json, subprocess, sys;"
        f"subprocess.run([sys.executable, '-c', {child!r}]);"
        "y = b'b' * 100_000_000; import time; time.sleep(0.3);"
        "out = json.load(open(sys.argv[1]))['answer']; open(out, 'w').write('{}')"
    )
    (tmp_path / "stub.py").write_text(code)
    seen = call.run_jobs([sys.executable, str(tmp_path / "stub.py")], {"threads": 1}, tmp_path)
    assert 250e6 < seen.peak_bytes < 320e6
    assert seen.process_s > 1.8 > seen.cpu_s > 0


def test_a_process_that_fails_ends_the_benchmark_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "stub.py").write_text("raise RuntimeError('no such scheme')")
    with pytest.raises(SystemExit, match="no such scheme"):
        call.run_jobs([sys.executable, str(tmp_path / "stub.py")], {"threads": 1}, tmp_path)


FAKE = """
import json, pathlib, sys, time
time.sleep(0.5)  # long enough for its memory to be looked at
task = json.load(open(sys.argv[1]))
for job in task["jobs"]:
    pathlib.Path(job["out"]).mkdir()
answer = {"seconds": {"job": SECONDS}, "errors": {}, "versions": {"llmcompressor": "0"}}
open(task["answer"], "w").write(json.dumps(answer))
"""


def test_gptq_is_measured_in_turn_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def sides(*_: Any) -> dict[str, Any]:
        found = {}
        for side, seconds in (("ours", 2), ("peer", 8)):
            script = tmp_path / f"{side}.py"
            script.write_text(FAKE.replace("SECONDS", str(seconds)))
            jobs = [{"out": str(tmp_path / side / "out")}]
            (tmp_path / side).mkdir()
            found[side] = ([sys.executable, str(script)], {"threads": 1, "jobs": jobs})
        return found

    def run_jobs(command: list[str], *rest: Any) -> Any:
        order.append(Path(command[1]).stem)
        return call.run_jobs(command, *rest)

    monkeypatch.setattr(cost_peer, "sides", sides)
    monkeypatch.setattr(cost_peer, "run_jobs", run_jobs)
    monkeypatch.setattr(cost_peer, "peer_python", lambda options: sys.executable)
    run_main(cost_peer, monkeypatch, "--rounds", "2", "--results", str(tmp_path / "results"))
    assert order == ["ours", "peer", "ours", "peer"]
    (record,) = read_records(next((tmp_path / "results").glob("gptq-peer-*.json")))
    assert record.values["s_ratio"] == 0.25
    assert len(record.values["runs"]["peer"]) == 2
    assert record.versions["peer llmcompressor"] == "0"


def test_quality_of_a_tiny_model_is_scored_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours alone, in a process of its own; a cell that cannot be is told and the others stand."""
    model = tiny_llama(tmp_path / "tiny", intermediate_size=72)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Story {i}. " * 9}) + "\n" for i in range(40)))
    run_main(
        quality,
        monkeypatch,
        *("--model", str(model), "--train", str(text), "--evaluate", str(text), "--alone", "--rows", "4"),
        *("--context-length", "32", "--methods", "rtn", "--schemes", "w8a16", "w4a16-g32", "w4a16-g64"),
        *("--documents", "3", "--results", str(tmp_path / "results")),
    )
    (record,) = read_records(next((tmp_path / "results").glob("quality-*.json")))
    assert record.settings["left_alone"]["w4a16-g32"] == ["lm_head", "down_proj"]
    rows = {(row["method"], row["scheme"]): row for row in record.values["rows"]}
    eight, four = rows["rtn", "w8a16"], rows["rtn", "w4a16-g32"]
    assert abs(eight["lost_percent"]) < abs(four["lost_percent"]) < 20
    # Groups of 64 fit no layer of width 32: nothing is left to quantise.
    assert any(note.startswith("rtn w4a16-g64: ") for note in record.notes)
    assert "| w4a16-g64 | rtn | failed | - | - | - |" in capsys.readouterr().out


def test_pruners_of_a_tiny_model_are_scored_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours alone: every variant is a cell of its own."""
    model = tiny_llama(tmp_path / "tiny")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Story {i}. " * 9}) + "\n" for i in range(40)))
    run_main(
        sparsity,
        monkeypatch,
        *("--model", str(model), "--train", str(text), "--evaluate", str(text), "--alone", "--rows", "4"),
        *("--context-length", "32", "--methods", "magnitude", "wanda", "--patterns", "70%", "2:4"),
        *("--documents", "3", "--results", str(tmp_path / "results")),
    )
    (record,) = read_records(next((tmp_path / "results").glob("sparsity-peer-*.json")))
    rows = {row["cell"]: row["ours"] for row in record.values["rows"]}
    variants = {"", " owl", " reconstruct"}
    assert set(rows) == {
        *(f"{method} 70%{variant}" for method in ("magnitude", "wanda") for variant in variants),
        *(f"{method} 2:4{variant}" for method in ("magnitude", "wanda") for variant in ("", " reconstruct")),
        *(f"wanda {pattern} true_sequential" for pattern in ("70%", "2:4")),
    }
    assert all(isinstance(figure, float) for figure in rows.values())
    assert len(set(rows.values())) > 6


def test_pruners_out_of_order_and_behind_are_told() -> None:
    options = sparsity.arguments().parse_args(
        ["--model", "m", "--train", "t", "--evaluate", "e", "--patterns", "2:4", "--alone"]
    )
    found = {
        "dense": 1.0,
        "ours": {"magnitude 2:4": 1.5, "wanda 2:4": 1.4, "sparsegpt 2:4": 1.41, "alps 2:4": 1.2},
        "peer": {"wanda 2:4": 1.4, "sparsegpt 2:4": 1.39, "wanda 70% owl": "it failed"},
        "agreement": {"wanda 2:4": 1.0},
    }
    rows = sparsity.rows_of(found)
    assert sparsity.verdicts(rows, options) == [
        "sparsegpt 2:4 is 1.44% worse than llm-compressor's.",
        "2:4: sparsegpt (1.4100) is no better than wanda (1.4000).",
    ]
    assert "| wanda 2:4 | 1.4000 | 40.00 | 1.4000 | +0.00 | 1.00000 |" in sparsity.table("m", 1.0, rows)


def test_the_peer_is_asked_for_as_many_zeros() -> None:
    """It rounds a row's zeros down; ours are rounded to the nearest."""
    for share in (0.5, 0.6, 0.7):
        for widths in ({128: 7, 384: 1}, {64: 5, 172: 2}, {64: 1}):
            asked = sparsity.rounded_down_alike(share, widths)
            many = {inputs: int(inputs * asked) - round(share * inputs) for inputs in widths}
            assert sum(abs(more) * widths[inputs] for inputs, more in many.items()) <= min(widths.values())
    assert sparsity.rounded_down_alike(0.5, {64: 5, 172: 2}) == 0.5
    assert call.sparsity_fields("2:8") == {"sparsity": 0.75, "mask_structure": "6:8"}


def test_what_falls_short_is_said() -> None:
    found = {
        "dense": 1.0,
        "cells": [("rtn", "w8a8"), ("rtn", "w4a16-g32"), ("gptq", "w4a16-g32")],
        "ours": {"rtn w8a8": 1.006, "rtn w4a16-g32": 1.02, "gptq w4a16-g32": 1.03},
        "peer": {"rtn w8a8": 1.006, "rtn w4a16-g32": 1.025, "gptq w4a16-g32": 1.02},
    }
    rows = quality.rows_of(found)
    assert [round(row["worse_percent"], 2) for row in rows] == [0.0, -0.49, 0.98]
    said = quality.verdicts(rows)
    assert len(said) == 3
    assert "rtn w8a8 loses 0.60% against the dense model." in said
    assert "gptq w4a16-g32 is 0.98% worse than llm-compressor's." in said
    assert "gptq w4a16-g32 is no better than rtn: 1.0300 against 1.0200." in said


def test_what_is_kept_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it scored again on the same text; what failed is tried again."""
    made: list[list[str]] = []
    scored: list[str] = []

    def run_jobs(_command: Any, task: Any, _place: Path) -> Any:
        made.append([job["name"] for job in task["jobs"]])
        for job in task["jobs"]:
            if job["name"] != "bad":
                Path(job["out"]).mkdir()
        return call.Watched({"errors": {"bad": "no such scheme"}, "versions": {"torch": "2"}}, 1.0, 1.0, 1)

    def score(checkpoint: Path, _options: Any) -> float:
        scored.append(checkpoint.name)
        return 1.5

    monkeypatch.setattr(quality, "run_jobs", run_jobs)
    monkeypatch.setattr(quality, "score", score)

    def ask(*names: str, text: str = "some", groups: int = 32) -> Any:
        (tmp_path / "text").write_text(text)
        typed = ["--model", "m", "--train", "t", "--evaluate", str(tmp_path / "text")]
        jobs = [{"name": name, "groups": groups} for name in names]
        return quality.figures_of(["x"], {}, jobs, quality.arguments().parse_args(typed), tmp_path / "home")

    assert ask("a 1", "bad") == ({"a 1": 1.5, "bad": "no such scheme"}, {"torch": "2"})
    assert ask("bad", "b") == ({"bad": "no such scheme", "b": 1.5}, {"torch": "2"})
    ask("a 1", text="other")
    ask("a 1", groups=64)
    assert made == [["a 1", "bad"], ["bad", "b"], ["a 1"]]
    first, b, again, other = scored
    assert first == again
    assert len({first, b, other}) == 3


def test_the_trainer_and_a_plain_loop_do_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"width": 64, "layers": 1, "vocabulary": 200, "context-length": 32, "steps": 3, "rounds": 1}
    asked = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    run_main(training, monkeypatch, "--overhead", *asked, "--results", str(tmp_path))
    (record,) = read_records(next(tmp_path.glob("trainer-overhead-*.json")))
    times = (record.values["compresskit_step_s"], record.values["plain_step_s"])
    assert record.values["overhead"] == times[0] / times[1] - 1
    assert (record.settings["rows"], record.threads) == (2, 2)


def test_sides_that_do_other_work_are_told() -> None:
    runs = {"ours": [{"losses": [2.0, 1.0]}], "plain": [{"losses": [2.0, 1.001]}]}
    with pytest.raises(SystemExit, match="plain does other work than ours"):
        training.require_same_losses(runs, ("ours", "plain"))
