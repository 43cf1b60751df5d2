"""MaskLLM: weights stay as they are, and which N of every M of them are kept is learnt.

Each group has a number, its logit, for each of the masks that N:M allows: 6 for 2:4. In a training step a
layer computes with a blend of them, drawn by Gumbel softmax: with p_c = softmax(kappa * logit)_c, noise
g_c = -log(-log u_c), u_c uniform, and mask S_c of the C there are,

    y_c = softmax((log p + g) / tau)_c        mask = sum_c y_c S_c

tau falls and kappa rises from step to step, so that blends become masks and draws become choices. From the
loss lambda * ||weight * mask||^2 is taken off, which keeps groups from weights so small that no gradient
comes through them. Logits start at N(0, spread^2), plus alpha times their deviation times the likeness of
each mask to the one by magnitude: the weights both keep, less the mean of that over all masks. In the end
each group has its most probable mask. A weight that is zero already cannot be had back: give it a dense
model.

Paper: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models", NeurIPS 2024,
https://arxiv.org/abs/2409.17481. The defaults are the paper's, for 2,000 steps; some hundred steps do with
them too, at a higher learning rate than that of weights.

Shapes: O = out_features, I = in_features, G = groups along I, M = members of a group, C = masks of a group.
Where M does not divide I, the last group has members that are no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.errors import Fault
from compresskit.options import Within
from compresskit.sparse.base import Moment
from compresskit.sparse.pattern import NM, Pattern, require_fit

MOST_MASKS = 70
"""Of a group: those of 4:8. Each is a trained number, 8.75 for each weight of 4:8, and 1.5 of 2:4."""
NEVER = -1e4
"""The logit of a mask that is never drawn."""
TINY = 1e-20
"""Least uniform number that noise is made of: the logarithm of none is infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskLLM:
    """N:M by learned masks of frozen weights.

    Attributes:
        pattern: N:M.
        tau_begin: temperature of the first step; high ones blend all masks alike.
        tau_end: of the last step; linear in between.
        kappa_begin: what logits are multiplied by in the first step; low ones leave the draw to the noise.
        kappa_end: in the last step; linear in between.
        spread: deviation of the logits at first.
        prior_strength: alpha, how much likelier the mask by magnitude is at first; 0 for no likelier.
        norm_reward: lambda, what is taken off the loss, in nats, for a squared norm of 1 that is kept.
    """

    regrows: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    masks_forward: ClassVar[bool] = True
    learns_scores: ClassVar[bool] = False
    learns_masks: ClassVar[bool] = True

    pattern: Pattern
    tau_begin: Annotated[float, Within(0, above=True)] = 4.0
    tau_end: Annotated[float, Within(0, above=True)] = 0.05
    kappa_begin: Annotated[float, Within(0, above=True)] = 100.0
    kappa_end: Annotated[float, Within(0, above=True)] = 500.0
    spread: Annotated[float, Within(0, above=True)] = 0.01
    prior_strength: Annotated[float, Within(0)] = 3.0
    norm_reward: Annotated[float, Within(0)] = 1e-5

    @staticmethod
    def unfit(pattern: Pattern) -> str:
        """Groups are few weights each, whose masks can be counted."""
        return "" if isinstance(pattern, NM) else "N:M, such as 2:4"

    def faults(self, where: str) -> list[Fault]:
        """Of a pattern with more masks than can be learnt."""
        keep, of = _sizes(self.pattern)
        if (masks := comb(of, keep)) <= MOST_MASKS:
            return []
        expected = f"at most {MOST_MASKS} masks of a group, each of which has a trained number"
        got = f"{self.pattern}, of which there are {masks:,}"
        return [Fault(f"{where}.pattern", expected, got, "Use 2:4, or method srste.")]

    def patterns(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Pattern]:
        """The same for every layer."""
        return dict.fromkeys(shapes, self.pattern)

    def due(self, step: int, steps: int) -> bool:
        """Never: every step has its own zeros."""
        return False

    @property
    def logits_per_weight(self) -> float:
        """C / M."""
        keep, of = _sizes(self.pattern)
        return comb(of, keep) / of

    def start(self, weight_OI: Tensor, seed: int) -> Tensor:
        """The logits (O, G, C) before the first step, fp32.

        Args:
            weight_OI: (O, I), any float dtype, on the CPU.
            seed: of this layer; the same one gives the same logits.
        """
        masks_CM = masks_of(self.pattern)
        prior_OI = self.pattern.keep_largest(weight_OI.abs()).float()
        short = -prior_OI.shape[1] % masks_CM.shape[1]
        prior_OGM = pad(prior_OI, (0, short)).view(len(weight_OI), -1, masks_CM.shape[1])
        alike_OGC = prior_OGM @ masks_CM.T
        generator = torch.Generator().manual_seed(seed)
        logit_OGC = self.spread * torch.randn(alike_OGC.shape, generator=generator)
        alike_OGC -= alike_OGC.mean(-1, keepdim=True)
        logit_OGC += self.prior_strength * logit_OGC.std() * alike_OGC
        if short:  # what is kept of the last group had better be weights
            weights_C = masks_CM[:, :-short].sum(-1)
            logit_OGC[:, -1, weights_C < weights_C.max()] = NEVER
        return logit_OGC

    def blend(self, logit_OGC: Tensor, moment: Moment) -> Tensor:
        """How much of each mask a layer computes with in the step after ``moment``, (O, G, C); sums to 1."""
        share = min(moment.step / max(moment.steps - 1, 1), 1.0)
        kappa = self.kappa_begin + share * (self.kappa_end - self.kappa_begin)
        tau = self.tau_begin + share * (self.tau_end - self.tau_begin)
        # On the layer's own device: ranks have as many logits to draw for, and devices of one kind.
        generator = torch.Generator(logit_OGC.device).manual_seed(moment.seed)
        uniform_OGC = torch.rand(logit_OGC.shape, generator=generator, device=logit_OGC.device)
        noise_OGC = uniform_OGC.clamp_(min=TINY).log_().neg_().log_().neg_()
        return torch.softmax((kappa * logit_OGC + noise_OGC) / tau, -1)  # the norm of p cancels

    def update(self, weight_OI: Tensor, moment: Moment) -> Tensor:
        """What a layer computes with, and in the end what is saved of it.

        Args:
            weight_OI: (O, I), any float dtype. Not modified.
            moment: where training stands, with the logits, through which gradients pass.

        Returns:
            The weight (O, I) times the blend of its groups' masks; after the last step, zero but for what the
            most probable mask of each group keeps.
        """
        require_fit(self.pattern, weight_OI)
        logit_OGC = moment.logit_OGC
        assert logit_OGC is not None
        masks_CM = masks_of(self.pattern).to(logit_OGC, non_blocking=True)
        if moment.step >= moment.steps:
            keep_OI = masks_CM.bool()[logit_OGC.argmax(-1)].flatten(1)
            return weight_OI.where(keep_OI[:, : weight_OI.shape[1]], 0)
        mask_OI = (self.blend(logit_OGC, moment) @ masks_CM).flatten(1)[:, : weight_OI.shape[1]]
        return weight_OI * mask_OI.to(weight_OI.dtype)


def masks_of(pattern: Pattern) -> Tensor:
    """All masks of a group of ``pattern``, an N:M, in lexical order: (C, M) of 0 and 1, fp32."""
    keep, of = _sizes(pattern)
    masks_CM = torch.zeros(comb(of, keep), of)
    for row, kept in enumerate(combinations(range(of), keep)):
        masks_CM[row, list(kept)] = 1
    return masks_CM


def _sizes(pattern: Pattern) -> tuple[int, int]:
    """N and M."""
    assert isinstance(pattern, NM)
    return pattern.keep, pattern.of
