"""How noisy gradients are: which batch still learns nearly as much from each row as a smaller one does.

Paper: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018,
https://arxiv.org/abs/1812.06162, appendix A.1. The gradient of n rows differs from the true one, G, by noise
of variance tr(Sigma) / n, so the squared norms of a small and a large batch's gradients tell |G|^2 and
tr(Sigma). Here the small ones are the passes of a step, over all ranks, and the large one is the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from compresskit.training.hold import weight_of

DECAY = 0.95
"""Of the exponential means, which begin as plain ones."""


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """Exponential means of |G|^2 and tr(Sigma) over steps.

    Attributes:
        signal: |G|^2.
        noise: tr(Sigma) of one row.
        steps: that were measured.
    """

    signal: float = 0.0
    noise: float = 0.0
    steps: int = 0

    def after(self, *, whole: float, parts: float, passes: int, rows: int) -> NoiseScale:
        """The means with one more step in them; a step that tells nothing leaves them as they are.

        Args:
            whole: squared norm of the step's gradient, a mean over its supervised tokens.
            parts: mean over the step's supervised tokens of the squared norm of their pass's gradient, which
                is a mean over the pass's.
            passes: of the step, over all ranks, that have supervised tokens.
            rows: of the step.
        """
        if passes < 2 or not (isfinite(whole) and isfinite(parts)):
            return self
        # Of passes of t_i of T tokens: E[parts] = |G|^2 + passes S / T, and E[whole] = |G|^2 + S / T.
        noise = (parts - whole) * rows / (passes - 1)
        signal = (passes * whole - parts) / (passes - 1)
        kept = min(DECAY, self.steps / (self.steps + 1))
        return NoiseScale(
            kept * self.signal + (1 - kept) * signal, kept * self.noise + (1 - kept) * noise, self.steps + 1
        )

    @property
    def rows(self) -> float | None:
        """tr(Sigma) / |G|^2, B_simple; None where noise hides the gradient, so that it has no bound."""
        return max(self.noise, 0.0) / self.signal if self.signal > 0 else None

    def reaches(self, rows: int) -> bool:
        """Whether it is as large as a batch of so many rows."""
        return self.steps > 0 and self.noise > 0 and self.noise >= rows * self.signal


class PassNorms:
    """The squared norm of the gradient of one pass, on one rank, under an engine that reduces it later.

    Gradients are looked at on their way to be added up, so none is kept a second time.

    Args:
        model: bare; an engine has prepared it: none, DDP or FSDP2.
        held: layers whose zeros get no gradient.
        device: that computes.
    """

    def __init__(self, model: nn.Module, held: Iterable[str], device: torch.device) -> None:
        self._model, self._held = model, tuple(held)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self._seen: set[nn.Parameter] = set()
        self._undo: list[Callable[[], None]] = []
        self._looked: set[nn.Module] = set()
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            # FSDP2 puts whole parameters in place before this hook, the same objects in every pass.
            handle = unit.register_forward_pre_hook(lambda unit, _: self._look(unit))
            self._undo.append(handle.remove)
        if not units:
            self._look(model)

    def _look(self, module: nn.Module) -> None:
        """See the gradients of what is whole in ``module`` from now on; once is enough."""
        if module in self._looked:
            return
        self._looked.add(module)
        masked = {weight_of(self._model, layer) for layer in self._held}
        for parameter in module.parameters():
            whole = not isinstance(parameter, DTensor)
            if whole and parameter.requires_grad and parameter not in self._seen:
                self._seen.add(parameter)
                self._see(parameter, masked=parameter in masked)

    def _see(self, parameter: nn.Parameter, *, masked: bool) -> None:
        def add(gradient: Tensor) -> None:
            if masked:
                gradient = gradient.masked_fill(parameter.detach() == 0, 0)
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
            self._squares += norm.double().square()

        handle = parameter.register_hook(add)  # type: ignore[no-untyped-call]
        self._undo.append(handle.remove)

    def take(self) -> Tensor:
        """Of the pass just taken, backward included; scalar, float64."""
        squares = self._squares.clone()
        self._squares.zero_()
        return squares

    def detach(self) -> None:
        """Look no more."""
        for undo in self._undo:
            undo()
        self._undo.clear()
