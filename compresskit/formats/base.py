"""The contract of a format, and what one is written from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from compresskit.errors import Fault, FormatError
from compresskit.formats.grid import Grid
from compresskit.formats.shards import Stored

CONFIG = "config.json"
G = TypeVar("G")


class Decoded(NamedTuple):
    """A parameter as the module has it, and for a packed weight the grid it lies on."""

    name: str
    tensor: Tensor
    grid: Grid | None


class Format(Protocol):
    """A pure mapping between a model's parameters and the tensors that stand in a file, one at a time."""

    def config(self, grids: Mapping[str, Grid], ignore: Sequence[str]) -> dict[str, Any]:
        """What goes into config.json for a model with ``grids``; ``ignore``: linear layers without one."""
        ...

    def encode(
        self, tensors: Iterable[tuple[str, Tensor]], grids: Mapping[str, Grid]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors to store, in order; each is made when asked for."""
        ...

    def decode(self, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]) -> Iterator[Decoded]:
        """The parameters again, equal to the bit to what was encoded."""
        ...


def encode_each(
    tensors: Iterable[tuple[str, Tensor]],
    grids: Mapping[str, G],
    encode_weight: Callable[[str, Tensor, G], Iterable[tuple[str, Tensor]]],
) -> Iterator[tuple[str, Tensor]]:
    """What ``encode_weight`` makes of each weight that has a grid, and every other tensor as it is.

    Args:
        tensors: (parameter name, tensor); read one at a time, none kept.
        grids: layer name -> grid, or whatever else says how to store its weight.
        encode_weight: (layer, weight, grid) -> the parts to store.

    Raises:
        FormatError: a layer of ``grids`` never came.
    """
    left = set(grids)
    for name, tensor in tensors:
        layer, _, part = name.rpartition(".")
        if part == "weight" and layer in grids:
            left.discard(layer)
            yield from encode_weight(layer, tensor, grids[layer])
        else:
            yield name, tensor
        del tensor  # before the next is made
    if left:
        cure = "Write grids for layers of this model only."
        raise FormatError(Fault("grids", "a weight for each grid", f"none for {sorted(left)[:10]}", cure))


class Checkpoint(Protocol):
    """What an export reads: a dense checkpoint between two stages."""

    directory: Path
    anatomy: Any  # its ``linears`` is a mapping with a key per linear layer

    def names(self) -> tuple[str, ...]:
        """Every stored parameter."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        ...

    def place(self, name: str) -> Stored:
        """Where it lies."""
        ...

    def grid(self, layer: str) -> Grid | None:
        """The grid that ``layer`` was quantised onto, if it was."""
        ...
