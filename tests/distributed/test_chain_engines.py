"""Pruned, distilled, quantised, while split layers or pipelines side by side distil: as in one process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import stories, tiny_llama

import compresskit as ck
from compresskit.artifact import Artifact
from compresskit.distill.cache.provider import Cached
from compresskit.distill.placements import cache
from compresskit.modeling import open_model
from compresskit.modeling.packed import unpacked

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ENGINES: Mapping[str, tuple[dict[str, Any], str]] = {
    "tp 2": ({"processes": 2, "strategy": "tp", "tensor_parallel": 2}, "replicate"),
    "pipeline 2 x 1f1b, 2 side by side": ({"processes": 4, "pipeline_stages": 2}, "cache"),
}
"""What the manifest has to call it -> its fields, and where the teacher is."""
FIELDS: dict[str, Any] = {"steps": 6, "batch_size": 8, "context_length": 24, "learning_rate": 1e-2}
HERE = Path(__file__)
TOLERANCE = 1e-3
"""Relative, of perplexity: another order of sums may move a weight to the next integer."""


class OnLastRanks(Cached):
    """A cached teacher that ranks without the last of two stages must leave alone."""

    def load(self) -> None:
        assert int(os.environ["RANK"]) % 2
        super().load()


def chain(place: Path, out: str, placed: str, **engine: Any) -> Artifact:
    where = {"method": "cache", "keep": "hidden", "precision": "model"} if placed == "cache" else placed
    stages = (
        ck.Prune("magnitude", pattern="2:4"),
        ck.Distill(**FIELDS, teacher_placement=where, **engine),
        ck.Quantize("rtn", scheme="w8a16"),
    )
    recipe = ck.Recipe(model=str(place / "model"), data=str(place / "text.txt"), stages=stages)
    return ck.run(recipe, place / out, keep_stages=True, measures=("quality",))


def perplexities(artifact: Artifact) -> dict[str, float]:
    (found,) = ck.report(artifact).chains
    return {step.name: step.value("quality", "perplexity") for step in found.steps}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chain")
    tiny_llama(place / "model", initializer_range=0.2)
    (place / "text.txt").write_text(stories())
    return place


@pytest.fixture(scope="module")
def single(place: Path) -> Artifact:
    return chain(place, "one", "replicate")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_chain_ends_as_in_one_process(
    engine: str, place: Path, single: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, placed = ENGINES[engine]
    paths = (HERE.parent, *HERE.parents[1:3], os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setattr(cache, "CACHED", "test_chain_engines:OnLastRanks")
    made = chain(place, engine, placed, **fields)
    metrics = made.manifest["stages"][1]["result"]["metrics"]
    assert (metrics["engine"], metrics["processes"]) == (engine, fields["processes"])
    found, true = perplexities(made), perplexities(single)
    assert found == pytest.approx(true, rel=TOLERANCE)
    assert true["2-distill"] < 0.97 * true["1-prune"], "nothing was learnt, so nothing was compared"
    checks = made.manifest["stages"][-1]["checks"]
    assert checks["zeros"] == checks["grid"] == {"checked": 14, "kept": 14}
    before, after = open_model(made.directory / "stages" / "1-prune"), unpacked(open_model(made.directory))
    for layer in (name for name, linear in before.anatomy.linears.items() if linear.block):
        grid, zero_OI = after.grid(layer), before.weight_OI(layer) == 0
        assert grid is not None
        integers_OI = grid.quantize(after.weight_OI(layer))
        assert not integers_OI[zero_OI].any()
        assert zero_OI.view(-1, 4).sum(1).eq(2).all()
