"""Forward KL: the student covers everything its teacher finds likely.

The loss of a token is temperature**2 * KL(teacher || student) with both distributions softened by the
temperature, so that its gradient does not shrink as the temperature grows. Optionally mixed with the
ordinary next-token loss. Computed from hidden states a few tokens at a time; exact over the whole vocabulary.

Paper: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531.

Shapes: B = rows, T = tokens of a row, D = student's hidden width, E = teacher's, V = vocabulary, N =
supervised tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compresskit.kernels.ops import linear_cross_entropy, linear_kl
from compresskit.training.objective import LOSS, Head, Signal, predictions


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardKL:
    """KL(teacher || student) over the vocabulary both share.

    Attributes:
        temperature: divides both models' logits.
        cross_entropy_weight: share of the next-token loss in the mix, in [0, 1].
    """

    needs_teacher: ClassVar[bool] = True

    temperature: float = 1.0
    cross_entropy_weight: float = 0.0

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """Sums over the supervised tokens of a batch, in nats.

        Args:
            hidden_BTD: (B, T, D), the student's.
            head: the student's output projection, onto at least as many ids as the teacher's.
            labels_BT: int64 (B, T), not shifted; positions before a label of -100 do not count.
            signal: the teacher's hidden states (B, T, E) and output projection.

        Returns:
            ``loss`` and, detached, ``kl`` (temperature squared included) and ``cross_entropy`` (where mixed).

        Raises:
            ValueError: there is no signal.
        """
        if signal is None:
            raise ValueError("forward KL needs a teacher's signal")
        hidden_ND, labels_N = predictions(hidden_BTD, labels_BT)
        teacher_hidden_NE, _ = predictions(signal.hidden_BTE, labels_BT)
        # Ids beyond the teacher's are padding that no text holds: both softmaxes are over the shared ones.
        shared = head.cut(signal.head.weight_VD.shape[0])
        kl = self.temperature**2 * linear_kl(
            hidden_ND,
            shared.weight_VD,
            teacher_hidden_NE,
            signal.head.weight_VD,
            student_bias_V=shared.bias_V,
            teacher_bias_V=signal.head.bias_V,
            temperature=self.temperature,
            student_softcap=head.softcap,
            teacher_softcap=signal.head.softcap,
        )
        if not self.cross_entropy_weight:
            return {LOSS: kl, "kl": kl.detach()}
        cross_entropy = linear_cross_entropy(
            hidden_ND, head.weight_VD, labels_N, bias_V=head.bias_V, softcap=head.softcap
        )
        weight = self.cross_entropy_weight
        return {
            LOSS: (1 - weight) * kl + weight * cross_entropy,
            "kl": kl.detach(),
            "cross_entropy": cross_entropy.detach(),
        }
