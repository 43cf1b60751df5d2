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
from compresskit.sparse.base import Moment
from compresskit.sparse.pattern import parse_pattern
from compresskit.sparse.srste import SRSTE
from compresskit.training.adaptation import Plain

ANY_MOMENT = Moment(0, 1)


class MaskedLinear(nn.Linear):
    """A linear layer that computes with what its pruner leaves of its weight.

    Made from a linear layer in place, never constructed; its weight stays dense.
    """

    pruner: SRSTE
    pull: float

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return linear(*self.operands(input), self.bias)

    def operands(self, input_I: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied: the input (..., I) and the weight (O, I) with its zeros."""
        return input_I, cast(Tensor, _Masked.apply(self.weight, self))  # type: ignore[no-untyped-call]


class _Masked(torch.autograd.Function):
    """The weight with its zeros; backwards the whole gradient, and the pull on what was left out.

    Chooses again backwards, so that nothing the size of the weight is kept.
    """

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, layer: MaskedLinear) -> Tensor:
        ctx.save_for_backward(weight_OI)
        ctx.layer = layer
        return layer.pruner.update(weight_OI, ANY_MOMENT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight_OI,) = ctx.saved_tensors
        left_out_OI = weight_OI - ctx.layer.pruner.update(weight_OI, ANY_MOMENT)
        return gradients[0] + ctx.layer.pull * left_out_OI, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """The model whose layers compute with their largest weights alone; only those are saved.

    Attributes:
        method: a name of ``compresskit.sparse.TRAINED_PRUNERS`` whose ``masks_forward`` is set.
        options: its own fields.
        ends: layer -> pattern, as :func:`compresskit.sparse.pattern.parse_pattern` reads it.
        passes: forward passes of one process per optimiser step, among which the pull is divided.
    """

    masks_gradients: ClassVar[bool] = True
    saves_frozen: ClassVar[bool] = True

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ends: Mapping[str, str]
    passes: int = 1

    def load(self, source: ModelSource) -> nn.Module:
        """See ``Adaptation.load``."""
        model = Plain().load(source)
        for name in self.ends:
            layer: Any = model.get_submodule(name)
            layer.__class__ = MaskedLinear
            layer.pruner = self._pruner(name)
            layer.pull = layer.pruner.pull / self.passes
        return model

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        """See ``Adaptation.save``."""
        names = {layer: f"{layer}.weight" for layer in self.ends}
        kept = {name: self._pruner(n).update(tensors[name], ANY_MOMENT) for n, name in names.items()}
        Plain().save(source, out, {**tensors, **kept})

    def _pruner(self, layer: str) -> SRSTE:
        method: Any = TRAINED_PRUNERS[self.method]
        made: SRSTE = method(pattern=parse_pattern(self.ends[layer]), **self.options)
        return made
