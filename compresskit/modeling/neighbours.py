"""Which modules of a block may hand a factor per channel to the linear layers that read them.

Dividing a producer's output channels by s and multiplying its consumers' input columns by s leaves the block
as it is where the producer's channels reach the consumers scaled and nothing else reads them. That is found
by running the block, never by a list of names: a copy with random float32 weights is run on a few random
tokens, each candidate's channels are scaled by distinct factors, and where the inputs of linear layers come
scaled by just these, the scales are folded into the copy's weights and its output compared.

A block costs one run of the copy, one more for each norm and each layer to quantise in it (more for
those that may make several things at once) and one for each group to check: 16 for a Llama, of
:data:`PROBE_TOKENS` tokens each.

Shapes: C = channels of a producer, O = out_features, I = in_features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with: positional and keyword arguments."""

PROBE_TOKENS = 32
"""So many that hardly any channel of a random layer is below zero for all of them, and dead behind a ReLU."""
WIDEST_FACTOR = 4.0
"""Probing factors lie between its inverse and itself, so that thousands can be told apart in float32."""
TOLERANCE = 1e-4
"""Of a norm of differences over a norm; rounding in float32 makes about 1e-6 of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """A producer and all that reads it.

    Attributes:
        producer: name of a norm or a linear layer, within the block.
        consumers: names of linear layers, within the block.
        channel_I: int64, the producer's channel behind each input of the consumers. Channels of key-value
            heads that several query heads read stand behind several inputs; those of queries and keys that
            a layer makes beside values stand behind none, and keep a scale of 1.
        num_channels: C.
        offset: the norm multiplies by (offset + weight); None where the producer is a linear layer.
        has_bias: whether the producer adds a bias.
        transposed: names of those linear layers whose weight is stored (I, O).
    """

    producer: str
    consumers: tuple[str, ...]
    channel_I: Tensor
    num_channels: int
    offset: float | None
    has_bias: bool
    transposed: frozenset[str]


def find_groups(block: nn.Module, layers: Collection[str], call: Call) -> tuple[Group, ...]:
    """Every group of ``block`` that consists of ``layers`` and norms, in order of execution.

    Args:
        block: in memory; its weights do not matter. Not changed.
        layers: linear layers of it, by their names within it, that may be changed.
        call: what the model calls it with on :data:`PROBE_TOKENS` tokens or so.

    Returns:
        Groups; a layer is the consumer of one at most, and a module the producer of one at most.
    """
    with torch.no_grad():
        return _Probe(block, layers, call).groups()


def fold(
    group: Group, scale_C: Tensor, read: Callable[[str], Tensor], write: Callable[[str, Tensor], None]
) -> Tensor:
    """Divide the producer's channels by ``scale_C``, multiply the consumers' columns by it.

    A norm's weight is rounded to its dtype first, and the consumers get the scale that it then has, so that
    only their own rounding is left. Where a norm's weight cannot carry a scale its channel keeps its own.

    Args:
        group: whose block is in memory.
        scale_C: (C,), positive, float32.
        read: the parameter of a name within the block, as stored.
        write: puts a new one, rounded to the dtype stored, in its place.

    Returns:
        The scale (I,) that the consumers' columns were multiplied by; their inputs are divided by it.
    """
    weight_name = f"{group.producer}.weight"
    weight = read(weight_name)
    scale_C = scale_C.to(weight.device, torch.float32)
    if group.offset is None:
        spread = scale_C if group.producer in group.transposed else scale_C[:, None]
        write(weight_name, (weight.float() / spread).to(weight.dtype))
    else:
        former_C = group.offset + weight.float()
        weight_C = (former_C / scale_C - group.offset).to(weight.dtype)
        actual_C = former_C / (group.offset + weight_C.float())
        sound_C = torch.isfinite(actual_C) & (actual_C > 0)
        write(weight_name, weight_C.where(sound_C, weight))
        scale_C = actual_C.where(sound_C, 1.0)
    if group.has_bias:
        bias_C = read(f"{group.producer}.bias")
        write(f"{group.producer}.bias", (bias_C.float() / scale_C).to(bias_C.dtype))
    scale_I = scale_C[group.channel_I.to(scale_C.device)]
    for name in group.consumers:
        weight = read(f"{name}.weight")
        spread = scale_I[:, None] if name in group.transposed else scale_I
        write(f"{name}.weight", (weight.float() * spread).to(weight.dtype))
    return scale_I


class _Probe:
    """A copy of a block, run to see what reaches what."""

    def __init__(self, block: nn.Module, layers: Collection[str], call: Call) -> None:
        self._block = _random_copy(block)
        self._call = _in_float32(call)
        modules = dict(self._block.named_modules())
        self._linears = {name: modules[name] for name in layers}
        self._producers = {n: m for n, m in modules.items() if n in self._linears or _is_norm(m)}
        self._seen: dict[str, list[tuple[Tensor, int]]] = {}
        self._output = self._run()
        self._inputs = self._seen  # in order of execution

    def groups(self) -> tuple[Group, ...]:
        found: list[Group] = []
        taken: set[str] = set()
        for name in reversed(self._inputs):  # the nearest of several producers in a row
            group = self._group_of(name)
            if group is not None and taken.isdisjoint(group.consumers) and self._holds(group):
                found.append(group)
                taken |= set(group.consumers)
        return tuple(reversed(found))

    def _group_of(self, name: str) -> Group | None:
        """What reads the channels of ``name``, or the last of them, as they are scaled."""
        module = self._producers[name]
        if len(self._inputs[name]) != 1:
            return None
        value, num_channels = self._inputs[name][0]
        offset = None if name in self._linears else _offset(module, value)
        if name not in self._linears and offset is None:
            return None
        for count in (num_channels, *self._tails(name, num_channels)):
            maps = self._maps(module, num_channels, count)
            first = next(iter(maps.values()), None)
            if first is not None and all(torch.equal(first, other) for other in maps.values()):
                return Group(
                    producer=name,
                    consumers=tuple(n for n in self._inputs if n in maps),
                    channel_I=first.cpu(),
                    num_channels=num_channels,
                    offset=offset,
                    has_bias=getattr(module, "bias", None) is not None,
                    transposed=frozenset(n for n, m in self._linears.items() if isinstance(m, Conv1D)),
                )
        return None

    def _tails(self, name: str, num_channels: int) -> list[int]:
        """How many of the last channels of a linear layer may be what another reads.

        Layers that make several things at once make the gate before what it gates, and queries and keys
        before values, of which there may be fewer than the reader has inputs.
        """
        if name not in self._linears:
            return []
        widths = {each[0][0].shape[-1] for n, each in self._inputs.items() if n in self._linears}
        found = {width for width in widths if width < num_channels}
        found |= {
            rest // 2 for width in widths if (rest := num_channels - width) > 0 and width % (rest / 2) == 0
        }
        return sorted(found, reverse=True)

    def _maps(self, module: nn.Module, num_channels: int, count: int) -> dict[str, Tensor]:
        """For each layer whose inputs come scaled as the last ``count`` channels are: the channel of each."""
        generator = torch.Generator().manual_seed(count)
        order_C = torch.randperm(count, generator=generator)
        factor_C = torch.cat([torch.ones(num_channels - count), _factors(order_C)])
        with self._scaled(module, factor_C):
            self._run()
        found = {reader: self._channels(reader, order_C) for reader in self._linears}
        return {
            n: channel_I + num_channels - count for n, channel_I in found.items() if channel_I is not None
        }

    def _channels(self, reader: str, order_C: Tensor) -> Tensor | None:
        """Whose factor each input of ``reader`` came scaled by; None where any came otherwise."""
        before, after = self._inputs.get(reader, []), self._seen.get(reader, [])
        if len(before) != 1 or len(after) != 1 or before[0][0].shape != after[0][0].shape:
            return None
        old_TI, new_TI = (each[0][0].flatten(0, -2) for each in (before, after))
        square_I = old_TI.square().sum(0)
        ratio_I = (old_TI * new_TI).sum(0) / square_I
        if not bool(((square_I > 0) & (ratio_I > 0)).all()):
            return None
        place_I = _place(ratio_I, len(order_C))
        rank_I = place_I.round().clamp(0, len(order_C) - 1)
        channel_I = torch.argsort(order_C).to(rank_I.device)[rank_I.long()]
        expected_TI = old_TI * _factors(order_C).to(old_TI.device)[channel_I]
        off_I = (new_TI - expected_TI).norm(dim=0) > TOLERANCE * expected_TI.norm(dim=0)
        if bool(off_I.any()) or bool(((place_I - rank_I).abs() > 0.25).any()):
            return None
        return channel_I

    def _holds(self, group: Group) -> bool:
        """Whether the block with random scales folded in computes what it did."""
        former: dict[str, Tensor] = {}

        def write(name: str, value: Tensor) -> None:
            former[name] = self._block.get_parameter(name).data
            self._block.get_parameter(name).data = value

        generator = torch.Generator().manual_seed(1)
        scale_C = torch.ones(group.num_channels)
        read_C = torch.unique(group.channel_I)
        scale_C[read_C] = torch.exp2(torch.rand(read_C.numel(), generator=generator) * 2 - 1)
        fold(group, scale_C, lambda name: self._block.get_parameter(name).data, write)
        output = self._run()
        for name, value in former.items():
            self._block.get_parameter(name).data = value
        return len(output) == len(self._output) and all(
            bool((new - old).norm() <= TOLERANCE * old.norm())
            for new, old in zip(output, self._output, strict=True)
        )

    def _run(self) -> list[Tensor]:
        """Run the copy; what its producers and linear layers were given goes to ``_seen``."""
        self._seen = {}
        handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True, prepend=True)
            for name, module in self._producers.items()
        ]
        try:
            args, kwargs = self._call
            return list(_tensors(self._block(*args, **kwargs)))
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            self._seen.setdefault(name, []).append((value.clone(), output.shape[-1]))

        return see

    @contextmanager
    def _scaled(self, module: nn.Module, factor_C: Tensor) -> Iterator[None]:
        handle = module.register_forward_hook(lambda _, args, output: output * factor_C.to(output.device))
        try:
            yield
        finally:
            handle.remove()


def _factors(order_C: Tensor) -> Tensor:
    """Distinct factors, evenly spaced in their logarithm, in a random order."""
    return WIDEST_FACTOR ** (2 * order_C / max(len(order_C) - 1, 1) - 1)


def _place(factor: Tensor, count: int) -> Tensor:
    """The inverse of :func:`_factors`: where among ``count`` factors each of ``factor`` stands."""
    return (factor.log() / math.log(WIDEST_FACTOR) + 1) / 2 * max(count - 1, 1)


def _random_copy(block: nn.Module) -> nn.Module:
    """``block`` in float32 with weights that leave no channel dead; its parameters are never copied."""
    generator = {p.device: torch.Generator(p.device).manual_seed(0) for p in block.parameters()}
    fresh: dict[int, Any] = {}
    for name, parameter in block.named_parameters():
        shape, device = parameter.shape, parameter.device
        if parameter.dim() >= 2:
            value = torch.randn(shape, device=device, generator=generator[device]) / math.sqrt(shape[-1])
        elif name.rpartition(".")[2] == "bias":
            value = torch.randn(shape, device=device, generator=generator[device]) / 10
        else:
            value = torch.rand(shape, device=device, generator=generator[device]) + 0.5
        fresh[id(parameter)] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(block, fresh).float().eval()


def _is_norm(module: nn.Module) -> bool:
    """A module of nothing but one weight per channel, and perhaps a bias."""
    names = {name: parameter.dim() for name, parameter in module.named_parameters()}
    return "weight" in names and names.keys() <= {"weight", "bias"} and set(names.values()) == {1}


def _offset(norm: nn.Module, value: Tensor) -> float | None:
    """What ``norm`` adds to its weight before it multiplies by it; None where it does something else."""
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    former_C, shift_C = weight.data, 0.0 if bias is None else bias.data
    made = []
    for value_C in (former_C, torch.zeros_like(former_C), torch.ones_like(former_C)):
        weight.data = value_C
        made.append(norm(value) - shift_C)
    weight.data = former_C
    now, zero, one = made
    normed = one - zero
    offset = float((zero * normed).sum() / normed.square().sum())
    off = (now - (offset + former_C) * normed).norm()
    if not off <= TOLERANCE * now.norm() or not (zero - offset * normed).norm() <= TOLERANCE * now.norm():
        return None
    return round(offset, 4) + 0.0


def _in_float32(value: Any) -> Any:
    """``value`` with all floating tensors in it as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_in_float32(each) for each in value)
    return {k: _in_float32(v) for k, v in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a block's result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
