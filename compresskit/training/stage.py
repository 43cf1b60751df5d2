"""A training stage at work: from stage and context to a job, from its outcome to a StageResult."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Protocol

from compresskit.data.spec import DataSpec
from compresskit.errors import Fault, PlanError
from compresskit.modeling import ModelSource, context_length
from compresskit.stage import LayerRecord, Promise, StageContext, StageResult
from compresskit.training.access import zero_fraction
from compresskit.training.fields import TrainingFields
from compresskit.training.job import Part, TrainJob, train
from compresskit.training.outcome import TrainOutcome
from compresskit.training.outlook import LONGEST_ROW
from compresskit.training.setting import this_rank

VALIDATION_ROWS = 256
CROSS_ENTROPY = Part("compresskit.training.objective:CrossEntropy")
LEAST_ALIGNED = 0.5
"""Share of the tokens; with less, a user is told how little an alignment hears of a teacher."""
COMPUTES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}


class TrainingStage(Protocol):
    """A stage that trains: a dataclass that inherits ``TrainingFields``."""

    @property
    def kind(self) -> str:
        """Of the stage."""
        ...

    @property
    def keeps_grids(self) -> bool:
        """Whether weights that lie on a grid already stay on it."""
        ...

    @property
    def loss_falls(self) -> bool:
        """Whether the loss should fall, so that a user is warned where it does not."""
        ...

    @property
    def data(self) -> DataSpec | None:
        """Text of the stage's own; None takes the recipe's."""
        ...

    @property
    def context_length(self) -> int | None:
        """Tokens per row; None is the model's own maximum, 2048 at most."""
        ...

    @property
    def precision(self) -> str:
        """What it computes in."""
        ...


def run_training(
    stage: TrainingStage,
    model: ModelSource,
    context: StageContext,
    *,
    title: str,
    objective: Part = CROSS_ENTROPY,
    teacher: Part | None = None,
    adaptation: Part | None = None,
    zeroing: Part | None = None,
    promises: tuple[Promise, ...] = (),
    evaluates_first: bool = False,
    on_policy: Mapping[str, Any] | None = None,
) -> StageResult:
    """Train ``model`` as ``stage`` says, into ``context.out``.

    Args:
        stage: its training fields, and its data.
        model: a dense checkpoint.
        context: of the stage; zeros that earlier stages promised are held.
        title: of the progress line.
        objective: what to minimise.
        teacher: where an objective's signal comes from.
        adaptation: what is trained in place of the plain model.
        zeroing: what makes zeros, or moves them, while it trains.
        promises: that this stage makes.
        evaluates_first: whether the validation loss is also measured before the first step.
        on_policy: fields of ``OnPolicy``, or None to learn from the data alone.

    Returns:
        A record per linear layer as saved, the training metrics, warnings; empty except on rank 0.

    Raises:
        PlanError: weights lie on a grid that this stage would move them off.
        RunError: training had to stop.
    """
    quantised = [p.layer for p in context.promises if p.kind == "grid"]
    if quantised and not stage.keeps_grids:
        got = f"{len(quantised)} quantised layers, such as {quantised[0]}"
        cure = "Put this stage before the quantisation."
        raise PlanError(Fault(stage.kind, "weights that may move", got, cure))
    job = TrainJob(
        model=str(model.directory),
        out=str(context.out),
        scratch=str(context.scratch),
        fields={f.name: getattr(stage, f.name) for f in fields(TrainingFields)},
        objective=objective,
        teacher=teacher,
        adaptation=adaptation,
        zeroing=zeroing,
        data=asdict(stage.data or context.data),
        context_length=stage.context_length or min(context_length(model.config), LONGEST_ROW),
        cache=str(context.cache),
        validation_rows=VALIDATION_ROWS,
        held=tuple(dict.fromkeys(p.layer for p in context.promises if p.kind == "zeros")),
        seed=context.seed,
        device=context.device,
        trust_remote_code=context.trust_remote_code,
        title=title,
        evaluates_first=evaluates_first,
        on_policy=on_policy,
    )
    outcome = train(job)
    if this_rank():
        return StageResult()  # rank 0 wrote the checkpoint and tells the result
    return _result(stage, outcome, context, promises)


def _result(
    stage: TrainingStage, outcome: TrainOutcome, context: StageContext, promises: tuple[Promise, ...]
) -> StageResult:
    """The outcome in the words of the manifest; what differs between runs goes to record.json."""
    made = ModelSource(context.out, trust_remote_code=context.trust_remote_code)
    plain = asdict(outcome)
    if outcome.validation_loss_before is None:
        del plain["validation_loss_before"]
    if not outcome.teacher:
        del plain["teacher"]
    if not outcome.batch_sizes:
        del plain["batch_sizes"], plain["noise_scale_rows"]
    record = {
        name: plain.pop(name)
        for name in ("resumed_from", "seconds", "parameter_bytes", "micro_batch_size", "shares")
    }
    (context.scratch / "record.json").write_text(json.dumps(record), encoding="utf-8")
    warnings = plain.pop("warnings") + dtype_warnings(context.dtype, stage.precision)
    if outcome.skipped_steps:
        warnings += (
            f"{outcome.skipped_steps} of {outcome.steps} steps overflowed in fp16 and were skipped; "
            "bf16 would not need to.",
        )
    if stage.loss_falls and outcome.steps > 1 and outcome.final_loss >= outcome.first_loss:
        warnings += (
            f"The training loss did not fall ({outcome.first_loss:.4f} at the first step, "
            f"{outcome.final_loss:.4f} at the end): train longer, or change learning_rate.",
        )
    if (share := plain["final_parts"].get("aligned", 1.0)) < LEAST_ALIGNED:
        cure = "Learn from the text too: set cross_entropy_weight."
        if getattr(stage, "on_policy", None) is not None:  # which the text's own loss does not go with
            cure = "Choose a teacher whose tokenizer is more like the student's."
        warnings += (
            f"The teacher was heard on {share:.0%} of the tokens: elsewhere its tokens and the student's "
            f"do not end together. {cure}",
        )
    layers = tuple(_record(made, name) for name in made.anatomy.linears)
    return StageResult(promises=promises, layers=layers, metrics=plain, warnings=tuple(warnings))


def _record(made: ModelSource, layer: str) -> LayerRecord:
    grid, name = made.grid(layer), f"{layer}.weight"
    bits = 8.0 * made.dtype(name).itemsize
    if grid is not None:
        bits = grid.bits_per_weight(made.anatomy.linears[layer].in_features)
    return LayerRecord(name=layer, zero_fraction=zero_fraction(made.tensor(name)), bits=bits)


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
