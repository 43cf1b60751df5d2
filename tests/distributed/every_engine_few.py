"""Few parameters of a pruned model trained under every engine, in the ranks of one launch.

``python every_engine_few.py OUT`` is one rank; it trains the models in ``OUT/model`` and ``OUT/bf16`` and
leaves ``OUT/<way>-<engine>`` and ``.json``, of runs that it breaks off too. Imported, it gives what one
process needs to do the same.
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
from compresskit.training.adapters.trainable import Adapter
from compresskit.training.bias_norm import BiasNorm
from compresskit.training.fields import TrainingFields
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

STEPS, BREAK = 6, 5
WAYS = ("bias_norm", "lora", "bf16", "bottleneck", "prefix")
"""``bf16`` is LoRA on a model that is stored so."""
BROKEN = WAYS[:2]
KEPT = ("bottleneck", "prefix")
RATES = {"prefix": 0.3}
ENGINES = {name: changes for name, changes in EVERY.items() if name != "zero1"}
ALL_FIELDS = replace(FIELDS, steps=STEPS, learning_rate=3e-2, checkpoint_every=3)


def layers_of(source: ModelSource) -> tuple[str, ...]:
    return tuple(name for name in source.anatomy.linears if name != "lm_head")


def model_of(way: str, place: Path) -> ModelSource:
    return ModelSource(place / ("bf16" if way == "bf16" else "model"))


def adaptation(way: str, source: ModelSource) -> Adaptation:
    if way == "bias_norm":
        return BiasNorm()
    layers = () if way in KEPT else layers_of(source)
    return Adapter(
        adapter="lora" if way == "bf16" else way,
        rank=4,
        alpha=8.0,
        dropout=0.0,
        finish="adapter" if way in KEPT else "merge",
        targets=layers,
        held=layers,
        seed=0,
    )


def train(way: str, place: Path, name: str, fields: TrainingFields) -> TrainOutcome:
    """Train into ``<place>/<name>``."""
    source, out = model_of(way, place), place / name
    adapted, rows = adaptation(way, source), Counting()

    def save(tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            out.mkdir()
            adapted.save(source, out, tensors)

    return Run(
        adapted.load(source),
        rows,
        fields=replace(fields, learning_rate=RATES.get(way, fields.learning_rate)),
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
    for engine, changes in ENGINES.items():
        fields = replace(ALL_FIELDS, **changes)
        for way in WAYS:
            name = f"{way}-{engine}"
            found = {name: train(way, place, name, fields)}
            if way in BROKEN:
                name = f"{way}-broken-{engine}"
                found[name] = broken_off(partial(train, way, place, name, fields), BREAK)
            for name, outcome in found.items():
                if torch.distributed.get_rank() == 0:
                    (place / f"{name}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
