"""What a stage learns from a teacher: checks of its fields, and the parts of a training job.

For any stage with the fields ``teacher``, ``loss``, ``temperature``, ``cross_entropy_weight``, ``features``.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from math import inf
from typing import TYPE_CHECKING, Any

from compresskit.distill import LOSSES
from compresskit.distill.align.checks import aligned, alignment_faults, spelt_ids
from compresskit.distill.feature_outlook import (
    compared,
    feature_bytes,
    feature_faults,
    featured,
    pair_faults,
    teacher_of,
)
from compresskit.distill.features import looks_of
from compresskit.distill.placements import PLACEMENTS
from compresskit.distill.placements.base import Placement, Preparatory, Teaching
from compresskit.distill.vocabulary import (
    shared_vocabulary,
    teacher_faults,
    vocabulary_faults,
    vocabulary_of,
)
from compresskit.errors import Fault, PlanError
from compresskit.modeling import ModelSource, open_model
from compresskit.options import Choice, choice_faults, choices_of
from compresskit.progress import size
from compresskit.training.job import Part
from compresskit.training.lesson import NO_ALIGNMENT, REPLICATE, SERVER, TEXT_ALONE, unused_faults
from compresskit.training.outlook import scale_faults
from compresskit.training.stage import CROSS_ENTROPY

if TYPE_CHECKING:
    from compresskit.data.spec import DataSpec
    from compresskit.stage import Outlook, StageContext
    from compresskit.training.lesson import Taught

DIVERGENCES = "compresskit.distill.divergences:Divergences"


class TeachersLesson:
    """See :class:`compresskit.training.lesson.Lesson`."""

    @staticmethod
    def faults(stage: Taught, model: Outlook, where: str) -> list[Fault]:
        """What is wrong with the losses, the teacher and its vocabulary, for a student such as ``model``."""
        faults = []
        if stage.loss == TEXT_ALONE and stage.features is not None:
            faults += unused_faults(stage, where, "temperature", "cross_entropy_weight")
        else:
            faults += loss_faults(stage, f"{where}.loss")
        faults += mix_faults(stage, where)
        faults += feature_faults(stage, model, f"{where}.features")
        faults += alignment_faults(stage, where)
        faults += teacher_faults(
            stage.teacher, stage.data or model.data, model, where, is_aligned=is_aligned(stage)
        )
        place = f"{where}.teacher_placement"
        faults += choice_faults(stage.teacher_placement, PLACEMENTS, where=place)
        if faults:
            return faults
        return _placement(stage).faults(stage, model, _foreseen(stage, model), place)

    @staticmethod
    def held_bytes(stage: Taught, model: Outlook) -> int:
        """Of what every process holds of the teacher, and of what a feature loss keeps."""
        teaching = _foreseen(stage, model)
        return _placement(stage).held_bytes(stage, model, teaching) + feature_bytes(stage, model)

    @staticmethod
    def before_bytes(stage: Taught, model: Outlook) -> int:
        """Of what the placement does before training."""
        placement = _placement(stage)
        if not isinstance(placement, Preparatory):
            return 0
        return placement.before_bytes(stage, model, _foreseen(stage, model))

    @staticmethod
    def notes(stage: Taught, model: Outlook) -> tuple[str, ...]:
        """What each placement would hold of the teacher in each process, and what is done before training."""
        teaching, placement = _foreseen(stage, model), _placement(stage)
        before = placement.notes(stage, model, teaching) if isinstance(placement, Preparatory) else ()
        return (held_note(stage.teacher_placement, stage, model, teaching), *before)

    @staticmethod
    def parts(stage: Taught, model: ModelSource, context: StageContext) -> tuple[Part, Part]:
        """What to minimise, and where the teacher's signal comes from.

        Raises:
            PlanError: the teacher's token ids are others, its logits are scaled, or blocks do not pair.
        """
        trust = context.trust_remote_code
        source = open_model(stage.teacher or str(context.original), trust_remote_code=trust)
        rows = vocabulary_of(model.config)
        faults = vocabulary_faults(
            model.directory, rows, source, "teacher", trust_remote_code=trust, is_aligned=is_aligned(stage)
        )
        faults += scale_faults(source.config, "teacher")
        faults += pair_faults(stage, model, source, "features")
        if faults:
            raise PlanError(*faults)
        objective = CROSS_ENTROPY if stage.loss == TEXT_ALONE else _loss(stage)
        placed = _placement(stage).part(_teaching(stage, model, source, context.data, trust))
        if stage.features is not None:
            objective = featured(stage, objective, model, source)
            if attended := looks_of(compared(stage, model, source), 1).attended:
                # A replica, as the plan made sure.
                placed = Part(placed.target, {**placed.options, "attended": attended})
        return objective, aligned(stage, placed, model, source, trust) if is_aligned(stage) else placed


def is_aligned(stage: Taught) -> bool:
    """Whether the teacher has a tokenizer of its own."""
    named: Choice = stage.alignment
    return named.method != NO_ALIGNMENT


def held_note(chosen: Choice, stage: Taught, model: Outlook, teaching: Teaching) -> str:
    """What each placement would hold of the teacher, in a line; none that would save nothing."""
    if chosen.method == SERVER and stage.teacher is None:
        return "Teacher, in each process: nothing, it is behind a server."
    made = {name: _placement(stage) if name == chosen.method else _plain(name) for name in PLACEMENTS}
    held = {name: placement.held_bytes(stage, model, teaching) for name, placement in made.items()}
    told = []
    for name, count in held.items():
        if name in (REPLICATE, chosen.method) or count < held[REPLICATE]:
            mark = " (chosen)" if name == chosen.method else ""
            told.append(f"{name} {size(count) if count else 'nothing'}{mark}")
    return f"Teacher, in each process: {', '.join(told)}."


def _plain(name: str) -> Placement:
    """A placement for its bytes alone, which hang on no option that has to be given."""
    cls: Any = PLACEMENTS[name]
    needed = [f for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    made: Placement = cls(**{field.name: "" for field in needed})
    return made


def loss_faults(stage: Taught, where: str) -> list[Fault]:
    """What is wrong with the losses of ``stage`` on next-token distributions."""
    choices = choices_of(stage.loss)
    if not choices:
        return [Fault(where, "at least one loss", "an empty list", "Write forward_kl, or leave loss out.")]
    place = "{}[{}]" if len(choices) > 1 else "{}"
    return [
        fault
        for i, choice in enumerate(choices)
        for fault in choice_faults(choice, LOSSES, where=place.format(where, i))
    ]


def mix_faults(stage: Taught, where: str) -> list[Fault]:
    """What is wrong with the temperature and the share of cross entropy."""
    faults = []
    if not 0 < stage.temperature < inf:
        got, cure = str(stage.temperature), "Set temperature to a number such as 2."
        faults.append(Fault(f"{where}.temperature", "a finite number above 0", got, cure))
    if not 0 <= stage.cross_entropy_weight <= 1:
        got, cure = str(stage.cross_entropy_weight), "Give the share of cross entropy, such as 0.5."
        faults.append(Fault(f"{where}.cross_entropy_weight", "a number from 0 to 1", got, cure))
    return faults


def _placement(stage: Taught) -> Placement:
    placed: Choice = stage.teacher_placement
    made: Placement = PLACEMENTS[placed.method](**dict(placed.options))
    return made


def _foreseen(stage: Taught, model: Outlook) -> Teaching:
    """What the stage will ask of its teacher."""
    return _teaching(stage, model, teacher_of(stage, model), model.data, model.trust_remote_code)


def _teaching(
    stage: Taught, model: Outlook | ModelSource, source: ModelSource, data: DataSpec, trust: bool
) -> Teaching:
    shared = shared_vocabulary(vocabulary_of(model.config), source)
    return Teaching(
        teacher=source,
        vocabulary=spelt_ids(source, trust) if is_aligned(stage) else shared,
        blocks=looks_of(compared(stage, model, source), 1).outputs,
        losses=() if stage.loss == TEXT_ALONE else choices_of(stage.loss),
        temperature=stage.temperature,
        trust_remote_code=trust,
        isolated=not (stage.data or data).cross_documents,
    )


def _loss(stage: Taught) -> Part:
    """The distillation losses."""
    losses = tuple((choice.method, dict(choice.options)) for choice in choices_of(stage.loss))
    mixed = {"temperature": stage.temperature, "cross_entropy_weight": stage.cross_entropy_weight}
    return Part(DIVERGENCES, {"losses": losses, **mixed})
