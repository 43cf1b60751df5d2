"""Which parameters a stage trains: all of them, few of them, or an adapter's. No torch.

The table stands here, below the families of methods, since stages of more than one may use what it names.

Paper: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023,
https://arxiv.org/abs/2312.15230.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from compresskit.calibration.oneshot import as_names
from compresskit.data.spec import DataSpec
from compresskit.errors import Fault
from compresskit.registry import Registry
from compresskit.training.fields import TrainingFields

if TYPE_CHECKING:
    from compresskit.modeling import ModelSource
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.stage import Json, Outlook, StageContext

ALL = "all"
"""Every parameter of the model as it is."""
LOW_RANK = ("lora", "dora")
"""Adapters that a weight can take in."""
ADAPTERS = (*LOW_RANK, "prefix", "bottleneck")
MERGE, BESIDE = "merge", "adapter"
FINISHES = (MERGE, BESIDE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainableFields(TrainingFields):
    """How to train, and what of the model; inherited by stages that may train few parameters.

    Attributes:
        trainable: ``all``, ``bias_norm`` (biases and the weights of norms; no parameter is added), or an
            adapter on the model, which is frozen as it is stored: ``lora``, ``dora``, ``prefix`` or
            ``bottleneck``.
        rank: of LoRA and DoRA; width of a bottleneck; virtual tokens of a prefix.
        alpha: LoRA's update is multiplied by alpha / rank.
        dropout: of the adapter's input, while it trains; the frozen weight sees all of it.
        finish: ``merge`` folds LoRA and DoRA in where no zero is held, ``adapter`` keeps an adapter beside
            the model, for peft to load.
        targets: which layers LoRA and DoRA update: module names, patterns or ``Linear``.
        ignore: which of those to leave alone; the output projection takes no update.
        data: text to train on; None takes the recipe's.
    """

    kind: ClassVar[str]
    """Of the stage."""

    trainable: str = ALL
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    finish: str = MERGE
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
        """Whether the weights of layers are trained under their own names."""
        return self.trainable == ALL

    @property
    def ends_chain(self) -> bool:
        """Whether no stage may follow: what was trained stands beside the model, not in it."""
        return self.finish == BESIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What of a model is trained.

    Attributes:
        trained: parameters that take a gradient.
        layers: linear layers that change, or are added to.
        frozen_bytes: of parameters that take none, as they are held, before an engine divides them.
        other_bytes: that training holds besides, in each process.
    """

    trained: int
    layers: int
    frozen_bytes: int = 0
    other_bytes: int = 0


class Trainable(Protocol):
    """An ``Adaptation`` that trains few parameters, and what the plan asks of it."""

    @staticmethod
    def reads(trainable: str) -> tuple[str, ...]:
        """Fields of the stage that it looks at under this name of the table."""
        ...

    @staticmethod
    def faults(stage: TrainableFields, model: Outlook, where: str) -> list[Fault]:
        """Everything that keeps such a ``model`` from being trained so."""
        ...

    @staticmethod
    def share(stage: TrainableFields, anatomy: Anatomy, config: Any, weight_bytes: float) -> Share:
        """What of such a model, stored in so many bytes a weight, is trained; ``stage`` has no faults."""
        ...

    @staticmethod
    def options(stage: TrainableFields, model: ModelSource, context: StageContext) -> dict[str, Json]:
        """Keyword arguments that make the adaptation.

        Raises:
            PlanError: what is trained does not go with the weights of ``model``.
        """
        ...


TRAINABLES: Registry[Trainable] = Registry(
    "trainable",
    {
        "bias_norm": "compresskit.training.bias_norm:BiasNorm",
        **dict.fromkeys(ADAPTERS, "compresskit.training.adapters.trainable:Adapter"),
    },
)
