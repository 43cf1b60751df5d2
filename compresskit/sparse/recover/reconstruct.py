"""Reconstruct: retrain what is left of each component until it gives again what it gave in the dense model.

Paper: block by block, Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs", 2024,
https://arxiv.org/abs/2402.12419; attention and feed-forward network apart, which takes less memory and does
as well: Wagner et al., "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning", 2025,
https://arxiv.org/abs/2510.14444. The inputs are what the pruned blocks before give, the targets are the dense
model's.

Shapes: B = documents of a batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from compresskit.calibration.refine import Component, Example, first_of
from compresskit.options import Within
from compresskit.sparse.base import Recovered

BETAS = (0.9, 0.95)
LEAST = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruct:
    """Adam on the mean squared error of a component's output; zeros stay zero.

    Attributes:
        epochs: times that the calibration rows are gone through for each component.
        learning_rate: of the first step, as a fraction of each weight's root mean square; it falls to zero
            along a cosine.
    """

    epochs: Annotated[int, Within(1, 10_000)] = 8
    learning_rate: Annotated[float, Within(0, 1, above=True)] = 0.01

    @property
    def passes(self) -> int:
        """Times that :meth:`recover` goes through the examples."""
        return self.epochs + 2

    def recover(self, component: Component) -> Recovered:
        """Retrain the weights and biases of a component's layers, in float32.

        Args:
            component: pruned; not changed.

        Returns:
            The values it then has; those that it had where these are no better.
        """
        module = component.module
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        trained = _trained(component)
        wide = {n: v.detach().float() for n, v in state.items() if v.is_floating_point() and n not in trained}
        free = {name: state[name].detach().to(torch.float32, copy=True).requires_grad_() for name in trained}
        dead = {name: value.detach() == 0 for name, value in free.items() if name.endswith("weight")}
        sizes = {name: _root_mean_square(value) for name, value in free.items()}
        optimizer = torch.optim.Adam(
            [{"params": [value], "size": sizes[name]} for name, value in free.items()], betas=BETAS
        )
        before, count = _error(module, {**wide, **free}, component)
        steps = self.epochs * count
        step = 0
        for _ in range(self.epochs):
            for example in component.examples():
                for group in optimizer.param_groups:
                    cosine = (1 + math.cos(math.pi * step / steps)) / 2
                    group["lr"] = self.learning_rate * group["size"] * cosine
                with torch.enable_grad():
                    change, energy = _difference(module, {**wide, **free}, example)
                    (change / energy.clamp(min=LEAST)).backward()  # type: ignore[no-untyped-call]
                for name, zero in dead.items():
                    if (gradient := free[name].grad) is not None:
                        gradient.masked_fill_(zero, 0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        new = {name: value.detach() for name, value in free.items()}
        as_run = {name: value.to(state[name].dtype).float() for name, value in new.items()}
        after, _ = _error(module, {**wide, **as_run}, component)
        if not after < before:
            return Recovered({}, before, before)
        return Recovered({f"{component.name}.{name}": value for name, value in new.items()}, before, after)


def _trained(component: Component) -> list[str]:
    """Weights and biases of the layers, named as in the module."""
    inside = [layer.removeprefix(component.name).removeprefix(".") for layer in component.layers]
    wanted = {f"{layer}.{leaf}".removeprefix(".") for layer in inside for leaf in ("weight", "bias")}
    return [name for name, _ in component.module.named_parameters() if name in wanted]


def _difference(module: nn.Module, values: Mapping[str, Tensor], example: Example) -> tuple[Tensor, Tensor]:
    """Squared norm of what ``module`` with ``values`` gives less the target, and that of the target."""
    args, kwargs = tree_map_only(
        Tensor, lambda t: t.float() if t.is_floating_point() else t, (example.args, dict(example.kwargs))
    )
    got = first_of(functional_call(module, dict(values), args, kwargs))
    assert got is not None
    target = example.target.float()
    change = got.float() - target
    if example.mask is not None and example.mask.numel() == target[..., 0].numel():
        keep = example.mask.to(target.device, torch.float32).view(target[..., :1].shape)
        change, target = change * keep, target * keep
    return change.square().sum(), target.square().sum()


@torch.no_grad()
def _error(module: nn.Module, values: Mapping[str, Tensor], component: Component) -> tuple[float, int]:
    """Squared norm of the difference to the targets over that of the targets; how many examples there are."""
    parts = [torch.stack(_difference(module, values, example)).double() for example in component.examples()]
    change, energy = torch.stack(parts).sum(0).tolist()
    return change / max(energy, LEAST), len(parts)


def _root_mean_square(value: Tensor) -> float:
    """Of what is not zero; 1 where all is."""
    alive = value.detach()[value.detach() != 0]
    return float(alive.square().mean().sqrt()) if alive.numel() else 1.0
