"""A teacher in fewer bits in every process: bitsandbytes' int8 or NF4 for the linear layers of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, ClassVar

from compresskit.distill.placements.base import Teaching, packed_faults, with_blocks
from compresskit.errors import Fault

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.stage import Outlook
    from compresskit.training.job import Part
    from compresskit.training.lesson import Taught

FEW_BITS = "compresskit.distill.few_bits:FewBits"
BLOCK, SCALES = 64, 256
"""Weights that share a scale in NF4, and scales, themselves in a byte, that share another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBit:
    """Linear layers of the blocks in int8, one scale a row; head, embeddings and norms as they are stored."""

    base: ClassVar[str] = "int8"

    def faults(self, stage: Taught, model: Outlook, teaching: Teaching, where: str) -> list[Fault]:
        """See ``Placement.faults``."""
        faults = packed_faults(teaching.teacher, where)
        if find_spec("bitsandbytes") is None:
            cure = "Install it with `pip install 'compresskit[qlora]'`, or use replicate."
            faults.append(Fault(where, "the package bitsandbytes", "an environment without it", cure))
        if not rounded_layers(teaching.teacher.anatomy):
            got = type(teaching.teacher.config).__name__
            faults.append(Fault(where, "a teacher with linear layers in its blocks", got, "Use replicate."))
        return faults

    def held_bytes(self, stage: Taught, model: Outlook, teaching: Teaching) -> int:
        """See ``Placement.held_bytes``."""
        source = teaching.teacher
        layers = rounded_layers(source.anatomy)
        weights = [source.anatomy.linears[name] for name in layers]
        rounded = sum(self.layer_bytes(n.out_features, n.in_features) for n in weights)
        gone = sum(prod((n.out_features, n.in_features)) for n in weights)
        return rounded + (source.anatomy.num_parameters - gone) * source.compute_dtype.itemsize

    def layer_bytes(self, rows: int, inputs: int) -> int:
        """Of the weight of one layer, scales included."""
        return rows * inputs + 4 * rows

    def part(self, teaching: Teaching) -> Part:
        """See ``Placement.part``."""
        from compresskit.training.job import Part

        layers = rounded_layers(teaching.teacher.anatomy)
        return Part(FEW_BITS, with_blocks(teaching) | {"base": self.base, "layers": layers})


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBit(EightBit):
    """Linear layers of the blocks in NF4; head, embeddings and norms as they are stored."""

    base: ClassVar[str] = "nf4"

    def layer_bytes(self, rows: int, inputs: int) -> int:
        """Of the weight of one layer, scales included."""
        scales = -(-rows * inputs // BLOCK)
        return -(-rows * inputs // 2) + scales + 4 * -(-scales // SCALES)


def rounded_layers(anatomy: Anatomy) -> tuple[str, ...]:
    """The layers that are kept in few bits: those in the blocks that compute as linear layers do."""
    return tuple(
        name
        for name, linear in anatomy.linears.items()
        if linear.block and not linear.tied and (linear.is_plain or linear.transposed)
    )
