"""Ways to train that no other script puts together: pipelines and HSDP, each with several, in one launch.

``python every_engine_pairs.py OUT`` is one rank of two or four, which says which engine it is; it trains the
model in ``OUT/model``, or one of its own, and writes ``OUT/<way>-<engine>.json``. Imported, it trains alone.
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

import every_engine_few
import every_engine_qat
import every_engine_qlora
import torch
from every_engine import FIELDS, Counting, make_model

from compresskit.modeling import ModelSource
from compresskit.training import activations
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

ENGINES: Mapping[int, tuple[str, dict[str, Any]]] = {
    2: ("pipeline", {"pipeline_stages": 2, "micro_batch_size": 2}),
    4: ("hsdp", {"strategy": "fsdp", "replicas": 2, "micro_batch_size": 1}),
}
"""By the number of ranks."""
NAMES = {"pipeline": "pipeline 2 x 1f1b", "hsdp": "fsdp 2 x 2"}
WAYS: Mapping[str, dict[str, Any]] = {
    "offload": {"offload_activations": True},
    "adafactor": {"optimizer": "adafactor"},
    "bits8": {"optimizer": "adamw_8bit"},
    "int8": {"matmul": "int8"},
    "lora": {},
    "qat": {},
    "qlora": {},
}
"""What each changes in the fields; those that change none have another model."""
RUNS = {"pipeline": ("offload", "adafactor", "bits8"), "hsdp": ("offload", "int8", "lora", "qat", "qlora")}


def train(way: str, place: Path, name: str, **changes: Any) -> TrainOutcome:
    """Train what ``way`` does; losses are in ``place/NAME-s``."""
    scratch, changes = place / f"{name}-s", {"checkpoint_every": 0, **changes}
    if not WAYS[way]:
        source, out = ModelSource(place / "model"), place / name
        if way == "lora":
            return every_engine_few.train(way, place, name, replace(every_engine_few.ALL_FIELDS, **changes))
        if way == "qat":
            fields = replace(every_engine_qat.ALL_FIELDS, **changes)
            return every_engine_qat.train("dynamic", source, out, scratch, fields)
        fields = replace(every_engine_qlora.ALL_FIELDS, **changes)
        return every_engine_qlora.train("lora", source, out, fields)[0]
    model, held = make_model(layers=4)
    return Run(
        model,
        Counting(),
        fields=replace(FIELDS, steps=6, **WAYS[way], **changes),
        scratch=scratch,
        held=() if way == "bits8" else held,
        device="cpu",
    ).train()


def main(place: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.compiler.set_stance("force_eager")
    activations.offloading = partial(activations.offloading, from_cpu=True)
    engine, changes = ENGINES[ranks := int(os.environ["WORLD_SIZE"])]
    for way in RUNS[engine]:
        outcome = train(way, place, f"{way}-{engine}", processes=ranks, **changes)
        if torch.distributed.get_rank() == 0:
            (place / f"{way}-{engine}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
