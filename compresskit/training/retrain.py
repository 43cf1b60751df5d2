"""A stage that may train few parameters: its faults, its forecast, and the run. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, Any

from compresskit.errors import Fault
from compresskit.registry import nearest
from compresskit.training.adapters.outlook import beside_notes, beside_warnings
from compresskit.training.fields import TrainingFields
from compresskit.training.outlook import forecast_training, student_faults
from compresskit.training.setting import this_rank
from compresskit.training.trainable import ALL, TRAINABLES, Share, TrainableFields

if TYPE_CHECKING:
    from compresskit.modeling import ModelSource
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult
    from compresskit.training.job import Part

SHARED = {f.name for f in fields(TrainingFields)} | {"trainable", "data"}
OWN = tuple(f for f in fields(TrainableFields) if f.name not in SHARED)
"""The fields that only some of what is trainable looks at."""


def retraining_faults(stage: TrainableFields, model: Outlook, where: str) -> list[Fault]:
    """What is wrong with training this much of such a ``model`` with these fields."""
    faults = student_faults(stage, model, where)
    known = (ALL, *TRAINABLES)
    if stage.trainable not in known:
        cure = f"Did you mean: {nearest(stage.trainable, known)}?"
        return [
            *faults,
            Fault(f"{where}.trainable", f"one of {', '.join(known)}", repr(stage.trainable), cure),
        ]
    faults += _idle_faults(stage, where)
    return (
        faults if stage.trainable == ALL else faults + TRAINABLES[stage.trainable].faults(stage, model, where)
    )


def _idle_faults(stage: TrainableFields, where: str) -> list[Fault]:
    """Fields that were set, though what is trainable does not look at them."""
    reads = () if stage.trainable == ALL else TRAINABLES[stage.trainable].reads(stage.trainable)
    faults = []
    for field in OWN:
        value: Any = getattr(stage, field.name)
        if field.name in reads or field.default is MISSING or value == field.default:
            continue
        readers = [name for name in TRAINABLES if field.name in TRAINABLES[name].reads(name)]
        expected = f"nothing beside trainable {stage.trainable}"
        cure = f"Leave this field out, or set trainable to {' or '.join(readers)}."
        faults.append(Fault(f"{where}.{field.name}", expected, repr(value), cure))
    return faults


def share_of(stage: TrainableFields, anatomy: Anatomy, config: Any, weight_bytes: float = 4.0) -> Share:
    """What of such a model, stored in so many bytes a weight, ``stage``, which has no faults, trains."""
    if stage.trainable == ALL:
        return Share(trained=anatomy.num_parameters, layers=len(anatomy.linears))
    return TRAINABLES[stage.trainable].share(stage, anatomy, config, weight_bytes)


def forecast_retraining(stage: TrainableFields, model: Outlook, *, teacher_bytes: int = 0) -> Forecast:
    """Memory of one process: what takes no gradient has neither that nor optimiser states.

    Args:
        stage: has no faults for ``model``.
        model: what the stage will be given.
        teacher_bytes: what every process holds of a teacher.
    """
    share = share_of(stage, model.anatomy, model.config, model.weight_bytes)
    found = forecast_training(
        stage,
        model,
        teacher_bytes=teacher_bytes,
        trained=share.trained,
        frozen_bytes=share.frozen_bytes,
        other_bytes=share.other_bytes,
    )
    return replace(found, layers=share.layers, notes=(*found.notes, *_notes(stage, share, model.anatomy)))


def _notes(stage: TrainableFields, share: Share, anatomy: Anatomy) -> tuple[str, ...]:
    if stage.trainable == ALL:
        return ()
    percent = 100 * share.trained / anatomy.num_parameters
    told = f"{share.trained:,} parameters are trained, {percent:.3g}% of the model's: {stage.trainable}."
    return (told, *beside_notes(stage.trainable, stage.finish))


def run_retraining(
    stage: TrainableFields,
    model: ModelSource,
    context: StageContext,
    *,
    title: str,
    objective: Part | None = None,
    teacher: Part | None = None,
    on_policy: Mapping[str, Any] | None = None,
) -> StageResult:
    """Train as much of ``model`` as ``stage`` says, into ``context.out``.

    Args:
        stage: its training fields, its data, and what is trainable.
        model: a dense checkpoint.
        context: of the stage; zeros that earlier stages promised are held.
        title: of the progress line.
        objective: what to minimise; None is the next-token loss.
        teacher: where an objective's signal comes from.
        on_policy: fields of ``OnPolicy``, or None to learn from the data alone.

    Returns:
        As of ``run_training``; the metrics also say how many parameters were trained, what share of the
        model's that is, and the validation loss before the first step.
    """
    from compresskit.training.job import Part
    from compresskit.training.stage import CROSS_ENTROPY, run_training

    adaptation, warnings = None, tuple[str, ...]()
    if stage.trainable != ALL:
        cls: Any = TRAINABLES[stage.trainable]
        options = cls.options(stage, model, context)
        adaptation = Part(f"{cls.__module__}:{cls.__qualname__}", options)
        warnings = beside_warnings(stage.finish, holds=bool(options.get("held")))
    result = run_training(
        stage,
        model,
        context,
        title=title,
        objective=objective or CROSS_ENTROPY,
        teacher=teacher,
        adaptation=adaptation,
        evaluates_first=True,
        on_policy=on_policy,
    )
    if this_rank():
        return result
    trained = share_of(stage, model.anatomy, model.config).trained
    told = {"trained_parameters": trained, "trained_fraction": trained / model.anatomy.num_parameters}
    return replace(result, metrics={**result.metrics, **told}, warnings=(*result.warnings, *warnings))
