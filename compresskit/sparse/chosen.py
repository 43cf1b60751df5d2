"""A frozen model whose layers learn which of their weights to compute with.

Shapes: O = out_features, I = in_features, G = groups along I, C = masks of a group; ``_I`` alone: any leading
dimensions, then I.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from compresskit.modeling import ModelSource
from compresskit.sparse import TRAINED_PRUNERS
from compresskit.sparse.base import MaskLearner, Moment, moment_seed
from compresskit.sparse.masked import MaskedLinear
from compresskit.sparse.pattern import parse_pattern
from compresskit.training.adaptation import Plain
from compresskit.training.write import Changed, write_checkpoint

START = -1
"""The step whose seed the first logits have: no step of training has it."""


class ChosenLinear(MaskedLinear):
    """A linear layer that computes with a blend of masks of its weight, and after training with one.

    Made from a linear layer in place by :func:`choose_in_place`, never constructed. All passes of a step, on
    every rank, have the same blend, so that a step's gradient is that of one model.
    """

    logit_OGC: nn.Parameter
    label: str
    seed: int
    backward_passes: int

    def operands(self, input_I: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied: the input (..., I) and the weight (O, I) that its masks leave."""
        step = self.steps
        if self.training:
            step = min(self._passed() // self.passes_per_step, self.steps - 1)
        weight_OI = _Chosen.apply(self.weight, self.logit_OGC, self, step)  # type: ignore[no-untyped-call]
        return input_I, cast(Tensor, weight_OI)

    def chosen(self, weight_OI: Tensor, logit_OGC: Tensor, step: int) -> Tensor:
        """What the masks leave of the weight after ``step``; in fp32 whatever products are in."""
        moment = Moment(step, self.steps, moment_seed(self.seed, step, self.label), logit_OGC=logit_OGC)
        with torch.autocast(weight_OI.device.type, enabled=False):
            made_OI: Tensor = self.pruner.update(weight_OI, moment)
        return made_OI


class _Chosen(torch.autograd.Function):
    """The weight times its masks; backwards the logits alone have a gradient.

    Blends again backwards, so that nothing the size of the logits is kept.
    """

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, logit_OGC: Tensor, layer: ChosenLinear, step: int) -> Tensor:
        ctx.save_for_backward(weight_OI, logit_OGC)
        ctx.layer, ctx.step = layer, step
        return layer.chosen(weight_OI, logit_OGC, step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        weight_OI, logit_OGC = ctx.saved_tensors
        layer: ChosenLinear = ctx.layer
        with torch.enable_grad():
            logit_OGC = logit_OGC.detach().requires_grad_()
            made_OI = layer.chosen(weight_OI.detach(), logit_OGC, ctx.step)
        reward_OI = 2 * layer.pruner.norm_reward / layer.backward_passes * made_OI.detach()
        (gradient_OGC,) = torch.autograd.grad(made_OI, logit_OGC, gradients[0] - reward_OI)
        return None, gradient_OGC, None, None


def choose_in_place(
    layer: nn.Linear,
    pruner: MaskLearner,
    *,
    label: str,
    seed: int,
    steps: int,
    passes_per_step: int,
    backward_passes: int,
) -> None:
    """Turn ``layer`` into a :class:`ChosenLinear`, and freeze it but for its logits.

    Args:
        layer: an ordinary linear layer on the CPU, its weight whole.
        pruner: whose ``learns_masks`` is set.
        label: its name, which tells its noise from that of others.
        seed: of the run.
        steps: optimiser steps of the whole run.
        passes_per_step: training passes of one process through the layer per optimiser step.
        backward_passes: of those, the ones that a gradient comes back through.
    """
    layer.__class__ = ChosenLinear
    assert isinstance(layer, ChosenLinear)
    layer.pruner, layer.label, layer.seed = pruner, label, seed
    layer.steps, layer.passes_per_step, layer.backward_passes = steps, passes_per_step, backward_passes
    layer.requires_grad_(False)
    layer.logit_OGC = nn.Parameter(pruner.start(layer.weight.detach(), moment_seed(seed, START, label)))
    layer.register_buffer("passes", torch.zeros((), dtype=torch.int64))
    layer.passed = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The frozen model whose layers learn their masks; each weight is saved as it was, or as zero.

    Attributes:
        method: a name of ``compresskit.sparse.TRAINED_PRUNERS`` whose ``learns_masks`` is set.
        options: its own fields.
        ends: layer -> pattern, as :func:`compresskit.sparse.pattern.parse_pattern` reads it.
        steps: optimiser steps of the whole run.
        passes_per_step: training passes of one process per optimiser step.
        twice: layers that the backward pass computes once more.
        seed: of the run.
    """

    masks_gradients: ClassVar[bool] = False
    saves_frozen: ClassVar[bool] = False

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ends: Mapping[str, str]
    steps: int = 1
    passes_per_step: int = 1
    twice: tuple[str, ...] = ()
    seed: int = 0

    def load(self, source: ModelSource) -> nn.Module:
        """See ``Adaptation.load``."""
        model = Plain().load(source).requires_grad_(False)
        for name in self.ends:
            layer: Any = model.get_submodule(name)
            choose_in_place(
                layer,
                self._pruner(name),
                label=name,
                seed=self.seed,
                steps=self.steps,
                passes_per_step=self.passes_per_step * (2 if name in self.twice else 1),
                backward_passes=self.passes_per_step,
            )
        return model

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        """See ``Adaptation.save``."""
        make = {f"{layer}.weight": partial(self._chosen, source, layer, tensors) for layer in self.ends}
        write_checkpoint(source, out, Changed(source, make))

    def _chosen(self, source: ModelSource, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The stored weight (O, I) with its zeros."""
        end = Moment(self.steps, self.steps, logit_OGC=tensors[f"{layer}.logit_OGC"])
        return self._pruner(layer).update(source.weight_OI(layer), end)

    def _pruner(self, layer: str) -> MaskLearner:
        method: Any = TRAINED_PRUNERS[self.method]
        made: MaskLearner = method(pattern=parse_pattern(self.ends[layer]), **self.options)
        return made
