"""What ZenFlow cannot step for its shape is told when planned, and by its trainer, in the same words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import outlook, tiny_llama
from transformers import GptOssConfig, GptOssForCausalLM

from compresskit.distill.finetune import Finetune
from compresskit.errors import PlanError
from compresskit.modeling import open_model
from compresskit.training.driver.zenflow import ZenFlowTrainer
from compresskit.training.rules.zenflow import shape_faults

LATE = Finetune(
    strategy="deepspeed",
    offload="optimizer",
    overlap=False,
    synchronise="zenflow",
    synchronise_every=5,
    context_length=32,
)


def with_experts() -> GptOssForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 8, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))


def test_experts_in_one_tensor_are_refused_when_planned_and_when_trained(tmp_path: Path) -> None:
    place = tiny_llama(tmp_path / "model")
    assert not [f for f in LATE.faults(outlook(open_model(str(place))), "x") if "vectors" in f.expected]
    with_experts().save_pretrained(place)
    planned = [f for f in LATE.faults(outlook(open_model(str(place))), "x") if "vectors" in f.expected]
    assert [f.where for f in planned] == ["x.synchronise"]
    assert planned[0].got == "model.layers.0.mlp.experts.gate_up_proj of (4, 16, 16) and 3 more"
    with pytest.raises(PlanError) as caught:
        ZenFlowTrainer(with_experts())
    assert [replace(f, where="x.synchronise") for f in caught.value.faults] == planned


@pytest.mark.parametrize(
    ("shape", "is_refused"),
    [((8,), False), ((2, 8), False), ((1, 8), True), ((), True), ((2, 3, 4), True), ((8, 1), False)],
)
def test_vectors_and_matrices_of_several_rows_are_stepped(shape: tuple[int, ...], is_refused: bool) -> None:
    faults = shape_faults({"bias": (4,), "weight": shape}, "x")
    assert bool(faults) == is_refused
    assert all(f.got == f"weight of {shape}" for f in faults)
