"""Each rule of what does not combine: broken once, told with its cure, and silent where all is well."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from compresskit.training import rules
from compresskit.training.faults import training_faults
from compresskit.training.fields import TrainingFields
from compresskit.training.int8 import multiplies_int8
from compresskit.training.rules import RULES, Setting, this_rank

DS: dict[str, Any] = {"strategy": "deepspeed"}
BREAKS: dict[str, dict[str, Any]] = {
    "strategy-name": {"strategy": "zero"},
    "precision-name": {"precision": "fp8"},
    "schedule-name": {"lr_schedule": "cosin"},
    "optimizer-name": {"optimizer": "galore_adamw"},
    "zero-stage": {"zero_stage": 4},
    "batch-divides": {"batch_size": 10, "micro_batch_size": 4},
    "more-processes-than-devices": {"processes": 4},
    "one-process-shards-nothing": {"strategy": "fsdp"},
    "deepspeed-missing": {"strategy": "deepspeed"},
    "deepspeed-config-without-deepspeed": {"deepspeed_config": "ds.json"},
    "deepspeed-config-unreadable": DS | {"deepspeed_config": "absent.json"},
    "deepspeed-config-stage": {
        "strategy": "deepspeed",
        "deepspeed_config": {"zero_optimization": {"stage": 3}},
    },
    "deepspeed-config-optimizer": {
        "strategy": "deepspeed",
        "deepspeed_config": {"optimizer": {"type": "Adam"}},
    },
    "deepspeed-config-precision": DS | {"deepspeed_config": {"bf16": {"enabled": True}}},
    "best-without-evaluations": {"keep_best": True},
    "best-while-zeros-change": {"keep_best": True, "eval_every": 5, "kind": "sparse_train"},
    "tracker-name": {"trackers": ("tensorbord",)},
    "tracker-missing": {"trackers": ("wandb",)},
    "optimizer-8bit-missing": {"optimizer": "adamw_8bit"},
    "optimizer-8bit-sharded": {"strategy": "fsdp", "processes": 2, "optimizer": "adamw_8bit"},
    "optimizer-paged-cpu": {"optimizer": "paged_adamw_8bit"},
    "prefix-checkpointing": {"adapter": "prefix", "activation_checkpointing": True},
    "frozen-bits-sharded": {"strategy": "fsdp", "processes": 2, "base": "int8"},
    "fp16-sharded": {"strategy": "fsdp", "processes": 2, "precision": "fp16"},
    "matmul-name": {"matmul": "int4"},
    "matmul-int8-missing": {"matmul": "int8"},
    "matmul-int8-device": {"matmul": "int8"},
    "matmul-int8-stage": {"matmul": "int8", "kind": "qat"},
    "matmul-int8-deepspeed": DS | {"matmul": "int8"},
    "matmul-int8-fp16": {"matmul": "int8", "precision": "fp16"},
}


@dataclass(frozen=True, kw_only=True)
class AdapterFields(TrainingFields):
    """Those of a stage that trains adapters, or has another name."""

    kind: str = "finetune"
    adapter: str = "lora"
    base: str = "none"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rules, "find_spec", lambda name: object())
    monkeypatch.setattr(rules, "multiplies_int8", lambda device: True)


def test_every_rule_is_broken_here() -> None:
    assert {rule.name for rule in RULES} == set(BREAKS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_broken_rule_is_told_with_its_cure(
    rule: rules.Rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = dict(BREAKS[rule.name])
    if isinstance(changes.get("deepspeed_config"), dict):
        (tmp_path / "ds.json").write_text(json.dumps(changes["deepspeed_config"]))
        changes["deepspeed_config"] = str(tmp_path / "ds.json")
    if rule.name.endswith("-missing"):
        monkeypatch.setattr(rules, "find_spec", lambda name: None)
    if rule.name == "matmul-int8-device":
        monkeypatch.setattr(rules, "multiplies_int8", lambda device: False)
    two_gpus = {"device": "cuda", "devices": 2} if rule.name == "more-processes-than-devices" else {}
    faults = training_faults(AdapterFields(**changes), "stages[1]", **two_gpus)
    assert [f.where for f in faults] == [f"stages[1].{rule.field}"]
    assert faults[0].cure == rule.cure
    assert "{" not in str(faults[0])


@pytest.mark.parametrize(
    "fields",
    [
        TrainingFields(),
        TrainingFields(processes=2),
        TrainingFields(processes=2, strategy="fsdp", precision="bf16", micro_batch_size=2),
        TrainingFields(processes=2, strategy="ddp", precision="fp16"),
        TrainingFields(strategy="deepspeed", zero_stage=3),
        TrainingFields(processes=2, strategy="fsdp", precision="bf16", matmul="int8"),
    ],
)
def test_what_combines_has_no_faults(fields: TrainingFields) -> None:
    assert training_faults(fields, "x") == []


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"micro_batch_size": 0},
        {"processes": 0},
        {"context_length": 1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"max_grad_norm": 0.0},
        {"epochs": 0.0},
        {"weight_decay": -1.0},
        {"warmup_fraction": 1.0},
        {"warmup_fraction": -0.1},
        {"eval_every": -1},
        {"checkpoint_every": -1},
    ],
    ids=str,
)
def test_numbers_out_of_range(changes: dict[str, Any]) -> None:
    (name,) = changes
    assert [f.where for f in training_faults(replace(TrainingFields(), **changes), "x")] == [f"x.{name}"]


def test_auto_follows_an_existing_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Setting(TrainingFields(), 1, "cpu").strategy == "single"
    assert Setting(TrainingFields(), 2, "cpu").strategy == "ddp"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Setting(TrainingFields(), 1, "cpu").strategy == "ddp"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert Setting(TrainingFields(), 2, "cpu").strategy == "fsdp"
    assert Setting(TrainingFields(strategy="ddp"), 2, "cpu").strategy == "ddp"


def test_a_launch_decides_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    (fault,) = training_faults(TrainingFields(batch_size=16, micro_batch_size=4), "x")
    assert "on 3 processes" in fault.got


def test_the_rank_is_that_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "3")
    assert this_rank() == 3


@pytest.mark.parametrize(
    ("device", "triton", "capability", "expected"),
    [
        ("cpu", False, (0, 0), True),
        ("cpu", True, (9, 0), False),
        ("cuda", True, (8, 0), True),
        ("cuda", True, (7, 5), False),
        ("cuda", False, (9, 0), False),
    ],
)
def test_where_torchao_has_an_int8_product(
    monkeypatch: pytest.MonkeyPatch, device: str, triton: bool, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: triton)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert multiplies_int8(device) is expected
