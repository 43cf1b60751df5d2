"""What a stage that trains may learn from besides its text: the table, and what is asked of it. No torch.

The table stands here, below the families of methods, since stages of more than one use what it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from compresskit.data.spec import DataSpec
from compresskit.errors import Fault
from compresskit.registry import Registry
from compresskit.training.fields import TrainingFields

if TYPE_CHECKING:
    from compresskit.modeling import ModelSource
    from compresskit.stage import Outlook, StageContext
    from compresskit.training.job import Part


class Taught(Protocol):
    """The fields of a stage that say what it learns from whom."""

    @property
    def teacher(self) -> str | None:
        """Directory or hub id; None is the model as it was before the first stage."""
        ...

    @property
    def loss(self) -> str:
        """A name of ``compresskit.distill.LOSSES``; where text alone will do, ``cross_entropy`` too."""
        ...

    @property
    def temperature(self) -> float:
        """Divides both models' logits."""
        ...

    @property
    def cross_entropy_weight(self) -> float:
        """Share of the ordinary next-token loss in the mix, in [0, 1]."""
        ...

    @property
    def data(self) -> DataSpec | None:
        """Text of the stage's own; None takes the recipe's."""
        ...


class Lesson(Protocol):
    """Checks of such fields, and the parts of a training job that they mean."""

    @staticmethod
    def faults(stage: Taught, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong with the fields for a student such as ``model``."""
        ...

    @staticmethod
    def held_bytes(stage: Taught, model: Outlook) -> int:
        """What every process holds for it in memory."""
        ...

    @staticmethod
    def parts(stage: Taught, model: ModelSource, context: StageContext) -> tuple[Part, Part]:
        """What to minimise, and where the signal comes from."""
        ...


LESSONS: Registry[Lesson] = Registry("lesson", {"teacher": "compresskit.distill.lesson:TeachersLesson"})
TEXT_ALONE = "cross_entropy"
"""The loss of a stage that learns from text without a teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaughtFields(TrainingFields):
    """How to train, and whether to learn from a teacher besides; inherited by stages that need none.

    Attributes:
        loss: ``cross_entropy``, or a name of ``compresskit.distill.LOSSES`` to learn from a teacher.
        teacher: directory or hub id; None is the model as it was before the first stage.
        temperature: divides both models' logits; the distillation loss is multiplied by its square.
        cross_entropy_weight: share of the next-token loss beside a distillation loss, in [0, 1].
        data: text to train on; None takes the recipe's.
    """

    loss: str = TEXT_ALONE
    teacher: str | None = None
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    data: DataSpec | None = None

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", DataSpec(source=self.data))


def lesson_faults(stage: Taught, model: Outlook, where: str) -> list[Fault]:
    """What is wrong with the loss and the teacher of a stage that may also learn from text alone."""
    if stage.loss != TEXT_ALONE:
        return LESSONS["teacher"].faults(stage, model, where)
    unused = {"teacher": None, "temperature": 1.0, "cross_entropy_weight": 0.0}
    cure = "Set loss: forward_kl to learn from a teacher, or leave this field out."
    return [
        Fault(f"{where}.{name}", "nothing beside loss: cross_entropy", str(getattr(stage, name)), cure)
        for name, default in unused.items()
        if getattr(stage, name) != default
    ]


def lesson_bytes(stage: Taught, model: Outlook) -> int:
    """What every process holds in memory for a teacher; 0 where text alone is learnt from."""
    return 0 if stage.loss == TEXT_ALONE else LESSONS["teacher"].held_bytes(stage, model)


def lesson_parts(stage: Taught, model: ModelSource, context: StageContext) -> tuple[Part, Part | None]:
    """What such a stage minimises, and where a teacher's signal comes from, if there is one."""
    from compresskit.training.stage import CROSS_ENTROPY

    if stage.loss == TEXT_ALONE:
        return CROSS_ENTROPY, None
    return LESSONS["teacher"].parts(stage, model, context)
