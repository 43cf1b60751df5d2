"""Few parameters of a pruned model trained under every engine, in the ranks of one launch.

``python every_engine_few.py OUT`` is one rank; it trains the model in ``OUT/model`` and leaves
``OUT/<way>-<engine>`` and ``.json``, of a run that it breaks off too. Imported, it gives what one process
needs to do the same.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from every_engine import ENGINES as EVERY
from every_engine import FIELDS, Counting, broken_off
from torch import Tensor

from compresskit.modeling import ModelSource
from compresskit.training.adaptation import Adaptation
from compresskit.training.bias_norm import BiasNorm
from compresskit.training.fields import TrainingFields
from compresskit.training.lora import Lora
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

STEPS, BREAK = 6, 5
WAYS = ("bias_norm", "lora")
ENGINES = {name: changes for name, changes in EVERY.items() if name != "zero1"}
ALL_FIELDS = replace(FIELDS, steps=STEPS, learning_rate=3e-2, checkpoint_every=3)


def layers_of(source: ModelSource) -> tuple[str, ...]:
    return tuple(name for name in source.anatomy.linears if name != "lm_head")


def adaptation(way: str, source: ModelSource) -> Adaptation:
    if way == "bias_norm":
        return BiasNorm()
    layers = layers_of(source)
    return Lora(rank=4, alpha=8.0, targets=layers, held=layers, seed=0)


def train(way: str, source: ModelSource, out: Path, fields: TrainingFields) -> TrainOutcome:
    """Train into ``out``."""
    adapted, rows = adaptation(way, source), Counting()

    def save(tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            out.mkdir()
            adapted.save(source, out, tensors)

    return Run(
        adapted.load(source),
        rows,
        fields=fields,
        scratch=out.with_name(f"{out.name}-s"),
        validation=rows,
        adaptation=repr(adapted),
        saves_frozen=adapted.saves_frozen,
        device="cpu",
        save=save,
        evaluates_first=True,
    ).train()


def main(place: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    source = ModelSource(place / "model")
    for engine, changes in ENGINES.items():
        fields = replace(ALL_FIELDS, **changes)
        for way in WAYS:
            whole, broken = f"{way}-{engine}", f"{way}-broken-{engine}"
            again = partial(train, way, source, place / broken, fields)
            found = {whole: train(way, source, place / whole, fields), broken: broken_off(again, BREAK)}
            for name, outcome in found.items():
                if torch.distributed.get_rank() == 0:
                    (place / f"{name}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
