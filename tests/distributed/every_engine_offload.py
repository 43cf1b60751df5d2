"""Offload under ZeRO-1/2/3 and of a teacher, and traces of DDP and FSDP2, in the ranks of one launch.

``python every_engine_offload.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment.
Every offloading run is broken off once and continues. It writes ``OUT/<run>.json``, what the engine was made
of into ``OUT/<run>-made.json``, and ``OUT/<run>.safetensors``. Imported, it gives what one process needs.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from every_engine import ENGINES, FIELDS, Counting, broken_off, make_model
from every_engine_teachers import VOCABULARY
from every_engine_teachers import train as train_taught
from every_engine_zeros import train as train_zeros
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig, LlamaForCausalLM

from compresskit.distill.divided import Divided
from compresskit.modeling import ModelSource
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.trainer import StageTrainer

STEPS, SAVED, BREAK = 8, 3, 5
OFFLOADED: Mapping[str, dict[str, Any]] = {
    "zero1-optimizer": {**ENGINES["zero1"], "offload": "optimizer"},
    "zero2-optimizer": {**ENGINES["zero2"], "offload": "optimizer"},
    "zero3-optimizer": {**ENGINES["zero3"], "offload": "optimizer"},
    "zero3-parameters": {**ENGINES["zero3"], "offload": "parameters"},
}
ZEROED = ("zero2-optimizer", "zero3-parameters")
"""The runs that also move zeros."""
ZERO_STEPS = 8
TAUGHT = "taught"
"""The run whose teacher is offloaded, beside its student."""
TRACED: Mapping[str, dict[str, Any]] = {
    "buckets-ddp": {"strategy": "ddp"},
    "one-bucket-ddp": {"strategy": "ddp", "overlap": False},
    "traced-fsdp": {"strategy": "fsdp"},
}
TRACED_STEPS = 4
OFFLOAD_FIELDS = replace(FIELDS, steps=STEPS, checkpoint_every=SAVED)
TRACED_FIELDS = replace(FIELDS, steps=TRACED_STEPS, micro_batch_size=4, trace=1)
ZERO_FIELDS = replace(FIELDS, steps=ZERO_STEPS)


def wide_model() -> LlamaForCausalLM:
    """Wide enough that its gradients do not fit DDP's first bucket, of one megabyte."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def train_held(scratch: Path, saved: dict[str, Tensor], **changes: Any) -> TrainOutcome:
    """The tiny model, half of whose weights are held at zero."""
    model, held = make_model()
    return Run(
        model,
        Counting(),
        fields=replace(OFFLOAD_FIELDS, **changes),
        scratch=scratch,
        validation=Counting(),
        held=held,
        device="cpu",
        save=saved.update,
    ).train()


def train_traced(scratch: Path, model: nn.Module, **changes: Any) -> TrainOutcome:
    """The wide model, a step of which is traced."""
    fields = replace(TRACED_FIELDS, **changes)
    return Run(model, Counting(), fields=fields, scratch=scratch, device="cpu").train()


def made_of(trainer: StageTrainer) -> dict[str, Any]:
    """What DeepSpeed itself says of offload and overlap, and whose optimiser steps."""
    engine: Any = trainer.model_wrapped
    inner: Any = engine.optimizer
    wanted = {"optimizer": engine.zero_offload_optimizer(), "param": engine.zero_offload_param()}
    return {
        "told": {name: str(part.device) if part else "none" for name, part in wanted.items()},
        "does": [n for n in ("cpu_offload", "offload_optimizer", "offload_param") if getattr(inner, n, 0)],
        "stepper": type(engine.basic_optimizer).__module__,
        "overlap_comm": engine.zero_overlap_comm(),
    }


def _shares_buckets(trainer: StageTrainer) -> bool:
    """Whether gradients are views of DDP's buckets."""
    return bool(getattr(trainer.model_wrapped, "gradient_as_bucket_view", False))


def kept_by(provider: Divided) -> list[bool]:
    """Of each parameter of the teacher that FSDP2 gathers, whether its share is kept on the CPU."""
    groups: list[Any] = []
    for module in provider.model(torch.device("cpu")).modules():
        if isinstance(module, FSDPModule):
            groups += module._get_fsdp_state()._fsdp_param_groups
    return [parameter.offload_to_cpu for group in groups for parameter in group.fsdp_params]


def main(place: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    seen: list[dict[str, Any]] = []
    prepared = StageTrainer.when_prepared

    def noted(self: StageTrainer) -> None:
        prepared(self)
        seen.append(made_of(self) if self.is_deepspeed_enabled else {"views": _shares_buckets(self)})

    StageTrainer.when_prepared = noted  # type: ignore[method-assign]
    for run, changes in OFFLOADED.items():
        saved: dict[str, Tensor] = {}
        scratch = place / run

        def start(scratch: Path = scratch, saved: Any = saved, changes: Any = changes) -> TrainOutcome:
            return train_held(scratch, saved, **changes)

        outcome = broken_off(start, BREAK)
        tell(place, run, outcome, saved, seen[-1])
    for run in ZEROED:
        fields = replace(ZERO_FIELDS, **OFFLOADED[run])
        outcome = train_zeros("rigl", ModelSource(place / "model"), place / f"rigl-{run}", fields)
        tell(place, f"rigl-{run}", outcome, {}, seen[-1])
    provider = Divided(directory=str(place / "tied"), vocabulary=VOCABULARY, blocks=(1, 3), offload=True)
    outcome = train_taught(place, "tied", place / TAUGHT, provider, **OFFLOADED["zero3-parameters"])
    tell(place, TAUGHT, outcome, {}, {"kept": kept_by(provider)})
    for run, changes in TRACED.items():
        model = wide_model()
        outcome = train_traced(place / run, model, **changes)
        tell(place, run, outcome, {}, seen[-1])
    torch.distributed.destroy_process_group()


def tell(place: Path, run: str, outcome: TrainOutcome, saved: Mapping[str, Tensor], made: Any) -> None:
    """Of the main process, what it came to."""
    if torch.distributed.get_rank() == 0:
        (place / f"{run}.json").write_text(json.dumps(asdict(outcome)))
        (place / f"{run}-made.json").write_text(json.dumps(made))
        save_file({k: t.clone() for k, t in saved.items()}, place / f"{run}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
