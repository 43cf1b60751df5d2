"""Which block of a student learns from which block of its teacher, and the fields every feature loss has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from compresskit.errors import Fault
from compresskit.options import Within

Pairs = tuple[tuple[int, int], ...]
"""A block of the student and the one of its teacher, both counted from 0."""
Layers = str | Pairs
"""``uniform``, ``last_k`` for a number k, or pairs."""

UNIFORM = "uniform"
LAST = re.compile(r"last_(\d+)")
EXPECTED = "uniform, last_1 or a higher number, or pairs of blocks such as {0: 1, 3: 7}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFields:
    """How much a feature loss counts and which blocks it compares; inherited by each of them.

    Attributes:
        weight: what it is multiplied by before it is added to the other losses.
        layers: ``uniform`` spreads the student's blocks evenly over the teacher's, the last upon the last;
            ``last_k``, such as ``last_2``, compares the last k of each; or pairs, student's block to
            teacher's, counted from 0: ``{0: 1, 3: 7}``.
    """

    takes: ClassVar[str] = "output"
    """What of a block is compared: its output, or what its ``attention`` is given."""

    weight: Annotated[float, Within(0, above=True)] = 1.0
    layers: Layers = UNIFORM


def paired(layers: Layers, student: int, teacher: int) -> Pairs:
    """The pairs that ``layers`` means, which has no faults, for so many blocks of each."""
    if not isinstance(layers, str):
        return layers
    if last := LAST.fullmatch(layers):
        return tuple((student - k, teacher - k) for k in range(int(last[1]), 0, -1))
    # The end of a student's block is as far through the model as that of its teacher's, halves rounded up.
    ends = ((2 * (i + 1) * teacher + student) // (2 * student) for i in range(student))
    return tuple((i, max(end - 1, 0)) for i, end in enumerate(ends))


def mapping_faults(layers: Any, student: int, teacher: int, where: str) -> list[Fault]:
    """What is wrong with ``layers``, as a recipe wrote it, for so many blocks of each."""
    if isinstance(layers, str):
        last = LAST.fullmatch(layers)
        if layers != UNIFORM and last is None:
            return [Fault(where, EXPECTED, repr(layers), "Choose one of these.")]
        fewest = min(student, teacher)
        if last and not 1 <= int(last[1]) <= fewest:
            expected = f"a number from 1 to {fewest}: the student has {student} blocks, the teacher {teacher}"
            return [Fault(where, expected, layers, f"Choose last_{fewest} or fewer, or pairs.")]
        return []
    if not (isinstance(layers, tuple) and layers and all(map(_is_pair, layers))):
        return [Fault(where, EXPECTED, repr(layers), "Choose one of these.")]
    faults = []
    for place, (side, count) in enumerate((("student", student), ("teacher", teacher))):
        outside = sorted({pair[place] for pair in layers if not 0 <= pair[place] < count})
        if outside:
            expected = f"blocks of the {side} from 0 to {count - 1}"
            got = ", ".join(map(str, outside))
            faults.append(Fault(where, expected, got, f"The {side} has {count} blocks: mend the pairs."))
    return faults


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and all(type(block) is int for block in pair)
