"""The contract of a quantizer. O = out_features, I = in_features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from compresskit.calibration.statistics import LayerStats
from compresskit.formats.grid import Grid
from compresskit.quant.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight (O, I) that lies on ``grid`` to the bit, in the dtype it had.

    ``note`` is anything a reader of the report should know, such as a damping that had to be raised.
    """

    weight_OI: Tensor
    grid: Grid
    note: str = ""


class Quantizer(Protocol):
    """A frozen dataclass whose fields are the hyperparameters and whose quantize() is pure."""

    needs: ClassVar[frozenset[str]]

    def quantize(self, weight_OI: Tensor, scheme: Scheme, stats: LayerStats) -> Quantized:
        """Return ``weight_OI`` on a grid; never modify it, and leave every zero of it exactly zero."""
        ...
