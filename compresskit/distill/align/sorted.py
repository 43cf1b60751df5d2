"""Whole distributions where both tokenizers have just ended a token, for a loss that does not ask for ids.

Paper: Boizard, El Haddad, Hudelot, Colombo, "Towards Cross-Tokenizer Distillation: the Universal Logit
Distillation Loss for LLMs", TMLR 2025, https://arxiv.org/abs/2402.12030.

Shapes: B = rows, T = the student's tokens of a row, M = matches, E = the teacher's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compresskit.distill.align.base import Matched
from compresskit.training.objective import Hidden, Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """For the loss ``uld``, which compares probabilities by their rank."""

    reads_twins: ClassVar[bool] = False

    def __call__(self, matched: Matched, teacher: Hidden, temperature: float) -> Signal:
        """See ``Alignment.__call__``.

        Args:
            matched: where both tokenizers end a token.
            teacher: its hidden states and its projection.
            temperature: not used: the loss applies it.

        Returns:
            A signal with hidden states of the teacher at the student's tokens.
        """
        goes_on_M = matched.ours_M + 1 < matched.ids_BT.shape[1]
        row_M, ours_M = matched.row_M[goes_on_M], matched.ours_M[goes_on_M]
        states_BTE = teacher.states_BTE.new_zeros(*matched.ids_BT.shape, teacher.states_BTE.shape[-1])
        states_BTE[row_M, ours_M] = teacher.states_BTE[row_M, matched.theirs_M[goes_on_M]]
        told_BT = torch.zeros_like(matched.ids_BT, dtype=torch.bool)
        told_BT[row_M, ours_M + 1] = True
        return Signal(Hidden(states_BTE, teacher.head, foreign=True), told_BT=told_BT)
