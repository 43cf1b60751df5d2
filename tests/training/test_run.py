"""A live model in training: losses, restarts, held zeros, precision, and what stops it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import broken_off_at_the_end, broken_off_in
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from compresskit.errors import DataError, InputError, NumericError, PlanError, PromiseError
from compresskit.training.checkpoint import MARK, latest
from compresskit.training.fields import TrainingFields
from compresskit.training.hold import require_held
from compresskit.training.order import Ordered, Rows
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.watch import LossLog

Make = Callable[..., LlamaForCausalLM]
FIELDS = TrainingFields(
    steps=8, batch_size=4, learning_rate=3e-3, checkpoint_every=0, warmup_fraction=0.0, lr_schedule="cosine"
)


def train(model: nn.Module, rows: Rows, scratch: Path, **changes: Any) -> TrainOutcome:
    extra = {name: changes.pop(name) for name in ("held", "validation", "save", "seed") if name in changes}
    return Run(model, rows, fields=replace(FIELDS, **changes), scratch=scratch, device="cpu", **extra).train()


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


def slow_losses(model: LlamaForCausalLM, rows: Rows, steps: int) -> list[float]:
    """The same training written out: AdamW, cosine, clipping at 1, whole logits, mean over tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIELDS.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * s / steps))))
    )
    ordered = Ordered(rows, steps=steps, batch_size=FIELDS.batch_size, seed=0)
    found = []
    for step in range(steps):
        batch = [ordered[step * FIELDS.batch_size + i] for i in range(FIELDS.batch_size)]
        ids, labels = (torch.stack([b[k] for b in batch]) for k in ("input_ids", "labels"))
        logits = model(input_ids=ids, position_ids=batch[0]["position_ids"].expand_as(ids)).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_equals_the_loop_written_out(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    model, twin = make_model(), make_model()
    outcome = train(model, rows, tmp_path)
    assert losses(tmp_path) == pytest.approx(slow_losses(twin, rows, 8), rel=1e-5)
    for (name, mine), true in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5, msg=name)
    assert outcome.final_loss < outcome.first_loss
    assert (outcome.steps, outcome.engine, outcome.processes) == (8, "single", 1)


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_changes_nothing(make_model: Make, rows: Rows, tmp_path: Path, micro: int) -> None:
    """Rows have different numbers of supervised tokens, so a mean of means would differ."""
    whole, parts = make_model(), make_model()
    train(whole, rows, tmp_path / "whole")
    train(parts, rows, tmp_path / "parts", micro_batch_size=micro)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize(("scaling", "times"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_the_rate_follows_the_batch(
    make_model: Make, rows: Rows, tmp_path: Path, scaling: str, times: float
) -> None:
    """What was asked for and scaled is what would have been asked for."""
    reference = None if scaling == "none" else 1
    scaled = train(
        make_model(), rows, tmp_path / "a", learning_rate_scaling=scaling, reference_batch_size=reference
    )
    train(make_model(), rows, tmp_path / "b", learning_rate=times * FIELDS.learning_rate)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert scaled.learning_rate == times * FIELDS.learning_rate
    rates = [r["learning_rate"] for r in LossLog(tmp_path / "a" / "losses.jsonl").read()]
    assert max(rates) == times * FIELDS.learning_rate


def test_bf16_weights_come_back_in_bf16(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    model, saved = make_model().to(torch.bfloat16), {}
    before = copy.deepcopy(model.state_dict())
    train(model, rows, tmp_path, save=saved.update)
    now = model.state_dict()
    assert {t.dtype for t in now.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[name], now[name]) for name in now)
    assert any(not torch.equal(before[name], now[name]) for name in now)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert model.config.use_cache is True


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_narrow_compute_stays_near(
    make_model: Make, rows: Rows, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    train(make_model(), rows, tmp_path / "wide")
    model, seen = make_model(), set()
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *io: seen.add(io[2].dtype))
    train(model, rows, tmp_path / "narrow", precision=precision)
    assert seen == {dtype}
    wide, narrow = (LossLog(tmp_path / name / "losses.jsonl").read() for name in ("wide", "narrow"))
    for name in ("loss", "grad_norm"):
        mine, true = [r[name] for r in narrow], [r[name] for r in wide]
        assert mine != true, "the precision had no effect"
        assert mine == pytest.approx(true, rel=0.05), name


def test_fp16_scales_the_loss_and_skips_what_overflows(
    make_model: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of 2**24 overflows fp16; the scaler halves it until gradients fit, skipping each try."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**24))
    model = make_model()
    outcome = train(model, rows, tmp_path, precision="fp16", steps=12, checkpoint_every=6)
    assert 0 < outcome.skipped_steps < 12
    assert all(p.isfinite().all() for p in model.parameters())
    records = LossLog(tmp_path / "losses.jsonl").read()
    assert records[0]["skipped"] is True
    assert records[1]["learning_rate"] == records[0]["learning_rate"], "a skipped step moved the schedule"
    assert (latest_checkpoint(tmp_path) / "scaler.pt").is_file(), "a restart would lose the scale"


def latest_checkpoint(scratch: Path) -> Path:
    return max((scratch / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


def test_activation_checkpointing_changes_nothing(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    train(make_model(), rows, tmp_path / "kept")
    model = make_model()
    train(model, rows, tmp_path / "again", activation_checkpointing=True)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), rel=1e-6)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_restart_gives_the_same_bytes(make_model: Make, rows: Rows, tmp_path: Path, precision: str) -> None:
    """With dropout, so that random states must come back too; broken off between two checkpoints."""
    straight, broken = (make_model(attention_dropout=0.2) for _ in range(2))
    settings = {"checkpoint_every": 3, "precision": precision, "validation": rows, "eval_every": 4}
    train(straight, rows, tmp_path / "straight", **settings)
    with broken_off_in(step=6):
        train(broken, rows, tmp_path / "broken", **settings)
    again = make_model(attention_dropout=0.2)
    outcome = train(again, rows, tmp_path / "broken", **settings)
    assert outcome.resumed_from == 3
    for (name, a), b in zip(straight.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def test_a_restart_of_a_model_whose_files_have_other_names(rows: Rows, tmp_path: Path) -> None:
    """Transformers writes the experts of a Mixtral one by one, which no running model has."""

    def made() -> MixtralForCausalLM:
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=4, **sizes))

    straight, again = made(), made()
    train(straight, rows, tmp_path / "straight")
    with broken_off_in(step=6):
        train(made(), rows, tmp_path / "broken", checkpoint_every=3)
    assert train(again, rows, tmp_path / "broken", checkpoint_every=3).resumed_from == 3
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    for (name, a), b in zip(straight.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("epochs", "rows", "batch_size", "steps"),
    [(0.07, 100, 1, 7), (0.07, 101, 1, 8), (1.1, 30, 3, 11), (2, 10, 4, 5), (0.01, 10, 4, 1), (1.0, 9, 4, 3)],
)
def test_epochs_are_whole_steps_of_as_many_rows_as_are_written(
    epochs: float, rows: int, batch_size: int, steps: int
) -> None:
    assert TrainingFields(epochs=epochs, batch_size=batch_size).steps_over(rows) == steps


def test_other_rows_are_another_run(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    """Of which there are as many: what a checkpoint has learnt is not theirs."""
    with broken_off_in(step=6):
        train(make_model(), rows, tmp_path, checkpoint_every=3)
    others: Any = [{name: value.flip(0) for name, value in rows[i].items()} for i in range(len(rows))]
    assert train(make_model(), others, tmp_path, checkpoint_every=3).resumed_from == 0


class Told:
    """``rows``, and a file that names each process that reads one."""

    def __init__(self, rows: Rows, place: Path) -> None:
        self._rows, self._place = rows, place

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        (self._place / str(os.getpid())).touch()
        return self._rows[index]


def test_workers_read_the_same_rows_before_and_after_a_restart(
    make_model: Make, rows: Rows, tmp_path: Path
) -> None:
    readers = tmp_path / "readers"
    readers.mkdir()
    one, two = make_model(), make_model()
    train(one, rows, tmp_path / "straight")
    ahead = {"workers": 2, "prefetch": 3, "checkpoint_every": 3}
    with broken_off_in(step=6):
        train(make_model(), rows, tmp_path / "broken", **ahead)
    assert train(two, Told(rows, readers), tmp_path / "broken", **ahead).resumed_from == 3
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    # This process looks at some rows to tell how long they are; the others are read by the workers.
    assert len({path.name for path in readers.iterdir()} - {str(os.getpid())}) == 2


@pytest.mark.parametrize(("stop", "resumed"), [(5, 3), (8, 8)])
def test_the_outcome_is_the_same_after_any_kill(
    make_model: Make, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, resumed: int
) -> None:
    """Broken off between two checkpoints, and after the last one: then no step is left to take."""
    settings = {"checkpoint_every": 3, "precision": "fp16", "validation": rows}
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**18))
    straight = asdict(train(make_model(), rows, tmp_path / "straight", **settings))

    with broken_off_in(step=stop + 1) if stop < 8 else broken_off_at_the_end():
        train(make_model(), rows, tmp_path / "broken", **settings)
    again = asdict(train(make_model(), rows, tmp_path / "broken", **settings))
    assert again.pop("resumed_from") == resumed
    assert straight.pop("resumed_from") == 0
    assert straight.pop("seconds") > 0 <= again.pop("seconds")
    assert again == straight
    assert straight["kernels"] == {"linear_cross_entropy": "reference"}


def test_a_half_written_checkpoint_is_ignored(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    train(make_model(), rows, tmp_path, checkpoint_every=2, steps=4)
    made = latest_checkpoint(tmp_path)
    identity = json.loads((made / MARK).read_text())["identity"]
    assert latest(tmp_path / "checkpoints", identity) == made
    before = made.with_name("checkpoint-2")
    for checkpoint, left in ((made, before), (before, None)):
        (checkpoint / "optimizer.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes()[:-1])
        assert latest(tmp_path / "checkpoints", identity) == left
    assert train(make_model(), rows, tmp_path, checkpoint_every=2, steps=4).resumed_from == 0


def test_checkpoints_of_another_run_are_ignored(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    train(make_model(), rows, tmp_path, checkpoint_every=2)
    assert train(make_model(), rows, tmp_path, checkpoint_every=2, seed=1).resumed_from == 0
    assert train(make_model(), rows, tmp_path, checkpoint_every=2, seed=1).resumed_from == 8


def prune(model: nn.Module) -> tuple[str, ...]:
    names = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in n)
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight[:, ::2] = 0
    return names


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_zeros_are_held_by_every_optimizer(
    make_model: Make, rows: Rows, tmp_path: Path, optimizer: str
) -> None:
    model = make_model()
    names = prune(model)
    before = copy.deepcopy(model.state_dict())
    train(model, rows, tmp_path, held=names, optimizer=optimizer, weight_decay=0.1, learning_rate=1e-2)
    for name in names:
        weight = model.get_submodule(name).weight
        assert not weight[:, ::2].any(), name
        assert (weight[:, 1::2] != 0).all()
        assert not torch.equal(weight, before[f"{name}.weight"]), "nothing was trained"


def test_zeros_not_held_are_lost_and_seen(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    model = make_model()
    names = prune(model)
    before = copy.deepcopy(model.state_dict())
    train(model, rows, tmp_path)
    with pytest.raises(PromiseError, match=r"gate_proj: expected every pruned weight still zero, got \d+"):
        require_held(model.state_dict().__getitem__, names, before.__getitem__)


def test_a_weight_that_is_nan_stops_the_run_and_is_named(
    make_model: Make, rows: Rows, tmp_path: Path
) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    expected = r"step 1, layer model\.layers\.1\.mlp\.up_proj, whose weight is not finite"
    with pytest.raises(NumericError, match=expected):
        train(model, rows, tmp_path)


def test_a_loss_that_explodes_stops_the_run(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match=r"step [2-8], layer") as error:
        train(make_model(), rows, tmp_path, learning_rate=1e30, optimizer="sgd", max_grad_norm=1e30)
    assert "Lower learning_rate" in str(error.value)


def test_a_gradient_that_is_not_finite_is_named(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    model = make_model()
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NumericError, match=r"step 1, layer model\.layers\.0\.self_attn\.q_proj"):
        train(model, rows, tmp_path)


def test_evaluation_is_a_mean_over_tokens(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    model = make_model()
    outcome = train(model, rows, tmp_path, validation=rows, eval_every=4, micro_batch_size=4)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in (rows[i] for i in range(len(rows))):
            logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
            labels = row["labels"][1:]
            total += cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            tokens += int((labels != -100).sum())
    assert outcome.validation_loss == pytest.approx(total / tokens, rel=1e-5)
    records = LossLog(tmp_path / "losses.jsonl").read()
    assert [r["step"] for r in records if "validation_loss" in r] == [4, 8]


def test_faults_come_together(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as error:
        train(make_model(), rows, tmp_path, learning_rate=0.0, optimizer="muno", precision="fp4")
    assert len(error.value.faults) == 3
    with pytest.raises(InputError, match="device: expected auto, cpu, cuda or cuda:0, got 'tpu'"):
        Run(make_model(), rows, fields=FIELDS, scratch=tmp_path, device="tpu").train()
    with pytest.raises(DataError, match="at least one row"):
        train(make_model(), [], tmp_path)  # type: ignore[arg-type]
