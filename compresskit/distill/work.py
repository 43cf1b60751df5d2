"""A training stage at work: from stage and context to a job, from its outcome to a StageResult."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from compresskit.distill import LOSSES
from compresskit.distill.finetune import Finetune
from compresskit.distill.outlook import scale_faults
from compresskit.distill.stage import Distill
from compresskit.distill.vocabulary import shared_vocabulary, vocabulary_faults, vocabulary_of
from compresskit.errors import Fault, PlanError
from compresskit.modeling import ModelSource, context_length, open_model
from compresskit.stage import LayerRecord, StageContext, StageResult
from compresskit.training.access import zero_fraction
from compresskit.training.fields import TrainingFields
from compresskit.training.fit import TrainOutcome
from compresskit.training.job import Part, TrainJob, train
from compresskit.training.rules import this_rank

LONGEST_ROW = 2048
VALIDATION_ROWS = 256
CROSS_ENTROPY = "compresskit.training.objective:CrossEntropy"
REPLICA = "compresskit.distill.teacher:Replica"
COMPUTES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run_stage(stage: Distill | Finetune, model: ModelSource, context: StageContext) -> StageResult:
    """Train ``model`` as ``stage`` says, into ``context.out``.

    Raises:
        PlanError: weights lie on a grid, or the teacher's token ids are others.
        RunError: training had to stop.
    """
    quantised = [p.layer for p in context.promises if p.kind == "grid"]
    if quantised:
        got = f"{len(quantised)} quantised layers, such as {quantised[0]}"
        cure = "Put this stage before the quantisation."
        raise PlanError(Fault(stage.kind, "weights that may move", got, cure))
    objective, teacher = _loss(stage, model, context)
    job = TrainJob(
        model=str(model.directory),
        out=str(context.out),
        scratch=str(context.scratch),
        fields={f.name: getattr(stage, f.name) for f in fields(TrainingFields)},
        objective=objective,
        teacher=teacher,
        data=asdict(stage.data or context.data),
        context_length=stage.context_length or min(context_length(model.config), LONGEST_ROW),
        cache=str(context.cache),
        validation_rows=VALIDATION_ROWS,
        held=tuple(dict.fromkeys(p.layer for p in context.promises if p.kind == "zeros")),
        seed=context.seed,
        device=context.device,
        trust_remote_code=context.trust_remote_code,
        title="Distilling" if isinstance(stage, Distill) else "Fine-tuning",
    )
    outcome = train(job)
    if this_rank():
        return StageResult()  # rank 0 wrote the checkpoint and tells the result
    return _result(stage, outcome, context)


def _loss(stage: Distill | Finetune, model: ModelSource, context: StageContext) -> tuple[Part, Part | None]:
    """What to minimise, and where the teacher's signal comes from."""
    if isinstance(stage, Finetune):
        return Part(CROSS_ENTROPY), None
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


def _result(stage: Distill | Finetune, outcome: TrainOutcome, context: StageContext) -> StageResult:
    """The outcome in the words of the manifest; what differs between runs goes to record.json."""
    made = ModelSource(context.out, trust_remote_code=context.trust_remote_code)
    plain = asdict(outcome)
    record = {name: plain.pop(name) for name in ("resumed_from", "seconds", "parameter_bytes")}
    (context.scratch / "record.json").write_text(json.dumps(record), encoding="utf-8")
    warnings = plain.pop("warnings") + dtype_warnings(context.dtype, stage.precision)
    if outcome.skipped_steps:
        warnings += (
            f"{outcome.skipped_steps} of {outcome.steps} steps overflowed in fp16 and were skipped; "
            "bf16 would not need to.",
        )
    if outcome.steps > 1 and outcome.final_loss >= outcome.first_loss:
        warnings += (
            f"The training loss did not fall ({outcome.first_loss:.4f} at the first step, "
            f"{outcome.final_loss:.4f} at the end): train longer, or change learning_rate.",
        )
    layers = tuple(
        LayerRecord(
            name=name,
            zero_fraction=zero_fraction(made.tensor(f"{name}.weight")),
            bits=8.0 * made.dtype(f"{name}.weight").itemsize,
        )
        for name in made.anatomy.linears
    )
    return StageResult(layers=layers, metrics=plain, warnings=tuple(warnings))


def dtype_warnings(dtype: str, precision: str) -> tuple[str, ...]:
    """What to tell of a recipe's ``dtype`` that is not what training computed in, in full sentences.

    It is the type that stages without training compute in; no stage changes the type weights are stored in.
    """
    if dtype == "auto" or COMPUTES[precision] == dtype:
        return ()
    return (
        f"dtype: {dtype} has no effect on training, which computed in {COMPUTES[precision]}: set the stage's "
        "precision instead. Weights are stored in the type they had.",
    )
