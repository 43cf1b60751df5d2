"""The contract of placements. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from compresskit.errors import Fault
from compresskit.options import Choice

if TYPE_CHECKING:
    from compresskit.modeling import ModelSource
    from compresskit.stage import Outlook
    from compresskit.training.job import Part
    from compresskit.training.lesson import Taught

STORED = "auto"
"""The type that the teacher's weights are stored in."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
        isolated: whether documents packed into one row must not see each other.
    """

    teacher: ModelSource
    vocabulary: int
    blocks: tuple[int, ...] = ()
    losses: tuple[Choice, ...] = ()
    temperature: float = 1.0
    trust_remote_code: bool = False
    isolated: bool = True


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


def dtype_faults(dtype: str, where: str) -> list[Fault]:
    """What is wrong with the name of a type to hold a teacher's weights in."""
    known = (STORED, *ITEM_BYTES)
    if dtype in known:
        return []
    return [Fault(f"{where}.dtype", f"one of {', '.join(known)}", repr(dtype), "Choose one of these.")]


def packed_faults(teacher: ModelSource, where: str, cure: str = "Use replicate.") -> list[Fault]:
    """Why a teacher whose weights are packed cannot be read one tensor at a time."""
    if not teacher.is_compressed:
        return []
    return [Fault(where, "a teacher whose weights are not packed", "a packed one", cure)]


def row_tokens(stage: Taught, model: Outlook) -> int:
    """Tokens of a row that ``stage`` trains on.

    Raises:
        InputError: neither it nor the model says how many.
    """
    from compresskit.modeling import context_length
    from compresskit.training.outlook import LONGEST_ROW

    return getattr(stage, "context_length", None) or min(context_length(model.config), LONGEST_ROW)


def processes_of(stage: Taught) -> int:
    """In how many processes ``stage`` will train."""
    from compresskit.training.setting import launched_processes

    return launched_processes() or int(getattr(stage, "processes", 1))


def weight_bytes(teacher: ModelSource, dtype: str = STORED) -> int:
    """Of all weights of a teacher held in ``dtype``."""
    item = ITEM_BYTES.get(dtype)
    return teacher.bytes if item is None else teacher.anatomy.num_parameters * item


def with_blocks(teaching: Teaching) -> dict[str, Any]:
    """The options that every provider with a live model has."""
    return {
        "directory": str(teaching.teacher.directory),
        "vocabulary": teaching.vocabulary,
        "trust_remote_code": teaching.trust_remote_code,
        "blocks": teaching.blocks,
    }


@runtime_checkable
class Preparatory(Protocol):
    """A placement whose provider works before training starts."""

    def before_bytes(self, stage: Taught, model: Outlook, teaching: Teaching) -> int:
        """What the process that works then holds at its peak, of the device it works on."""
        ...

    def notes(self, stage: Taught, model: Outlook, teaching: Teaching) -> tuple[str, ...]:
        """Sentences for a plan."""
        ...
