"""The same adapters on weights frozen in four bits under every engine, in the ranks of one launch.

``python every_engine_qlora.py OUT`` is one rank; it trains on the model in ``OUT/model`` and leaves
``OUT/<run>-<engine>`` and ``.json``. Imported, it gives what one process needs to do the same.
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
from every_engine import ENGINES as EVERY
from every_engine import FIELDS, Counting, broken_off
from torch import Tensor

from compresskit.modeling import ModelSource
from compresskit.training.adapters.adaptation import Adapted
from compresskit.training.fields import TrainingFields
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.setting import Setting

STEPS = 10
ENGINES = {name: changes for name, changes in EVERY.items() if name != "zero1"}
RUNS: Mapping[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "loftq_rounds": 0},
    "loftq": {"adapter": "lora", "loftq_rounds": 2},
    "dora": {"adapter": "dora", "loftq_rounds": 0},
    "dora-free": {"adapter": "dora", "loftq_rounds": 0, "held": ()},
    "bf16": {"adapter": "lora", "loftq_rounds": 0, "precision": "bf16", "held": ()},
}
"""Where no zeros are held, LoRA is computed by peft's own layers."""
BROKEN, BREAK = "lora", 5
"""The run that is broken off, and the step after which."""
ALL_FIELDS = replace(FIELDS, steps=STEPS, weight_decay=0.0, learning_rate=1e-2)


def adaptation(source: ModelSource, run: str, sharded: bool) -> Adapted:
    """Zeros are held in every layer but the head, where the run does not say otherwise."""
    layers = tuple(name for name in source.anatomy.linears if name != "lm_head")
    asked: dict[str, Any] = {
        "rank": 4,
        "alpha": 32.0,
        "dropout": 0.0,
        "base": "nf4",
        "finish": "merge",
        "merge_into": "trained",
        "targets": layers,
        "held": layers,
        "precision": "fp32",
        "seed": 0,
    }
    return Adapted(**(asked | RUNS[run]), sharded=sharded)


def train(run: str, source: ModelSource, out: Path, fields: TrainingFields) -> tuple[TrainOutcome, int]:
    """Train into ``out``; besides the outcome, the bytes of frozen weights that this rank keeps."""
    fields = replace(fields, precision=RUNS[run].get("precision", "fp32"))
    sharded = Setting(fields, fields.processes, "cpu").shards_parameters
    adapted, rows = adaptation(source, run, sharded), Counting()
    model = adapted.load(source)
    kept = []

    def save(tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            out.mkdir()
            adapted.save(source, out, tensors)

    outcome = Run(
        model,
        rows,
        fields=fields,
        scratch=out.with_name(f"{out.name}-s"),
        validation=rows,
        device="cpu",
        save=save,
        saves_frozen=adapted.saves_frozen,
    ).train()
    for name, weight in model.named_parameters():
        if name.endswith("base_layer.weight"):
            shard: Any = getattr(weight, "ds_tensor", None)
            own = weight.to_local() if hasattr(weight, "to_local") else weight if shard is None else shard
            kept.append(own.numel() * own.element_size())
    return outcome, sum(kept)


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    source = ModelSource(out / "model")
    for engine, changes in ENGINES.items():
        fields = replace(ALL_FIELDS, processes=2, **changes)
        for run in RUNS:
            name = f"{run}-{engine}"
            outcome, kept = train(run, source, out / name, fields)
            if torch.distributed.get_rank() == 0:
                (out / f"{name}.json").write_text(json.dumps({**asdict(outcome), "frozen_bytes": kept}))
        name, again = f"{BROKEN}-broken-{engine}", replace(fields, checkpoint_every=3)
        outcome = broken_off(lambda: train(BROKEN, source, out / name, again)[0], BREAK)  # noqa: B023
        if torch.distributed.get_rank() == 0:
            (out / f"{name}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
