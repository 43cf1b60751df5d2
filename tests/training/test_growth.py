"""Batches that grow with the noise of gradients: what is measured, what is read, what a restart finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import broken_off_at_the_end, broken_off_in
from tiny import stories, tiny_llama
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from compresskit.data.spec import DataSpec
from compresskit.distill.finetune import Finetune
from compresskit.modeling import ModelSource
from compresskit.stage import StageContext
from compresskit.training.fields import TrainingFields
from compresskit.training.growth import LEAST, Growth, batches_at_most, growth_from_json
from compresskit.training.noise_scale import DECAY, NoiseScale, PassNorms
from compresskit.training.order import Ordered, Rows
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.watch import LossLog

Make = Callable[..., LlamaForCausalLM]
FIELDS = TrainingFields(
    steps=46,
    batch_size=2,
    micro_batch_size=1,
    learning_rate=3e-3,
    checkpoint_every=0,
    warmup_fraction=0.1,
    adapt_batch="noise",
    largest_batch_size=9,
    learning_rate_scaling="sqrt",
    reference_batch_size=2,
)
GREW = {"1": 2, "21": 4, "41": 8}
CPU = torch.device("cpu")


class Chance:
    """Rows of chance, with unlike numbers of supervised tokens: gradients are all noise."""

    def __init__(self, rows: int = 60) -> None:
        self.ids = torch.randint(0, 48, (rows, 12), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        labels = self.ids[index].clone()
        labels[: 1 + index % 5] = -100
        return {"input_ids": self.ids[index], "labels": labels, "position_ids": torch.arange(12)}


def train(model: nn.Module, rows: Rows, scratch: Path, **changes: Any) -> TrainOutcome:
    held = changes.pop("held", ())
    fields = replace(FIELDS, **changes)
    return Run(model, rows, fields=fields, scratch=scratch, device="cpu", held=held).train()


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


def batch_lines(scratch: Path) -> list[dict[str, Any]]:
    return [r for r in LossLog(scratch / "losses.jsonl").read() if "batch_size" in r]


def test_a_known_noise_scale_is_found_within_its_error() -> None:
    """A linear model of inputs of unit variance: both figures are known in closed form."""
    torch.manual_seed(0)
    width, sigma, passes, rows_of_pass, steps = 6, 0.7, 4, 3, 600
    model = nn.Linear(width, 1, bias=False)
    distance = model.weight.detach()[0].clone()  # the true weights are zero
    norms, found = PassNorms(model, (), CPU), []
    for _ in range(steps):
        parts = 0.0
        for _ in range(passes):
            x = torch.randn(rows_of_pass, width)
            loss = 0.5 * (model(x)[:, 0] - sigma * torch.randn(rows_of_pass)).square().sum()
            loss.backward()  # summed up over passes, as accumulation does
            parts += float(norms.take()) / rows_of_pass**2 / passes
        rows = passes * rows_of_pass
        whole = float((model.weight.grad / rows).square().sum())
        model.weight.grad = None
        one = NoiseScale().after(whole=whole, parts=parts, passes=passes, rows=rows)
        found.append([one.signal, one.noise])
    means, errors = torch.tensor(found).mean(0), torch.tensor(found).std(0) / steps**0.5
    signal = float(distance.square().sum())
    true = torch.tensor([signal, width * sigma**2 + (width + 1) * signal])
    assert ((means - true).abs() < 4 * errors).all()
    assert (errors < 0.1 * true).all(), "too few steps to tell anything"


def test_means_are_plain_at_first_and_exponential_then() -> None:
    scale, figures = NoiseScale(), torch.rand(60, 2, generator=torch.Generator().manual_seed(0)).tolist()
    signal = noise = 0.0
    for nth, (whole, more) in enumerate(figures):
        scale = scale.after(whole=whole, parts=whole + more, passes=4, rows=8)
        share = max(1 / (nth + 1), 1 - DECAY)
        noise += share * (more * 8 / 3 - noise)
        signal += share * (whole - more / 3 - signal)
    assert (scale.signal, scale.noise, scale.steps) == pytest.approx((signal, noise, 60))
    assert scale.rows == pytest.approx(noise / signal)
    assert scale.reaches(int(noise / signal))
    assert not scale.reaches(int(noise / signal) + 1)
    for nothing in ({"passes": 1}, {"whole": float("inf")}, {"parts": float("nan")}):
        assert scale.after(**({"whole": 1.0, "parts": 2.0, "passes": 2, "rows": 4} | nothing)) == scale
    hidden = NoiseScale(signal=-0.1, noise=1.0, steps=3)
    assert hidden.rows is None
    assert hidden.reaches(1 << 30)


def gradient(model: LlamaForCausalLM, batch: list[Mapping[str, Tensor]]) -> tuple[list[Tensor], int]:
    """Summed over the supervised tokens of ``batch``, and their number."""
    ids, labels = (torch.stack([b[k] for b in batch]) for k in ("input_ids", "labels"))
    logits = model(input_ids=ids).logits
    loss = cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    return list(torch.autograd.grad(loss, list(model.parameters()))), int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_trainer_measures_what_passes_written_out_have(
    make_model: Make, tmp_path: Path, precision: str
) -> None:
    """Weights that do not move, passes of two rows, zeros that are held: step for step."""
    model, rows, steps = make_model(tie_word_embeddings=True), Chance(), 6
    held = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj")
    with torch.no_grad():
        for name in held:
            model.get_submodule(name).weight[::2] = 0
    changes = {"batch_size": 8, "micro_batch_size": 2, "largest_batch_size": 16, "reference_batch_size": 8}
    train(model, rows, tmp_path, steps=steps, learning_rate=1e-30, held=held, precision=precision, **changes)
    ordered, scale, expected = Ordered(rows, steps=steps, batch_size=8, seed=0), NoiseScale(), []
    masks = [
        (p != 0).float() if n.removesuffix(".weight") in held else torch.ones_like(p)
        for n, p in model.named_parameters()
    ]
    for step in range(steps):
        made = [gradient(model, [ordered[8 * step + 2 * i + j] for j in range(2)]) for i in range(4)]
        total = sum(tokens for _, tokens in made)
        passes = [[g * m for g, m in zip(grads, masks, strict=True)] for grads, _ in made]
        sizes = [
            sum(float((g / t).square().sum()) for g in grads)
            for grads, (_, t) in zip(passes, made, strict=True)
        ]
        parts = sum(size * tokens / total for size, (_, tokens) in zip(sizes, made, strict=True))
        whole = sum(float((sum(grads) / total).square().sum()) for grads in zip(*passes, strict=True))
        scale = scale.after(whole=whole, parts=parts, passes=4, rows=8)
        expected.append(scale.rows)
    found = [line["noise_scale_rows"] for line in batch_lines(tmp_path)]
    assert None not in found, "nothing to compare"
    assert found == pytest.approx(expected, rel=1e-3 if precision == "fp32" else 0.1)


def slow(model: LlamaForCausalLM, rows: Rows, sizes: list[int], shares: list[float]) -> list[float]:
    """The same training written out: so many rows a step, at these shares of the peak rate."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    ordered, first, found = Ordered(rows, steps=sum(sizes), batch_size=1, seed=0), 0, []
    for size, share in zip(sizes, shares, strict=True):
        batch = [ordered[first + i] for i in range(size)]
        first += size
        ids, labels = (torch.stack([b[k] for b in batch]) for k in ("input_ids", "labels"))
        loss = cross_entropy(
            model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = FIELDS.learning_rate * (size / 2) ** 0.5 * share
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def cosine(nth: int, steps: int) -> float:
    """What transformers multiplies the peak by in the step after ``nth``, a tenth of them warm-up."""
    warmup = round(0.1 * steps)
    if nth < warmup:
        return nth / warmup
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (nth - warmup) / (steps - warmup)))))


def test_grown_steps_are_those_of_the_larger_batch(make_model: Make, tmp_path: Path) -> None:
    """Rows in the order of the seed, each once; the rate by the root of the batch; the schedule by steps."""
    model, twin, rows = make_model(), make_model(), Chance()
    outcome = train(model, rows, tmp_path)
    assert outcome.batch_sizes == GREW
    sizes = [2] * 20 + [4] * 20 + [8] * 6
    expected = slow(twin, rows, sizes, [cosine(i, 46) for i in range(46)])
    assert losses(tmp_path) == pytest.approx(expected, rel=2e-5)
    for (name, mine), true in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-4, msg=name)
    assert [line["batch_size"] for line in batch_lines(tmp_path)] == sizes
    tokens = [r["tokens"] for r in LossLog(tmp_path / "losses.jsonl").read() if "tokens" in r]
    assert tokens[-1] == 12 * sum(sizes)


def test_with_epochs_the_rows_are_the_limit_and_the_schedule_follows_them(
    make_model: Make, tmp_path: Path
) -> None:
    outcome = train(make_model(), Chance(), tmp_path, steps=None, epochs=2.5)
    assert outcome.batch_sizes == GREW
    # 75 batches of 2: 20 of one, 20 of two, 4 of four, of which the last has one row of the next pass.
    sizes = [2] * 20 + [4] * 20 + [8] * 4
    taken = [sum(sizes[:i]) // 2 for i in range(len(sizes))]
    expected = slow(make_model(), Chance(), sizes, [cosine(n, 75) for n in taken])
    assert (outcome.steps, outcome.given_step) == (44, 44)
    assert losses(tmp_path) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("limit", [{"steps": 46}, {"steps": None, "epochs": 2.5}], ids=str)
def test_a_restart_gives_the_same_bytes(make_model: Make, tmp_path: Path, limit: dict[str, Any]) -> None:
    """Broken off three times: before the batch has grown, after that, and after the last step."""
    settings = {**limit, "checkpoint_every": 14, "learning_rate_scaling": "linear"}
    straight = make_model(attention_dropout=0.2)
    true = asdict(train(straight, Chance(), tmp_path / "straight", **settings))
    assert true["batch_sizes"] == GREW
    for step in (17, 38):
        with broken_off_in(step=step):
            train(make_model(attention_dropout=0.2), Chance(), tmp_path / "broken", **settings)
    with broken_off_at_the_end():
        train(make_model(attention_dropout=0.2), Chance(), tmp_path / "broken", **settings)
    again = make_model(attention_dropout=0.2)
    found = asdict(train(again, Chance(), tmp_path / "broken", **settings))
    assert found.pop("resumed_from") == true["steps"]
    for name in ("resumed_from", "seconds"):
        true.pop(name)
        found.pop(name, None)
    assert found == true
    for (name, a), b in zip(straight.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert batch_lines(tmp_path / "broken") == batch_lines(tmp_path / "straight")


def test_gradients_without_noise_let_nothing_grow(make_model: Make, tmp_path: Path) -> None:
    """All rows are one: whatever the batch, a step sees the same gradient."""
    one = [Chance()[0]] * 8
    plain, found = make_model(), make_model()
    outcome = train(found, one, tmp_path / "noise", steps=24)  # type: ignore[arg-type]
    train(plain, one, tmp_path / "plain", steps=24, adapt_batch="none", largest_batch_size=None)  # type: ignore[arg-type]
    assert outcome.batch_sizes == {"1": 2}
    assert outcome.noise_scale_rows == pytest.approx(0, abs=0.1)
    assert losses(tmp_path / "noise") == losses(tmp_path / "plain")
    for a, b in zip(plain.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b)


def test_when_a_batch_may_grow() -> None:
    loud = NoiseScale(signal=1.0, noise=8.0, steps=LEAST)
    growth = Growth(
        batch_size=4, since=LEAST - 1, scale=replace(loud, steps=LEAST - 1), taken=1, sizes={"1": 4}
    )
    grown = growth.stepped(loud, step=2, most=8, left=None)
    assert (grown.times, grown.rows, grown.taken, grown.since) == (2, 8, 2, 0)
    assert grown.sizes == {"1": 4, "3": 8}
    assert growth_from_json(grown.to_json()) == grown
    kept = (
        growth.stepped(loud, step=2, most=7, left=None),  # no larger than asked for
        growth.stepped(loud, step=2, most=8, left=1),  # no more than the rows that are left
        replace(growth, taken=2).stepped(loud, step=3, most=8, left=None),  # not at a multiple
        growth.stepped(replace(loud, noise=7.9), step=2, most=8, left=None),
        growth.stepped(growth.scale, step=2, most=8, left=None),  # one step more that told nothing
        replace(growth, since=0).stepped(loud, step=2, most=8, left=None),
    )
    assert [growth.times for growth in kept] == [1] * len(kept)


def test_how_much_is_read_at_most() -> None:
    assert batches_at_most(FIELDS, 46) == 46 * 4
    assert batches_at_most(replace(FIELDS, steps=None), 75) == 78
    assert batches_at_most(replace(FIELDS, adapt_batch="none"), 46) == 46


def test_the_manifest_tells_how_the_batch_grew(tmp_path: Path) -> None:
    source, out = ModelSource(tiny_llama(tmp_path / "model")), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(stories())
    stage = Finetune(
        steps=2,
        batch_size=4,
        micro_batch_size=1,
        context_length=24,
        adapt_batch="noise",
        largest_batch_size=8,
    )
    context = StageContext(
        out=out,
        scratch=tmp_path / "scratch",
        original=source.directory,
        data=DataSpec(source=str(text)),
        device="cpu",
        cache=tmp_path / "cache",
    )
    out.mkdir()
    context.scratch.mkdir()
    told = stage.run(source, context).metrics
    assert told["batch_sizes"] == {"1": 4}
    assert told["noise_scale_rows"] == batch_lines(tmp_path / "scratch")[-1]["noise_scale_rows"]
    plain = replace(stage, adapt_batch="none", largest_batch_size=None)
    assert not {"batch_sizes", "noise_scale_rows", "shares"} & plain.run(source, context).metrics.keys()
