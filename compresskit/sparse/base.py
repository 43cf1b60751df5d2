"""The contracts of pruners, allocations and recoveries.

Shapes: O = out_features, I = in_features, G = groups along I, C = masks that a group may have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol
from zlib import crc32

from torch import Tensor

from compresskit.calibration.refine import Component
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


@dataclass(frozen=True, slots=True)
class Survey:
    """What an allocation may look at.

    Attributes:
        sizes: layer -> (out_features, in_features), of the layers to prune, in the model's order.
        blocks: layer -> name of its block; None outside the blocks.
        zero_fraction: to reach over all of these layers together, in (0, 1).
        score: layer -> float (O, I): what the method, or Wanda where it has no scores, holds of each weight.
        chosen_among: layer -> float: what the pattern chooses among, which is those scores, or one of each
            block. None of it is negative.
        cost: ``cost(levels)`` measures the loss of the model with one layer alone pruned to each of its
            ``levels``, zero fractions: layer -> level -> nats per token.
    """

    sizes: Mapping[str, tuple[int, int]]
    blocks: Mapping[str, str | None]
    zero_fraction: float
    score: Callable[[str], Tensor]
    chosen_among: Callable[[str], Tensor]
    cost: Callable[[Mapping[str, Sequence[float]]], Mapping[str, Mapping[float, float]]]


class Allocation(Protocol):
    """A frozen dataclass whose one verb divides zeros among layers."""

    reads: ClassVar[str]
    """The most that it looks at: ``sizes``, ``scores`` or ``costs``."""

    def fault(self, zero_fraction: float) -> str:
        """What ``zero_fraction`` would have to be for it; empty if it will do."""
        ...

    def fractions(self, survey: Survey) -> Mapping[str, float]:
        """Layer -> zero fraction in [0, 1); together they come to about ``survey.zero_fraction``."""
        ...


@dataclass(frozen=True, slots=True)
class Recovered:
    """What retraining a component came to.

    Attributes:
        parameters: new values by qualified name, float32, in the shape that the module has them.
        before: squared norm of the difference to the dense model's output over that of the latter.
        after: the same with the new values.
    """

    parameters: Mapping[str, Tensor]
    before: float
    after: float


class Recovery(Protocol):
    """A frozen dataclass that makes up for what pruning a component did to it; zeros stay zero."""

    @property
    def passes(self) -> int:
        """How often it goes through the examples of a component."""
        ...

    def recover(self, component: Component) -> Recovered:
        """The values that ``component``, which is not changed, had better have."""
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


@dataclass(frozen=True, slots=True)
class Moment:
    """Where training stands when a weight's zeros are changed.

    Attributes:
        step: optimiser steps taken; 0 is before the first.
        steps: of the whole run.
        seed: of whatever is random, for this layer and step alone; the same on every rank.
        gradient_OI: (O, I), of the step just taken, zeros included; up to a factor, and only for a method
            that asks for it.
        score_OI: (O, I), fp32, that training has learnt, for a method whose ``learns_scores`` is set.
        logit_OGC: (O, G, C), fp32, the same for one whose ``learns_masks`` is set.
    """

    step: int
    steps: int
    seed: int = 0
    gradient_OI: Tensor | None = None
    score_OI: Tensor | None = None
    logit_OGC: Tensor | None = None


def moment_seed(seed: int, step: int, layer: str) -> int:
    """Of whatever is random for ``layer`` after ``step``, in a run that has ``seed``."""
    return crc32(f"{seed} {step} {layer}".encode())


class TrainedPruner(Protocol):
    """A frozen dataclass whose fields are the hyperparameters and whose verbs are pure.

    Attributes:
        regrows: whether a zero may become a weight again, so that zeros promised earlier would be lost.
        needs_gradient: whether :meth:`update` looks at the gradient, except before the first step.
        masks_forward: whether layers compute with what :meth:`update` makes of their weight, and the weight
            itself stays dense until it is saved; else :meth:`update` makes the weight itself.
        learns_scores: of those, whether a score of each weight is trained besides.
        learns_masks: of those, whether the model is frozen and logits of the masks of each group are trained
            in its place; the method is a :class:`MaskLearner`.
        pattern: of the zeros there are at the end, over all layers together.
    """

    regrows: ClassVar[bool]
    needs_gradient: ClassVar[bool]
    masks_forward: ClassVar[bool]
    learns_scores: ClassVar[bool]
    learns_masks: ClassVar[bool]
    pattern: Pattern

    @staticmethod
    def unfit(pattern: Pattern) -> str:
        """What the pattern would have to be, e.g. ``a share of each layer``; empty if it will do."""
        ...

    def patterns(self, shapes: Mapping[str, tuple[int, int]]) -> Mapping[str, Pattern]:
        """Layer -> the pattern it ends with; a layer left out stays dense.

        Args:
            shapes: layer -> (O, I), of all layers that may be pruned.
        """
        ...

    def due(self, step: int, steps: int) -> bool:
        """Whether zeros change after ``step`` of ``steps``."""
        ...

    def update(self, weight_OI: Tensor, moment: Moment) -> Tensor:
        """The weight (O, I) to train on with, for a layer whose pattern is ``pattern``; modifies nothing."""
        ...


class MaskLearner(TrainedPruner, Protocol):
    """A trained pruner whose ``learns_masks`` is set; :meth:`update` lets gradients pass to the logits.

    Attributes:
        norm_reward: what is taken off the loss, in nats, for a squared norm of 1 that layers compute with.
    """

    norm_reward: float

    @property
    def logits_per_weight(self) -> float:
        """Trained numbers for each weight."""
        ...

    def start(self, weight_OI: Tensor, seed: int) -> Tensor:
        """The logits (O, G, C) before the first step, fp32, of a weight on the CPU."""
        ...
