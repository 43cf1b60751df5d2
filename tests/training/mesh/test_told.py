"""What cannot be learnt with split layers is told to a script, too, before anything is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import outlook, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from compresskit.distill.features import WithFeatures
from compresskit.distill.finetune import Finetune
from compresskit.errors import PlanError
from compresskit.modeling import open_model
from compresskit.training.fields import TrainingFields
from compresskit.training.outlook import STATE_BYTES
from compresskit.training.rollout import OnPolicy
from compresskit.training.run import Run

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
FIELDS = TrainingFields(strategy="tp", tensor_parallel=4, batch_size=4)
INNER = {"target": "compresskit.distill.divergences:Divergences", "options": {}}


def test_all_that_needs_whole_layers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    rows: Any = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}]
    compared: Any = WithFeatures(objective=INNER, features=[{"method": "relation", "pairs": ((0, 0),)}])
    run = Run(
        LlamaForCausalLM(CONFIG),
        rows,
        fields=FIELDS,
        scratch=tmp_path,
        objective=compared,
        on_policy=OnPolicy(),
        device="cpu",
    )
    with pytest.raises(PlanError) as error:
        run.train()
    assert [str(fault).split(", got")[0] for fault in error.value.faults] == [
        "training.tensor_parallel: expected a divisor of num_key_value_heads=2",
        "training.tensor_parallel: expected attention whose heads are all in each process",
        "training.tensor_parallel: expected no on_policy",
    ]


def test_the_forecast_knows_what_a_process_keeps(tmp_path: Path) -> None:
    """Of so few rows that states weigh most: copies take more than shards, split layers as much as shards."""
    source = open_model(str(tiny_llama(tmp_path / "m", vocab_size=258, hidden_size=128)))
    ways: dict[str, dict[str, Any]] = {
        "whole": {"strategy": "ddp"},
        "copies": {"strategy": "fsdp", "replicas": 2},
        "shards": {"strategy": "fsdp"},
    }
    told = {}
    for name, changes in ways.items():
        stage = Finetune(processes=4, batch_size=4, context_length=4, **changes)
        assert stage.faults(outlook(source), "s") == []
        told[name] = stage.forecast(outlook(source)).memory_bytes
    states = STATE_BYTES * source.anatomy.num_parameters
    assert told["whole"] - told["copies"] == states - states // 2
    assert told["copies"] >= told["shards"]
