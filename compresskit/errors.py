"""Every error compresskit raises on purpose, and the exit code of each.

* CompressKitError
  - InputError           exit 2: what was asked for cannot be done; nothing was written
    - RecipeError          the recipe is malformed or contradicts itself
      - UnknownMethodError   a name is not in its registry
    - PlanError            the recipe does not fit the model, the data or the machine
    - ModelError           a model path is no model, or its files are damaged
    - DataError            a data file is missing, empty, malformed or lacks a column
    - PatternError         a sparsity pattern does not fit a tensor
    - SchemeError          a quantisation scheme does not fit a tensor
    - FormatError          an artifact cannot be encoded or decoded
    - OutputError          the output directory cannot be used
    - EngineError          a distributed strategy is not to be had here
  - RunError             exit 3: a run that began had to stop
    - StatisticError       a calibration statistic is missing, misshapen or not finite
    - NumericError         a loss or a weight became NaN or infinite
    - PromiseError         a stage broke what an earlier stage had won, or had no effect
    - CheckpointError      a checkpoint could not be written
    - WorkerError          a training process died
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, said in full.

    Attributes:
        where: the layer, file or recipe line, e.g. ``recipe.yaml:7 stages[0].pattern``.
        expected: what would have been right.
        got: what was found.
        cure: what to change, as an imperative sentence.
    """

    where: str
    expected: str
    got: str
    cure: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}. {self.cure}"


class CompressKitError(Exception):
    """Base class; the command line prints these without a traceback.

    Args:
        faults: what is wrong, all of it together; a plain string stands for itself.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, *faults: Fault | str) -> None:
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        if len(self.faults) == 1:
            return str(self.faults[0])
        return "\n".join(f"{i}. {fault}" for i, fault in enumerate(self.faults, 1))


class InputError(CompressKitError, ValueError):
    """What was asked for cannot be done; nothing was written."""


class RecipeError(InputError):
    """The recipe is malformed or contradicts itself."""


class UnknownMethodError(RecipeError, KeyError):
    """A name is not in its registry."""

    __str__ = CompressKitError.__str__


class PlanError(InputError):
    """The recipe does not fit the model, the data or the machine."""


class ModelError(InputError):
    """A model path is no model, or its files are damaged."""


class DataError(InputError):
    """A data file is missing, empty, malformed or lacks a column."""


class PatternError(InputError):
    """A sparsity pattern does not fit a tensor."""


class SchemeError(InputError):
    """A quantisation scheme does not fit a tensor."""


class FormatError(InputError):
    """An artifact cannot be encoded or decoded."""


class OutputError(InputError):
    """The output directory cannot be used."""


class EngineError(InputError):
    """A distributed strategy is not to be had here."""


class RunError(CompressKitError, RuntimeError):
    """A run that began had to stop."""

    exit_code: ClassVar[int] = 3


class StatisticError(RunError):
    """A calibration statistic is missing, misshapen or not finite."""


class NumericError(RunError):
    """A loss or a weight became NaN or infinite."""


class PromiseError(RunError):
    """A stage broke what an earlier stage had won, or had no effect."""


class CheckpointError(RunError):
    """A checkpoint could not be written."""


class WorkerError(RunError):
    """A training process died."""
