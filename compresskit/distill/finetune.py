"""What a recipe says about fine-tuning. No torch until a verb is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compresskit.errors import Fault
from compresskit.training.trainable import TrainableFields

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetune(TrainableFields):
    """Train the model, or little of it, with the ordinary next-token loss; pruned weights stay zero."""

    kind: ClassVar[str] = "finetune"
    trains: ClassVar[bool] = True

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong with this stage for such a ``model``; reads no weight.

        Args:
            model: what this stage will be given.
            where: prefix of each fault, e.g. ``stages[1]``.

        Returns:
            All faults of the training fields together.
        """
        from compresskit.training.retrain import retraining_faults

        return retraining_faults(self, model, where)

    def forecast(self, model: Outlook) -> Forecast:
        """What this stage will do to such a ``model``; called only when it has no faults."""
        from compresskit.training.retrain import forecast_retraining

        return forecast_retraining(self, model)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Train ``model`` into ``context.out``.

        Raises:
            EngineError: the engine asked for is not to be had here.
            NumericError: a loss or weight is no longer finite; names the step and the layer.
            WorkerError: a training process died.
        """
        from compresskit.training.retrain import run_retraining

        return run_retraining(self, model, context, title="Fine-tuning")
