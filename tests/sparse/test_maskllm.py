"""Masks that are learnt: draw and gradient beside the same written out, and a best mask that is known."""

from __future__ import annotations

from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import stories, tiny_llama
from torch import Tensor

import compresskit as ck
from compresskit.data.spec import DataSpec
from compresskit.modeling import load_model, open_model
from compresskit.sparse.base import Moment, moment_seed
from compresskit.sparse.chosen import START, Chosen, ChosenLinear, choose_in_place
from compresskit.sparse.maskllm import MaskLLM, masks_of
from compresskit.sparse.pattern import NM, LayerUnstructured, RowUnstructured
from compresskit.sparse.train import SparseTrain
from compresskit.training.trainer import StageTrainer
from tests.sparse.test_prune_stage import outlook
from tests.sparse.test_prune_stage import run as run_stage

LAYER = "model.layers.0.mlp.up_proj"
STEPS = 8
GROUPS = [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]


def slow_masks(keep: int, of: int) -> list[tuple[int, ...]]:
    """Of all rows of bits those with as many ones, the first place counting most."""
    return sorted((bits for bits in product((0, 1), repeat=of) if sum(bits) == keep), reverse=True)


def slow_blend(method: MaskLLM, logits: list[float], uniform: list[float], share: float) -> list[float]:
    """The paper's equations for one group."""
    kappa = method.kappa_begin + share * (method.kappa_end - method.kappa_begin)
    tau = method.tau_begin + share * (method.tau_end - method.tau_begin)
    total = sum(exp(kappa * pi) for pi in logits)
    drawn = [
        (log(exp(kappa * pi) / total) - log(-log(u))) / tau for pi, u in zip(logits, uniform, strict=True)
    ]
    top = max(drawn)
    return [exp(d - top) / sum(exp(e - top) for e in drawn) for d in drawn]


def slow_mask(blend: Tensor, keep: int, of: int) -> Tensor:
    """(O, G, C) to (O, I), one number after another."""
    rows = []
    for groups in blend.tolist():
        row: list[float] = []
        for group in groups:
            masks = slow_masks(keep, of)
            row += [sum(y * bits[m] for y, bits in zip(group, masks, strict=True)) for m in range(of)]
        rows.append(row)
    return torch.tensor(rows)


def logits_for(keep: int, of: int, groups: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.01 * torch.randn(5, groups, len(slow_masks(keep, of)), generator=generator)


@pytest.mark.parametrize(("keep", "of"), GROUPS)
def test_all_masks_are_there_once(keep: int, of: int) -> None:
    found = [tuple(int(bit) for bit in row) for row in masks_of(NM(keep, of)).tolist()]
    assert sorted(found, reverse=True) == slow_masks(keep, of)
    assert MaskLLM(pattern=NM(keep, of)).logits_per_weight == len(found) / of


@pytest.mark.parametrize(("keep", "of"), GROUPS)
@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
def test_a_draw_is_that_of_the_paper(keep: int, of: int, step: int) -> None:
    method, logit_OGC = MaskLLM(pattern=NM(keep, of)), logits_for(keep, of)
    weight_OI = torch.randn(5, 3 * of, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(logit_OGC.shape, generator=torch.Generator().manual_seed(7)).tolist()
    share = step / (STEPS - 1)
    blend = [
        [slow_blend(method, logits, u, share) for logits, u in zip(row, us, strict=True)]
        for row, us in zip(logit_OGC.tolist(), uniform, strict=True)
    ]
    moment = Moment(step, STEPS, 7, logit_OGC=logit_OGC)
    torch.testing.assert_close(method.blend(logit_OGC, moment), torch.tensor(blend), rtol=1e-3, atol=1e-5)
    expected_OI = weight_OI * slow_mask(torch.tensor(blend), keep, of)
    torch.testing.assert_close(method.update(weight_OI, moment), expected_OI, rtol=1e-3, atol=1e-5)


def test_noise_that_could_not_be_told_from_none_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    method, logit_OGC = MaskLLM(pattern=NM(2, 4)), logits_for(2, 4)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(*shape))
    assert method.blend(logit_OGC, Moment(7, STEPS, logit_OGC=logit_OGC)).isfinite().all()


@pytest.mark.parametrize(("keep", "of"), GROUPS)
def test_the_first_logits_favour_what_resembles_the_largest(keep: int, of: int) -> None:
    weight_OI = torch.randn(5, 3 * of, generator=torch.Generator().manual_seed(2))
    plain_OGC = MaskLLM(pattern=NM(keep, of), prior_strength=0.0).start(weight_OI, 3)
    assert plain_OGC.std() == pytest.approx(0.01, rel=0.4)
    made_OGC = MaskLLM(pattern=NM(keep, of), prior_strength=2.0).start(weight_OI, 3)
    for row in range(5):
        for group in range(3):
            members = weight_OI[row, group * of : (group + 1) * of].abs().tolist()
            largest = sorted(range(of), key=lambda i: -members[i])[:keep]
            alike = [sum(bits[i] for i in largest) for bits in slow_masks(keep, of)]
            mean = sum(alike) / len(alike)
            bonus = torch.tensor([2.0 * (a - mean) for a in alike]) * plain_OGC.std()
            torch.testing.assert_close(made_OGC[row, group], plain_OGC[row, group] + bonus)
    other = MaskLLM(pattern=NM(keep, of)).start(weight_OI, 4)
    assert not torch.equal(other, MaskLLM(pattern=NM(keep, of)).start(weight_OI, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_the_end_the_most_probable_mask_is_left(dtype: torch.dtype) -> None:
    method, logit_OGC = MaskLLM(pattern=NM(2, 4)), logits_for(2, 4)
    weight_OI = torch.randn(5, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    made_OI = method.update(weight_OI, Moment(STEPS, STEPS, logit_OGC=logit_OGC))
    for row in range(5):
        for group in range(3):
            logits = logit_OGC[row, group].tolist()
            bits = slow_masks(2, 4)[logits.index(max(logits))]
            for m, bit in enumerate(bits):
                at = 4 * group + m
                assert made_OI[row, at] == (weight_OI[row, at] if bit else 0)
    assert not made_OI[made_OI == 0].signbit().any()


@pytest.mark.parametrize("step", [0, 2])
def test_the_gradient_of_the_logits(step: int) -> None:
    """In float64, of numbers so large that the draw is not settled."""
    method = MaskLLM(pattern=NM(2, 4), kappa_begin=2.0, kappa_end=3.0, tau_end=0.5)
    weight_OI = torch.randn(5, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logit_OGC = (100 * logits_for(2, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logit: method.update(weight_OI, Moment(step, STEPS, 7, logit_OGC=logit)), (logit_OGC,)
    )


@pytest.mark.parametrize("passes", [1, 2])
def test_a_layer_computes_and_learns_as_in_the_paper(passes: int, tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path)))
    chosen = Chosen(
        method="maskllm",
        options={"norm_reward": 0.3},
        ends={LAYER: "2:4"},
        steps=STEPS,
        passes_per_step=passes,
        seed=5,
    )
    model = chosen.load(source)
    layer: Any = model.get_submodule(LAYER).train()
    assert isinstance(layer, ChosenLinear)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"{LAYER}.logit_OGC"]
    method = MaskLLM(pattern=NM(2, 4), norm_reward=0.3)
    first_OGC = method.start(layer.weight.detach(), moment_seed(5, START, LAYER))
    assert torch.equal(layer.logit_OGC.detach(), first_OGC)
    for done in range(passes * (STEPS + 1)):
        layer.zero_grad()
        input_BI, after_BO = torch.randn(5, 32), torch.randn(5, 64)
        step = min(done // passes, STEPS - 1)
        logit_OGC = first_OGC.clone().requires_grad_()
        moment = Moment(step, STEPS, moment_seed(5, step, LAYER), logit_OGC=logit_OGC)
        made_OI = method.update(layer.weight, moment)
        output_BO = layer(input_BI)
        torch.testing.assert_close(output_BO, input_BI @ made_OI.T)
        output_BO.backward(after_BO)
        loss = ((input_BI @ made_OI.T) * after_BO).sum() - 0.3 / passes * made_OI.square().sum()
        loss.backward()
        torch.testing.assert_close(layer.logit_OGC.grad, logit_OGC.grad)
        assert layer.weight.grad is None
    assert int(layer.passes) == passes * (STEPS + 1)
    end_OI = method.update(layer.weight, Moment(STEPS, STEPS, logit_OGC=first_OGC))
    torch.testing.assert_close(layer.eval()(input_BI), input_BI @ end_OI.T)
    assert int(layer.passes) == passes * (STEPS + 1), "an evaluation is no step"


def test_noise_differs_between_steps_layers_and_seeds_alone() -> None:
    seeds = {moment_seed(s, step, n) for s in (0, 1) for step in (START, 0, 1) for n in ("a", "b")}
    assert len(seeds) == 12
    method, logit_OGC = MaskLLM(pattern=NM(2, 4)), logits_for(2, 4)
    one, same, other = (method.blend(logit_OGC, Moment(3, STEPS, seed)) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_it_finds_the_masks_that_magnitude_misses() -> None:
    """The outputs wanted are those of the smaller half of each group: the larger half only does harm."""
    steps = 200
    torch.manual_seed(0)
    layer: Any = torch.nn.Linear(16, 8, bias=False)
    best_OI = ~NM(2, 4).keep_largest(layer.weight.detach().abs())
    wanted_OI = layer.weight.detach().where(best_OI, 0)
    before_OI = layer.weight.detach().clone()
    method, how = MaskLLM(pattern=NM(2, 4)), {"label": "layer", "seed": 0, "steps": steps}
    choose_in_place(layer, method, **how, passes_per_step=1, backward_passes=1)
    assert not torch.equal(layer.chosen(layer.weight, layer.logit_OGC, steps) != 0, best_OI)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        input_BI = torch.randn(64, 16)
        loss = (layer(input_BI) - input_BI @ wanted_OI.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(layer.weight, before_OI)
    assert torch.equal(layer.chosen(layer.weight, layer.logit_OGC, steps), wanted_OI)


FEW: dict[str, Any] = {"steps": 6, "batch_size": 4, "context_length": 24, "checkpoint_every": 0}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(stories())
    return path


def test_what_is_saved_is_what_there_was_or_zero(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model stored in bfloat16; and the optimiser knows of nothing but logits."""
    source = open_model(str(tiny_llama(tmp_path / "model", dtype=torch.bfloat16)))
    seen: list[StageTrainer] = []
    log = StageTrainer.log

    def look(self: Any, logs: Any, *rest: Any) -> None:
        log(self, logs, *rest)
        seen.append(self)

    monkeypatch.setattr(StageTrainer, "log", look)
    stage = SparseTrain(method="maskllm", pattern="2:4", learning_rate=1e-2, precision="bf16", **FEW)
    result, made = run_stage(stage, source, tmp_path / "s", text)
    layers = {promise.layer for promise in result.promises}
    assert layers == {name for name in source.anatomy.linears if name != "lm_head"}
    moved = 0
    for name in source.names():
        now, was = made.tensor(name), source.tensor(name)
        assert now.dtype == was.dtype
        kept = now != 0
        assert torch.equal(now[kept], was[kept])
        if name.removesuffix(".weight") in layers:
            assert NM(2, 4).missing(~kept) == ()
            moved += int((kept != NM(2, 4).keep_largest(was.abs())).sum())
        else:
            assert torch.equal(now, was)
    assert moved, "nothing was learnt, so nothing was seen"
    trained = [p for group in seen[-1].optimizer.param_groups for p in group["params"]]
    named = dict(seen[-1].model.named_parameters())
    logits = [p for name, p in named.items() if name.endswith("logit_OGC")]
    assert {id(p) for p in trained} == {id(p) for p in logits}
    assert len(logits) == len(layers)
    assert all(p.grad is None for name, p in named.items() if not name.endswith("logit_OGC"))


def test_it_computes_what_it_saves(text: Path, tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path / "model")))
    chosen = Chosen(method="maskllm", ends={LAYER: "2:4"})
    model = chosen.load(source).eval()
    (tmp_path / "out").mkdir()
    chosen.save(source, tmp_path / "out", model.state_dict())
    made, ids = open_model(str(tmp_path / "out")), torch.arange(12)[None]
    plain = load_model(made, dtype="auto", device="cpu")
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert NM(2, 4).missing(made.weight_OI(LAYER) == 0) == ()


def test_earlier_zeros_stay(text: Path, tmp_path: Path) -> None:
    """In layers it leaves alone, and in those it prunes further."""
    model = tiny_llama(tmp_path / "model")
    stages = [
        ck.Prune("magnitude", pattern="50%", targets=("*.q_proj", "*.up_proj")),
        SparseTrain(method="maskllm", pattern="2:4", targets=("*.mlp.*",), learning_rate=1e-2, **FEW),
    ]
    recipe = ck.Recipe(model=str(model), data=DataSpec(source=str(text)), stages=stages)
    artifact = ck.run(recipe, tmp_path / "out", measures=(), keep_stages=True)
    assert artifact.manifest["stages"][-1]["checks"]["zeros"] == {"checked": 10, "kept": 10}
    first, last = (open_model(str(artifact.directory / "stages" / n)) for n in ("1-prune", "2-sparse_train"))
    query = "model.layers.1.self_attn.q_proj"
    assert torch.equal(last.weight_OI(query), first.weight_OI(query))
    assert not last.weight_OI(LAYER)[first.weight_OI(LAYER) == 0].any()


@pytest.mark.parametrize(("pattern", "masks"), [("8:16", "12,870"), ("4:9", "126"), ("2:16", "120")])
def test_more_masks_than_can_be_learnt_are_refused(pattern: str, masks: str, tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path, hidden_size=144, intermediate_size=144)))
    (fault,) = SparseTrain(method="maskllm", pattern=pattern, **FEW).faults(outlook(source), "s")
    assert fault.where == "s.pattern"
    assert f"{pattern}, of which there are {masks}" in fault.got
    assert fault.cure == "Use 2:4, or method srste."
    assert SparseTrain(method="maskllm", pattern="4:8", **FEW).faults(outlook(source), "s") == []
    one, other = SparseTrain(method="maskllm", pattern="8:32", **FEW).faults(outlook(source), "s")
    assert "10,518,300" in one.got, "told beside what else is wrong with the pattern"
    assert "in_features divisible by 32" in other.expected


def test_its_faults(tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path)))
    for pattern in (RowUnstructured(0.5), LayerUnstructured(0.5)):
        assert "2:4" in MaskLLM.unfit(pattern)
    (fault,) = SparseTrain(method="maskllm", pattern="2:4").faults(outlook(source), "s")
    assert (fault.where, fault.expected) == ("s.steps", "a number, with method maskllm")
    (fault,) = SparseTrain(method="maskllm", pattern="2:4", precision="fp16", **FEW).faults(
        outlook(source), "s"
    )
    assert "whose reward knows no loss scale" in fault.expected
    wrong = {"tau_end": 0.0, "spread": 0.0, "kapa_end": 1.0}
    found = SparseTrain(method="maskllm", pattern="2:4", options=wrong, **FEW).faults(outlook(source), "s")
    assert {f.where for f in found} == {"s.tau_end", "s.spread", "s.kapa_end"}
    assert "Did you mean: kappa_end" in str(found)
