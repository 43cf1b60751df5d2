"""A replica of the whole teacher in every process: nothing to wait for, and the most memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskit.distill.placements.base import STORED, Teaching, dtype_faults, weight_bytes, with_blocks
from compresskit.errors import Fault

if TYPE_CHECKING:
    from compresskit.stage import Outlook
    from compresskit.training.job import Part
    from compresskit.training.lesson import Taught

REPLICA = "compresskit.distill.teacher:Replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicate:
    """Each process has all weights.

    Attributes:
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is the type they are stored in.
    """

    dtype: str = STORED

    def faults(self, stage: Taught, model: Outlook, teaching: Teaching, where: str) -> list[Fault]:
        """See ``Placement.faults``."""
        return dtype_faults(self.dtype, where)

    def held_bytes(self, stage: Taught, model: Outlook, teaching: Teaching) -> int:
        """See ``Placement.held_bytes``: all weights."""
        return weight_bytes(teaching.teacher, self.dtype)

    def part(self, teaching: Teaching) -> Part:
        """See ``Placement.part``."""
        from compresskit.training.job import Part

        return Part(REPLICA, with_blocks(teaching) | {"dtype": self.dtype})
