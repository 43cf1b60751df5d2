"""One report, four forms, the same figures in each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from compresskit.artifact import open_artifact
from compresskit.errors import InputError
from compresskit.measure.record import Record, write_records
from compresskit.reports import build
from compresskit.reports.artifact import write_artifact
from compresskit.reports.figures import write_bytes, write_ms, write_ratio
from compresskit.reports.svg import BAR_W

from .conftest import make_records

Make = Callable[..., Path]


def test_table(make_artifact: Make) -> None:
    lines = build([make_artifact()]).table().splitlines()
    assert lines[0] == "tiny"
    assert re.split(r"  +", lines[1]) == [
        "stage",
        "size on disk",
        "zeros",
        "peak memory",
        "of it the model",
        "prefill of 128",
        "per token",
        "perplexity",
        "bits per byte",
    ]
    cells = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in lines[3:]}
    assert cells["original"][:2] == ["1.00 MB", "0.0%"]
    assert cells["prune wanda 50%"][0] == "1.00 MB x1.00"
    assert cells["prune wanda 50%"][-1] == "1.000 x1.50"
    assert cells["quantize rtn w8a8"][0] == "270 kB x0.27", "the artifact stands for its last stage"
    assert len({len(line) for line in lines[3:]}) == 1, "columns are aligned"


def test_json_holds_the_figures_and_the_records(make_artifact: Make) -> None:
    (chain,) = json.loads(build([make_artifact()]).json())
    assert [s["name"] for s in chain["steps"]] == ["0-source", "1-prune", "2-distill", "3-quantize"]
    last = chain["steps"][-1]
    assert last["figures"]["total_bytes"] == 270_000
    assert last["ratios"]["total_bytes"] == pytest.approx(0.27)
    assert chain["steps"][0]["ratios"]["total_bytes"] is None
    assert chain["steps"][1]["seconds"] == 3.25
    assert {r["kind"] for r in last["records"]} == {"size", "quality", "latency", "memory"}


def test_markdown(make_artifact: Make) -> None:
    text = build([make_artifact()]).markdown()
    assert "# tiny" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert "grid 6 of 6" in text
    assert "Rows were cut \\<here\\>." in text


def test_page_is_self_contained_and_well_formed(make_artifact: Make) -> None:
    page = build([make_artifact()]).html()
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert "Rows were cut &lt;here&gt;." in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 4 + 1 + 1 + 4, "bars, quality, training loss, two maps for each of two stages"
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("aria-label")
        width = float(root.get("viewBox", "").split()[2])
        for element in root.iter("text"):
            assert 0 <= float(element.get("x", "nan")) <= width
    assert page.count("<table") == page.count("</table>")
    assert page == build([make_artifact("again")]).html(), "the same input, the same bytes"


def test_bars_are_to_scale(make_artifact: Make) -> None:
    page = build([make_artifact()]).html()
    picture = next(p for p in re.findall(r"<svg.*?</svg>", page) if "Size on disk" in p)
    starts = re.findall(r'<path class="k-\w+" d="M([\d.]+) [\d.]+h([\d.]+)q([\d.]+)', picture)
    widths = [float(h) + float(r) for _, h, r in starts]
    assert widths[3] / widths[0] == pytest.approx(0.27, abs=0.005)
    assert widths[0] == BAR_W, "the longest leaves room for its figure"


def test_losses_come_with_the_wins(make_artifact: Make) -> None:
    records = make_records("0-source") + make_records(
        "artifact", total_bytes=3_000_000, model_bytes=20_000_000
    )
    text = build([make_artifact(records=records)]).markdown()
    assert "**cost**: 3.00x larger: 1.00 MB became 3.00 MB on disk." in text
    assert "**cost**: More memory" in text


def test_records_alone(tmp_path: Path) -> None:
    records = make_records("one") + make_records("two", total_bytes=500_000)
    report = build(records)
    assert "500 kB x0.50" in report.table()
    write_records(records, tmp_path / "r")
    assert build([tmp_path / "r"]).table().splitlines()[1:] == report.table().splitlines()[1:]
    assert "0.50" in build([tmp_path / "r" / "two.json", *records]).html()


def test_a_single_step_and_an_encoder() -> None:
    quality = Record(kind="quality", subject="bert", values={"perplexity": None, "bits_per_byte": None})
    report = build([make_records("bert")[0], quality])
    assert "perplexity" not in report.table()
    assert "bert" in report.html()
    assert report.markdown()


def test_several_artifacts(make_artifact: Make) -> None:
    page = build([make_artifact("a"), make_artifact("b")]).html()
    assert page.count('class="chain-of"') == 2


def test_the_artifact_has_its_own_row_beside_a_measured_last_stage(make_artifact: Make) -> None:
    records = [r for s in ("0-source", "3-quantize", "artifact") for r in make_records(s)]
    steps = build([make_artifact(records=records)]).chains[0].steps
    assert [s.name for s in steps][-2:] == ["3-quantize", "artifact"]


@pytest.mark.parametrize(
    ("kind", "fields", "detail"),
    [
        ("prune", {"method": "wanda", "pattern": "50%:16x16"}, "wanda 50%:16x16"),
        ("prune", {"method": "cut", "layers": 2, "milliseconds": None}, "cut layers 2"),
        ("prune", {"method": "cut", "milliseconds": 30.0, "trim": "both"}, "cut milliseconds 30.0"),
        (
            "sparse_train",
            {"method": "maskllm", "pattern": "2:4", "loss": "cross_entropy", "steps": 9},
            "maskllm 2:4 cross_entropy 9 steps",
        ),
        (
            "distill",
            {"loss": [{"method": "jsd", "beta": 0.3, "weight": 2.0}, {"method": "taid"}], "steps": 9},
            "jsd (beta 0.3, weight 2.0) + taid 9 steps",
        ),
    ],
)
def test_what_a_stage_was_asked_for(
    make_artifact: Make, kind: str, fields: dict[str, object], detail: str
) -> None:
    place = make_artifact()
    manifest = json.loads((place / "compresskit.json").read_text())
    manifest["recipe"]["stages"][0] = {kind: fields}
    manifest["stages"][0]["kind"] = kind
    (place / "compresskit.json").write_text(json.dumps(manifest))
    assert build([place]).chains[0].steps[1].detail == detail


def test_figures_of_a_stage_stand_in_the_terminal_as_people_write_them(make_artifact: Make) -> None:
    place = make_artifact()
    manifest = json.loads((place / "compresskit.json").read_text())
    metrics = {"blocks_kept": [0, 2], "forecast": {"prefill_ms": 1.23456789, "decode_tokens": 4}}
    manifest["stages"][0]["result"]["metrics"] = metrics
    (place / "compresskit.json").write_text(json.dumps(manifest))
    lines = write_artifact(open_artifact(place)).splitlines()
    assert "  blocks_kept: [0, 2]" in lines
    assert "  forecast: prefill_ms 1.23457, decode_tokens 4" in lines


def test_different_conditions_are_told(make_artifact: Make) -> None:
    records = make_records("0-source") + make_records("artifact", threads=4)
    (chain,) = build([make_artifact(records=records)]).chains
    assert any("latency of quantize" in w and "(threads)" in w for w in chain.warnings)


def test_a_caution_is_told_once_with_its_steps(make_artifact: Make) -> None:
    records = [
        Record(**{**r.to_json(), "notes": ("It was busy.",)}) if r.kind == "latency" else r
        for r in make_records("0-source") + make_records("artifact")
    ]
    page = build([make_artifact(records=records)]).html()
    assert page.count("It was busy.") == 1
    assert "latency of original, quantize: It was busy." in page


def test_perplexities_of_different_tokens_get_no_ratio(make_artifact: Make) -> None:
    records = make_records("0-source")
    for record in make_records("artifact"):
        if record.kind == "quality":
            record = Record(**{**record.to_json(), "notes": (), "values": {**record.values, "tokens": 999}})
        records.append(record)
    (chain,) = json.loads(build([make_artifact(records=records)]).json())
    assert chain["steps"][-1]["ratios"]["perplexity"] is None
    assert chain["steps"][-1]["ratios"]["bits_per_byte"] == 1.0


def test_errors(tmp_path: Path, make_artifact: Make) -> None:
    with pytest.raises(InputError, match="nothing"):
        build([])
    with pytest.raises(InputError, match="no such file"):
        build([tmp_path / "absent"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="compresskit bench"):
        build([tmp_path / "model"])
    damaged = make_artifact()
    (damaged / "records" / "0-source.json").write_text('[{"kind": "size"')
    with pytest.raises(InputError, match=r"0-source\.json"):
        build([damaged])
    with pytest.raises(InputError, match=r"stages\[0\]\.checks"):
        build([make_artifact("old", stages=[{"name": "1-prune", "kind": "prune", "result": {}}])])


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_044_992, "1.04 MB"),
        (99_960, "100 kB"),
        (3.2e12, "3.20 TB"),
    ],
)
def test_bytes_are_written_with_three_digits(value: float, written: str) -> None:
    assert write_bytes(value) == written


def test_times_and_ratios_are_written() -> None:
    assert [write_ms(v) for v in (0.0123, 0.91, 12.34, 250.0, 12_000)] == [
        "0.012 ms",
        "0.91 ms",
        "12.3 ms",
        "250 ms",
        "12.0 s",
    ]
    assert [write_ratio(v) for v in (None, 0.267, 1.0, 250.0)] == ["", "x0.27", "x1.00", "x250"]
