"""A teacher divided among the processes: each keeps its share, and gathers a block while that computes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from compresskit.distill.placements.base import (
    STORED,
    Teaching,
    dtype_faults,
    packed_faults,
    processes_of,
    weight_bytes,
    with_blocks,
)
from compresskit.errors import Fault

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.stage import Outlook
    from compresskit.training.job import Part
    from compresskit.training.lesson import Taught

DIVIDED = "compresskit.distill.divided:Divided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Each process has an equal share of all weights, whatever the strategy does with the student's.

    Attributes:
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is the type they are stored in.
        offload: whether shares are kept on the CPU, so that a GPU has no more of the teacher than what
            computes (ZeRO-Inference, Aminabadi et al. 2022).
    """

    dtype: str = STORED
    offload: bool = False

    def faults(self, stage: Taught, model: Outlook, teaching: Teaching, where: str) -> list[Fault]:
        """See ``Placement.faults``."""
        faults = dtype_faults(self.dtype, where) + packed_faults(teaching.teacher, where)
        if processes_of(stage) < 2:
            cure = "Use replicate, 8bit or 4bit, or train in more processes."
            faults.append(Fault(where, "several processes to divide the teacher among", "one process", cure))
        return faults

    def held_bytes(self, stage: Taught, model: Outlook, teaching: Teaching) -> int:
        """See ``Placement.held_bytes``: its share, and of the rest what is gathered at a time.

        Of a GPU's memory no more than what is gathered, where shares are offloaded.
        """
        whole, anatomy = weight_bytes(teaching.teacher, self.dtype), teaching.teacher.anatomy
        count = max(processes_of(stage), 1)
        gathered = whole * _gathered(anatomy) / max(anatomy.num_parameters, 1)
        if self.offload and model.device == "cuda":
            return round(gathered)
        return min(whole, round(whole / count + gathered * (count - 1) / count))

    def part(self, teaching: Teaching) -> Part:
        """See ``Placement.part``."""
        from compresskit.training.job import Part

        kept = {"dtype": self.dtype, "isolated": teaching.isolated, "offload": self.offload}
        return Part(DIVIDED, with_blocks(teaching) | kept)


def _gathered(anatomy: Anatomy) -> int:
    """Parameters that are whole at the same time: what is outside the blocks, and one of these."""
    blocks: dict[str | None, int] = {}
    tied = {name for group in anatomy.tied for name in group[1:]}
    for name, shape in anatomy.parameter_shapes.items():
        if name not in tied:
            block = anatomy.block_of(name)
            blocks[block] = blocks.get(block, 0) + prod(shape)
    outside = blocks.pop(None, 0)
    return outside + max(blocks.values(), default=0)
