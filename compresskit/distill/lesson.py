"""What a stage learns from a teacher: checks of its fields, and the parts of a training job.

For any stage with the fields ``teacher``, ``loss``, ``temperature`` and ``cross_entropy_weight``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from compresskit.distill import LOSSES
from compresskit.distill.vocabulary import (
    shared_vocabulary,
    teacher_bytes,
    teacher_faults,
    vocabulary_faults,
    vocabulary_of,
)
from compresskit.errors import Fault, PlanError
from compresskit.modeling import ModelSource, open_model
from compresskit.registry import nearest
from compresskit.training.job import Part
from compresskit.training.outlook import scale_faults

if TYPE_CHECKING:
    from compresskit.stage import Outlook, StageContext
    from compresskit.training.lesson import Taught

REPLICA = "compresskit.distill.teacher:Replica"


class TeachersLesson:
    """See :class:`compresskit.training.lesson.Lesson`."""

    @staticmethod
    def faults(stage: Taught, model: Outlook, where: str) -> list[Fault]:
        """What is wrong with the loss, the teacher and its vocabulary, for a student such as ``model``."""
        faults = []
        if stage.loss not in LOSSES:
            cure = f"Did you mean: {nearest(stage.loss, LOSSES)}?"
            faults.append(Fault(f"{where}.loss", "the name of a distillation loss", repr(stage.loss), cure))
        if not stage.temperature > 0:
            got = str(stage.temperature)
            faults.append(Fault(f"{where}.temperature", "a number above 0", got, "Raise temperature."))
        if not 0 <= stage.cross_entropy_weight <= 1:
            got = str(stage.cross_entropy_weight)
            cure = "Give the share of the next-token loss, such as 0.5."
            faults.append(Fault(f"{where}.cross_entropy_weight", "a number from 0 to 1", got, cure))
        return faults + teacher_faults(stage.teacher, stage.data or model.data, model, where)

    @staticmethod
    def held_bytes(stage: Taught, model: Outlook) -> int:
        """Of the teacher's weights, which every process holds."""
        return teacher_bytes(stage.teacher, model)

    @staticmethod
    def parts(stage: Taught, model: ModelSource, context: StageContext) -> tuple[Part, Part]:
        """What to minimise, and where the teacher's signal comes from.

        Raises:
            PlanError: the teacher's token ids are others, or its logits are scaled.
        """
        trust = context.trust_remote_code
        source = open_model(stage.teacher or str(context.original), trust_remote_code=trust)
        rows = vocabulary_of(model.config)
        faults = vocabulary_faults(model.directory, rows, source, "teacher", trust_remote_code=trust)
        faults += scale_faults(source.config, "teacher")
        if faults:
            raise PlanError(*faults)
        loss: Any = LOSSES[stage.loss]
        options = {f.name: getattr(stage, f.name) for f in fields(loss) if hasattr(stage, f.name)}
        teacher = {
            "directory": str(source.directory),
            "vocabulary": shared_vocabulary(rows, source),
            "trust_remote_code": trust,
        }
        return Part(f"{loss.__module__}:{loss.__qualname__}", options), Part(REPLICA, teacher)
