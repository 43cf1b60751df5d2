"""Distill at work: which loss, which teacher; the rest is what every training stage does."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from compresskit.distill import LOSSES
from compresskit.distill.stage import Distill
from compresskit.distill.vocabulary import shared_vocabulary, vocabulary_faults, vocabulary_of
from compresskit.errors import PlanError
from compresskit.modeling import ModelSource, open_model
from compresskit.stage import StageContext, StageResult
from compresskit.training.job import Part
from compresskit.training.outlook import scale_faults
from compresskit.training.stage import run_training

REPLICA = "compresskit.distill.teacher:Replica"


def run_stage(stage: Distill, model: ModelSource, context: StageContext) -> StageResult:
    """Train ``model`` as ``stage`` says, into ``context.out``.

    Raises:
        PlanError: weights lie on a grid, or the teacher's token ids are others.
        RunError: training had to stop.
    """
    loss, teacher = _loss(stage, model, context)
    return run_training(stage, model, context, title="Distilling", objective=loss, teacher=teacher)


def _loss(stage: Distill, model: ModelSource, context: StageContext) -> tuple[Part, Part]:
    """What to minimise, and where the teacher's signal comes from."""
    source = open_model(stage.teacher or str(context.original), trust_remote_code=context.trust_remote_code)
    rows = vocabulary_of(model.config)
    trust = context.trust_remote_code
    faults = vocabulary_faults(model.directory, rows, source, "teacher", trust_remote_code=trust)
    faults += scale_faults(source.config, "teacher")
    if faults:
        raise PlanError(*faults)
    loss: Any = LOSSES[stage.loss]
    options = {f.name: getattr(stage, f.name) for f in fields(loss) if hasattr(stage, f.name)}
    teacher = {
        "directory": str(source.directory),
        "vocabulary": shared_vocabulary(rows, source),
        "trust_remote_code": context.trust_remote_code,
    }
    return Part(f"{loss.__module__}:{loss.__qualname__}", options), Part(REPLICA, teacher)
