"""What a recipe says about distillation. No torch until a verb is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from compresskit.distill import SENTENCE_LOSSES
from compresskit.errors import Fault
from compresskit.options import Choice, choice_of, choices_of
from compresskit.training.lesson import LESSONS, NO_ALIGNMENT, REPLICATE, forecast_with, freeze_lesson
from compresskit.training.trainable import TrainableFields

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult
    from compresskit.training.lesson import Lesson


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill(TrainableFields):
    """Train the model, or little of it, to predict what a teacher predicts; pruned weights stay zero.

    A language model learns a teacher's next-token distributions; a model that reads a text whole, such as an
    encoder, the embeddings of sentences or the logits of their classes.

    Attributes:
        teacher: directory or hub id; None is the model as it was before the first stage.
        teacher_placement: where the teacher lives: a name of ``compresskit.distill.placements.PLACEMENTS``,
            or a mapping of ``method`` and its own fields.
        loss: a name of ``compresskit.distill.LOSSES``, or a mapping of ``method`` and the loss's own fields,
            or a list of these, which are added up; beside ``features`` also ``cross_entropy``. Of models
            without a next-token head names of ``compresskit.distill.SENTENCE_LOSSES``.
        temperature: divides both models' logits; the loss is multiplied by its square.
        cross_entropy_weight: share of the ordinary loss in the mix, in [0, 1]: on next tokens, or of a
            classifier on the classes that rows have.
        features: what else is learnt from the teacher, block by block: a name of
            ``compresskit.distill.FEATURE_LOSSES``, or a mapping of ``method``, ``weight``, ``layers`` and
            the method's own fields, or a list of these, which are added up.
        alignment: how a teacher with another tokenizer is compared: ``none``, a name of
            ``compresskit.distill.align.ALIGNMENTS``, or a mapping of ``method`` and its own fields.
        on_policy: how much is learnt from text that the student generates and the teacher scores: a mapping
            of ``fraction`` of the steps, ``max_new_tokens``, ``sampling_temperature``, ``top_p`` and
            ``prompt_fraction``; None learns from the data alone.
    """

    kind: ClassVar[str] = "distill"
    trains: ClassVar[bool] = True

    teacher: str | None = None
    teacher_placement: str | Mapping[str, Any] = REPLICATE
    loss: str | Mapping[str, Any] | tuple[str | Mapping[str, Any], ...] = "forward_kl"
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    features: str | Mapping[str, Any] | tuple[str | Mapping[str, Any], ...] | None = None
    alignment: str | Mapping[str, Any] = NO_ALIGNMENT
    on_policy: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        TrainableFields.__post_init__(self)  # super() knows no class with slots
        freeze_lesson(self)
        if self.on_policy is not None:
            object.__setattr__(self, "on_policy", choice_of(self.on_policy))

    @property
    def learns_sentences(self) -> bool:
        """Whether any of the losses is one on whole sentences."""
        return any(choice.method in SENTENCE_LOSSES for choice in choices_of(self.loss))

    @property
    def _lesson(self) -> type[Lesson]:
        return LESSONS["sentences" if self.learns_sentences else "teacher"]

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong with this stage for such a ``model``; reads no weight.

        Args:
            model: what this stage will be given.
            where: prefix of each fault, e.g. ``stages[1]``.

        Returns:
            All faults together: of the training fields, the loss, the teacher and its vocabulary.
        """
        from compresskit.distill.on_policy import on_policy_faults
        from compresskit.training.retrain import retraining_faults

        faults = retraining_faults(self, model, where) + self._lesson.faults(self, model, where)
        return faults + ([] if self.learns_sentences else on_policy_faults(self, model, where))

    def forecast(self, model: Outlook) -> Forecast:
        """What this stage will do to such a ``model``; called only when it has no faults."""
        from compresskit.training.retrain import forecast_retraining

        found = forecast_retraining(self, model, teacher_bytes=self._lesson.held_bytes(self, model))
        return forecast_with(self._lesson, found, self, model)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Train ``model`` into ``context.out``.

        Raises:
            InputError: the teacher's vocabulary is another one, or the engine asked for is not to be had.
            NumericError: a loss or weight is no longer finite; names the step and the layer.
            WorkerError: a training process died.
        """
        from compresskit.training.retrain import run_retraining

        loss, teacher = self._lesson.parts(self, model, context)
        return run_retraining(
            self,
            model,
            context,
            title="Distilling",
            objective=loss,
            teacher=teacher,
            on_policy=None if self.on_policy is None else dict(cast(Choice, self.on_policy).options),
        )
