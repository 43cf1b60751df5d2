"""Hooks on linear layers that sum up their inputs.

Shapes: B = documents of a batch, T = tokens, I = in_features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from compresskit.calibration.gram import Workspace
from compresskit.calibration.replay import not_once
from compresskit.calibration.statistics import Accumulator, LayerStats
from compresskit.errors import Fault, StatisticError
from compresskit.modeling.anatomy import Linear


class Enough(Exception):
    """Every layer has had its input: the rest of the batch need not be run."""


class Collector:
    """A context in which layers report what they are fed; those fed the very same tensor share a sum.

    Args:
        module: the whole model.
        layers: to watch.
        needs: names of ``statistics.STATISTICS``; none collects a sample and the number of tokens.
        device: of the sums.
        once: each layer runs once in a batch, with every token. A batch is left by :class:`Enough` when all
            have been fed: what the last of them makes, often a block's largest product, is spared. Of those
            that read the same tensor in the first batch one is enough in the others.

    Raises:
        StatisticError: in a batch of ``once`` a layer runs otherwise.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Iterable[Linear],
        needs: frozenset[str],
        device: torch.device,
        *,
        once: bool = False,
    ) -> None:
        self._module, self._layers = module, list(layers)
        self._needs, self._device = needs, device
        self._keep: Tensor | None = None
        self._workspace = Workspace()
        self._once, self._unfed, self._tokens = once, set[str](), 0
        self._sums: dict[str, Accumulator] = {}
        self._leaders: dict[str, str] = {}
        self._last: tuple[Tensor, int, str] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer in self._layers:
            target = self._module.get_submodule(layer.name)
            self._handles.append(target.register_forward_pre_hook(self._hook(layer), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def seen(self) -> frozenset[str]:
        """Layers that ran."""
        return frozenset(self._sums) | frozenset(self._leaders)

    def begin(self, tokens: int, mask: Tensor | None) -> None:
        """A batch follows.

        Args:
            tokens: so many it has.
            mask: (B, T); those count where it is not 0, all of them without one.
        """
        self._require_fed()
        self._tokens = tokens
        self._unfed = set(self._sums) if self._sums else {layer.name for layer in self._layers}
        padded = mask is not None and not bool(mask.all())
        self._keep = mask.reshape(-1).bool().to(self._device) if mask is not None and padded else None

    def finish(self, layers: Iterable[str]) -> dict[str, LayerStats]:
        """Statistics of each of ``layers``; those that never ran have no tokens. Call once."""
        self._require_fed()
        self._last = None
        made = {name: sums.finish() for name, sums in self._sums.items()}
        self._sums = {}
        empty = LayerStats(num_tokens=0)
        return {n: replace(made.get(self._leaders.get(n, n), empty), layer=n) for n in layers}

    def _hook(self, layer: Linear) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            if self._once and value[..., 0].numel() != self._tokens:
                raise StatisticError(not_once(layer.name))
            self._see(layer, value)
            self._unfed.discard(layer.name)
            if self._once and not self._unfed:
                raise Enough

        return see

    def _require_fed(self) -> None:
        """In the batch that ends here every layer has run that was to run once."""
        if self._once and self._unfed:
            raise StatisticError(*map(not_once, sorted(self._unfed)))

    def _see(self, layer: Linear, value: Tensor) -> None:
        name = layer.name
        last, version, leader = self._last or (None, 0, "")
        if last is value and version == value._version and name not in self._sums:
            if self._leaders.setdefault(name, leader) == leader:
                return
        elif name in self._leaders:
            got = f"that of {self._leaders[name]} in some rows and another in others"
            raise StatisticError(Fault(name, "the same kind of input each time", got, "Add it to ignore."))
        self._last = (value, value._version, name)
        if name not in self._sums:
            self._sums[name] = Accumulator(
                self._needs, layer.in_features, self._device, workspace=self._workspace
            )
        self._sums[name].add(self._counted(name, value))

    def _counted(self, layer: str, value: Tensor) -> Tensor:
        """``value`` (..., I) as (T, I), without padding."""
        flat = value.reshape(-1, value.shape[-1])
        if self._keep is None:
            return flat
        if len(flat) != len(self._keep):
            got = f"{len(flat)} inputs for {len(self._keep)} tokens"
            cure = "Calibrate on rows without padding: this layer does not see every token."
            raise StatisticError(Fault(layer, "one input for each token", got, cure))
        return flat[self._keep]
