"""The command line as a new user meets it: rightly, and wrongly in every way we know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from compresskit.cli import main
from tests.tiny import tiny_llama

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data, good and bad."""
    place = tmp_path_factory.mktemp("material")
    tiny_llama(place / "model")
    tiny_llama(place / "odd", intermediate_size=172)
    other = tiny_llama(place / "other", vocab_size=300)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": f"line {n} " * 20}) for n in range(200)))
    (place / "empty.txt").write_text("")
    (place / "one.txt").write_text("One document and no more.")
    (place / "cut.jsonl").write_text('{"text": "whole"}\n{"text": "cut of')
    (place / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (place / "two.csv").write_text("left,right\nsome words,other words\n")
    return place


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> Result:
        return CliRunner().invoke(main, [str(a) for a in argv])

    return run


def test_prune_rightly(cli: Run, material: Path, tmp_path: Path) -> None:
    argv = ["prune", material / "model", "--method", "magnitude", "--pattern", "2:4", "-o", "out"]
    done = cli(*argv, "--measure", "size", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["artifact"] == str(tmp_path / "out")
    shown = cli("inspect", "out", "--verify")
    assert shown.exit_code == 0, shown.output
    assert "zeros 14/14" in shown.output
    assert "model after 1 stage\n" in shown.output
    assert "50.0%" in shown.output


def test_dry_run_writes_nothing(cli: Run, material: Path, tmp_path: Path) -> None:
    done = cli("quantize", material / "model", "--scheme", "W8A8", "-o", "out", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    stage = json.loads(done.stdout.splitlines()[-1])["stages"][0]
    assert stage["bytes_after"] < stage["bytes_before"]
    assert stage["layers"] == 14
    assert list(tmp_path.iterdir()) == []


def test_choices_take_a_name_a_mapping_or_single_fields(cli: Run, material: Path) -> None:
    argv = ("prune", material / "model", "--method", "wanda", "--pattern", "60%", "--dry-run")
    done = cli(*argv, "--allocation", "owl", "--recover", "{method: reconstruct, epochs: 2}")
    assert done.exit_code == 0, done.output
    assert "wanda 60% owl reconstruct" in done.output
    for typed in (("--allocation", "owl", "--set", "allocation.spread=2"), ("--recover", "{epochs: 2}")):
        assert cli(*argv, *typed).exit_code != 0
    said = cli(*argv, "--allocation", "owl", "--set", "allocation.spread=2").output
    assert "allocation.spread: expected a number above 0 and at most 0.5, got 2" in said


def test_plan_prints_the_schema(cli: Run) -> None:
    assert json.loads(cli("plan", "--schema").stdout)["title"] == "compresskit recipe"


@pytest.mark.parametrize("option", ["--out=x", "--measure=all", "--keep-stages", "--overwrite", "--dry-run"])
def test_a_plan_takes_no_option_that_it_would_ignore(option: str, cli: Run) -> None:
    done = cli("plan", "recipe.yaml", option)
    assert done.exit_code == 2
    assert f"No such option '{option.partition('=')[0]}'" in done.output


def test_doctor_tells_versions_and_what_is_missing(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import compresskit.cli.doctor as doctor

    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "peft" else "9.9")
    done = cli("doctor", "--json")
    assert done.exit_code == 0
    assert "peft missing; it would give LoRA" in done.output
    assert "torch 9.9" in done.output
    assert json.loads(done.stdout.splitlines()[-1])["packages"]["peft"] is None


WRONG = {
    "unknown method": (
        "prune {m}/model -o out --method wnada",
        ["--method stages[0].method: expected", "'wnada'", "wanda"],
    ),
    "unknown field": ("prune {m}/model -o out --set sampels=3", ["--set sampels", "'sampels'", "samples"]),
    "unknown field of a quantiser": ("quantize {m}/model -o out --set grup=3", ["--set grup", "'grup'"]),
    "pattern that is none": ("prune {m}/model -o out --pattern 4:2", ["--pattern stages[0].pattern", "4:2"]),
    "pattern that does not divide": (
        "prune {m}/odd -o out --pattern 8:16",
        ["172", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "on_indivisible"],
    ),
    "scheme that is none": ("quantize {m}/model -o out --scheme w3a5", ["--scheme", "w3a5"]),
    "scheme that does not divide": (
        "quantize {m}/odd -o out --scheme w4a16-g128",
        ["model.layers.0.mlp.down_proj", "172"],
    ),
    "target that matches nothing": (
        "prune {m}/model -o out --targets *.up_prj",
        ["stages[0].targets", "*.up_prj", "up_proj"],
    ),
    "no such model": ("prune {m}/absent -o out", ["absent", "hub"]),
    "a model that is a file": ("prune {m}/text.jsonl -o out", ["text.jsonl", "expected a model directory"]),
    "no such data": ("finetune {m}/model -o out --data {m}/absent.txt", ["--data", "absent.txt"]),
    "empty data": ("finetune {m}/model -o out --data {m}/empty.txt", ["--data", "empty.txt"]),
    "truncated data": ("finetune {m}/model -o out --data {m}/cut.jsonl", ["--data", "cut.jsonl:2"]),
    "data that is not UTF-8": ("finetune {m}/model -o out --data {m}/latin.txt", ["latin.txt", "UTF-8"]),
    "data without a text column": (
        "finetune {m}/model -o out --data {m}/two.csv",
        ["two.csv", "left", "right"],
    ),
    "other vocabulary": (
        "distill --teacher {m}/model --student {m}/other -o out --data {m}/text.jsonl",
        ["--teacher", "same token ids", "'a' is 65 and 64"],
    ),
    "cut that is none": ("distill --teacher {m}/model --student cut:layers -o out", ["cut:layers=3,ffn=0.5"]),
    "cut beyond what is there": (
        "distill --teacher {m}/model --student cut:layers=9 -o out",
        ["--student stages[0].layers", "9", "2"],
    ),
    "heads that grouping forbids": (
        "prune {m}/model -o out --method cut --set heads=3",
        ["--set heads stages[0].heads", "query heads", "got 3", "nearest legal one is 2"],
    ),
    "more parameters than are left": (
        "prune {m}/model -o out --method cut --set layers=1 --set parameters=0.9",
        ["--set parameters stages[0].parameters", "got 0.9", "The nearest is 0."],
    ),
    "a multiple that does not fit": (
        "prune {m}/model -o out --method cut --set ffn=0.5 --set multiple=128",
        ["stages[0].ffn", "multiple of 128", "Lower multiple"],
    ),
    "a cut by no such importance": (
        "prune {m}/model -o out --method cut --set ffn=0.5 --set importance=activations",
        ["stages[0].importance", "Did you mean: activation"],
    ),
    "unknown strategy": ("finetune {m}/model -o out --nproc 2 --strategy fdsp", ["--strategy", "fsdp"]),
    "more processes than cores": (
        "finetune {m}/model -o out --device cpu --nproc 100000 --batch-size 100000 --dry-run",
        ["--nproc stages[0].processes", "at most 8 processes on a CPU", "got 100000"],
    ),
    "unknown loss": (
        "distill --teacher {m}/model --student {m}/model -o out --loss kl",
        ["--loss", "forward_kl"],
    ),
    "one unknown feature loss of two": (
        "distill --teacher {m}/model --student {m}/model -o out --features squarehead --features relatoin",
        ["--features", "features[1]", "Did you mean: relation"],
    ),
    "ill-typed number": ("finetune {m}/model -o out --steps many", ["--steps", "a whole number", "'many'"]),
    "no output": ("prune {m}/model", ["--out"]),
    "output not ours": ("prune {m}/model -o full --method magnitude", ["full", "did not write"]),
    "unknown measure": ("prune {m}/model -o out --measure speed", ["speed", "latency"]),
    "nothing to score": (
        "prune {m}/model -o out --method magnitude --data {m}/one.txt",
        ["one.txt", "at least one document to score"],
    ),
    "a negative number of documents": (
        "prune {m}/model -o out --method magnitude --eval-documents -1",
        ["documents to score", "-1"],
    ),
    "a report where no file can be": ("report {m}/model -o absent/r.html", ["absent/r.html"]),
    "records where no file can be": ("bench {m}/model -o absent/r.json", ["absent/r.json"]),
    "unknown dtype": ("prune {m}/model -o out --dtype float31", ["float31"]),
    "a column that is not there": (
        "prune {m}/model -o out --data {m}/two.csv --set data.column=middle",
        ["two.csv", "middle", "left", "right"],
    ),
    "unknown command": ("prun {m}/model", ["did you mean: prune"]),
    "report of nothing": ("report {m}/model", ["compresskit.json"]),
    "several faults at once": (
        "prune {m}/model -o out --pattern 4:2 --samples 0 --data {m}/empty.txt",
        ["4:2", "samples", "empty.txt"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrongly(case: str, cli: Run, material: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    command, parts = WRONG[case]
    done = cli(*command.format(m=material).split())
    assert done.exit_code == 2, f"{done.output}\n{done.exception!r}"
    for part in parts:
        assert part in done.output, done.output
    assert "Traceback" not in done.output
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["full", "mine"], "something was written"


def test_a_launch_that_this_machine_has_no_room_for_starts_nothing(
    cli: Run, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr("compresskit.training.agent._set_up", lambda *of_it: None)
    monkeypatch.setattr("compresskit.training.agent._run_again", lambda *of_it: started.append(of_it))
    recipe = {"model": str(material / "model"), "device": "cpu", "stages": [{"finetune": {"steps": 1}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = cli("run", "recipe.yaml", "-o", "out", "--nproc", 100000)
    assert (done.exit_code, started) == (2, [])
    assert "--nproc: expected at most 8 processes on a CPU, or 4 for each of the" in done.output
    assert cli("run", "recipe.yaml", "-o", "out", "--nproc", 2).exit_code == 0
    assert len(started) == 1


def test_distill_needs_a_teacher_unless_one_is_behind_a_server(tmp_path: Path) -> None:
    student = str(tiny_llama(tmp_path / "model"))
    asked = ["distill", "--student", student, "-o", str(tmp_path / "out"), "--dry-run"]
    for more in ([], ["--teacher-placement", "4bit"], ["--student", "cut:layers=1"]):
        result = CliRunner().invoke(main, [*asked, *more])
        assert result.exit_code == 2
        assert "Missing option '--teacher'" in result.output
    server = "{method: server, url: 'http://127.0.0.1:9/v1', model: m}"
    result = CliRunner().invoke(main, [*asked, "--teacher-placement", server])
    assert "expected a server that tells its models" in result.output


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full is a disk without room; any other error of a file keeps its traceback."""
    command = click.Command("inspect", callback=lambda: Path("/dev/full").write_text("x"))
    monkeypatch.setattr("compresskit.cli.locate", lambda name: command)
    found = CliRunner().invoke(main, ["inspect"])
    assert found.exit_code == 3
    assert "error: a file: expected room on the disk, got No space left on device" in found.output
    command.callback = lambda: Path("/").write_text("x")
    assert isinstance(CliRunner().invoke(main, ["inspect"]).exception, IsADirectoryError)
