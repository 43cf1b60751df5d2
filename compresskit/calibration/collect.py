"""Hooks on linear layers: sum up their inputs, or measure how far their outputs moved.

Shapes: T = tokens, O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from compresskit.calibration.statistics import Accumulator, LayerStats
from compresskit.errors import Fault, StatisticError
from compresskit.modeling.anatomy import Linear


class Hooks:
    """A context in which ``module``'s linear layers report to this object.

    Args:
        module: the whole model.

    Attributes:
        keep_T: set before each row: which of its tokens count; None counts all.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.keep_T: Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _rows(self, layer: str, value: Tensor) -> Tensor:
        """``value`` (..., n) as (T, n), without padding."""
        flat = value.reshape(-1, value.shape[-1])
        if self.keep_T is None:
            return flat
        if len(flat) != len(self.keep_T):
            got = f"{len(flat)} inputs for {len(self.keep_T)} tokens"
            cure = "Calibrate on rows without padding: this layer does not see every token."
            raise StatisticError(Fault(layer, "one input for each token", got, cure))
        return flat[self.keep_T]


class Collector(Hooks):
    """Collects ``needs`` for ``layers``. Layers that are fed the very same tensor share one sum.

    Args:
        module: the whole model.
        layers: to watch.
        needs: names of ``statistics.STATISTICS``; none collects nothing but the number of tokens.
        device: of the sums.
    """

    def __init__(
        self, module: nn.Module, layers: Iterable[Linear], needs: frozenset[str], device: torch.device
    ) -> None:
        super().__init__(module)
        self._needs, self._device = needs, device
        self._sums: dict[str, Accumulator] = {}
        self._leaders: dict[str, str] = {}
        self._last: tuple[Tensor, int, str] | None = None
        for layer in layers:
            target = module.get_submodule(layer.name)
            self._handles.append(target.register_forward_pre_hook(self._hook(layer), with_kwargs=True))

    @property
    def seen(self) -> frozenset[str]:
        """Layers that ran."""
        return frozenset(self._sums) | frozenset(self._leaders)

    def finish(self, layers: Iterable[str]) -> dict[str, LayerStats]:
        """Statistics of each of ``layers``; those that never ran have no tokens. Call once."""
        self._last = None
        made = {name: sums.finish() for name, sums in self._sums.items()}
        self._sums = {}
        empty = LayerStats(num_tokens=0)
        return {n: replace(made.get(self._leaders.get(n, n), empty), layer=n) for n in layers}

    def _hook(self, layer: Linear) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(layer, args[0] if args else kwargs["input"])

        return see

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
            self._sums[name] = Accumulator(self._needs, layer.in_features, self._device)
        self._sums[name].add(self._rows(name, value))


class Shift(Hooks):
    """Measures how far each layer's output is from what its former weight would have made of the same input.

    Args:
        module: the whole model, with the new weights in place.
        deltas: for each layer new minus former weight (O, I), in the dtype computed in.
    """

    def __init__(self, module: nn.Module, deltas: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self._change = dict.fromkeys(deltas, 0.0)
        self._output = dict.fromkeys(deltas, 0.0)
        for name, delta_OI in deltas.items():
            target = module.get_submodule(name)
            self._handles.append(target.register_forward_hook(self._hook(name, delta_OI), with_kwargs=True))

    def relative_error(self) -> dict[str, float | None]:
        """Squared norm of the change over that of the former output; None where that output was zero."""
        return {n: self._change[n] / total if total else None for n, total in self._output.items()}

    def _hook(self, name: str, delta_OI: Tensor) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            input_TI = self._rows(name, args[0] if args else kwargs["input"])
            change_TO = nn.functional.linear(input_TI, delta_OI).float()
            former_TO = self._rows(name, output).float() - change_TO
            self._change[name] += float(change_TO.square().sum(dtype=torch.float64))
            self._output[name] += float(former_TO.square().sum(dtype=torch.float64))

        return see
