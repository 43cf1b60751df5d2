"""Refining what a walk changed: a component of a block at a time, towards what it gave in the dense model.

A component is a child of a block that holds layers to visit: usually its attention, then its feed-forward
network. Once all of these were visited it is handed to a :data:`Refine` together with what now reaches it and
what it gave when the whole model was as it had been, so that what the blocks before lost can be made up for.
Besides the walk's own hidden states a second set is kept, the dense model's.

Shapes: B = documents of a batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compresskit.calibration.activations import Activations
from compresskit.calibration.collect import Enough
from compresskit.calibration.relay import Relay
from compresskit.calibration.rows import Row
from compresskit.modeling.streaming import StreamedModel, return_memory
from compresskit.progress import Progress


@dataclass(frozen=True, slots=True)
class Example:
    """One batch for a component.

    Attributes:
        args: what it is called with.
        kwargs: by name.
        target: what it gave in the dense model, (B, T, D), or (B * T, D).
        mask: (B, T), 0 where a token does not count; None where all do.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Component:
    """A child of a block whose layers were all visited.

    Attributes:
        name: qualified.
        module: itself, its weights as they are now.
        layers: of it, those that were visited.
        examples: goes through all batches, anew at each call.
    """

    name: str
    module: nn.Module
    layers: tuple[str, ...]
    examples: Callable[[], Iterator[Example]]


@dataclass(frozen=True, slots=True)
class _Kept:
    """Stands in an argument's place for the tensor that is kept under this number."""

    number: int


class Refine(Protocol):
    """Changes a component so that it gives what it gave in the dense model, as far as it can."""

    @property
    def passes(self) -> int:
        """How often it goes through the examples of a component."""
        ...

    def __call__(self, component: Component) -> Mapping[str, Tensor]:
        """New values, by qualified name and in the shape that the module has them; it is not changed."""
        ...


def first_of(output: Any) -> Tensor | None:
    """The tensor that a module's ``output`` is, or begins with."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


class Refining:
    """The part of a walk that refines.

    Args:
        streamed: the model.
        batches: of the walk.
        refine: what to do.
        spill: names of files to keep values in begin with it; None keeps them in memory.
    """

    def __init__(
        self, streamed: StreamedModel, batches: Sequence[Row], refine: Refine, spill: Path | None
    ) -> None:
        self._streamed, self._batches, self._refine, self._spill = streamed, batches, refine, spill
        self._dense = self._place("dense")
        self._inputs: list[Activations] = []
        self._targets: dict[str, Activations] = {}
        self._waiting: dict[str, set[str]] = {}
        self._layers: dict[str, tuple[str, ...]] = {}
        self._index = 0
        self._left_out: list[str] = []

    def begin(self, relay: Relay, hidden: Activations, progress: Progress) -> None:
        """Take over from the walk: ``hidden`` enters the first block, of the dense model too.

        ``progress`` counts rows; ``hidden`` will always hold what enters the block at hand.
        """
        self._relay, self._hidden, self._progress = relay, hidden, progress
        for batch in range(len(self._batches)):
            self._dense[batch] = hidden[batch]

    def enter(self, index: int, names: Sequence[str]) -> None:
        """Run the dense block ``index``, of which ``names`` will be visited, and keep what it gives."""
        self._index = index
        self._layers = components(self._streamed.blocks[index], names)
        for leaf in map(_leaf, self._layers):
            if leaf not in self._targets:
                self._targets[leaf] = self._place(f"target-{leaf}")

        odd: dict[str, None] = {}
        seen: list[str] = []

        def keep(name: str, batch: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                value = first_of(output)
                if value is None:
                    odd[name] = None
                    return
                seen.append(name)
                self._targets[_leaf(name)][batch] = value

            return hook

        for batch, row in enumerate(self._batches):
            with ExitStack() as stack:
                for name in self._layers:
                    module = self._streamed.module.get_submodule(name)
                    stack.callback(module.register_forward_hook(keep(name, batch)).remove)
                self._dense[batch] = self._through(row, self._dense[batch])
            odd |= dict.fromkeys(name for name in self._layers if seen.count(name) != 1)
            seen.clear()
            self._progress.advance(len(row["input_ids"]))
        self._left_out += odd
        self._waiting = {name: set(of) for name, of in self._layers.items() if name not in odd}
        self._progress.advance(len(odd) * self._passes)

    def after(self, visited: Collection[str]) -> None:
        """Refine the components whose last layers are ``visited``."""
        for name in list(self._waiting):
            self._waiting[name] -= set(visited)
            if not self._waiting[name]:
                del self._waiting[name]
                self._refined(name)

    def passes(self, blocks: Mapping[str, Sequence[str]]) -> int:
        """Times that all rows are gone through, where ``blocks`` have these layers to visit."""
        counts = (len(components(block, names)) for block, names in blocks.items())
        return sum(1 + count * (1 + self._refine.passes) for count in counts)

    def close(self) -> None:
        """Remove all files."""
        for place in (self._dense, *self._inputs, *self._targets.values()):
            place.close()

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence on the components that could not be refined."""
        if not self._left_out:
            return ()
        names = ", ".join(self._left_out)
        return (f"Not refined, since they do not run once in each batch and give a tensor: {names}.",)

    @property
    def _passes(self) -> int:
        """Rows that refining a component goes through."""
        return (1 + self._refine.passes) * sum(len(row["input_ids"]) for row in self._batches)

    def _refined(self, name: str) -> None:
        module = self._streamed.module.get_submodule(name)
        calls = [self._call(module, batch, row) for batch, row in enumerate(self._batches)]

        def examples() -> Iterator[Example]:
            for batch, row in enumerate(self._batches):
                args, kwargs = tree_map_only(_Kept, partial(self._kept, batch), calls[batch])
                target = self._targets[_leaf(name)][batch].to(self._streamed.device)
                yield Example(args, kwargs, target, row.get("attention_mask"))
                self._progress.advance(len(row["input_ids"]), note=name)

        layers = self._layers[name]
        for parameter, value in self._refine(Component(name, module, layers, examples)).items():
            layer = parameter.removesuffix(".weight")
            if layer in layers:
                linear = self._streamed.source.anatomy.linears[layer]
                self._streamed.set_weight(layer, value.t() if linear.transposed else value)
            else:
                self._streamed.set_parameter(parameter, value)
        return_memory()

    def _kept(self, batch: int, kept: _Kept) -> Tensor:
        return self._inputs[kept.number][batch].to(self._streamed.device)

    def _call(self, module: nn.Module, batch: int, row: Row) -> Any:
        """What ``module`` is called with; what has a value for each token is kept as inputs of ``batch``."""
        found: list[Any] = []

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args, kwargs))
            raise Enough

        handle = module.register_forward_pre_hook(take, with_kwargs=True)
        with suppress(Enough):
            self._through(row, self._hidden[batch])
        handle.remove()
        self._progress.advance(len(row["input_ids"]))
        tokens, numbers = row["input_ids"].numel(), count()

        def put_away(value: Tensor) -> Tensor | _Kept:
            if not value.is_floating_point() or value[..., 0].numel() != tokens:
                return value
            number = next(numbers)
            if number == len(self._inputs):
                self._inputs.append(self._place(f"input-{number}"))
            self._inputs[number][batch] = value
            return _Kept(number)

        return tree_map_only(Tensor, put_away, found[0])

    def _through(self, row: Row, hidden: Tensor) -> Tensor:
        return self._relay.through(self._index, row, hidden.to(self._streamed.device))

    def _place(self, name: str) -> Activations:
        if self._spill is None:
            return Activations()
        return Activations(self._spill.with_name(f"{self._spill.name}-{name}"))


def components(block: str, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The children of ``block`` that hold the layers ``names`` of it, each with its own, in their order."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in names:
        child = layer.removeprefix(f"{block}.").partition(".")[0]
        name = f"{block}.{child}"
        found[name] = (*found.get(name, ()), layer)
    return found


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
