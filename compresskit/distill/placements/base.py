"""The contract of placements. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from compresskit.errors import Fault
from compresskit.options import Choice

if TYPE_CHECKING:
    from compresskit.modeling import ModelSource
    from compresskit.stage import Outlook
    from compresskit.training.job import Part
    from compresskit.training.lesson import Taught


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """What a student asks of its teacher.

    Attributes:
        teacher: opened, its weights unread.
        vocabulary: how many ids it shares with the student.
        blocks: whose output a feature loss compares, counted from 0.
        losses: names of ``compresskit.distill.LOSSES`` and their fields; none where only blocks are compared.
        temperature: divides both models' logits.
        trust_remote_code: whether code beside the teacher may run.
    """

    teacher: ModelSource
    vocabulary: int
    blocks: tuple[int, ...] = ()
    losses: tuple[Choice, ...] = ()
    temperature: float = 1.0
    trust_remote_code: bool = False


class Placement(Protocol):
    """A frozen dataclass whose fields are its options."""

    def faults(self, stage: Taught, model: Outlook, teaching: Teaching, where: str) -> list[Fault]:
        """Why such a teacher cannot be had in this way, for a student such as ``model``."""
        ...

    def held_bytes(self, stage: Taught, model: Outlook, teaching: Teaching) -> int:
        """What each process keeps in memory of the teacher."""
        ...

    def part(self, teaching: Teaching) -> Part:
        """The ``TeacherProvider`` of a training job."""
        ...


def with_blocks(teaching: Teaching) -> dict[str, Any]:
    """The options that every provider with a live model has."""
    return {
        "directory": str(teaching.teacher.directory),
        "vocabulary": teaching.vocabulary,
        "trust_remote_code": teaching.trust_remote_code,
        "blocks": teaching.blocks,
    }
