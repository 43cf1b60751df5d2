"""What a stage that trains may learn from besides its text: the table, and what is asked of it. No torch.

The table stands here, below the families of methods, since stages of more than one use what it names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from compresskit.registry import Registry

if TYPE_CHECKING:
    from compresskit.data.spec import DataSpec
    from compresskit.errors import Fault
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
        """A name of ``compresskit.distill.LOSSES``."""
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
