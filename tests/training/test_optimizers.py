"""Optimisers by name: each one that is installed trains, keeps zeros as the table says, and restarts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import compresskit as ck
from compresskit.errors import PlanError
from compresskit.training.access import Whole
from compresskit.training.faults import training_faults, zero_faults
from compresskit.training.fields import TrainingFields
from compresskit.training.muon import MuonAdamW
from compresskit.training.optimizers import CHANGED, EXPECTED, MOVED, OPTIMIZERS
from compresskit.training.optimizing import optimizer_of
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.trainer import StageTrainer
from compresskit.training.watch import LossLog

Make = Callable[..., LlamaForCausalLM]
HERE = [n for n, k in OPTIMIZERS.items() if not k.on_gpu and (not k.package or find_spec(k.package))]
SOURCES = {OPTIMIZERS[n].source: n for n in HERE}
EACH = [
    n for source, n in SOURCES.items() if n == "adamw_torch_fused" or not source.startswith("torch.optim")
]
"""One of each kind that keeps its state in its own way."""
RATES = {"adadelta": 0.5, "sgd": 0.3, "schedule_free_sgd": 0.3, "radam": 3e-2, "schedule_free_radam": 0.2}
OPTIONS = {"rank": 4, "update_proj_gap": 3}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """What torchao compiles is the same in eager mode, without minutes of compiling."""
    with torch.compiler.set_stance("force_eager"):
        yield


def fields_of(name: str, **changes: Any) -> TrainingFields:
    known = OPTIMIZERS[name]
    return replace(
        TrainingFields(
            steps=10,
            batch_size=8,
            micro_batch_size=4,
            learning_rate=RATES.get(name, 5e-3),
            optimizer=name,
            optimizer_options=OPTIONS if known.low_rank else {},
            weight_decay=0.01,
            warmup_fraction=0.0,
            lr_schedule="constant" if known.constant_rate else "cosine",
            checkpoint_every=0,
        ),
        **changes,
    )


def train(model: nn.Module, rows: Any, scratch: Path, fields: TrainingFields, **more: Any) -> TrainOutcome:
    return Run(model, rows, fields=fields, scratch=scratch, device="cpu", **more).train()


def made_for(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """As the trainer makes it, without decay."""
    fields = fields_of(name)
    kind, kwargs = optimizer_of(fields, model, (), rate=fields.learning_rate, warmup_steps=0)
    return kind(kwargs.pop("params", model.parameters()), **kwargs)


def step(optimizer: Any, model: nn.Module, keep: dict[str, torch.Tensor], seed: int) -> None:
    """One step on random gradients that are zero wherever ``keep`` is not."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if name in keep:
            parameter.grad.masked_fill_(~keep[name], 0)
    optimizer.step()


def thinned(make_model: Make) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor], tuple[str, ...]]:
    """A model with matrices of 4096 weights, which 8-bit states are for, half of them zero."""
    model = make_model(hidden_size=64, intermediate_size=128)
    held = tuple(name for name, _ in model.named_modules() if name.endswith("proj"))
    keep = {}
    with torch.no_grad():
        for index, layer in enumerate(held):
            weight = model.get_submodule(layer).weight
            generator = torch.Generator().manual_seed(index)
            keep[f"{layer}.weight"] = torch.rand(weight.shape, generator=generator) < 0.5
            weight.masked_fill_(~keep[f"{layer}.weight"], 0)
    return model, keep, held


@pytest.mark.parametrize("name", HERE)
def test_every_optimizer_trains(name: str, make_model: Make, rows: Any, tmp_path: Path) -> None:
    outcome = train(make_model(), rows, tmp_path, fields_of(name), validation=rows)
    losses = LossLog(tmp_path / "losses.jsonl").losses()
    assert losses[-1] < 0.97 * losses[0]
    assert outcome.validation_loss is not None
    assert outcome.validation_loss < 0.97 * losses[0]


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n in HERE and n != "lion"])
def test_it_is_the_one_transformers_makes(name: str, make_model: Make, tmp_path: Path) -> None:
    """Of the same class, with as many bits and pages; torch's own names transformers does not know.

    That torch's are fused here changes no more than how long a step takes.
    """
    try:
        theirs = TrainingArguments(str(tmp_path), optim=name, use_cpu=True, optim_target_modules="all-linear")
    except ValueError:
        assert OPTIMIZERS[name].source.partition(":")[0] in ("torch.optim", "compresskit.training.muon")
        return
    model = make_model()
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(theirs, model)
    mine, found = optimizer_of(fields_of(name), model, (), rate=1e-3, warmup_steps=0)
    assert mine is kind
    for argument in ("optim_bits", "scale_parameter", "relative_step"):
        assert found.get(argument) == kwargs.get(argument), argument
    assert bool(found.get("is_paged")) == bool(kwargs.get("is_paged"))


@pytest.mark.parametrize("name", HERE)
def test_zeros_stay_where_the_table_says_so(name: str, make_model: Make) -> None:
    """Gradients that were always zero, in six steps; those that move zeros do move them."""
    model, keep, _ = thinned(make_model)
    optimizer = made_for(name, model)
    for seed in range(6):
        step(optimizer, model, keep, seed)
    getattr(optimizer, "eval", lambda: None)()
    moved = sum(int((p[~keep[n]] != 0).sum()) for n, p in model.named_parameters() if n in keep)
    assert (moved > 0) == (OPTIMIZERS[name].zeros == MOVED)
    assert all(bool((p[keep[n]] != 0).all()) for n, p in model.named_parameters() if n in keep)


@pytest.mark.parametrize("name", [n for n in HERE if OPTIMIZERS[n].zeros == CHANGED])
def test_weights_that_become_zero_are_forgotten(name: str, make_model: Make) -> None:
    model, _, held = thinned(make_model)
    model = make_model(hidden_size=64, intermediate_size=128)
    optimizer, access, keep = made_for(name, model), Whole(), {}
    for seed in range(3):
        step(optimizer, model, {}, seed)
    for layer in held:
        weight = model.get_submodule(layer).weight
        keep[f"{layer}.weight"] = weight.detach().abs() > weight.detach().abs().median()
        new = keep[f"{layer}.weight"]
        access.change(weight, optimizer, lambda whole, _, new=new: whole * new)
    for seed in range(3, 6):
        step(optimizer, model, keep, seed)
    for name_, parameter in model.named_parameters():
        if name_ in keep:
            assert torch.equal(parameter != 0, keep[name_])


@pytest.mark.parametrize("name", [n for n in EACH if OPTIMIZERS[n].zeros != MOVED])
def test_the_trainer_holds_zeros(name: str, make_model: Make, rows: Any, tmp_path: Path) -> None:
    model, keep, held = thinned(make_model)
    train(model, rows, tmp_path, fields_of(name, steps=3), held=held)
    for parameter, kept in keep.items():
        assert torch.equal(model.get_parameter(parameter) != 0, kept)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if OPTIMIZERS[n].zeros == MOVED])
def test_what_moves_zeros_is_refused_with_them(
    name: str, make_model: Make, rows: Any, tmp_path: Path
) -> None:
    (fault,) = zero_faults(fields_of(name), "stages[1]")
    nearest = fault.cure.split()[-1].rstrip(".")
    assert zero_faults(fields_of(name, optimizer=nearest), "x", changing=True) == []
    if name in HERE:
        with pytest.raises(PlanError, match="keeps pruned weights at zero"):
            train(make_model(), rows, tmp_path, fields_of(name), held=("lm_head",))


@pytest.mark.parametrize("name", EACH)
def test_a_restart_changes_no_byte(
    name: str, make_model: Make, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = fields_of(name, checkpoint_every=2, steps=4)
    whole = make_model()
    train(whole, rows, tmp_path / "whole", fields)
    log = StageTrainer.log

    def stop(self: Any, logs: Any, *rest: Any) -> None:
        log(self, logs, *rest)
        if self.state.global_step == 3:
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "log", stop)
        with suppress(InterruptedError):
            train(make_model(), rows, tmp_path / "broken", fields)
    again = make_model()
    assert train(again, rows, tmp_path / "broken", fields).resumed_from == 2
    for (parameter, mine), true in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, true), parameter


def test_muon_is_torch_s_two(make_model: Make) -> None:
    """Muon on the matrices of the blocks, AdamW on all else, each by itself, and once restored."""
    mine, true = make_model(), make_model()
    made = made_for("muon", mine)
    assert isinstance(made, MuonAdamW)
    matrices = [p for n, p in true.named_parameters() if ".layers." in n and p.dim() == 2]
    rest = [p for n, p in true.named_parameters() if ".layers." not in n or p.dim() != 2]
    assert len(matrices) == 14
    both = (
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=5e-3, weight_decay=0.0),
    )
    for seed in range(4):
        step(made, mine, {}, seed)
        step(both[0], true, {}, seed)
        both[1].step()
        if seed == 1:
            made_again = made_for("muon", mine)
            made_again.load_state_dict(copy.deepcopy(made.state_dict()))
            made = made_again
    for (name, found), expected in zip(mine.named_parameters(), true.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_options_reach_the_optimizer(make_model: Make) -> None:
    fields = TrainingFields(optimizer="lion_8bit", optimizer_options={"betas": [0.7, 0.8]})
    if find_spec("bitsandbytes"):
        assert optimizer_of(fields, make_model(), (), rate=1.0, warmup_steps=0)[1]["betas"] == (0.7, 0.8)
    assert fields == TrainingFields(optimizer="lion_8bit", optimizer_options=fields.optimizer_options)
    assert hash(fields) == hash(replace(fields))


def test_a_batch_that_grows_is_refused_where_zeros_change_on_a_schedule() -> None:
    (fault,) = zero_faults(fields_of("adamw_torch", adapt_batch="noise"), "x", changing=True)
    assert (fault.where, fault.got) == ("x.adapt_batch", "noise")
    assert zero_faults(fields_of("adamw_torch", adapt_batch="noise"), "x") == []


def test_every_option_says_what_it_may_be() -> None:
    assert {option for known in OPTIMIZERS.values() for option in known.options} == {*EXPECTED, "betas"}
    assert all(known.expected(option).words for known in OPTIMIZERS.values() for option in known.options)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("adamw_torch", {"beta": 0.9}, "Did you mean: betas?"),
        ("adamw_torch", {"betas": [0.9]}, "two numbers"),
        ("adamw_torch", {"betas": [0.9, 1.0]}, "two numbers"),
        ("adamw_torch", {"betas": [0.9, 0.95, 0.99]}, "two numbers"),
        ("ademamix", {"betas": [0.9, 0.95]}, "three numbers"),
        ("adamw_torch", {"eps": True}, "a number above 0"),
        ("rmsprop", {"momentum": 1.5}, "from 0 to below 1"),
        ("muon", {"adjust_lr_fn": "mine"}, "original or match_rms_adamw"),
        ("muon", {"ns_steps": 0}, "a whole number of 1 or more"),
        ("adafactor", {"rank": 3}, "an option of adafactor: clip_threshold"),
    ],
)
def test_options_that_will_not_do(name: str, options: dict[str, Any], told: str) -> None:
    (fault,) = training_faults(TrainingFields(optimizer=name, optimizer_options=options), "x")
    assert fault.where == f"x.optimizer_options.{next(iter(options))}"
    assert told in str(fault)


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_a_plan_refuses_what_would_move_zeros_of_an_earlier_stage(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "model"))
    prune, dense = ck.Prune("magnitude", pattern="50%"), ck.Finetune(optimizer="muon", steps=1)
    ck.plan(ck.Recipe(model=model, stages=[dense, prune]))
    with pytest.raises(PlanError, match=r"keeps pruned weights at zero, got muon.*Use optimizer adamw_torch"):
        ck.plan(ck.Recipe(model=model, stages=[prune, dense]))
    ck.plan(ck.Recipe(model=model, stages=[prune, ck.Finetune(optimizer="lion_32bit", steps=1)]))
    making = {"pattern": "50%:layer", "steps": 2}
    with pytest.raises(PlanError, match="whose state can forget"):
        ck.plan(ck.Recipe(model=model, stages=[ck.SparseTrain(optimizer="ademamix", **making)]))
    ck.plan(ck.Recipe(model=model, stages=[ck.SparseTrain(optimizer="adam", **making)]))
