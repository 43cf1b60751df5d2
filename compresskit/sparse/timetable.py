"""When zeros change while a model trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from compresskit.options import Within


@dataclass(frozen=True, slots=True, kw_only=True)
class Timetable:
    """Every so many steps, until a share of all steps is done; what is left of them only trains.

    Attributes:
        update_every: steps between two changes.
        end: share of the steps after which zeros change no more.
    """

    update_every: Annotated[int, Within(1)] = 10
    end: Annotated[float, Within(0, 1, above=True)] = 0.75

    def last(self, steps: int) -> int:
        """The step of the last change, of ``steps``."""
        return max(1, round(self.end * steps))

    def due(self, step: int, steps: int) -> bool:
        """Whether zeros change after ``step`` of ``steps``; step 0 is before the first."""
        return step == self.last(steps) or (step < self.last(steps) and step % self.update_every == 0)
