"""All measurements of small models, in fresh processes where they have to be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from compresskit.api import run
from compresskit.data.spec import DataSpec
from compresskit.errors import InputError, ModelError, WorkerError
from compresskit.measure import compare_latency, measure
from compresskit.measure.fresh import run_probe
from compresskit.measure.load import auto_class
from compresskit.measure.record import Record, record_from
from compresskit.measure.size import file_bytes
from compresskit.quant.stage import Quantize
from compresskit.recipe import Recipe
from compresskit.timing import Runner


def by_kind(records: list[Record]) -> dict[str, Record]:
    return {record.kind: record for record in records}


@pytest.mark.slow
def test_causal_model(llama_dir: Path) -> None:
    got = by_kind(measure(llama_dir, data=["abc", "de"], threads=1, repetitions=5, subject="original"))
    for record in got.values():
        assert record_from(record.to_json(), "memory") == record
        assert record.subject == "original"
    assert list(got) == ["size", "quality", "latency", "memory"]
    assert got["quality"].values["bytes"] == 5
    assert got["quality"].settings["context_length"] == 64

    latency = got["latency"]
    assert (latency.threads, latency.repetitions) == (1, 5)
    assert latency.settings["prompt_tokens"] + latency.settings["decode_tokens"] <= 64
    for name in ("prefill_ms", "decode_ms"):
        low, median, high = latency.quartiles[name]
        assert 0 < low <= median == latency.values[name] <= high

    memory = got["memory"].values
    assert memory["baseline_bytes"] > 50e6, "a bare interpreter with torch"
    assert memory["baseline_bytes"] < memory["peak_bytes"]
    assert memory["model_bytes"] == memory["peak_bytes"] - memory["baseline_bytes"]


@pytest.mark.slow
def test_memory_sees_the_weights_and_not_the_parent(tmp_path: Path, llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    model.config.intermediate_size = 200_000  # 2 layers * 3 * 32 * 200,000 * 4 bytes = 154 MB
    big = AutoModelForCausalLM.from_config(model.config)
    big.save_pretrained(tmp_path)
    weights_bytes = sum(p.numel() * 4 for p in big.parameters())
    ballast = torch.ones(200_000_000)  # 800 MB in this process must not count in the other
    (record,) = measure(tmp_path, what=("memory",), threads=1)
    assert weights_bytes < record.values["model_bytes"] < 3 * weights_bytes
    assert record.values["peak_bytes"] < ballast.numel() * 4 + 400e6


def test_size_counts_files_and_zeros(llama_dir: Path, tmp_path: Path) -> None:
    (record,) = measure(llama_dir, what=("size",))
    files = {p.name: p.stat().st_size for p in llama_dir.iterdir()}
    assert record.values["weights_bytes"] == files["model.safetensors"]
    assert record.values["total_bytes"] == sum(files.values())
    assert record.values["tokenizer_bytes"] == files["tokenizer.json"] + files["tokenizer_config.json"]
    weights = zeros = parameters = 0
    with safe_open(llama_dir / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            parameters += tensor.numel()
            if "_proj" in name:
                weights += tensor.numel()
                zeros += int((tensor == 0).sum())
    assert zeros == 2 * 24 * 32
    assert record.values["num_parameters"] == parameters
    assert record.values["zero_fraction"] == zeros / weights


def test_quality_reads_a_data_set(llama_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abc", "defg", "hi")))
    spec = DataSpec(source=str(data), split="validation", validation_fraction=1.0)
    (record,) = measure(llama_dir, data=spec, what=("quality",), max_documents=2, context_length=16)
    assert record.values["documents"] == 2
    assert record.values["bytes"] < 9
    assert record.settings["data"] == f"{data}, validation split"
    (whole,) = measure(llama_dir, data=DataSpec(source=str(data)), what=("quality",), context_length=16)
    assert (whole.values["documents"], whole.values["bytes"]) == (3, 9)
    assert whole.settings["data"] == str(data)
    assert record.settings["context_length"] == 16


def test_what_stands_beside_the_model_is_counted_apart(llama_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "artifact"
    shutil.copytree(llama_dir, place)
    (place / "records").mkdir()
    for name in ("compresskit.json", "recipe.yaml", "records/a.json", "grids.safetensors", "stage.json"):
        (place / name).write_bytes(b"x" * 100)
    plain, beside = file_bytes(llama_dir), file_bytes(place)
    assert beside == {**plain, "manifest_bytes": 500}
    for path in place.glob("model*.safetensors"):
        path.unlink()
    with pytest.raises(ModelError, match="a file of weights"):
        file_bytes(place)


@pytest.mark.slow
def test_encoder(bert_dir: Path) -> None:
    got = by_kind(measure(bert_dir, what=("size", "quality", "latency"), threads=1, repetitions=2))
    assert got["quality"].values["perplexity"] is None
    assert "does not apply" in got["quality"].notes[0]
    assert "decode_ms" not in got["latency"].values
    assert got["latency"].values["prefill_ms"] > 0
    assert got["size"].values["num_parameters"] > 0


def test_models_in_turn(llama_dir: Path, bert_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def probe(name: str, job: dict, *, threads: int) -> dict:
        asked.append(Path(job["directory"]).name)
        times = [float(len(asked))] * job["repetitions"]
        more = {"load_ms": 1.0, "dtype": "float32", "attention": "sdpa"}
        more["notes"] = ["An op does without its kernel."]
        more["layouts"] = {"blocks.0.q": "bitmap", "blocks.1.q": "bitmap", "blocks.0.v": "1: gap, 2-4: dense"}
        return {"prefill_ms": times, "decode_ms": times if job["causal"] else [], **more}

    monkeypatch.setattr("compresskit.measure.suite.run_probe", probe)
    got = compare_latency({"a": llama_dir, "b": bert_dir}, rounds=3, threads=1, repetitions=2)
    assert asked == ["tiny-llama", "tiny-bert"] * 3
    assert [r.subject for r in got] == ["a", "b"]
    assert got[0].quartiles["prefill_ms"] == (2.0, 3.0, 4.0), "medians of processes 1, 3 and 5"
    assert got[1].values["prefill_ms"] == 4.0
    assert all(r.repetitions == 3 and r.settings["rounds_per_process"] == 2 for r in got)
    assert all(record_from(r.to_json(), "latency") for r in got)
    assert all("An op does without its kernel." in r.notes for r in got)
    assert all(r.settings["layouts"]["blocks.0.v"] == "1: gap, 2-4: dense" for r in got)
    assert "Packed layers that multiply as bitmap: blocks.*.q (2)." in got[0].notes
    assert "Packed layers that multiply as 1: gap, 2-4: dense: blocks.*.v (1)." in got[0].notes


def test_decoding_uses_the_cache_and_every_step(llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    lengths: list[tuple[int, int, int]] = []

    def note(module, args, kwargs, out) -> None:
        cached = out.past_key_values.get_seq_length()
        lengths.append((kwargs["input_ids"].shape[1], out.logits.shape[1], cached))

    model.register_forward_hook(note, with_kwargs=True)
    runner = Runner(model, causal=True, prompt_tokens=7, decode_tokens=3, seed=0)
    prefill_ms, decode_ms = runner.once()
    assert lengths == [(7, 1, 7), (1, 1, 8), (1, 1, 9), (1, 1, 10)]
    assert prefill_ms > 0
    assert decode_ms > 0


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("BertModel", "AutoModel"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
    ],
)
def test_auto_class(tmp_path: Path, architecture: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert auto_class(tmp_path) == expected


def test_errors(tmp_path: Path, llama_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        measure(tmp_path)
    with pytest.raises(InputError, match="Did you mean: latency"):
        measure(llama_dir, what=("latancy",))
    with pytest.raises(InputError, match="at most 64 together"):
        measure(llama_dir, what=("latency",), prompt_tokens=60, decode_tokens=5)
    with pytest.raises(WorkerError, match="KeyError"):
        run_probe("nothing of the kind", {}, threads=1)


def test_importing_measure_and_reports_imports_no_torch() -> None:
    code = "import sys, compresskit.measure, compresskit.reports; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-channel"])
def test_zeros_of_a_packed_artifact(llama_dir: Path, tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "out"
    run(Recipe(model=str(llama_dir), stages=(Quantize(scheme=scheme),)), out, measures=())
    before, after = (measure(d, what=("size",))[0].values for d in (llama_dir, out))
    assert after["num_parameters"] == before["num_parameters"]
    assert after["linear_weights"] == before["linear_weights"]
    assert after["bytes_per_parameter"] < before["bytes_per_parameter"]
    # Rounding adds zeros to those that were there, but not many.
    assert before["zero_fraction"] <= after["zero_fraction"] < before["zero_fraction"] + 0.3
