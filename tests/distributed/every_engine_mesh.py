"""The same training by ranks that copy, shard and split a model, in the ranks of one launch.

``python every_engine_mesh.py OUT`` is one rank of two or four, which says what meshes there are; it writes
``OUT/<run>-<mesh>.json`` and ``.safetensors``, of some runs that it breaks off too. Imported, it gives what
one process needs to do the same.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from every_engine import FIELDS, Counting, broken_off, make_model
from safetensors.torch import save_file
from split_kinds import compare
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from compresskit.distill.features import WithFeatures
from compresskit.distill.teacher import Replica
from compresskit.modeling.anatomy import anatomy_of
from compresskit.sparse.train_run import Scheduled
from compresskit.training.bias_norm import biases_and_norms
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

STEPS, BREAK = 10, 7
MESHES: Mapping[int, Mapping[str, dict[str, Any]]] = {
    2: {"tp": {"strategy": "tp", "tensor_parallel": 2}},
    4: {
        "hsdp": {"strategy": "fsdp", "replicas": 2, "micro_batch_size": 1},
        "fsdp-tp": {"strategy": "fsdp", "tensor_parallel": 2},
    },
}
"""By the number of ranks. Each step is of 8 rows in two or four passes."""
SPLIT = 2
"""The ranks among which models of other kinds are split, too."""
NAMES = {"tp": "tp 2", "hsdp": "fsdp 2 x 2", "fsdp-tp": "fsdp 2 x tp 2"}
PARTS = {"tp": 2, "hsdp": 2, "fsdp-tp": 4}
RANKS = {mesh: ranks for ranks, meshes in MESHES.items() for mesh in meshes}
RUNS: Mapping[str, dict[str, Any]] = {
    "best": {"eval_every": 3, "keep_best": True, "activation_checkpointing": True},
    "taught": {"optimizer": "sgd", "learning_rate": 0.1},
    "rigl": {"weight_decay": 0.0},
    "few": {"learning_rate": 3e-2},
}
"""What each changes in the fields."""
BROKEN = ("rigl", "few")
"""The runs that are broken off and started again, too."""
LOSSES = [("forward_kl", {}), ("reverse_kl", {"weight": 0.5})]
VOCABULARY = 49
"""Of the taught run: its embedding's rows cannot be divided evenly."""


def make_qwen(*, layers: int, seed: int) -> nn.Module:
    """With norms of each head of queries and keys, of which each rank has its own, and projections apart."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=0,
    )
    made: nn.Module = Qwen3ForCausalLM(config)
    return made


def student(run: str) -> tuple[nn.Module, dict[str, Any]]:
    """What is trained, and what else :class:`Run` is told."""
    if run == "taught":
        return make_qwen(layers=2, seed=0), {}
    if run == "few":
        model = make_qwen(layers=2, seed=0)
        few = biases_and_norms(anatomy_of(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in few)
        return model, {"saves_frozen": False}
    model, held = make_model()
    if run == "rigl":
        ends, options = dict.fromkeys(held, "70%:layer"), {"update_every": 3}
        return model, {"zeroing": Scheduled(method="rigl", options=options, ends=ends)}
    return model, {"held": held}


def taught(place: Path) -> dict[str, Any]:
    """The objective, with features of blocks, and the teacher in each rank."""
    inner = {"target": "compresskit.distill.divergences:Divergences", "options": {"losses": LOSSES}}
    pairs = ((0, 1), (1, 3))
    teacher = Replica(directory=str(place / "teacher"), vocabulary=VOCABULARY, blocks=(1, 3))
    teacher.load()
    features = [{"method": "squarehead", "pairs": pairs}]
    return {"objective": WithFeatures(objective=inner, features=features), "teacher": teacher}


def train(place: Path, run: str, scratch: Path, saved: dict[str, Tensor], **changes: Any) -> TrainOutcome:
    """Train what ``run`` trains; what is saved comes into ``saved``."""
    model, told = student(run)
    told |= taught(place) if run == "taught" else {}
    return Run(
        model,
        Counting(),
        fields=replace(FIELDS, steps=STEPS, **RUNS[run], **changes),
        scratch=scratch,
        validation=Counting(7),
        device="cpu",
        save=saved.update,
        **told,
    ).train()


def main(place: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for mesh, changes in MESHES[int(os.environ["WORLD_SIZE"])].items():
        for run in (*RUNS, *(f"{run}-broken" for run in BROKEN)):
            name, saved = f"{run}-{mesh}", dict[str, Tensor]()
            plain, _, broken = run.partition("-")
            start = partial(train, place, plain, place / f"{name}-s", saved, **changes)
            if broken:
                start.keywords["checkpoint_every"] = 3
                outcome = broken_off(start, BREAK)
            else:
                outcome = start()
            if torch.distributed.get_rank() == 0:
                save_file({k: t.clone() for k, t in saved.items()}, place / f"{name}.safetensors")
                (place / f"{name}.json").write_text(json.dumps(asdict(outcome)))
    if (ranks := torch.distributed.get_world_size()) == SPLIT:
        found = compare(ranks)
        (place / f"kinds-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
