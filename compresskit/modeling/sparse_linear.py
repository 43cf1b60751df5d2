"""A linear layer whose weight has zeros: held packed on its device, multiplied by the fastest layout.

Shapes: O = outputs, I = inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compresskit.errors import Fault, FormatError
from compresskit.formats.bitmask import MASK, SCALES, SHAPE, TYPES, VALUES, PackedLayer
from compresskit.kernels.bitmap import Bitmap, unpack
from compresskit.kernels.choice import Choice, Wish, choose
from compresskit.kernels.contest import DENSE, EXPANDED, expand
from compresskit.kernels.packed import LAYOUTS
from compresskit.kernels.packed.base import Layout
from compresskit.modeling.unread import Unread

PARTS = (MASK, VALUES, SCALES)
TRAINED = "bitmap"
"""The layout whose values have a gradient and lie as the neutral ones do."""


class SparseLinear(nn.Module):
    """``inputs @ weight.T + bias`` for a weight of ``compresskit.kernels.bitmap.Bitmap``.

    Its state is the neutral one, whatever is in memory: ``mask``, ``values``, ``scales`` of integers,
    ``bias``, and ``weight``, the dense shape. Until :meth:`settle` these are buffers, into which a checkpoint
    is read; from then on the layouts of :attr:`choice` are. On another device or in another type it is packed
    anew. :meth:`train_values` has the kept weights learn, under a mask that cannot move.

    Args:
        layer: what its tensors are.
        dtype: of inputs and outputs, and of values that are no integers.
        bias: whether it adds one.
        device: of the buffers; on ``meta`` they wait for a checkpoint.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        layer: PackedLayer,
        *,
        dtype: torch.dtype,
        bias: bool = False,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.shape
        self.layer, self.dtype = layer, TYPES[layer.dtype]
        self.retype(dtype)
        self.choice: Choice | None = None
        self.wish: Wish | None = None
        self._ways: dict[str, tuple[Layout | None, tuple[str, ...]]] = {}
        self._kept = ""
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None
        for part, (kind, shape) in layer.parts.items():
            if part != SHAPE:
                floats = kind.is_floating_point and part == VALUES
                empty = torch.empty(shape, dtype=dtype if floats else kind, device=device)
                self.register_buffer(part, empty)

    @classmethod
    def of(
        cls,
        weight: Bitmap,
        bias_O: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        pattern: str = "",
    ) -> SparseLinear:
        """A layer with ``weight`` in its buffers, not yet settled.

        Args:
            weight: without a fault.
            bias_O: or None.
            dtype: of inputs and outputs; None is that of the values, which then may not be integers.
            pattern: ``2:4`` and the like, where the zeros lie so.
        """
        kind = dtype or weight.values_K.dtype
        scales = weight.scales_OG
        layer = PackedLayer(
            shape=(weight.out_features, weight.in_features),
            kept=weight.values_K.numel(),
            dtype=str(kind).removeprefix("torch."),
            pattern=pattern,
            bits=None if scales is None else 8,
            group_size=None
            if scales is None or scales.shape[1] == 1
            else weight.in_features // scales.shape[1],
        )
        made = cls(layer, dtype=kind, bias=bias_O is not None, device=weight.mask_OB.device)
        made._hold(weight)
        if bias_O is not None:
            made.bias = nn.Parameter(bias_O.detach().to(kind))
        return made

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(iter(self._buffers.values())).device  # type: ignore[union-attr]

    @property
    def weight(self) -> Tensor:
        """The dense weight (O, I) in :attr:`dtype`, for reading, not for computing.

        Its numbers are made when they are first asked for, and forgotten with the tensor; type, shape and
        device cost nothing. A step that trains the values in place before then shows in them. It is no
        parameter: make one of ``weight.clone()``.
        """
        if self.device.type == "meta":
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        if DENSE in self._ways:
            return self._get(self._ways[DENSE][1])[0]
        if torch.compiler.is_compiling():  # which does away with what is not used
            return self._unpacking()()
        return Unread(self._unpacking(), (self.out_features, self.in_features), self.dtype, self.device)

    def bitmap(self) -> Bitmap:
        """The weight in the neutral form, to the bit as it was read; on the CPU once it is settled."""
        if self._kept:
            layout, names = self._ways[self._kept]
            assert layout is not None  # of what is kept to be unpacked
            with torch.no_grad():
                return layout.unpack(self._get(names), self.in_features)
        scales = self._buffers.get(SCALES)
        mask, values = self._buffers[MASK], self._buffers[VALUES]
        assert mask is not None
        assert values is not None
        return Bitmap(mask_OB=mask, values_K=values, in_features=self.in_features, scales_OG=scales)

    def settle(
        self, wish: Wish | None = None, device: torch.device | None = None, where: str = "weight"
    ) -> Choice:
        """Choose how to multiply on ``device``, and pack the weight so.

        Args:
            wish: of the user; None is as the environment says.
            device: to compute on; None is where the buffers are.
            where: the place that faults name.

        Returns:
            The choice, which :attr:`choice` is from now on.

        Raises:
            FormatError: mask and values contradict each other, or what the layer is said to be.
            EngineError: the layout asked for cannot multiply such a layer.
        """
        device = device or self.device
        weight = self.bitmap()
        if faults := self.layer.faults(weight, where):
            raise FormatError(*faults)
        choice = choose(weight, inputs=self.dtype, device=device, group=self.layer.group, wish=wish)
        if self.bias is not None and self.bias.device != device:
            self.bias.data = self.bias.data.to(device)
        self._drop()
        self.wish, self.choice = wish, choice
        for name in choice.resident:
            self._pack(name, weight, device)
        self._kept = next((n for n in choice.resident if n != DENSE), "")
        if not self._kept and weight.values_K.dtype == self.dtype:
            self._kept = DENSE
        if not self._kept:  # integers cannot be had back from the dense weight
            self._hold(weight, device)
        return choice

    def train_values(self, device: torch.device | None = None) -> nn.Parameter:
        """Make the kept weights a parameter, and multiply by the layout ``bitmap``.

        What is zero has no place in the parameter, so that no optimiser moves the mask, and gradients are of
        the kept weights alone: of a dense one only some rows exist at a time. It is one of ``parameters()``.
        The state stays neutral, and another may be loaded that has the same mask. A weight that becomes zero
        stays kept. :meth:`settle` ends it.

        Args:
            device: to compute on; None is where the layer is.

        Returns:
            ``values``, (K,), the kept weights row by row; the same one until :meth:`settle`.

        Raises:
            FormatError: the values are integers; or mask and values contradict each other.
        """
        if self.layer.bits is not None:
            cure = "Train before it is quantised, or its adapters."
            raise FormatError(Fault("SparseLinear", "floating values", "int8 ones, to be trained", cure))
        values = self._parameters.get(VALUES)
        if values is None or device not in (None, self.device):
            self.settle(Wish(layout=TRAINED), device)
            values = self._train(nn.Parameter(torch.empty(0)) if values is None else values)
        return values

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the inputs' type; under autocast in that of autocast."""
        choice = self.choice
        if choice is None:
            raise RuntimeError("a SparseLinear multiplies only once it is settled: call settle()")
        if inputs.shape[-1] != self.in_features:
            raise RuntimeError(f"a SparseLinear of {self.in_features} inputs was given {inputs.shape[-1]}")
        step = choice.at(inputs.numel() // self.in_features)
        if step == DENSE:
            return linear(inputs, self._buffers["dense_0"], self.bias)  # type: ignore[arg-type]
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            narrow = torch.get_autocast_dtype(kind)
            with torch.autocast(kind, enabled=False):
                return self._product(step, inputs.to(self.dtype)).to(narrow)
        if inputs.dtype != self.dtype:
            raise RuntimeError(f"a SparseLinear of {self.dtype} was given inputs of {inputs.dtype}")
        return self._product(step, inputs)

    def extra_repr(self) -> str:
        """Shape, zeros, and how it multiplies."""
        said = f"in_features={self.in_features}, out_features={self.out_features}, "
        said += f"bias={self.bias is not None}, zeros={self.layer.zero_fraction:.1%}"
        return said + (f", {self.choice}" if self.choice else ", not settled")

    def _product(self, step: str, inputs: Tensor) -> Tensor:
        layout, names = self._ways[step.removesuffix(EXPANDED)]
        assert layout is not None  # dense is done without one
        packed = self._get(names)
        if step.endswith(EXPANDED):
            with torch.no_grad():
                weight_OI = expand(layout, packed, self.in_features, inputs.dtype)
            return linear(inputs, weight_OI, self.bias)
        return layout.linear(inputs, packed, self.bias)

    def _pack(self, name: str, weight: Bitmap, device: torch.device) -> None:
        """Put one layout into buffers; dense weights of integers are multiplied by their scales here."""
        layout: Layout = LAYOUTS[name]()
        if name == DENSE and weight.values_K.dtype != self.dtype:
            packed: tuple[Tensor, ...] = (unpack(weight, self.dtype).to(device),)
        else:
            packed = layout.pack(weight, device)
        names = tuple(f"{name}_{index}" for index in range(len(packed)))
        for each, tensor in zip(names, packed, strict=True):
            self.register_buffer(each, tensor, persistent=False)
        self._ways[name] = layout, names

    def _get(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in names)

    def _unpacking(self) -> Callable[[], Tensor]:
        """What makes the dense weight where none is in memory: of the tensors and in the type of now."""
        if not self._kept:
            return partial(unpack, self.bitmap(), self.dtype)
        layout, names = self._ways[self._kept]
        assert layout is not None  # of what is kept to be unpacked
        return torch.no_grad()(partial(expand, layout, self._get(names), self.in_features, self.dtype))

    def _train(self, values: nn.Parameter) -> nn.Parameter:
        """Make ``values`` what is multiplied by: of the packed values those before the slack, not copied."""
        layout, (words, packed, *rest) = self._ways[TRAINED]
        values.data = self.get_buffer(packed)[: self.layer.kept]
        if values.grad is not None:
            values.grad = values.grad.to(values)
        delattr(self, packed)
        self.register_parameter(VALUES, values)
        self._ways[TRAINED] = layout, (words, VALUES, *rest)
        return values

    def _drop(self) -> None:
        """Forget what is in the buffers, and how to multiply."""
        for name in [*self._buffers, *(self._parameters.keys() & {VALUES})]:
            delattr(self, name)
        self._ways, self._kept, self.choice = {}, "", None

    def _hold(self, weight: Bitmap, device: torch.device | None = None, *, copy: bool = False) -> None:
        """The neutral form as buffers; without ``copy`` they may be the given tensors."""
        parts = {MASK: weight.mask_OB, VALUES: weight.values_K, SCALES: weight.scales_OG}
        for name, tensor in parts.items():
            if tensor is not None:
                self.register_buffer(name, tensor if device is None else tensor.to(device, copy=copy))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """As any module's; on another device or in another type the weight is packed anew."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        floats = probe.dtype if probe.is_floating_point() else self.dtype
        if self.choice is None or (probe.device == self.device and floats == self.dtype):
            self.retype(floats)
            scales, settled = self._buffers.get(SCALES), self.choice is not None
            before = dict(self._buffers)
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if settled:  # nothing changes, but scales are fp32 whatever the model is
                self._buffers.update(before)
            elif scales is not None:
                self._buffers[SCALES] = scales.to(probe.device)
            return self
        weight = self.bitmap()
        wish, values = self.wish, self._parameters.get(VALUES)
        self.retype(floats)  # which may refuse, before anything is dropped
        self._drop()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight.values_K.is_floating_point():
            weight = replace(weight, values_K=weight.values_K.to(floats))
        if probe.device.type == "meta":
            self._hold(weight, probe.device)
            return self
        self._hold(weight)
        self.settle(wish, probe.device)
        if values is not None:
            self._train(values)
        return self

    def retype(self, dtype: torch.dtype) -> None:
        """From now on it takes inputs of ``dtype``."""
        if dtype != self.dtype:
            name = str(dtype).removeprefix("torch.")
            if name not in TYPES:
                cure = f"Use one of {', '.join(TYPES)}, or export the model to dense."
                raise FormatError(Fault("SparseLinear", "a type that a layout holds", name, cure))
            self.dtype, self.layer = dtype, replace(self.layer, dtype=name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The neutral form; on ``meta`` without the shape, which no checkpoint is read into."""
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        weight = self.bitmap()
        parts = {MASK: weight.mask_OB, VALUES: weight.values_K, SCALES: weight.scales_OG}
        if self.device.type != "meta":
            parts[SHAPE] = torch.tensor(self.layer.shape)
        destination.update({f"{prefix}{name}": part for name, part in parts.items() if part is not None})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the neutral form, checked; as many weights may be kept as it says."""
        found = {part: state_dict.get(f"{prefix}{part}") for part in self.layer.parts}
        if lost := [f"{prefix}{p}" for p, tensor in found.items() if tensor is None and p != SHAPE]:
            missing_keys += lost if strict else []
            return
        weight = Bitmap(
            mask_OB=found[MASK],  # type: ignore[arg-type]
            values_K=found[VALUES],  # type: ignore[arg-type]
            in_features=self.in_features,
            scales_OG=found.get(SCALES),
        )
        layer = replace(self.layer, kept=weight.values_K.numel())
        if faults := layer.faults(weight, prefix.rstrip(".")):
            error_msgs += map(str, faults)
            return
        shape = found[SHAPE]
        if shape is not None and shape.tolist() != list(layer.shape):
            error_msgs.append(f"{prefix}{SHAPE}: expected {list(layer.shape)}, got {shape.tolist()}")
            return
        values = self._parameters.get(VALUES)
        if values is not None and not torch.equal(self.bitmap().mask_OB, weight.mask_OB.cpu()):
            error_msgs.append(f"{prefix}{MASK}: values are trained under another one; call settle() first")
            return
        bias = state_dict.get(f"{prefix}bias")
        if self.bias is not None and bias is not None and bias.shape != self.bias.shape:
            expected, got = tuple(self.bias.shape), tuple(bias.shape)
            error_msgs.append(f"{prefix}bias: expected one of {expected}, got {got}")
            return
        was, wish, device, self.layer = self.choice, self.wish, self.device, layer
        if device.type == "meta" and local_metadata.get("assign_to_params_buffers"):
            device = weight.mask_OB.device  # as any module's whose state is assigned
        if self.bias is not None and bias is not None:
            if self.bias.device != device:
                self.bias = nn.Parameter(torch.empty_like(self.bias, device=device), self.bias.requires_grad)
            with torch.no_grad():
                self.bias.copy_(bias)
        elif self.bias is not None and strict:
            missing_keys.append(f"{prefix}bias")
        if values is not None:
            values.data.copy_(weight.values_K)
            return
        self._drop()
        self._hold(weight, device, copy=True)
        if was is not None:
            self.settle(wish, device)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Every SparseLinear of ``model`` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def choices_of(model: nn.Module) -> dict[str, Choice]:
    """How each SparseLinear of ``model`` multiplies; ``compresskit.kernels.choice.table`` prints it."""
    return {name: layer.choice for name, layer in sparse_layers(model).items() if layer.choice is not None}
