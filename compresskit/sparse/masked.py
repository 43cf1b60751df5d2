"""Layers that compute with part of their weights, while all of them learn.

Shapes: O = out_features, I = in_features; ``_I`` alone: any leading dimensions, then I.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compresskit.modeling import ModelSource
from compresskit.sparse import TRAINED_PRUNERS
from compresskit.sparse.base import Moment, TrainedPruner
from compresskit.sparse.pattern import parse_pattern
from compresskit.training.adaptation import Plain


class MaskedLinear(nn.Linear):
    """A linear layer that computes with what its pruner leaves of its weight.

    Made from a linear layer in place by :func:`mask_in_place`, never constructed; its weight stays dense.
    """

    pruner: Any
    pull: float
    steps: int
    passes_per_step: int
    passes: Tensor
    passed: int | None
    score_OI: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return linear(*self.operands(input), self.bias)

    def operands(self, input_I: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied: the input (..., I) and the weight (O, I) with its zeros."""
        if not self.pruner.learns_scores:
            weight_OI = _Masked.apply(self.weight, self)  # type: ignore[no-untyped-call]
            return input_I, cast(Tensor, weight_OI)
        step = min(self._passed() // self.passes_per_step, self.steps)
        weight_OI = _Scored.apply(self.weight, self.score_OI, self, step)  # type: ignore[no-untyped-call]
        return input_I, cast(Tensor, weight_OI)

    def _passed(self) -> int:
        """Training passes before this one; counted twice, so that a GPU is waited for at the first alone."""
        if not self.training:
            return int(self.passes)
        if self.passed is None:  # a restart has the number in its checkpoint
            self.passed = int(self.passes)
        self.passes += 1
        self.passed += 1
        return self.passed - 1

    def sparse(self, weight_OI: Tensor, score_OI: Tensor | None = None, step: int = 0) -> Tensor:
        """What the pruner leaves of the weight after ``step``."""
        made_OI: Tensor = self.pruner.update(weight_OI, Moment(step, self.steps, score_OI=score_OI))
        return made_OI


class _Masked(torch.autograd.Function):
    """The weight with its zeros; backwards the whole gradient, and the pull on what was left out.

    Chooses again backwards, so that nothing the size of the weight is kept.
    """

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, layer: MaskedLinear) -> Tensor:
        ctx.save_for_backward(weight_OI)
        ctx.layer = layer
        return layer.sparse(weight_OI)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight_OI,) = ctx.saved_tensors
        left_out_OI = weight_OI - ctx.layer.sparse(weight_OI)
        return gradients[0] + ctx.layer.pull * left_out_OI, None


class _Scored(torch.autograd.Function):
    """The weight with zeros where scores are low; a score's gradient is the weight's, times the weight.

    Where a weight is left out it is not trained, and its score is.
    """

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, score_OI: Tensor, layer: MaskedLinear, step: int) -> Tensor:
        ctx.save_for_backward(weight_OI, score_OI)
        ctx.layer, ctx.step = layer, step
        return layer.sparse(weight_OI, score_OI, step).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight_OI, score_OI = ctx.saved_tensors
        keep_OI = ctx.layer.sparse(torch.ones_like(weight_OI), score_OI, ctx.step)
        return gradients[0] * keep_OI, gradients[0] * weight_OI, None, None


def mask_in_place(layer: nn.Linear, pruner: Any, *, steps: int, passes_per_step: int) -> None:
    """Turn ``layer`` into a :class:`MaskedLinear`; its parameters stay the same objects.

    Args:
        layer: an ordinary linear layer, its weight whole.
        pruner: a trained pruner whose ``masks_forward`` is set.
        steps: optimiser steps of the whole run, for a pruner that learns scores.
        passes_per_step: training passes of one process per optimiser step.
    """
    layer.__class__ = MaskedLinear
    assert isinstance(layer, MaskedLinear)
    layer.pruner, layer.steps, layer.passes_per_step = pruner, steps, passes_per_step
    if pruner.learns_scores:
        layer.score_OI = nn.Parameter(torch.zeros(layer.weight.shape))
        layer.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        layer.passed = None
    else:
        layer.pull = pruner.pull / passes_per_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """The model whose layers compute with part of their weights alone; only those are saved.

    Attributes:
        method: a name of ``compresskit.sparse.TRAINED_PRUNERS`` whose ``masks_forward`` is set.
        options: its own fields.
        ends: layer -> pattern, as :func:`compresskit.sparse.pattern.parse_pattern` reads it.
        steps: see :func:`mask_in_place`.
        passes_per_step: see there; of a layer that is computed once.
        twice: layers that the backward pass computes once more.
    """

    masks_gradients: ClassVar[bool] = True
    saves_frozen: ClassVar[bool] = True

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ends: Mapping[str, str]
    steps: int = 1
    passes_per_step: int = 1
    twice: tuple[str, ...] = ()

    def load(self, source: ModelSource) -> nn.Module:
        """See ``Adaptation.load``; in fp32: :meth:`save` chooses again, and rounding makes weights equal."""
        model = Plain().load(source).float()
        for name in self.ends:
            layer: Any = model.get_submodule(name)
            pruner = self._pruner(name)
            passes = self.passes_per_step * (2 if name in self.twice else 1)
            mask_in_place(layer, pruner, steps=self.steps, passes_per_step=passes)
        return model

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        """See ``Adaptation.save``."""
        kept: dict[str, Tensor] = {}
        for layer in self.ends:
            name, score_OI = f"{layer}.weight", tensors.get(f"{layer}.score_OI")
            end = Moment(self.steps, self.steps, score_OI=score_OI)
            kept[name] = self._pruner(layer).update(tensors[name], end)
        Plain().save(source, out, {**tensors, **kept})

    def _pruner(self, layer: str) -> TrainedPruner:
        method: Any = TRAINED_PRUNERS[self.method]
        made: TrainedPruner = method(pattern=parse_pattern(self.ends[layer]), **self.options)
        return made
