"""The same training under every engine with each way of keeping activations, in the ranks of one launch.

``python every_engine_memory.py OUT`` is one rank; it writes ``OUT/<mode>-<engine>.json``.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from every_engine import ENGINES, FIELDS, Counting, make_model

from compresskit.training import activations
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

STEPS = 4
AGAIN: dict[str, Any] = {"activation_checkpointing": True}
MODES: Mapping[str, dict[str, Any]] = {
    "none": {},
    "second": AGAIN | {"checkpoint_blocks": 2, "offload_activations": True},
    "operators": AGAIN | {"checkpoint_operators": True},
    "offload": {"offload_activations": True},
}
CASES = [(mode, engine) for engine in ("ddp", "fsdp", "zero2", "zero3") for mode in MODES]
_offloading = activations.offloading


def train(mode: str, scratch: Path, **changes: Any) -> TrainOutcome:
    """With tensors of the CPU copied as those of a GPU are."""
    activations.offloading = partial(_offloading, from_cpu=True)
    model, held = make_model()
    fields = replace(FIELDS, steps=STEPS, **MODES[mode], **changes)
    rows = Counting()
    return Run(model, rows, fields=fields, scratch=scratch, held=held, device="cpu").train()


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for mode, engine in CASES:
        outcome = train(mode, out / f"{mode}-{engine}-s", **ENGINES[engine])
        if torch.distributed.get_rank() == 0:
            (out / f"{mode}-{engine}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
