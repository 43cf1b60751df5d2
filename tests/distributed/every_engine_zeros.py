"""The same making and moving of zeros under every engine, one after another, in the ranks of one launch.

``python every_engine_zeros.py OUT`` is one rank; it trains the model in ``OUT/model`` and leaves
``OUT/<run>-<engine>`` and ``.json``; some runs it breaks off and starts again. Imported, it gives what one
process needs to do the same.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from every_engine import ENGINES, FIELDS, Counting, broken_off
from torch import Tensor, nn

from compresskit.modeling import ModelSource
from compresskit.sparse import TRAINED_PRUNERS
from compresskit.sparse.chosen import Chosen
from compresskit.sparse.masked import Masked
from compresskit.sparse.train_run import Scheduled
from compresskit.training.adaptation import Adaptation, Plain
from compresskit.training.fields import TrainingFields
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

STEPS = 12
RUNS: Mapping[str, dict[str, Any]] = {
    "gradual": {"method": "gradual", "options": {"update_every": 3}, "end": "70%:layer"},
    "gradual-groups": {"method": "gradual", "options": {"update_every": 2, "end": 0.5}, "end": "2:4"},
    "set": {"method": "set", "options": {"update_every": 3}, "end": "70%:layer"},
    "rigl": {"method": "rigl", "options": {"update_every": 3}, "end": "70%:layer"},
    "srste": {"method": "srste", "options": {"pull": 0.01}, "end": "2:4"},
    "movement": {"method": "movement", "options": {"update_every": 3}, "end": "70%:layer"},
    "maskllm": {"method": "maskllm", "options": {"norm_reward": 1e-3}, "end": "2:4"},
}
ALL_FIELDS = replace(FIELDS, steps=STEPS)
BROKEN, BREAK = ("rigl", "movement", "maskllm"), 8
"""The runs that are broken off, and the step after which: past a change and past a checkpoint."""


def runs_under(engine: str) -> tuple[str, ...]:
    """ZeRO-1 differs from ZeRO-2 in how gradients are divided alone, which one of the runs looks at."""
    return ("gradual", "rigl") if engine == "zero1" else tuple(RUNS)


def ends(run: str, source: ModelSource) -> dict[str, str]:
    """Layer -> the pattern it ends with."""
    return {name: RUNS[run]["end"] for name in source.anatomy.linears if name != "lm_head"}


def train(run: str, source: ModelSource, out: Path, fields: TrainingFields) -> TrainOutcome:
    """Train the model, dense at first, into ``out``."""
    asked = {"method": RUNS[run]["method"], "options": RUNS[run]["options"], "ends": ends(run, source)}
    passes = fields.batch_size // (fields.micro_batch_size or 1) // (1 if fields.micro_batch_size == 8 else 2)
    method = TRAINED_PRUNERS[RUNS[run]["method"]]
    swaps, swap = method.masks_forward, Chosen if method.learns_masks else Masked
    adapted: Adaptation = swap(**asked, steps=STEPS, passes_per_step=passes) if swaps else Plain()

    def save(tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            out.mkdir()
            adapted.save(source, out, tensors)

    model = adapted.load(source)
    outcome = Run(
        model,
        Counting(),
        fields=fields,
        scratch=out.with_name(f"{out.name}-s"),
        validation=Counting(),
        zeroing=None if swaps else Scheduled(**asked),
        saves_frozen=adapted.saves_frozen,
        device="cpu",
        save=save,
    ).train()
    require_same_everywhere(model)
    if method.learns_masks:
        require_frozen(model)
    return outcome


def require_same_everywhere(model: nn.Module) -> None:
    """Fail unless whole parameters are the same on every rank to the bit, the zeros among them."""
    if not torch.distributed.is_initialized():
        return
    digest = sha256()
    for parameter in model.parameters():
        if type(parameter.data) is Tensor and parameter.numel():
            digest.update(parameter.detach().numpy().tobytes())
    digests: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest.hexdigest())
    assert len(set(digests)) == 1, "ranks have different weights"


def require_frozen(model: nn.Module) -> None:
    """Fail unless logits alone are trained, and nothing else was given a gradient."""
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.endswith("logit_OGC"), name
        assert parameter.requires_grad or parameter.grad is None, name


def main(place: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    source = ModelSource(place / "model")
    for engine, changes in ENGINES.items():
        fields = replace(ALL_FIELDS, **changes)
        outcomes = {run: train(run, source, place / f"{run}-{engine}", fields) for run in runs_under(engine)}
        again = replace(fields, checkpoint_every=5)
        for run in (run for run in BROKEN if run in runs_under(engine)):
            name = f"{run}-broken"
            start = partial(train, run, source, place / f"{name}-{engine}", again)
            outcomes[name] = broken_off(start, BREAK)
        if torch.distributed.get_rank() == 0:
            for run, outcome in outcomes.items():
                (place / f"{run}-{engine}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
