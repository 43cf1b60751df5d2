"""What holds for every export target, and the command."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from compresskit.cli import main
from compresskit.exports import EXPORTS
from compresskit.exports.base import Prospect, prospect_of
from compresskit.modeling import ModelSource, open_model
from compresskit.quant.scheme import parse
from tests.exports.models import on_grids
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(tiny_llama(tmp_path_factory.mktemp("exports") / "model", hidden_size=64))


@pytest.mark.parametrize("to", EXPORTS)
def test_faults_need_no_weights_and_come_all_together(
    to: str, dense: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelSource, "tensor", None)
    monkeypatch.setattr("compresskit.exports.base.find_spec", lambda name: None)
    schemes = {name: parse("w4a8-g32") for name in dense.anatomy.linears if name.endswith("q_proj")}
    schemes |= {name: parse("fp8") for name in dense.anatomy.linears if name.endswith("down_proj")}
    model = Prospect(anatomy=dense.anatomy, config=dense.config, tokenizer=dense.directory, schemes=schemes)
    faults = EXPORTS[to]().faults(model, "here")
    assert all(fault.where == "here" for fault in faults)
    told = " ".join(map(str, faults))
    alone = ("dense", "compressed-tensors", "bitmask")
    assert ("not installed. Install it: pip install" in told) == (to not in alone)
    layers = {"gguf": ["fp8"], "bitmask": ["fp8"], "dense": [], "compressed-tensors": []}.get(
        to, ["w4a8-g32", "fp8"]
    )
    for scheme in layers:
        assert f"got {scheme} in model.layers.0." in told
    doc = inspect.getdoc(inspect.getmodule(EXPORTS[to]))
    assert all([doc, EXPORTS[to].faults.__doc__, EXPORTS[to].write.__doc__])


def test_schemes_are_read_off_grids(dense: ModelSource, tmp_path: Path) -> None:
    names = ("w8a8", "w8a16", "w4a16-g32", "w4a16-g32-asym", "w8a8-static", "nf4", "fp8", "w4a8-g32")
    for name in names:
        stage = on_grids(dense, tmp_path / name, {"q_proj": name})
        assert set(prospect_of(stage).schemes.values()) == {parse(name)}


def test_the_command(dense: ModelSource, tmp_path: Path) -> None:
    stage = on_grids(dense, tmp_path / "stage", {"proj": "w8a8"})
    out = tmp_path / "out"
    words = ["export", str(stage.directory), "--to", "dense", "-o", str(out), "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["out"] == str(out)
    assert found["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert f"warning: {found['warnings'][0]}" in done.stderr
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 2
    assert "an export. Add --overwrite to replace it." in again.stderr
    (out / "left").touch()
    over = CliRunner().invoke(main, [*words, "--overwrite"])
    assert over.exit_code == 0, over.output
    assert not (out / "left").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stage"]
