"""What a student learns from its teacher's next-token distributions: a weighted sum of losses.

The sum over divergences is multiplied by temperature**2, so that its gradient does not shrink as the
temperature grows. Optionally mixed with the ordinary next-token loss. Computed from hidden states a few
tokens at a time, and over all ids exactly.

Shapes: B = rows, T = tokens of a row, D = student's hidden width, E = teacher's, N = supervised tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from compresskit.distill import LOSSES
from compresskit.distill.base import DistillLoss, Scheduled
from compresskit.kernels.ops import linear_cross_entropy, linear_divergence
from compresskit.kernels.reference.linear_divergence import Foreign, Listed, Projected, Target, Term
from compresskit.kernels.reference.projection import Projection
from compresskit.training.objective import (
    IGNORED,
    LOSS,
    Classified,
    Embedded,
    Head,
    Hidden,
    Listing,
    Signal,
    predictions,
)

AGREEMENT, ALIGNED, CROSS_ENTROPY = "agreement", "aligned", "cross_entropy"


@dataclass(frozen=True, kw_only=True)
class Divergences:
    """An ``Objective``.

    Attributes:
        losses: names of ``compresskit.distill.LOSSES``, each with its own fields.
        temperature: divides both models' logits.
        cross_entropy_weight: share of the next-token loss in the mix, in [0, 1].
    """

    needs_teacher: ClassVar[bool] = True

    losses: Sequence[tuple[str, Mapping[str, Any]]] = (("forward_kl", {}),)
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        # A job's options have been through JSON.
        object.__setattr__(self, "losses", tuple((name, dict(options)) for name, options in self.losses))

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """Sums over the supervised tokens of a batch, in nats.

        Args:
            hidden_BTD: (B, T, D), the student's.
            head: the student's output projection, onto at least as many ids as the teacher's.
            labels_BT: int64 (B, T), not shifted; positions before a label of -100 do not count.
            signal: what the teacher says.

        Returns:
            ``loss`` and, detached, each loss by its name (temperature squared included, its weight not),
            ``cross_entropy`` (where mixed), ``agreement``: tokens whose likeliest id is the teacher's (not of
            a foreign one), and ``aligned``: tokens that the teacher said something of (if not of all).

        Raises:
            ValueError: there is no signal.
        """
        if signal is None:
            raise ValueError("a distillation loss needs a teacher's signal")
        scale, weight = self.temperature**2, self.cross_entropy_weight
        told_BT = labels_BT if signal.told_BT is None else labels_BT.masked_fill(~signal.told_BT, IGNORED)
        hidden_ND, labels_N = predictions(hidden_BTD, told_BT)
        sums = linear_divergence(
            hidden_ND,
            head.weight_VD,
            target_of(signal.says, told_BT, head.weight_VD.shape[0]),
            self._terms((1 - weight) * scale, signal.progress),
            bias_W=head.bias_V,
            softcap=head.softcap,
            temperature=self.temperature,
            labels_N=labels_N,
            cross_entropy_weight=weight,
        )
        loss, cross_entropy = sums.total, sums.cross_entropy
        if weight and signal.told_BT is not None:
            untold_ND, untold_N = predictions(hidden_BTD, labels_BT.masked_fill(signal.told_BT, IGNORED))
            rest = linear_cross_entropy(
                untold_ND, head.weight_VD, untold_N, bias_V=head.bias_V, softcap=head.softcap
            )
            loss, cross_entropy = loss + weight * rest, cross_entropy + rest.detach()
        parts = dict(zip(self._names, (scale * sums.terms).unbind(), strict=True))
        if weight:
            parts[CROSS_ENTROPY] = cross_entropy
        if not (isinstance(signal.says, Hidden) and signal.says.foreign):
            parts[AGREEMENT] = sums.agreed
        if signal.told_BT is not None:
            parts[ALIGNED] = sums.agreed.new_tensor(len(labels_N))
        return {LOSS: loss, **parts}

    @cached_property
    def _made(self) -> tuple[DistillLoss, ...]:
        return tuple(LOSSES[name](**options) for name, options in self.losses)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Of the parts; a loss that is there twice is numbered."""
        return numbered([name for name, _ in self.losses])

    def _terms(self, scale: float, progress: float) -> list[Term]:
        now = [loss.at(progress) if isinstance(loss, Scheduled) else loss for loss in self._made]
        return [Term(loss, scale * loss.weight, loss.top_k or 0) for loss in now]


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """``names``, those that are there several times with a number each."""
    return tuple(
        name if names.count(name) == 1 else f"{name}_{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    )


def projected(hidden_NE: Tensor, head: Head) -> Projected:
    """The distributions over all ids that the head of a teacher makes of its hidden states."""
    return Projected(hidden_NE, Projection(head.weight_VD.to(hidden_NE.dtype), head.bias_V, head.softcap))


def target_of(says: Hidden | Listing | Embedded | Classified, labels_BT: Tensor, students: int = 0) -> Target:
    """The teacher's distributions of the tokens before a label, as the fused op takes them.

    Args:
        says: what the teacher does.
        labels_BT: not shifted.
        students: ids of the student, with which foreign ones are compared.
    """
    if isinstance(says, Hidden):
        made = projected(predictions(says.states_BTE, labels_BT)[0], says.head)
        return Foreign(made, students) if says.foreign else made
    assert isinstance(says, Listing)  # what a teacher makes of sentences is not for this objective
    ids_NK, _ = predictions(says.ids_BTK, labels_BT)
    log_p_NO, _ = predictions(says.log_p_BTO, labels_BT)
    return Listed(ids_NK, log_p_NO, says.vocabulary, says.temperature)
