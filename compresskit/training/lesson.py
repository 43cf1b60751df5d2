"""What a stage that trains may learn from besides its text: the table, and what is asked of it. No torch.

The table stands here, below the families of methods, since stages of more than one use what it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from compresskit.data.spec import DataSpec
from compresskit.errors import Fault
from compresskit.options import Choice, choice_of, choices_of
from compresskit.registry import Registry
from compresskit.training.fields import TrainingFields

if TYPE_CHECKING:
    from compresskit.modeling import ModelSource
    from compresskit.stage import Forecast, Outlook, StageContext
    from compresskit.training.job import Part


class Taught(Protocol):
    """The fields of a stage that say what it learns from whom."""

    @property
    def kind(self) -> str:
        """Of the stage."""
        ...

    @property
    def teacher(self) -> str | None:
        """Directory or hub id; None is the model as it was before the first stage."""
        ...

    @property
    def loss(self) -> Any:
        """Choices of ``compresskit.distill.LOSSES``, or ``cross_entropy`` where there need be no other."""
        ...

    @property
    def teacher_placement(self) -> Any:
        """A ``Choice`` of ``compresskit.distill.placements.PLACEMENTS``."""
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
    def features(self) -> Any:
        """A ``Choice`` of ``compresskit.distill.FEATURE_LOSSES``, a tuple of several, or None."""
        ...

    @property
    def alignment(self) -> Any:
        """A ``Choice`` of ``compresskit.distill.align.ALIGNMENTS``, or of the method ``none``."""
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
    def before_bytes(stage: Taught, model: Outlook) -> int:
        """What one process holds at most for what is done before training, when no student is there yet."""
        ...

    @staticmethod
    def notes(stage: Taught, model: Outlook) -> tuple[str, ...]:
        """What a user should know of it before the stage starts."""
        ...

    @staticmethod
    def parts(stage: Taught, model: ModelSource, context: StageContext) -> tuple[Part, Part]:
        """What to minimise, and where the signal comes from."""
        ...


LESSONS: Registry[Lesson] = Registry(
    "lesson",
    {
        "teacher": "compresskit.distill.lesson:TeachersLesson",
        "sentences": "compresskit.distill.sentence_lesson:SentencesLesson",
    },
)
REPLICATE, SERVER, NO_ALIGNMENT = "replicate", "server", "none"
TEXT_ALONE = "cross_entropy"
"""The loss of a stage that learns from text without a teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaughtFields(TrainingFields):
    """How to train, and whether to learn from a teacher besides; inherited by stages that need none.

    Attributes:
        loss: ``cross_entropy``, or to learn from a teacher a name of ``compresskit.distill.LOSSES``, a
            mapping of ``method`` and the loss's own fields, or a list of these, which are added up.
        teacher: directory or hub id; None is the model as it was before the first stage.
        teacher_placement: where the teacher lives: a name of ``compresskit.distill.placements.PLACEMENTS``,
            or a mapping of ``method`` and its own fields.
        temperature: divides both models' logits; the distillation loss is multiplied by its square.
        cross_entropy_weight: share of the next-token loss beside a distillation loss, in [0, 1].
        features: what else is learnt from a teacher, block by block: a name of
            ``compresskit.distill.FEATURE_LOSSES``, or a mapping of ``method``, ``weight``, ``layers`` and
            the method's own fields, or a list of these, which are added up.
        alignment: how a teacher with another tokenizer is compared: ``none``, a name of
            ``compresskit.distill.align.ALIGNMENTS``, or a mapping of ``method`` and its own fields.
        data: text to train on; None takes the recipe's.
    """

    kind: ClassVar[str]

    loss: str | Mapping[str, Any] | tuple[str | Mapping[str, Any], ...] = TEXT_ALONE
    teacher: str | None = None
    teacher_placement: str | Mapping[str, Any] = REPLICATE
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    features: str | Mapping[str, Any] | tuple[str | Mapping[str, Any], ...] | None = None
    alignment: str | Mapping[str, Any] = NO_ALIGNMENT
    data: DataSpec | None = None

    def __post_init__(self) -> None:
        TrainingFields.__post_init__(self)
        freeze_lesson(self)
        if isinstance(self.data, str):
            object.__setattr__(self, "data", DataSpec(source=self.data))


def freeze_lesson(stage: Taught) -> None:
    """Make the losses of a stage in construction choices: frozen, hashable, checked by their tables."""
    if not isinstance(stage.loss, str):
        named = choices_of(stage.loss)
        plain = len(named) == 1 and not named[0].options
        object.__setattr__(stage, "loss", named[0].method if plain else named)
    object.__setattr__(stage, "teacher_placement", choice_of(stage.teacher_placement))
    object.__setattr__(stage, "alignment", choice_of(stage.alignment))
    if stage.features is not None:
        added = choices_of(stage.features)
        object.__setattr__(stage, "features", added[0] if len(added) == 1 else added)


def lesson_faults(stage: Taught, model: Outlook, where: str) -> list[Fault]:
    """What is wrong with the loss and the teacher of a stage that may also learn from text alone."""
    if has_teacher(stage):
        faults = LESSONS["teacher"].faults(stage, model, where)
        if stage.loss == TEXT_ALONE and stage.teacher is None:
            cure = (
                "Name a teacher, or set loss: forward_kl, whose teacher is the model before the first stage."
            )
            faults.append(Fault(f"{where}.teacher", "a teacher for features", "none", cure))
        return faults
    names = ("teacher", "teacher_placement", "temperature", "cross_entropy_weight", "alignment")
    return unused_faults(stage, where, *names)


def has_teacher(stage: Taught) -> bool:
    """Whether anything is learnt from a teacher."""
    return stage.loss != TEXT_ALONE or stage.features is not None


def unused_faults(stage: Taught, where: str, *names: str) -> list[Fault]:
    """Which fields of these were given although the text's own loss has no use for them."""
    unused = {
        "teacher": None,
        "teacher_placement": Choice(REPLICATE),
        "temperature": 1.0,
        "cross_entropy_weight": 0.0,
        "alignment": Choice(NO_ALIGNMENT),
    }
    cure = "Set loss: forward_kl to learn from a teacher, or leave this field out."
    return [
        Fault(f"{where}.{name}", "nothing beside loss: cross_entropy", str(getattr(stage, name)), cure)
        for name in names
        if getattr(stage, name) != unused[name]
    ]


def lesson_bytes(stage: Taught, model: Outlook) -> int:
    """What every process holds in memory for a teacher; 0 where text alone is learnt from."""
    return LESSONS["teacher"].held_bytes(stage, model) if has_teacher(stage) else 0


def forecast_with(lesson: Lesson, found: Forecast, stage: Taught, model: Outlook) -> Forecast:
    """The forecast of a training, with what is to be told of ``lesson``, and what comes before it."""
    peak = max(found.memory_bytes, lesson.before_bytes(stage, model))
    return replace(found, memory_bytes=peak, notes=(*found.notes, *lesson.notes(stage, model)))


def forecast_taught(found: Forecast, stage: Taught, model: Outlook) -> Forecast:
    """:func:`forecast_with` a teacher; as it is where text alone is learnt from."""
    return forecast_with(LESSONS["teacher"], found, stage, model) if has_teacher(stage) else found


def lesson_parts(stage: Taught, model: ModelSource, context: StageContext) -> tuple[Part, Part | None]:
    """What such a stage minimises, and where a teacher's signal comes from, if there is one."""
    from compresskit.training.stage import CROSS_ENTROPY

    if not has_teacher(stage):
        return CROSS_ENTROPY, None
    return LESSONS["teacher"].parts(stage, model, context)
