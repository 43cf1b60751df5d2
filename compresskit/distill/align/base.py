"""The contract of alignments.

Shapes: B = rows, T = the student's tokens of a row, U = the teacher's, M = matches, S = ids that spell the
same in both vocabularies, R = ids of the teacher's that spell the same but for a space before it, V = the
teacher's vocabulary, W = the student's, 2 = without a space and with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from compresskit.training.objective import Hidden, Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """Where tokens of a batch end together with tokens of the teacher's spelling of the same documents.

    Attributes:
        ids_BT: the student's tokens.
        theirs_BU: the teacher's, a row of the student's in a row of its own.
        row_M: int64, of each match.
        ours_M: int64, the student's token that ends there.
        theirs_M: int64, the teacher's.
        space_M: int64, 1 where the student has read a space that the teacher has not, -1 the other way round.
        next_M: int64, the teacher's token that ends with the student's next one; -1 where there is none.
        next_space_M: int64, of that as ``space_M``.
        twins_S2: ids that spell the same, the student's and the teacher's, but for those of the teacher's
            with which it begins to spell longer tokens of the student's.
        spaced_R2: ids of which the teacher's spells a space more, before the same; but for those, too.
        opens_V: bool, of the teacher's ids: whether it begins with a space.
        open_2W: bool, of the student's ids: whether the teacher's spelling of it begins that of a longer one;
            read after the same text, and where the student has read a space more.
        students: ids of the student's vocabulary.
        teachers: of the teacher's.
    """

    ids_BT: Tensor
    theirs_BU: Tensor
    row_M: Tensor
    ours_M: Tensor
    theirs_M: Tensor
    space_M: Tensor
    next_M: Tensor
    next_space_M: Tensor
    twins_S2: Tensor
    spaced_R2: Tensor
    opens_V: Tensor
    open_2W: Tensor
    students: int
    teachers: int


class Alignment(Protocol):
    """A frozen dataclass whose fields are its options.

    Attributes:
        reads_twins: whether it looks at tables of tokens; elsewhere these are empty.
    """

    reads_twins: ClassVar[bool]

    def __call__(self, matched: Matched, teacher: Hidden, temperature: float) -> Signal:
        """What the teacher says of the student's tokens.

        Args:
            matched: where both end together.
            teacher: its hidden states (B, U, E) and its projection onto its own ids.
            temperature: divides its logits.

        Returns:
            A signal of shape (B, T); ``told_BT`` is where there is anything to compare.
        """
        ...
