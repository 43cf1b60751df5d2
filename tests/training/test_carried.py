"""How a run is carried out may change between two starts: what goes on, and what is refused with the cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import broken_off_in
from torch import nn
from transformers import LlamaForCausalLM

from compresskit.errors import EngineError, PlanError
from compresskit.training.access import Whole
from compresskit.training.carried import COUNTS, HOW, WITHIN, carried_out, moved, reads, refusal, words
from compresskit.training.checkpoint import MARK, mark_of
from compresskit.training.fields import TrainingFields
from compresskit.training.order import Rows
from compresskit.training.outcome import TrainOutcome
from compresskit.training.portable.sources import Files, Parts
from compresskit.training.portable.take import take_over
from compresskit.training.run import Run
from compresskit.training.setting import Setting
from compresskit.training.watch import LossLog

Make = Callable[..., LlamaForCausalLM]
FIELDS = TrainingFields(steps=6, batch_size=4, learning_rate=3e-3, checkpoint_every=3)


def way(processes: int = 1, adaptation: str = "", **changes: Any) -> dict[str, Any]:
    return carried_out(Setting(replace(FIELDS, **changes), processes, "cpu"), adaptation)


ONE, DDP, FSDP = way(), way(2, strategy="ddp"), way(2, strategy="fsdp")
ZERO = way(2, strategy="deepspeed", zero_stage=3)
PIPE, ALONE = way(2, pipeline_stages=2), way(2, strategy="ddp", synchronise="diloco")
GROWN = way(2, strategy="ddp", adapt_batch="noise")
SWEPT = way(2, strategy="deepspeed", offload="optimizer", offload_device="nvme", nvme_path="/nvme")


def test_what_an_engine_reads_by_itself() -> None:
    assert reads(ONE, DDP)
    assert reads(FSDP, way(4, strategy="fsdp"))
    assert reads(ZERO, {**ZERO, "overlap": False, "micro_batch_size": 1})
    for old, new in (
        (FSDP, DDP),
        (ZERO, FSDP),
        (ZERO, {**ZERO, "processes": 4}),
        (FSDP, way(4, strategy="tp")),
    ):
        assert not reads(old, new)
    assert moved(ONE, DDP)
    assert not moved(DDP, {**DDP, "micro_batch_size": 1})
    assert [words(w) for w in (ONE, FSDP, ZERO)] == [
        "one process",
        "fsdp on 2 processes",
        "deepspeed ZeRO-3 on 2 processes",
    ]


@pytest.mark.parametrize(
    ("old", "new", "optimizer", "expected"),
    [
        (PIPE, DDP, "adamw_torch", "no pipeline divides"),
        (FSDP, PIPE, "adamw_torch", "no pipeline divides"),
        (ALONE, DDP, "adamw_torch", "all ranks agree on"),
        (DDP, ALONE, "adamw_torch", "all ranks agree on"),
        (GROWN, DDP, "adamw_torch", "does not grow"),
        (DDP, GROWN, "adamw_torch", "does not grow"),
        (SWEPT, DDP, "adamw_torch", "states in memory"),
        (ZERO, DDP, "adafactor", "numbers of single weights"),
        (FSDP, ONE, "adamw_torch_8bit", "numbers of single weights"),
        (way(1, "passes_per_step=4"), way(2, "passes_per_step=2"), "adamw_torch", "as many forward passes"),
    ],
)
def test_what_cannot_go_on_says_what_to_go_back_to(old: Any, new: Any, optimizer: str, expected: str) -> None:
    fault = refusal(old, new, optimizer, "here")
    assert fault is not None
    assert expected in fault.expected
    changed = [name for name in HOW if name not in WITHIN and old[name] != new[name]]
    assert changed
    assert all(f"{name}: {old[name]}" in fault.cure for name in changed)
    assert "another output directory" in fault.cure
    assert refusal(old, dict(old), optimizer, "here") is None


@pytest.mark.parametrize("optimizer", ["adamw_torch", "muon", "sgd"])
def test_what_goes_on(optimizer: str) -> None:
    for old in (ONE, DDP, FSDP, ZERO):
        assert all(refusal(old, new, optimizer, "here") is None for new in (ONE, DDP, FSDP, ZERO))
    assert refusal(ONE, DDP, "lion_8bit", "here") is None, "whole states are read as they are"


def ds_config(path: Path, **zero: Any) -> str:
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, **zero}, "steps_per_print": 5}))
    return str(path)


def test_a_ds_config_counts_by_what_it_says(tmp_path: Path) -> None:
    """Not by where it lies: what it says of portions is read from the checkpoint's files one by one."""
    here, there = tmp_path / "ds.json", tmp_path / "moved.json"
    asked: dict[str, Any] = {"strategy": "deepspeed", "deepspeed_config": ds_config(here)}
    old = way(2, **asked)
    there.write_text(json.dumps(dict(reversed(json.loads(here.read_text()).items())), indent=4))
    assert reads(old, way(2, **asked | {"deepspeed_config": str(there)}))
    ds_config(here, sub_group_size=1000)
    new = way(2, **asked)
    assert not reads(old, new)
    assert refusal(old, new, "adamw_torch", "here") is None


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_a_ds_config_may_put_states_on_a_drive_too(section: str, tmp_path: Path) -> None:
    config = ds_config(tmp_path / "ds.json", **{section: {"device": "nvme", "nvme_path": "/nvme"}})
    swept = way(2, strategy="deepspeed", deepspeed_config=config)
    for old, new in ((swept, DDP), (DDP, swept)):
        fault = refusal(old, new, "adamw_torch", "here")
        assert fault is not None
        assert fault.expected == "states in memory"
    assert refusal(swept, dict(swept), "adamw_torch", "here") is None


@pytest.mark.parametrize(
    ("changed", "is_another"),
    [
        ({"zero_quantized_gradients": True}, True),
        ({"a_key_of_tomorrow": 1}, True),
        ({"reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}}, False),
    ],
)
def test_a_ds_config_that_may_change_what_is_learnt_makes_another_run(
    make_model: Make, rows: Rows, tmp_path: Path, changed: dict[str, Any], is_another: bool
) -> None:
    pytest.importorskip("deepspeed")
    place = tmp_path / "ds.json"
    fields = replace(FIELDS, strategy="deepspeed", deepspeed_config=ds_config(place))

    def made() -> Run:
        return Run(make_model(), rows, fields=fields, scratch=tmp_path, device="cpu")

    before = made()
    assert before.identity == made().identity
    place.write_text(json.dumps(json.loads(place.read_text()), indent=4))
    assert before.identity == made().identity, "the same in other words"
    ds_config(place, **changed)
    assert (made().identity != before.identity) == is_another


def test_passes_that_a_model_counts_are_no_part_of_what_it_learns() -> None:
    told = "Chosen(layers=('a',), passes_per_step=4, twice=('b', 'c'), steps=8)"
    assert COUNTS.findall(told) == ["passes_per_step=4", "twice=('b', 'c')"]
    assert COUNTS.sub("", told) == COUNTS.sub("", told.replace("=4", "=2").replace("('b', 'c')", "()"))


def train(model: nn.Module, rows: Rows, scratch: Path, **changes: Any) -> TrainOutcome:
    return Run(model, rows, fields=replace(FIELDS, **changes), scratch=scratch, device="cpu").train()


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


def test_smaller_passes_go_on_where_larger_ones_ended(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    train(make_model(), rows, tmp_path / "whole")
    with broken_off_in(step=5):
        train(make_model(), rows, tmp_path / "moved")
    outcome = train(make_model(), rows, tmp_path / "moved", micro_batch_size=1, activation_checkpointing=True)
    assert (outcome.resumed_from, outcome.warnings) == (3, ())
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)


def test_what_a_kill_left_of_another_engine_is_no_part_of_a_checkpoint(
    make_model: Make, rows: Rows, tmp_path: Path
) -> None:
    """Also of the first one, where no complete one tells that the engine is another."""
    left = tmp_path / "checkpoints" / "checkpoint-3" / "pytorch_model_fsdp_0" / "__0_0.distcp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    with broken_off_in(step=5):
        train(make_model(), rows, tmp_path)
    assert not left.exists()
    assert train(make_model(), rows, tmp_path).resumed_from == 3


def test_a_refusal_leaves_the_checkpoint_alone(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    train(make_model(), rows, tmp_path, steps=3)
    mark = tmp_path / "checkpoints" / "checkpoint-3" / MARK
    told = mark_of(mark.parent)
    mark.write_text(json.dumps(told | {"carried": told["carried"] | {"pipeline_stages": 2, "processes": 2}}))
    before = mark.read_bytes()
    with pytest.raises(
        PlanError, match=r"after step 3: expected weights that no pipeline divides(.|\n)*Go back"
    ):
        train(make_model(), rows, tmp_path, steps=3)
    assert mark.read_bytes() == before
    mark.write_text(json.dumps(told))
    assert train(make_model(), rows, tmp_path, steps=3).resumed_from == 3


def test_what_a_source_lacks_or_has_otherwise_is_named(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    train(make_model(), rows, tmp_path, steps=3)
    made = tmp_path / "checkpoints" / "checkpoint-3"
    source = Files(made, mark_of(made)["names"])
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    take_over(source, model, optimizer, Whole())
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert int(state["step"]) == 3
        assert torch.equal(state["exp_avg"], source.states(name, parameter.shape)["exp_avg"]), name
        assert torch.equal(parameter, source.tensor(name, parameter.shape)), name
    for names in ([], [n for n in mark_of(made)["names"] if n != "model.norm.weight"]):
        with pytest.raises(EngineError, match="checkpoint-3: expected a name model"):
            take_over(Files(made, names), model, optimizer, Whole())
    number = source._numbers["model.norm.weight"]
    source._states[number]["exp_avg"] = torch.zeros(2)
    with pytest.raises(EngineError, match=r"exp_avg of model.norm.weight"):
        take_over(source, model, optimizer, Whole())
    del source._files["model.norm.weight"]
    with pytest.raises(EngineError, match=r"model.norm.weight: expected \(\d+,\), got none"):
        take_over(source, model, optimizer, Whole())


def test_states_in_parts_without_a_name_are_no_fresh_ones(tmp_path: Path) -> None:
    torch.save({"model": {}, "states": {"0": {"step": ("same", "", 3)}}}, tmp_path / "part-shard0.pt")
    assert Parts(tmp_path, ["known"]).states("known", torch.Size([2])) == {"step": 3}
    with pytest.raises(EngineError, match="a name unknown of states of the optimiser, got 1 other names"):
        Parts(tmp_path, ["known"]).states("unknown", torch.Size([2]))
