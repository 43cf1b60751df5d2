"""What a recipe says about training adapters on a frozen model. No torch until a verb is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compresskit.calibration.oneshot import as_names
from compresskit.data.spec import DataSpec
from compresskit.errors import Fault
from compresskit.training.fields import TrainingFields
from compresskit.training.trainable import ADAPTERS, BESIDE

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.quant.stage import Quantize
    from compresskit.stage import Forecast, Outlook, StageContext, StageResult

CHOICES = {
    "adapter": ADAPTERS,
    "base": ("nf4", "int8", "none"),
    "finish": ("adapter", "merge", "grid"),
    "merge_into": ("trained", "original"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Qlora(TrainingFields):
    """Freeze the model in few bits and train adapters on it; pruned weights stay zero, grids stay.

    Attributes:
        adapter: ``lora``, ``dora``, ``prefix`` or ``bottleneck``.
        rank: of LoRA and DoRA; width of a bottleneck; virtual tokens of a prefix.
        alpha: LoRA's update is multiplied by alpha / rank.
        dropout: of the adapter's input, while it trains; the frozen weight sees all of it.
        base: ``nf4`` (with double quantisation), ``int8`` or ``none``: how the targets are frozen.
        loftq_rounds: LoftQ's alternations, which start LoRA at the error of freezing; 0 starts it at zero.
        finish: ``adapter`` keeps it beside the model, ``merge`` folds it in, ``grid`` also puts the result on
            the grid that is in force, or on one of ``scheme``.
        merge_into: ``trained``, the weights rounded as they were while training, or ``original``.
        scheme: of the new grid, for ``finish: grid`` where none is in force, such as ``w4a16-g64``.
        rounding: the quantizer that puts weights on the new grid, calibrated on the training data.
        targets: which layers are frozen and get LoRA: module names, patterns or ``Linear``.
        ignore: which of those to leave alone; the output projection takes no adapter.
        data: text to train on; None takes the recipe's.
    """

    kind: ClassVar[str] = "qlora"
    trains: ClassVar[bool] = True
    keeps_grids: ClassVar[bool] = True

    adapter: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    base: str = "nf4"
    loftq_rounds: int = 0
    finish: str = "merge"
    merge_into: str = "trained"
    scheme: str | None = None
    rounding: str = "gptq"
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)
    data: DataSpec | None = None

    def __post_init__(self) -> None:
        TrainingFields.__post_init__(self)
        object.__setattr__(self, "targets", as_names(self.targets))
        object.__setattr__(self, "ignore", as_names(self.ignore))
        if isinstance(self.data, str):
            object.__setattr__(self, "data", DataSpec(source=self.data))

    @property
    def moves_weights(self) -> bool:
        """False: adapters are trained, on weights that are frozen."""
        return False

    @property
    def ends_chain(self) -> bool:
        """Whether no stage may follow: what was trained stands beside the model, not in it."""
        return self.finish == BESIDE

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong with this stage for such a ``model``; reads no weight.

        Args:
            model: what this stage will be given.
            where: prefix of each fault, e.g. ``stages[1]``.

        Returns:
            All faults together: of the training fields, the adapter, the base and the finish.
        """
        from compresskit.quant.qlora_outlook import qlora_faults

        return qlora_faults(self, model, where)

    def forecast(self, model: Outlook) -> Forecast:
        """What this stage will do to such a ``model``; called only when it has no faults."""
        from compresskit.quant.qlora_outlook import forecast_qlora

        return forecast_qlora(self, model)

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Train an adapter on ``model`` and finish it into ``context.out``.

        Raises:
            EngineError: the engine asked for is not to be had here.
            NumericError: a loss or weight is no longer finite; names the step and the layer.
            WorkerError: a training process died.
        """
        from compresskit.quant.qlora_run import run_qlora

        return run_qlora(self, model, context)

    def requantise(self, ignore: tuple[str, ...]) -> Quantize:
        """The stage that puts the merged targets on a new grid.

        Args:
            ignore: layers that are on one already.
        """
        from compresskit.quant.stage import Quantize

        return Quantize(
            self.rounding,
            scheme=self.scheme or "",
            targets=self.targets,
            ignore=(*self.ignore, *ignore),
            data=self.data,
            context_length=self.context_length,
        )
