"""What holds of every checkpoint: its tensors have the shapes of its config, its tied weights are tied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from compresskit.modeling.anatomy import Anatomy
from compresskit.modeling.source import ModelSource

if TYPE_CHECKING:
    from torch import Tensor


class Weights(Protocol):
    """The part of ``compresskit.stage.Weights`` that is needed here."""

    def __contains__(self, name: object) -> bool: ...

    def tensor(self, name: str) -> Tensor:
        """The parameter called ``name``."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """The parameter ``layer`` is there and has ``shape``."""

    kind: ClassVar[str] = "shape"

    layer: str
    shape: tuple[int, ...]

    def broken(self, made: Weights, now: Weights) -> tuple[str, ...]:
        """Say how the shape differs; reads the header alone where ``now`` is a checkpoint.

        Args:
            made: not needed.
            now: the checkpoint to check.

        Returns:
            At most one sentence.
        """
        if self.layer not in now:
            return (f"missing, was {self.shape}",)
        shape = now.shape(self.layer) if isinstance(now, ModelSource) else tuple(now.tensor(self.layer).shape)
        return () if shape == tuple(self.shape) else (f"shape {shape}, was {tuple(self.shape)}",)


@dataclass(frozen=True, slots=True)
class Tied:
    """The parameters ``names`` are one parameter; ``layer`` is the first of them."""

    kind: ClassVar[str] = "tied"

    layer: str
    names: tuple[str, ...]

    def broken(self, made: Weights, now: Weights) -> tuple[str, ...]:
        """Say which names are no longer tied to the first.

        Args:
            made: not needed.
            now: the checkpoint to check. In a ModelSource they must be tied by its config; elsewhere equal.

        Returns:
            At most one sentence for each name.
        """
        absent = tuple(f"{name} is missing" for name in self.names if name not in now)
        if absent:
            return absent[:10]
        others = [name for name in self.names if name != self.layer]
        if isinstance(now, ModelSource):
            groups = [set(group) for group in now.anatomy.tied]
            loose = [n for n in others if not any({n, self.layer} <= group for group in groups)]
        else:
            first = now.tensor(self.layer)
            loose = [n for n in others if not torch.equal(first, now.tensor(n))]
        return tuple(f"{name} is no longer tied to {self.layer}" for name in loose[:10])


def standing_promises(anatomy: Anatomy) -> tuple[Shape | Tied, ...]:
    """What every later checkpoint of the same architecture must keep.

    Args:
        anatomy: of a checkpoint, or of one that a plan foretells.

    Returns:
        A Shape for each parameter of the config's skeleton, tied ones included, and a Tied for each group.
    """
    shapes = tuple(Shape(name, shape) for name, shape in anatomy.parameter_shapes.items())
    return shapes + tuple(Tied(group[0], group) for group in anatomy.tied)
