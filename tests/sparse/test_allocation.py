"""Divisions of zeros against slow ones: sorting everything, trying everything, counting by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama
from torch import Tensor

from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.sparse.allocation.overall import Overall
from compresskit.sparse.allocation.owl import Owl
from compresskit.sparse.allocation.sensitivity import Sensitivity, cheapest, hull
from compresskit.sparse.allocation.uniform import Uniform
from compresskit.sparse.base import Survey
from compresskit.sparse.pattern import Block, LayerUnstructured, Pattern, RowUnstructured
from compresskit.sparse.promise import Zeros
from compresskit.sparse.stage import Prune
from compresskit.sparse.survey import patterns_of
from tests.sparse.test_prune_stage import TEXT, faults, outlook, run

BLOCKS = {"a.0": "a", "a.1": "a", "b.0": "b", "head": None}


def scores() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a.0": (8, 16), "a.1": (4, 32), "b.0": (16, 24), "head": (6, 10)}
    scales = {"a.0": 1.0, "a.1": 3.0, "b.0": 0.5, "head": 1.5}
    return {
        name: scales[name] * torch.randn(size, generator=generator).abs() ** 3 for name, size in sizes.items()
    }


def survey_of(
    found: Mapping[str, Tensor],
    zero_fraction: float,
    costs: Mapping[str, Mapping[float, float]] | None = None,
) -> Survey:
    def cost(levels: Mapping[str, Sequence[float]]) -> Mapping[str, Mapping[float, float]]:
        assert costs is not None
        return {layer: {level: costs[layer][round(level, 6)] for level in of} for layer, of in levels.items()}

    return Survey(
        sizes={name: (score.shape[0], score.shape[1]) for name, score in found.items()},
        blocks={name: BLOCKS.get(name) for name in found},
        zero_fraction=zero_fraction,
        score=lambda name: found[name],
        chosen_among=lambda name: found[name],
        cost=cost,
    )


def test_uniform_is_the_same_for_all() -> None:
    assert set(Uniform().fractions(survey_of(scores(), 0.4)).values()) == {0.4}


@pytest.mark.parametrize("zero_fraction", [0.1, 0.5, 0.8])
def test_global_zeros_what_sorting_all_scores_would(zero_fraction: float) -> None:
    found = scores()
    got = Overall(most=1.0).fractions(survey_of(found, zero_fraction))
    every = torch.cat([score.flatten() for score in found.values()]).sort().values
    threshold = every[round(zero_fraction * len(every))]
    for name, score in found.items():
        assert got[name] == pytest.approx(float((score < threshold).double().mean()), abs=2 / score.numel())


def test_global_leaves_a_part_of_every_layer() -> None:
    found = scores()
    found["b.0"] = found["b.0"] * 1e-6
    got = Overall(most=0.9).fractions(survey_of(found, 0.7))
    assert got["b.0"] == 0.9
    zeros = sum(got[name] * score.numel() for name, score in found.items())
    assert zeros == pytest.approx(0.7 * sum(score.numel() for score in found.values()), rel=1e-6)
    assert max(got.values()) <= 0.9


def test_global_may_ask_for_the_most_of_every_layer() -> None:
    """Rounding must not take one layer to be above the limit that all of them reach."""
    for seed in range(40):
        torch.manual_seed(seed)
        found = {f"l{i}": torch.rand(3 + i, 7 + seed % 5) for i in range(1 + seed % 6)}
        got = Overall(most=0.9).fractions(survey_of(found, 0.9))
        assert all(fraction == pytest.approx(0.9, abs=1e-6) for fraction in got.values())


def test_global_divides_equal_scores_in_proportion() -> None:
    found = {"a.0": torch.ones(4, 8), "b.0": torch.ones(8, 8)}
    got = Overall().fractions(survey_of(found, 0.25))
    assert got == {"a.0": pytest.approx(0.25), "b.0": pytest.approx(0.25)}


def test_owl_counts_outliers_block_by_block() -> None:
    found = scores()
    got = Owl(outlier=3.0, spread=0.1).fractions(survey_of(found, 0.6))
    share: dict[str | None, float] = {}
    for block in ("a", "b", None):
        every = torch.cat([found[name].flatten() for name in found if BLOCKS[name] == block])
        share[block] = float((every > 3.0 * every.mean()).double().mean())
    assert len(set(share.values())) == 3
    low, high = min(share.values()), max(share.values())
    for name in found:
        other = {n: got[n] - got[name] for n in found}
        for n in found:
            expected = -0.2 * (share[BLOCKS[n]] - share[BLOCKS[name]]) / (high - low)
            assert other[n] == pytest.approx(expected)
    total = sum(score.numel() for score in found.values())
    assert sum(got[n] * found[n].numel() for n in found) == pytest.approx(0.6 * total)


def test_owl_without_outliers_is_uniform() -> None:
    found = {"a.0": torch.ones(4, 8), "b.0": torch.ones(8, 8)}
    assert Owl().fractions(survey_of(found, 0.5)) == {"a.0": 0.5, "b.0": 0.5}


def test_a_hull_is_below_and_convex() -> None:
    curve = [(0.0, 0.0), (0.2, 0.5), (0.4, 0.3), (0.6, 0.9), (0.8, 1.0), (1.0, 4.0)]
    got = hull(curve)
    assert got == [(0.0, 0.0), (0.4, 0.3), (0.8, 1.0), (1.0, 4.0)]
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairwise(got)]
    assert slopes == sorted(slopes)


def test_the_cheapest_division_is_that_of_trying_all() -> None:
    grid = [i / 10 for i in range(11)]
    curves = {"a": hull([(x, x**2) for x in grid]), "b": hull([(x, 3 * x**3) for x in grid])}
    weights = {"a": 2, "b": 3}
    got = cheapest(curves, weights, 2.3)
    fine = [i / 100 for i in range(101)]

    def cost(name: str, x: float) -> float:
        for (x0, y0), (x1, y1) in zip(curves[name], curves[name][1:], strict=False):
            if x <= x1 + 1e-12:
                return y0 + (x - x0) / (x1 - x0) * (y1 - y0)
        raise AssertionError(x)

    tried = [cost("a", a) + cost("b", b) for a, b in product(fine, fine) if abs(2 * a + 3 * b - 2.3) < 1e-9]
    assert 2 * got["a"] + 3 * got["b"] == pytest.approx(2.3)
    assert cost("a", got["a"]) + cost("b", got["b"]) <= min(tried) + 1e-9


def test_sensitivity_spares_the_layer_that_costs_most() -> None:
    found = {"a.0": torch.ones(4, 10), "b.0": torch.ones(4, 10)}
    levels = [0.4, 0.5, 0.6]
    costs = {"a.0": dict.fromkeys(levels, 0.1), "b.0": {level: 10 * level**2 for level in levels}}
    got = Sensitivity(spread=0.1, levels=3).fractions(survey_of(found, 0.5, costs))
    assert got == {"a.0": pytest.approx(0.6), "b.0": pytest.approx(0.4)}


@settings(max_examples=60)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(2, 9), st.integers(2, 40)), min_size=1),
    st.floats(0.2, 0.8),
    st.booleans(),
    st.data(),
)
def test_patterns_have_the_zeros_asked_for(
    sizes: dict[str, tuple[int, int]], zero_fraction: float, by_row: bool, data: st.DataObject
) -> None:
    fractions = {name: data.draw(st.floats(-0.2, 1.2)) for name in sizes}
    pattern: Pattern = (RowUnstructured if by_row else LayerUnstructured)(zero_fraction)
    found = survey_of({name: torch.ones(size) for name, size in sizes.items()}, zero_fraction)
    got = patterns_of(dict.fromkeys(sizes, pattern), fractions, found)
    zeros, portions = 0, []
    for name, (rows, inputs) in sizes.items():
        assert isinstance(got[name], type(pattern))
        keep = got[name].keep_largest(torch.rand(rows, inputs))
        assert 0 < int(keep.sum()) < rows * inputs
        zeros += int((~keep).sum())
        portions.append(rows if by_row else 1)
    total = sum(rows * inputs for rows, inputs in sizes.values())
    room = [(p, i if by_row else r * i) for p, (r, i) in zip(portions, sizes.values(), strict=True)]
    least, most = sum(p for p, _ in room), sum(p * (n - 1) for p, n in room)
    wanted = min(max(zero_fraction * total, least), most)
    assert abs(zeros - wanted) <= max(portions)


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(4, 9), st.integers(7, 40)), min_size=1),
    st.floats(0.2, 0.8),
    st.data(),
)
def test_blocks_have_the_zeros_asked_for(
    sizes: dict[str, tuple[int, int]], zero_fraction: float, data: st.DataObject
) -> None:
    """Counted by hand as whole blocks, of which padded layers have short ones."""
    fractions = {name: data.draw(st.floats(-0.2, 1.2)) for name in sizes}
    found = survey_of({name: torch.ones(size) for name, size in sizes.items()}, zero_fraction)
    got = patterns_of(dict.fromkeys(sizes, Block(zero_fraction, 3, 5, pad=True)), fractions, found)
    blocks = {name: math.ceil(rows / 3) * math.ceil(inputs / 5) for name, (rows, inputs) in sizes.items()}
    zeros = {name: round(got[name].zero_fraction * blocks[name]) for name in sizes}
    assert all(0 < zeros[name] < blocks[name] for name in sizes)
    assert all(str(got[name]).endswith("%:3x5:pad") for name in sizes)
    least, most = len(sizes), sum(blocks.values()) - len(sizes)
    assert abs(sum(zeros.values()) - min(max(zero_fraction * sum(blocks.values()), least), most)) <= 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(tiny_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=3, hidden_size=64))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT * 60)
    return path


@pytest.mark.parametrize("allocation", ["global", "owl", {"method": "sensitivity", "levels": 3}], ids=str)
def test_a_stage_divides_and_promises(
    allocation: str | dict[str, object], model: ModelSource, text: Path, tmp_path: Path
) -> None:
    stage = Prune("wanda", pattern="60%:layer", allocation=allocation, samples=4, context_length=64)
    assert stage.faults(outlook(model), "s") == []
    result, pruned = run(stage, model, tmp_path, text)
    fractions = {record.name: record.zero_fraction for record in result.layers}
    assert len({round(f, 6) for f in fractions.values()}) > 2
    assert result.metrics["zero_fraction"] == pytest.approx(0.6, abs=1e-4)
    for promise in result.promises:
        assert isinstance(promise, Zeros)
        assert promise.broken(pruned, pruned) == ()
        assert promise.pattern == f"{fractions[promise.layer] * 100:.10f}".rstrip("0").rstrip(".") + "%:layer"


@pytest.mark.parametrize("allocation", ["global", "owl", {"method": "sensitivity", "levels": 3}], ids=str)
def test_blocks_are_divided_too(
    allocation: str | dict[str, object], model: ModelSource, text: Path, tmp_path: Path
) -> None:
    stage = Prune("wanda", pattern="60%:8x4", allocation=allocation, samples=4, context_length=64)
    assert stage.faults(outlook(model), "s") == []
    result, pruned = run(stage, model, tmp_path, text)
    assert len({round(record.zero_fraction, 6) for record in result.layers}) > 2
    assert result.metrics["zero_fraction"] == pytest.approx(0.6, abs=1e-3)
    for promise in result.promises:
        assert isinstance(promise, Zeros)
        assert promise.broken(pruned, pruned) == ()
        assert promise.pattern.endswith("%:8x4")


def test_global_takes_the_least_blocks_of_the_model(model: ModelSource, tmp_path: Path) -> None:
    """By their energy, sorted over all layers at once."""
    stage = Prune("magnitude", pattern="50%:8x4", allocation={"method": "global", "most": 1.0})
    result, _ = run(stage, model, tmp_path)
    energy = {
        record.name: model.weight_OI(record.name).square().unfold(0, 8, 8).unfold(1, 4, 4).sum((2, 3))
        for record in result.layers
    }
    every = torch.cat([e.flatten() for e in energy.values()]).sort().values
    for record in result.layers:
        below = float((energy[record.name] < every[len(every) // 2]).double().mean())
        assert record.zero_fraction == pytest.approx(below, abs=2 / energy[record.name].numel())


def test_a_measured_cost_is_that_of_the_pruned_model(model: ModelSource, text: Path, tmp_path: Path) -> None:
    """The layer that sensitivity spares most is the one whose pruning alone moves the logits most."""
    loaded = load_model(model, dtype="float32")
    ids = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = loaded(ids).logits.log_softmax(-1)
    moved = {}
    pattern = RowUnstructured(0.8)
    for name in model.anatomy.linears:
        if name == "lm_head":
            continue
        weight = loaded.get_parameter(f"{name}.weight")
        former = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(former.where(pattern.keep_largest(former.abs()), 0))
            got = loaded(ids).logits.log_softmax(-1)
            weight.copy_(former)
        moved[name] = float((want.exp() * (want - got)).sum(-1).mean())
    stage = Prune(
        "magnitude", pattern="50%", allocation={"method": "sensitivity", "spread": 0.3}, samples=4,
        context_length=64,
    )  # fmt: skip
    assert stage.reads_data
    result, _ = run(stage, model, tmp_path, text)
    fractions = {record.name: record.zero_fraction for record in result.layers}
    most, least = max(moved, key=moved.__getitem__), min(moved, key=moved.__getitem__)
    assert fractions[most] < 0.5 < fractions[least]


@pytest.mark.parametrize("pattern", ["21%", "80%"])
def test_levels_are_what_narrow_layers_have_room_for(pattern: str, text: Path, tmp_path: Path) -> None:
    """1% and 99% of 32 inputs are none and all."""
    narrow = open_model(tiny_llama(tmp_path / "narrow"))
    stage = Prune("magnitude", pattern=pattern, allocation="sensitivity", samples=2, context_length=32)
    assert stage.faults(outlook(narrow), "s") == []
    result, _ = run(stage, narrow, tmp_path / "run", text)
    assert result.metrics["zero_fraction"] == pytest.approx(float(pattern[:-1]) / 100, abs=0.01)


def test_what_an_allocation_cannot_do_is_told_before(model: ModelSource) -> None:
    assert "expected uniform, got owl with 2:4" in faults(Prune(pattern="2:4", allocation="owl"), model)
    said = faults(Prune(allocation="olw"), model)
    assert said == ("stages[0].allocation: expected the name of an allocation, got 'olw'. Did you mean: owl?")
    said = faults(Prune(allocation={"method": "owl", "spraed": 0.1}), model)
    assert "stages[0].allocation.spraed: expected a field of Owl" in said
    assert "Did you mean: spread?" in said
    said = faults(Prune(allocation={"spread": 0.1}), model)
    assert "stages[0].allocation: expected the key method, got a mapping without it" in said
    said = faults(Prune(pattern="95%", allocation="owl"), model)
    assert "expected more than 0.08 and less than 0.92, the spread of owl, got 95%" in said
    assert "at most 0.95" in faults(Prune(pattern="97%", allocation="global"), model)
    assert "less than 0.99" in faults(Prune(pattern="99.5%:layer", allocation="sensitivity"), model)
    assert not Prune("magnitude", allocation="global").reads_data
    assert Prune("magnitude", allocation="sensitivity").reads_data


def test_choices_are_values_and_read_back() -> None:
    from compresskit.recipe import Recipe, recipe_from

    stage = Prune(allocation={"method": "owl", "spread": 0.1}, recover="reconstruct")
    assert stage == Prune(allocation={"spread": 0.1, "method": "owl"}, recover={"method": "reconstruct"})
    assert hash(stage) == hash(Prune(allocation=stage.allocation, recover=stage.recover))
    recipe = Recipe(model="m", stages=(stage, Prune()))
    plain = recipe.to_json()
    assert plain["stages"][0]["prune"]["allocation"] == {"method": "owl", "spread": 0.1}
    assert plain["stages"][1]["prune"]["allocation"] == "uniform"
    assert recipe_from(plain, {}) == recipe
