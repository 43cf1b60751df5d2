"""A QLoRA stage at work: train, finish, and where a new grid is asked for, quantise what came out."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from compresskit.modeling import ModelSource
from compresskit.quant.qlora_outlook import unrounded_inputs
from compresskit.targets import select
from compresskit.training.adapters.outlook import beside_warnings, require_live_rows, trained_parameters
from compresskit.training.job import Part
from compresskit.training.setting import Setting, launched_processes, this_rank
from compresskit.training.stage import run_training
from compresskit.training.trainable import BESIDE

if TYPE_CHECKING:
    from compresskit.quant.qlora import Qlora
    from compresskit.stage import StageContext, StageResult

ADAPTED = "compresskit.training.adapters.adaptation:Adapted"
FIELDS = ("adapter", "rank", "alpha", "dropout", "base", "loftq_rounds", "finish", "merge_into", "precision")
MERGED = "merged"


def run_qlora(stage: Qlora, model: ModelSource, context: StageContext) -> StageResult:
    """Train adapters on ``model`` as ``stage`` says, and finish them into ``context.out``.

    Raises:
        PlanError: a row of zeros is to get a DoRA adapter that stays beside the model.
        RunError: training had to stop.
        SchemeError: the new grid does not fit a layer.
    """
    targets = select(model.anatomy, stage.targets, stage.ignore)
    if stage.adapter == "dora" and stage.finish == BESIDE:
        require_live_rows(model, targets)
    held = dict.fromkeys(p.layer for p in context.promises if p.kind == "zeros" and p.layer in targets)
    options = {name: value for name, value in asdict(stage).items() if name in FIELDS}
    setting = Setting(stage, launched_processes() or stage.processes, context.device)
    options |= {"targets": targets, "held": tuple(held), "seed": context.seed}
    options["sharded"] = setting.shards_parameters
    gridded = tuple(layer for layer in targets if model.grid(layer) is not None)
    regrids = stage.finish == "grid" and stage.scheme is not None and len(gridded) < len(targets)
    training = context
    if regrids:
        training = replace(context, out=context.scratch / MERGED)
        if not this_rank():
            shutil.rmtree(training.out, ignore_errors=True)
            training.out.mkdir()
    result = run_training(
        stage, model, training, title="Training adapters", adaptation=Part(ADAPTED, options)
    )
    if this_rank():
        return result
    trained = trained_parameters(stage.adapter, stage.rank, model.anatomy, model.config, targets)
    rounding = [n for n in model.anatomy.linears if (g := model.grid(n)) is not None and g.activation_bits]
    said = beside_warnings(stage.finish, holds=bool(held)) + unrounded_inputs(rounding)
    metrics = {**result.metrics, "trained_parameters": trained}
    result = replace(result, metrics=metrics, warnings=(*result.warnings, *said))
    if not regrids:
        return result
    merged = ModelSource(training.out, trust_remote_code=context.trust_remote_code)
    done = stage.requantise(gridded).run(merged, context)
    shutil.rmtree(training.out)
    return replace(
        done, metrics={**result.metrics, **done.metrics}, warnings=(*result.warnings, *done.warnings)
    )
