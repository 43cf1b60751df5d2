"""The contract of importances: what is worth keeping, told before anything is cut.

Shapes: L = blocks, U = units of a width, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from compresskit.modeling.source import ModelSource
    from compresskit.sparse.structured.dimensions import Dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What an importance looks at.

    Attributes:
        model: a dense checkpoint.
        dimensions: the widths that are cut; None where none is.
        rows: calibration rows; None for an importance that reads none.
        spill: a file for hidden states, where they are too many for memory.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``: to compute in.
    """

    model: ModelSource
    dimensions: Dimensions | None
    rows: Any = None
    spill: Path | None = None
    device: str = "cpu"
    dtype: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What everything is worth; more is better. Only what one tensor holds compares. Float64, on the CPU.

    Attributes:
        blocks_L: of each block; None where the importance knows nothing of blocks: evenly spaced ones stay.
        units: by kind of width: (L, U) for units of each block, (D,) for hidden channels.
        num_tokens: calibration tokens read.
    """

    blocks_L: Tensor | None = None
    units: Mapping[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0


class Importance(Protocol):
    """A frozen dataclass whose one verb looks at a model and changes nothing."""

    reads_data: ClassVar[bool]
    """Whether it needs calibration rows."""
    reads_gradients: ClassVar[bool]
    """Whether it needs a model that predicts the next token, whole in memory, and its gradients."""

    def measure(self, subject: Subject) -> Scores:
        """The scores of every block and of every unit of the widths in ``subject``."""
        ...
