"""What is said about a chain is true: no gain is claimed that was not measured, or that noise explains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compresskit.measure import Record
from compresskit.reports import build
from compresskit.reports.verdict import Finding, findings

from .conftest import make_records

Make = Callable[..., Path]


def said(make: Make, records: list[Record], **changes: Any) -> list[Finding]:
    return findings(build([make(records=records, **changes)]).chains[0])


def one(found: list[Finding], start: str) -> Finding:
    (match,) = [f for f in found if start in f.text]
    return match


def test_overlapping_quartiles_are_no_gain(make_artifact: Make) -> None:
    last = make_records("artifact", prefill=(8.5, 9.2, 10.0), decode=(0.8, 0.92, 1.0))
    finding = one(said(make_artifact, make_records("0-source") + last), "No faster")
    assert finding.tone == "note"
    assert "10.0 ms before and 9.20 ms after for the prompt" in finding.text
    assert "1.00 ms before and 0.92 ms after for each token" in finding.text
    assert "within the spread" in finding.text


def test_the_same_work_measured_faster_is_drift(make_artifact: Make) -> None:
    last = make_records("artifact", prefill=(4.9, 5.0, 5.1), decode=(0.49, 0.5, 0.51), zeros=0.5)
    finding = one(said(make_artifact, make_records("0-source") + last), "No faster")
    assert finding.tone == "note"
    assert "drift" in finding.text
    page = build([make_artifact("again", records=make_records("0-source") + last)]).html()
    assert "2.00x faster" not in page


def test_fewer_parameters_measured_faster_are_a_gain(make_artifact: Make) -> None:
    last = make_records("artifact", prefill=(4.9, 5.0, 5.1), decode=(0.49, 0.5, 0.51), parameters=100_000)
    found = said(make_artifact, make_records("0-source") + last)
    assert one(found, "2.00x faster").tone == "gain"
    page = build([make_artifact("again", records=make_records("0-source") + last)]).html()
    assert "2.00x faster" in page


def test_a_packed_model_that_is_slower_says_so(make_artifact: Make) -> None:
    last = make_records("artifact", decode=(1.9, 2.0, 2.1), total_bytes=270_000)
    found = said(make_artifact, make_records("0-source") + last)
    assert one(found, "2.00x slower").tone == "cost"


def test_size_memory_and_quality(make_artifact: Make) -> None:
    last = make_records("artifact", total_bytes=250_000, model_bytes=2_000_000, nats=1.2)
    found = said(make_artifact, make_records("0-source") + last)
    assert one(found, "4.00x smaller: 1.00 MB became 250 kB").tone == "gain"
    assert one(found, "Less memory: 5.00 MB became 2.00 MB beyond the 300 MB").tone == "gain"
    assert one(found, "0.667 became 0.800 bits per byte (+20.0%)").tone == "cost"


@pytest.mark.parametrize(
    ("prune", "expected"),
    [
        ({"method": "wanda", "pattern": "50%"}, "(a bit says whether it is kept): at most 1.59x at"),
        ({"method": "wanda", "pattern": "2:4"}, "Sparse tensor cores multiply 2:4 faster"),
        ({"method": "wanda"}, "(a bit says whether it is kept): at most 1.59x at"),
        ({"method": "cut", "layers": 1}, "every runtime gains"),
        ({"method": "cut", "parameters": 0.5}, "every runtime gains"),
    ],
)
def test_what_a_pattern_gives(make_artifact: Make, prune: dict[str, Any], expected: str) -> None:
    stages = [{"prune": prune}, {"distill": {"steps": 1}}, {"quantize": {"method": "rtn", "scheme": "W4A16"}}]
    found = said(make_artifact, [], recipe={"model": "tiny", "stages": stages})
    assert "Latency was not measured" in one(found, expected).text
    assert "unpacks 4-bit weights" in one(found, "transformers unpacks").text


def pruned_alone(make: Make, last: list[Record], **recipe: Any) -> list[Finding]:
    """Findings about one pruning to 50%, whose layers keep 32 bits."""
    place = make(records=make_records("0-source") + last)
    path = place / "compresskit.json"
    manifest = json.loads(path.read_text())
    manifest["stages"] = manifest["stages"][:1]
    manifest["recipe"] |= {"stages": manifest["recipe"]["stages"][:1], **recipe}
    path.write_text(json.dumps(manifest))
    return findings(build([place]).chains[0])


def test_zeros_that_are_measured_no_faster_say_so_and_why(make_artifact: Make) -> None:
    found = pruned_alone(make_artifact, make_records("1-prune", zeros=0.5), export=["gguf"])
    text = one(found, "50% of the linear weights are zero.").text
    assert "Zeros are stored as numbers, 4 bytes a weight, and llama.cpp multiplies by them" in text
    assert (
        "Not faster, since zeros are multiplied too: the measured time per token is the same within its "
        "spread (1.00 ms, 1.00 ms)." in text
    )
    assert "2.125 bytes a weight (a bit says whether it is kept): at most 1.88x at batch 1." in text
    assert one(found, "For speed: 8-bit weights (quantize, w8a8) give at most 4.00x").tone == "note"


def test_zeros_of_a_model_that_is_faster_are_not_told_to_be_slow(make_artifact: Make) -> None:
    last = make_records("1-prune", decode=(0.4, 0.5, 0.6), zeros=0.5, parameters=100_000)
    text = one(pruned_alone(make_artifact, last), "50% of the linear weights").text
    assert "Not faster" not in text
    assert "The measured time per token is 2.00x faster" in text


def test_zeros_in_quantised_layers_are_told_with_their_last_bits(make_artifact: Make) -> None:
    text = one(findings(build([make_artifact()]).chains[0]), "of the linear weights are zero").text
    assert "1.012 bytes a weight" in text, "8.1 bits after the last stage, not the 32 after pruning"


def test_recovery(make_artifact: Make) -> None:
    found = findings(build([make_artifact()]).chains[0])
    assert one(found, "Distillation won back 80%").tone == "gain"


def test_training_on_a_grid_is_told_as_what_it_makes(make_artifact: Make) -> None:
    """As quantisation, whose file the runtime unpacks; its scheme and steps are named."""
    place = make_artifact()
    manifest = json.loads((place / "compresskit.json").read_text())
    manifest["recipe"]["stages"][2] = {"qat": {"scheme": "w4a8", "loss": "cross_entropy", "steps": 30}}
    manifest["stages"][2] |= {"kind": "qat", "name": "3-qat"}
    (place / "compresskit.json").write_text(json.dumps(manifest))
    report = build([place])
    assert "4-bit weights" in report.markdown()
    assert "w4a8 cross_entropy 30 steps" in report.html()
