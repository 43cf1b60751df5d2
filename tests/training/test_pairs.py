"""Each pair of ways to train that a recipe can ask for: refused, run by a test, or listed as neither.

What a plan refuses follows from the rules. Of all other pairs the tables below say which tests run them on
several processes, and which no test has run. A pair is looked at in a stage that has the fields of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from tiny import outlook, tiny_bert, tiny_llama

import compresskit as ck
from compresskit.data.spec import DataSpec
from compresskit.modeling import ModelSource
from compresskit.stage import Outlook
from compresskit.training import outlook as machine
from compresskit.training.faults import zero_faults
from compresskit.training.rules import ROOMS, precision, zenflow

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
KINDS = (ck.Finetune, ck.Distill, ck.Qat, ck.SparseTrain, ck.Qlora)
"""Of two ways the first that has the fields of both."""
WAYS: Mapping[str, Mapping[str, Any]] = {
    "ddp": {"strategy": "ddp", "processes": 2},
    "fsdp": {"strategy": "fsdp", "replicas": 1, "tensor_parallel": 1, "processes": 2},
    "zero2": {"strategy": "deepspeed", "zero_stage": 2, "processes": 2},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3, "offload": "none", "processes": 2},
    "zero_offload": {"strategy": "deepspeed", "zero_stage": 3, "offload": "parameters", "processes": 2},
    "hsdp": {"strategy": "fsdp", "replicas": 2, "processes": 4},
    "tp": {"strategy": "tp", "tensor_parallel": 2, "processes": 2},
    "fsdp_tp": {"strategy": "fsdp", "tensor_parallel": 2, "processes": 4},
    "pipeline": {"pipeline_stages": 2, "processes": 2},
    "local_sgd": {"synchronise": "local_sgd", "processes": 2},
    "diloco": {"synchronise": "diloco", "processes": 2},
    "zenflow": {
        "strategy": "deepspeed",
        "zero_stage": 2,
        "offload": "optimizer",
        "synchronise": "zenflow",
        "overlap": False,
        "checkpoint_every": 0,
        "micro_batch_size": 32,
        "processes": 2,
    },
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "fp8": {"precision": "fp8"},
    "int8": {"matmul": "int8"},
    "recompute": {"activation_checkpointing": True},
    "offload_activations": {"offload_activations": True},
    "adapt_batch": {"adapt_batch": "memory"},
    "noise": {"adapt_batch": "noise", "largest_batch_size": 128},
    "keep_best": {"keep_best": True, "eval_every": 8},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon"},
    "galore": {"optimizer": "galore_adamw"},
    "bits8": {"optimizer": "adamw_8bit"},
    "schedule_free": {"optimizer": "schedule_free_adamw", "lr_schedule": "constant"},
    "distill": {"loss": "forward_kl"},
    "teacher_shard": {"teacher_placement": "shard", "processes": 2},
    "teacher_cache": {"teacher_placement": "cache"},
    "on_policy": {"on_policy": {"fraction": 0.5}},
    "features": {"features": "hidden_mse"},
    "sentences": {"loss": "embedding_cosine"},
    "lora": {"trainable": "lora"},
    "bias_norm": {"trainable": "bias_norm"},
    "bottleneck": {"trainable": "bottleneck", "finish": "adapter"},
    "prefix": {"trainable": "prefix", "finish": "adapter", "context_length": 100},
    "qat": {"kind": "qat", "scheme": "w8a8"},
    "sparse_train": {"kind": "sparse_train", "method": "rigl", "pattern": "50%:layer"},
    "qlora": {"kind": "qlora"},
}
COMMON = {"batch_size": 64, "micro_batch_size": 1, "steps": 16}
RUN: Mapping[str, tuple[tuple[str, str], ...]] = {
    "test_engines": (
        ("ddp fsdp zero3", "keep_best"),
        ("ddp fsdp", "int8"),
        ("ddp", "bf16 fp16"),
    ),
    "test_memory_engines": (
        ("ddp fsdp zero2 zero3", "recompute offload_activations"),
        ("recompute", "offload_activations"),
    ),
    "test_backoff_ranks": (("ddp fp16", "adapt_batch"),),
    "test_noise_engines": (("ddp fsdp", "noise"),),
    "test_pair_engines": (
        ("pipeline", "offload_activations adafactor bits8"),
        ("hsdp", "offload_activations int8 lora qat qlora"),
    ),
    "test_mesh_engines": (
        ("hsdp tp fsdp_tp", "recompute keep_best distill features bias_norm sparse_train"),
        ("recompute", "keep_best"),
        ("distill", "features"),
    ),
    "test_pipeline_engines": (("pipeline", "bf16 recompute keep_best distill"),),
    "test_local_sgd": (("ddp", "local_sgd diloco"),),
    "test_zenflow_engine": (("zenflow", "bf16"),),
    "test_optimizer_engines": (
        ("ddp", "muon galore schedule_free"),
        ("fsdp", "muon"),
        ("zero2 zero3", "adafactor"),
    ),
    "test_zero_engines": (("ddp fsdp zero2 zero3", "sparse_train"),),
    "test_offload_engines": (
        ("zero_offload", "sparse_train distill teacher_shard features"),
        ("teacher_shard", "features"),
    ),
    "test_qat_engines": (("ddp fsdp zero2 zero3", "qat"),),
    "test_qlora_engines": (("ddp fsdp zero2 zero3 bf16", "qlora"),),
    "test_few_engines": (("ddp fsdp zero2 zero3", "lora bias_norm bottleneck prefix"),),
    "test_cached_teacher": (("ddp distill", "teacher_cache"),),
    "test_policy_engines": (("ddp fsdp zero3", "on_policy"), ("distill", "on_policy")),
    "test_feature_engines": (
        ("ddp fsdp zero2 zero3", "features"),
        ("recompute", "features distill"),
    ),
    "test_sentence_engines": (("ddp fsdp zero3 recompute features", "sentences"),),
    "test_teacher_engines": (("ddp fsdp zero2 zero3", "distill teacher_shard"), ("distill", "teacher_shard")),
}
"""Test of several processes -> the pairs that it runs: each of the left with each of the right."""
NOT_RUN: Mapping[str, str] = {
    "ddp": "pipeline fp8 adafactor bits8",
    "fsdp": "bf16 fp8 teacher_cache",
    "zero2": "bf16 keep_best teacher_cache on_policy sentences",
    "zero3": "bf16 teacher_cache",
    "zero_offload": (
        "bf16 recompute offload_activations keep_best adafactor teacher_cache on_policy sentences lora "
        "bias_norm bottleneck prefix qat qlora"
    ),
    "hsdp": "fsdp_tp bf16 fp8 teacher_shard teacher_cache on_policy sentences bottleneck prefix",
    "tp": "bf16 teacher_cache",
    "fsdp_tp": "bf16 teacher_shard teacher_cache",
    "pipeline": "teacher_cache",
    "local_sgd": (
        "bf16 fp8 int8 recompute offload_activations keep_best adafactor muon galore bits8 distill "
        "teacher_shard teacher_cache features sentences lora bias_norm bottleneck prefix qat qlora"
    ),
    "diloco": (
        "bf16 fp8 int8 recompute offload_activations keep_best adafactor muon galore bits8 distill "
        "teacher_shard teacher_cache features sentences lora bias_norm bottleneck prefix qat qlora"
    ),
    "zenflow": "recompute offload_activations keep_best distill teacher_cache features",
    "bf16": (
        "int8 recompute offload_activations adapt_batch noise keep_best adafactor muon galore bits8 "
        "schedule_free distill teacher_shard teacher_cache on_policy features sentences lora bias_norm "
        "bottleneck prefix qat sparse_train"
    ),
    "fp16": (
        "recompute offload_activations noise keep_best adafactor muon galore bits8 schedule_free "
        "distill teacher_shard teacher_cache on_policy features sentences lora bias_norm bottleneck "
        "prefix qat sparse_train qlora"
    ),
    "fp8": (
        "recompute offload_activations adapt_batch noise keep_best adafactor muon galore bits8 "
        "schedule_free distill teacher_shard teacher_cache on_policy features sentences bias_norm "
        "sparse_train"
    ),
    "int8": (
        "recompute offload_activations adapt_batch noise keep_best adafactor muon galore bits8 "
        "schedule_free distill teacher_shard teacher_cache on_policy features sentences bias_norm "
        "sparse_train"
    ),
    "recompute": (
        "adapt_batch noise adafactor muon galore bits8 schedule_free teacher_shard teacher_cache "
        "on_policy lora bias_norm bottleneck qat sparse_train qlora"
    ),
    "offload_activations": (
        "adapt_batch noise keep_best adafactor muon galore bits8 schedule_free distill teacher_shard "
        "teacher_cache on_policy features sentences lora bias_norm bottleneck qat sparse_train qlora"
    ),
    "adapt_batch": (
        "keep_best adafactor muon galore bits8 schedule_free distill teacher_cache on_policy features "
        "lora bias_norm bottleneck prefix qlora"
    ),
    "noise": (
        "keep_best adafactor muon galore bits8 schedule_free distill teacher_shard teacher_cache "
        "on_policy features sentences lora bias_norm bottleneck prefix qlora"
    ),
    "keep_best": (
        "adafactor muon galore bits8 schedule_free distill teacher_shard teacher_cache on_policy "
        "features sentences lora bias_norm bottleneck prefix qat qlora"
    ),
    "adafactor": (
        "distill teacher_shard teacher_cache on_policy features sentences lora bias_norm bottleneck "
        "prefix qat sparse_train qlora"
    ),
    "muon": (
        "distill teacher_shard teacher_cache on_policy features sentences lora bias_norm bottleneck "
        "prefix qat qlora"
    ),
    "galore": (
        "distill teacher_shard teacher_cache on_policy features sentences lora bias_norm bottleneck "
        "prefix qat qlora"
    ),
    "bits8": (
        "distill teacher_shard teacher_cache on_policy features sentences lora bias_norm bottleneck "
        "prefix qat qlora"
    ),
    "schedule_free": (
        "distill teacher_shard teacher_cache on_policy features sentences lora bias_norm bottleneck "
        "prefix qat qlora"
    ),
    "distill": "lora bias_norm bottleneck prefix qat sparse_train",
    "teacher_shard": "on_policy lora bias_norm bottleneck prefix",
    "teacher_cache": "lora bias_norm bottleneck prefix",
    "on_policy": "features lora bias_norm bottleneck",
    "features": "lora bias_norm bottleneck",
}
"""Allowed, and no test has run it: a way -> those that stand after it in the table of ways."""


def joined(*names: str) -> dict[str, Any] | None:
    """The fields of all these ways; None where they contradict each other."""
    found: dict[str, Any] = {}
    for name in names:
        for field, value in WAYS[name].items():
            if field == "processes":
                found[field] = found.get(field, 1) * value
            elif found.setdefault(field, value) != value:
                return None
    return found


def stage_of(asked: Mapping[str, Any]) -> Any:
    """A stage with these fields; None where there is no such."""
    kind, rest = asked.get("kind"), {name: value for name, value in asked.items() if name != "kind"}
    for made in KINDS:
        if kind in (None, made.kind) and rest.keys() <= {f.name for f in fields(made)}:
            return made(**COMMON | rest)
    return None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Outlook]:
    """One that reads sentences, and one that does not."""
    place = tmp_path_factory.mktemp("pairs")
    (place / "s.tsv").write_text("label\tsentence\n" + "1\tw4 w5\n" * 100)
    made = {False: tiny_llama(place / "llama", num_hidden_layers=4), True: tiny_bert(place / "bert")}
    data = {False: DataSpec(), True: DataSpec(source=str(place / "s.tsv"), examples=True)}
    return {kind: outlook(ModelSource(path), data=data[kind]) for kind, path in made.items()}


@pytest.fixture(scope="module")
def faults(models: Mapping[bool, Outlook]) -> dict[tuple[str, ...], list[str]]:
    """What a plan has against each way, and against each pair that a recipe can ask for."""
    with pytest.MonkeyPatch.context() as patch:
        for room in ROOMS:
            if hasattr(room, "find_spec"):
                patch.setattr(room, "find_spec", lambda name: object())
        patch.setattr(machine, "usable_cores", lambda: 64)  # pairs of ways multiply their processes
        patch.setattr(zenflow, "_unknown", lambda: False)
        for name in ("multiplies_int8", "multiplies_fp8"):
            patch.setattr(precision, name, lambda device: True)
        every = [(name,) for name in WAYS] + list(combinations(WAYS, 2))
        told = {names: told_of(names, models) for names in every}
    return {names: found for names, found in told.items() if found is not None}


def told_of(names: tuple[str, ...], models: Mapping[bool, Outlook]) -> list[str] | None:
    asked = joined(*names)
    implied = len(names) == 2 and asked in [joined(name) for name in names]
    stage = None if asked is None or implied else stage_of(asked)
    if stage is None:
        return None
    found = stage.faults(models["sentences" in names], "s")
    if stage.kind == "sparse_train":  # told where the chain is looked at
        found += zero_faults(stage, "s", changing=True)
    return [str(fault) for fault in found]


def run_pairs() -> dict[tuple[str, str], str]:
    """Pair -> a test that runs it."""
    places, found = list(WAYS), {}
    for test, products in RUN.items():
        for left, right in products:
            for pair in product(left.split(), right.split()):
                first, second = sorted(pair, key=places.index)
                found[first, second] = test
    return found


def test_each_way_has_no_faults_alone(faults: Mapping[tuple[str, ...], list[str]]) -> None:
    assert {name: faults[(name,)] for name in WAYS if faults[(name,)]} == {}


def test_each_pair_is_refused_or_run_or_listed(faults: Mapping[tuple[str, ...], list[str]]) -> None:
    allowed = {names for names, told in faults.items() if len(names) == 2 and not told}
    run, listed = (
        set(run_pairs()),
        {(way, other) for way, others in NOT_RUN.items() for other in others.split()},
    )
    assert run & listed == set(), "these are run: take them off NOT_RUN"
    assert listed - allowed == set(), "these are refused, or nobody can ask for them"
    assert run - allowed == set(), "a test runs what is refused"
    assert allowed - run - listed == set(), "refuse these, run them, or list them in NOT_RUN"


def test_the_tests_that_run_pairs_are_there() -> None:
    assert [test for test in RUN if not (DISTRIBUTED / f"{test}.py").is_file()] == []
