"""The contracts of pruners. O = out_features, I = in_features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.errors import Fault
from compresskit.sparse.pattern import Pattern

if TYPE_CHECKING:
    from compresskit.calibration.oneshot import Calibrated
    from compresskit.modeling.source import ModelSource
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned weight (O, I) and its bool keep-mask (O, I); zero wherever the mask is False.

    ``note`` is a sentence for the layer's record; empty where nothing was out of the ordinary.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    note: str = ""


class Pruner(Protocol):
    """A frozen dataclass whose fields are the hyperparameters and whose prune() is pure."""

    needs: ClassVar[frozenset[str]]
    pattern: Pattern

    def prune(self, weight_OI: Tensor, stats: LayerStats) -> Pruned:
        """Return the pruned copy of ``weight_OI``; never modify it."""
        ...


class StructuredPruner(Protocol):
    """A frozen dataclass that takes layers or neurons away: the result is an ordinary, smaller model."""

    @property
    def reads_data(self) -> bool:
        """Whether it needs calibration rows."""
        ...

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong for such a ``model``; reads no weight."""
        ...

    def forecast(self, model: Outlook, calibrated: Calibrated) -> Forecast:
        """What the smaller model will be; called only when there are no faults."""
        ...

    def run(self, model: ModelSource, context: StageContext, calibrated: Calibrated) -> StageResult:
        """Write the smaller model into ``context.out``; ``calibrated`` says what to calibrate on."""
        ...
