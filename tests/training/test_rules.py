"""Each rule of what does not combine: broken once, told with its cure, and silent where all is well."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from compresskit.training.faults import crowd_faults, training_faults
from compresskit.training.fields import TrainingFields
from compresskit.training.int8 import multiplies_int8
from compresskit.training.rules import ROOMS, RULES, base, deepspeed, offload, precision, zenflow
from compresskit.training.setting import Setting, this_rank

DS: dict[str, Any] = {"strategy": "deepspeed"}
TP: dict[str, Any] = {"strategy": "tp", "processes": 2, "tensor_parallel": 2}
GROWS: dict[str, Any] = {"adapt_batch": "noise", "largest_batch_size": 64, "micro_batch_size": 4}
SHARES: dict[str, Any] = {"shares": "measured", "processes": 2}
TWO: dict[str, Any] = {"pipeline_stages": 2, "processes": 2}
ALONE: dict[str, Any] = {"synchronise": "diloco", "processes": 2}
NVME: dict[str, Any] = DS | {
    "zero_stage": 3,
    "offload": "parameters",
    "offload_device": "nvme",
    "nvme_path": "/nvme",
}
LATE: dict[str, Any] = DS | {
    "processes": 2,
    "offload": "optimizer",
    "overlap": False,
    "synchronise": "zenflow",
    "synchronise_every": 4,
    "checkpoint_every": 16,
}
ON_GPU = ("offload-nvme-stage", "offload-nvme-library", "offload-nvme-zeros")
BREAKS: dict[str, dict[str, Any]] = {
    "strategy-name": {"strategy": "zero"},
    "precision-name": {"precision": "fp4"},
    "fp8-missing": {"precision": "fp8"},
    "fp8-device": {"precision": "fp8"},
    "fp8-stage": {"precision": "fp8", "kind": "qat"},
    "fp8-deepspeed": DS | {"precision": "fp8"},
    "epochs-beside-steps": {"steps": 3, "epochs": 2.0},
    "schedule-name": {"lr_schedule": "cosin"},
    "optimizer-name": {"optimizer": "galore_adamw_layerwise"},
    "zero-stage": {"zero_stage": 4},
    "batch-divides": {"batch_size": 10, "micro_batch_size": 4},
    "more-processes-than-devices": {"processes": 4},
    "more-processes-than-cores": {"processes": 16},
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
    **{
        f"deepspeed-config-{key.replace('_', '-')}": DS | {"deepspeed_config": {key: 99}}
        for key in deepspeed.NUMBERS
    },
    "deepspeed-config-zenflow": DS
    | {"deepspeed_config": {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}},
    "zenflow-engine": LATE | {"zero_stage": 3},
    "zenflow-version": LATE,
    "zenflow-compiler": LATE,
    "zenflow-every": LATE | {"synchronise_every": 1},
    "zenflow-optimizer": LATE | {"weight_decay": 0.1},
    "zenflow-passes": LATE | {"micro_batch_size": 4},
    "zenflow-checkpoints": LATE | {"checkpoint_every": 18},
    "zenflow-overlap": LATE | {"overlap": True},
    "zenflow-from": LATE | {"synchronise_from": 2},
    "zenflow-stage": LATE | {"kind": "sparse_train"},
    "deepspeed-config-precision": DS | {"deepspeed_config": {"bf16": {"enabled": True}}},
    "offload-name": {"offload": "everything"},
    "offload-device-name": {"offload_device": "disk"},
    "offload-without-deepspeed": {"offload": "optimizer"},
    "offload-parameters-stage": DS | {"offload": "parameters"},
    "offload-config": DS
    | {
        "offload": "optimizer",
        "deepspeed_config": {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
    },
    "offload-nothing": {"offload_device": "nvme"},
    "offload-nvme-path": DS | {"offload": "optimizer", "nvme_path": "/nvme"},
    "offload-nvme-stage": NVME | {"zero_stage": 2, "offload": "optimizer"},
    "offload-nvme-cpu": NVME,
    "offload-nvme-library": NVME,
    "offload-nvme-zeros": NVME | {"kind": "sparse_train"},
    "overlap-always": {"overlap": False},
    "trace-steps": {"steps": 4, "trace": 3},
    "best-without-evaluations": {"keep_best": True},
    "best-while-zeros-change": {"keep_best": True, "eval_every": 5, "kind": "sparse_train"},
    "tracker-name": {"trackers": ("tensorbord",)},
    "tracker-missing": {"trackers": ("wandb",)},
    "optimizer-bitsandbytes-missing": {"optimizer": "adamw_8bit"},
    "optimizer-torchao-missing": {"optimizer": "adamw_torch_8bit"},
    "optimizer-schedulefree-missing": {"optimizer": "schedule_free_adamw", "lr_schedule": "constant"},
    "optimizer-galore-torch-missing": {"optimizer": "galore_adamw"},
    "optimizer-apollo-torch-missing": {"optimizer": "apollo_adamw"},
    "optimizer-optimi-missing": {"optimizer": "stable_adamw"},
    "scaling-name": {"learning_rate_scaling": "cubic"},
    "scaling-without-reference": {"learning_rate_scaling": "linear"},
    "reference-without-scaling": {"reference_batch_size": 8},
    "optimizer-engine": {"strategy": "fsdp", "processes": 2, "optimizer": "adamw_8bit"},
    "optimizer-schedule": {"optimizer": "schedule_free_adamw"},
    "optimizer-mesh": TP | {"optimizer": "muon", "batch_size": 2},
    "optimizer-pipeline": TWO | {"optimizer": "muon"},
    "optimizer-alone": ALONE | {"optimizer": "schedule_free_adamw", "lr_schedule": "constant"},
    "adapt-batch-sentences": {"adapt_batch": "memory", "learns_sentences": True},
    "few-sentences": {"learns_sentences": True, "trainable": "lora"},
    "offload-split-layers": TP | {"offload_activations": True, "batch_size": 2},
    "optimizer-paged-cpu": {"optimizer": "paged_adamw_8bit"},
    "prefix-learns": {"trainable": "prefix", "on_policy": {"fraction": 0.5}},
    "prefix-checkpointing": {"adapter": "prefix", "activation_checkpointing": True},
    "prefix-offload": {"trainable": "prefix", "offload_activations": True},
    "adapt-batch-name": {"adapt_batch": "always"},
    "adapt-batch-engine": DS | {"adapt_batch": "memory"},
    "shares-name": {"shares": "fair"},
    "shares-engine": {"shares": "measured", "micro_batch_size": 2},
    "shares-passes": SHARES | {"micro_batch_size": 1},
    "shares-adapted": SHARES | {"adapt_batch": "memory"},
    "shares-counts": SHARES | {"kind": "qat"},
    "shares-rows": SHARES | {"on_policy": {"fraction": 0.5}},
    "adapt-batch-noise-engine": DS | GROWS | {"processes": 2},
    "adapt-batch-noise-passes": GROWS | {"micro_batch_size": 16},
    "adapt-batch-largest": GROWS | {"largest_batch_size": 31},
    "largest-batch-without-noise": {"largest_batch_size": 64},
    "adapt-batch-counts": {"kind": "sparse_train", "adapt_batch": "memory"},
    "checkpoint-part-of-nothing": {"checkpoint_operators": True},
    "checkpoint-blocks-qat": {"kind": "qat", "activation_checkpointing": True, "checkpoint_blocks": 2},
    "frozen-bits-sharded": {"strategy": "fsdp", "processes": 2, "base": "int8"},
    "fp16-sharded": {"strategy": "fsdp", "processes": 2, "precision": "fp16"},
    "matmul-name": {"matmul": "int4"},
    "matmul-int8-missing": {"matmul": "int8"},
    "matmul-int8-device": {"matmul": "int8"},
    "matmul-int8-stage": {"matmul": "int8", "kind": "qat"},
    "matmul-int8-deepspeed": DS | {"matmul": "int8"},
    "matmul-int8-fp16": {"matmul": "int8", "precision": "fp16"},
    "replicas-strategy": {"strategy": "ddp", "processes": 4, "replicas": 2},
    "tensor-strategy": DS | {"processes": 2, "tensor_parallel": 2},
    "tensor-is-all": {"strategy": "tp", "processes": 4, "tensor_parallel": 2},
    "mesh-divides": {"strategy": "fsdp", "processes": 2, "replicas": 2},
    "tensor-swapped-layers": TP | {"kind": "qat"},
    "tensor-matmul": TP | {"matmul": "int8"},
    "tensor-on-policy": TP | {"on_policy": {"fraction": 0.5}},
    "tensor-sentences": TP | {"learns_sentences": True},
    "synchronise-name": {"synchronise": "diloko"},
    "alone-under-ddp": {"synchronise": "diloco", "processes": 2, "strategy": "fsdp"},
    "alone-every": {"synchronise_every": 0},
    "alone-delay": ALONE | {"synchronise_delay": 8},
    "alone-outer": {"outer_momentum": 1.0},
    "alone-fp16": ALONE | {"precision": "fp16"},
    "alone-evaluated": ALONE | {"synchronise": "local_sgd", "eval_every": 12},
    "alone-zeros-change": ALONE | {"kind": "sparse_train"},
    "pipeline-schedule-name": {"pipeline_schedule": "2f2b"},
    "pipeline-divides": {"processes": 4, "pipeline_stages": 3, "batch_size": 12, "micro_batch_size": 1},
    "pipeline-strategy": TWO | {"strategy": "fsdp"},
    "pipeline-micro-batches": TWO | {"micro_batch_size": 16},
    "pipeline-precision": TWO | {"precision": "fp16"},
    "pipeline-matmul": TWO | {"matmul": "int8"},
    "pipeline-alone": TWO | {"synchronise": "local_sgd"},
    "pipeline-adapted": TWO | {"kind": "qat"},
    "pipeline-teacher": TWO | {"teacher_placement": "sharded"},
    "pipeline-learns": TWO | {"features": ()},
    "alone-on-policy": ALONE | {"on_policy": {"fraction": 0.5}},
}


@dataclass(frozen=True, kw_only=True)
class AdapterFields(TrainingFields):
    """Those of a stage that trains adapters, or has another name."""

    kind: str = "finetune"
    adapter: str = ""
    trainable: str = "all"
    base: str = "none"
    on_policy: dict[str, Any] | None = None
    learns_sentences: bool = False
    features: Any = None
    teacher_placement: str = "replicate"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    _packages(monkeypatch, object())
    monkeypatch.setattr(precision, "multiplies_int8", lambda device: True)
    monkeypatch.setattr(precision, "multiplies_fp8", lambda device: True)
    monkeypatch.setattr(zenflow, "_unknown", lambda: False)


def _packages(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    """Every optional package is ``found``, or none is."""
    for room in ROOMS:
        if hasattr(room, "find_spec"):
            monkeypatch.setattr(room, "find_spec", lambda name: found)


def test_every_rule_is_broken_here() -> None:
    assert {rule.name for rule in RULES} == set(BREAKS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_broken_rule_is_told_with_its_cure(
    rule: base.Rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = dict(BREAKS[rule.name])
    if isinstance(changes.get("deepspeed_config"), dict):
        (tmp_path / "ds.json").write_text(json.dumps(changes["deepspeed_config"]))
        changes["deepspeed_config"] = str(tmp_path / "ds.json")
    if rule.name.endswith("-missing"):
        _packages(monkeypatch, None)
    if rule.name == "matmul-int8-device":
        monkeypatch.setattr(precision, "multiplies_int8", lambda device: False)
    if rule.name == "fp8-device":
        monkeypatch.setattr(precision, "multiplies_fp8", lambda device: False)
    monkeypatch.setattr(offload, "_writes_asynchronously", lambda: rule.name != "offload-nvme-library")
    monkeypatch.setattr(zenflow, "_unknown", lambda: rule.name == "zenflow-version")
    monkeypatch.setattr(zenflow, "_compiles", lambda: rule.name != "zenflow-compiler")
    on_gpus = (*ON_GPU, "more-processes-than-devices")
    two_gpus = {"device": "cuda", "devices": 2} if rule.name in on_gpus else {}
    faults = training_faults(AdapterFields(**changes), "stages[1]", cores=2, **two_gpus)
    assert [f.where for f in faults] == [f"stages[1].{rule.field}"]
    assert faults[0].cure == rule.cure
    assert "{" not in str(faults[0])


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_what_a_ds_config_puts_on_a_drive_is_on_a_drive(section: str, tmp_path: Path) -> None:
    said = {"zero_optimization": {section: {"device": "nvme", "nvme_path": "/nvme"}}}
    (tmp_path / "ds.json").write_text(json.dumps(said))
    fields = TrainingFields(strategy="deepspeed", deepspeed_config=str(tmp_path / "ds.json"), zero_stage=3)
    (fault,) = training_faults(fields, "stage")
    assert fault.expected.startswith("a GPU for offload_device nvme")


@pytest.mark.parametrize(("cores", "most"), [(1, 8), (2, 8), (4, 16), (0, 10**6)])
def test_a_cpu_has_room_for_a_few_processes_a_core(cores: int, most: int) -> None:
    for processes, refused in ((most, False), (most + 1, cores > 0)):
        fields = TrainingFields(processes=processes, batch_size=processes)
        told = [*training_faults(fields, "x", cores=cores)]
        assert [f.where for f in told] == ["x.processes"] * refused
        assert crowd_faults(processes, "y", device="cpu", devices=0, cores=cores) == [
            replace(f, where="y") for f in told
        ]
    assert training_faults(fields, "x", device="cuda", devices=0, cores=cores) == []


def test_a_launch_has_at_most_a_process_for_each_gpu() -> None:
    (fault,) = crowd_faults(3, "--nproc", device="cuda", devices=2, cores=1)
    assert (fault.where, fault.got) == ("--nproc", "3")
    assert "has 2" in fault.expected
    assert crowd_faults(2, "--nproc", device="cuda", devices=2, cores=1) == []


@pytest.mark.parametrize("said", ["{", "[1]", '{"zero_optimization": true}', '{"fp16": null}'])
def test_a_ds_config_without_objects_is_refused(said: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(said)
    fields = TrainingFields(strategy="deepspeed", deepspeed_config=str(tmp_path / "ds.json"))
    assert [f.where for f in training_faults(fields, "stage")] == ["stage.deepspeed_config"]


@pytest.mark.parametrize("stage", [2, "auto"])
def test_a_ds_config_may_have_the_recipes_own_numbers(tmp_path: Path, stage: int | str) -> None:
    own = dict(zip(deepspeed.NUMBERS, (32, 4, 2, 0.7), strict=True))
    (tmp_path / "ds.json").write_text(json.dumps(own | {"zero_optimization": {"stage": stage}}))
    fields = TrainingFields(
        processes=4,
        strategy="deepspeed",
        batch_size=32,
        micro_batch_size=4,
        max_grad_norm=0.7,
        deepspeed_config=str(tmp_path / "ds.json"),
    )
    assert training_faults(fields, "stage") == []


@pytest.mark.parametrize(
    "fields",
    [
        TrainingFields(),
        TrainingFields(processes=2),
        TrainingFields(processes=2, strategy="fsdp", precision="bf16", micro_batch_size=2),
        TrainingFields(processes=2, strategy="ddp", precision="fp16"),
        TrainingFields(strategy="deepspeed", zero_stage=3),
        TrainingFields(processes=2, strategy="fsdp", precision="bf16", matmul="int8"),
        TrainingFields(processes=4, strategy="fsdp", replicas=2, batch_size=8, micro_batch_size=2),
        TrainingFields(processes=2, strategy="tp", tensor_parallel=2, batch_size=1),
        TrainingFields(processes=4, strategy="fsdp", tensor_parallel=2, precision="bf16", batch_size=2),
        TrainingFields(processes=2, synchronise="local_sgd", synchronise_every=4, eval_every=8),
        TrainingFields(processes=4, pipeline_stages=2, pipeline_schedule="interleaved", precision="bf16"),
        TrainingFields(processes=2, pipeline_stages=2, pipeline_schedule="gpipe", micro_batch_size=16),
        TrainingFields(processes=2, synchronise="diloco", synchronise_delay=7, eval_every=3),
        TrainingFields(**LATE | {"precision": "bf16", "eval_every": 3}),
        TrainingFields(processes=2, shares="measured", micro_batch_size=2, workers=1),
        TrainingFields(adapt_batch="noise", largest_batch_size=32, micro_batch_size=8),
        TrainingFields(adapt_batch="noise", largest_batch_size=64, processes=2, strategy="fsdp"),
        TrainingFields(strategy="deepspeed", offload="optimizer", overlap=False),
        TrainingFields(strategy="deepspeed", zero_stage=3, offload="parameters"),
        TrainingFields(processes=2, strategy="ddp", overlap=False, steps=3, trace=1),
    ],
)
def test_what_combines_has_no_faults(fields: TrainingFields) -> None:
    assert training_faults(fields, "x") == []


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"reference_batch_size": 0, "learning_rate_scaling": "sqrt"},
        {"micro_batch_size": 0},
        {"processes": 0},
        {"replicas": 0},
        {"tensor_parallel": 0},
        {"checkpoint_blocks": 0},
        {"context_length": 1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"max_grad_norm": 0.0},
        {"epochs": 0.0},
        {"learning_rate": float("inf")},
        {"epochs": float("inf")},
        {"weight_decay": float("nan")},
        {"weight_decay": float("-inf")},
        {"warmup_fraction": float("-inf")},
        {"max_grad_norm": float("nan")},
        {"max_grad_norm": float("inf")},
        {"warmup_fraction": float("nan")},
        {"outer_learning_rate": float("inf")},
        {"weight_decay": -1.0},
        {"warmup_fraction": 1.0},
        {"warmup_fraction": -0.1},
        {"eval_every": -1},
        {"workers": -1},
        {"prefetch": 0},
        {"checkpoint_every": -1},
        {"synchronise_from": -1},
        {"trace": -1},
    ],
    ids=str,
)
def test_numbers_out_of_range(changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    assert [f.where for f in training_faults(replace(TrainingFields(), **changes), "x")] == [f"x.{name}"]


@pytest.mark.parametrize(
    ("changes", "processes", "data_ranks", "parts", "micro_batch_size"),
    [
        ({"strategy": "ddp"}, 4, 4, 1, 4),
        ({"strategy": "fsdp"}, 4, 4, 4, 4),
        ({"strategy": "deepspeed", "zero_stage": 3}, 4, 4, 4, 4),
        ({"strategy": "deepspeed", "zero_stage": 2}, 4, 4, 1, 4),
        ({"strategy": "fsdp", "replicas": 2}, 4, 4, 2, 4),
        ({"strategy": "tp", "tensor_parallel": 4}, 4, 1, 4, 16),
        ({"strategy": "fsdp", "tensor_parallel": 2}, 4, 2, 4, 8),
        ({"strategy": "fsdp", "tensor_parallel": 2, "replicas": 2}, 8, 4, 4, 4),
    ],
    ids=str,
)
def test_who_sees_what_and_keeps_what(
    changes: dict[str, Any], processes: int, data_ranks: int, parts: int, micro_batch_size: int
) -> None:
    setting = Setting(TrainingFields(**changes), processes, "cpu")
    assert (setting.data_ranks, setting.parameter_parts) == (data_ranks, parts)
    assert setting.micro_batch_size == micro_batch_size
    assert [setting.data_rank(rank) for rank in (0, processes - 1)] == [0, data_ranks - 1]


def test_auto_follows_an_existing_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Setting(TrainingFields(), 1, "cpu").strategy == "single"
    assert Setting(TrainingFields(), 2, "cpu").strategy == "ddp"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Setting(TrainingFields(), 1, "cpu").strategy == "ddp"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert Setting(TrainingFields(), 2, "cpu").strategy == "fsdp"
    assert Setting(TrainingFields(strategy="ddp"), 2, "cpu").strategy == "ddp"


def test_copies_and_split_layers_need_a_strategy_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's own engine does not divide a model so, whatever its launch asks for."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name in ("replicas", "tensor_parallel"):
        (fault,) = training_faults(TrainingFields(**{name: 2}), "x")
        assert (fault.where, fault.got) == (f"x.{name}", "strategy auto")
    assert training_faults(TrainingFields(strategy="fsdp", replicas=2), "x") == []


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
