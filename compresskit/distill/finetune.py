"""What a recipe says about fine-tuning. No torch until a verb is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compresskit.data.spec import DataSpec
from compresskit.errors import Fault
from compresskit.training.fields import TrainingFields

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetune(TrainingFields):
    """Train the model on text with the ordinary next-token loss; pruned weights stay zero.

    Attributes:
        data: text to train on; None takes the recipe's.
    """

    kind: ClassVar[str] = "finetune"
    trains: ClassVar[bool] = True

    data: DataSpec | None = None

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", DataSpec(source=self.data))

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong with this stage for such a ``model``; reads no weight.

        Args:
            model: what this stage will be given.
            where: prefix of each fault, e.g. ``stages[1]``.

        Returns:
            All faults of the training fields together.
        """
        from compresskit.training.outlook import student_faults

        return student_faults(self, model, where)

    def forecast(self, model: Outlook) -> Forecast:
        """What this stage will do to such a ``model``; called only when it has no faults."""
        from compresskit.training.outlook import forecast_training

        return forecast_training(self, model)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Train ``model`` into ``context.out``.

        Raises:
            EngineError: the engine asked for is not to be had here.
            NumericError: a loss or weight is no longer finite; names the step and the layer.
            WorkerError: a training process died.
        """
        from compresskit.training.stage import run_training

        return run_training(self, model, context, title="Fine-tuning")
