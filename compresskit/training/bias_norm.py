"""Retraining of biases and of the weights of norms alone; every other parameter stays what it is.

Nothing is added to the model: one without biases trains its norms.

Paper: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023,
https://arxiv.org/abs/2312.15230.
Shapes: a bias or norm as its module has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from compresskit.errors import Fault
from compresskit.modeling import ModelSource, load_model
from compresskit.modeling.anatomy import Anatomy
from compresskit.training.trainable import Share, TrainableFields
from compresskit.training.write import Changed, write_checkpoint

if TYPE_CHECKING:
    from compresskit.stage import Json, Outlook, StageContext


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasNorm:
    """See :class:`compresskit.training.trainable.Trainable`."""

    masks_gradients: ClassVar[bool] = False
    saves_frozen: ClassVar[bool] = False

    @staticmethod
    def reads(trainable: str) -> tuple[str, ...]:
        """There is nothing to choose."""
        return ()

    @staticmethod
    def faults(stage: TrainableFields, model: Outlook, where: str) -> list[Fault]:
        """What keeps such a ``model`` from being trained so."""
        if biases_and_norms(model.anatomy):
            return []
        got = f"none in {type(model.config).__name__}"
        return [
            Fault(f"{where}.trainable", "a model with biases or norm weights", got, "Set trainable to lora.")
        ]

    @staticmethod
    def share(stage: TrainableFields, anatomy: Anatomy, config: Any, weight_bytes: float) -> Share:
        """What of such a model is trained."""
        names = biases_and_norms(anatomy)
        trained = sum(prod(anatomy.parameter_shapes[name]) for name in names)
        layers = sum(f"{name}.bias" in names for name in anatomy.linears)
        return Share(trained=trained, layers=layers, frozen_bytes=4 * (anatomy.num_parameters - trained))

    @staticmethod
    def options(stage: TrainableFields, model: ModelSource, context: StageContext) -> dict[str, Json]:
        """There is nothing to choose."""
        return {}

    def load(self, source: ModelSource) -> nn.Module:
        """The model, in which only biases and norms take a gradient.

        Args:
            source: a dense checkpoint.

        Returns:
            The module on the CPU.
        """
        model: nn.Module = load_model(source, dtype="auto", device="cpu")
        few = set(biases_and_norms(source.anatomy))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in few)
        return model

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a complete dense checkpoint, all but the trained ``tensors`` to the bit as it was."""
        make = {name: lambda name=name: tensors[name] for name in biases_and_norms(source.anatomy)}
        write_checkpoint(source, out, Changed(source, make))


def biases_and_norms(anatomy: Anatomy) -> tuple[str, ...]:
    """The parameters that are biases or weights of norms, in the model's order; tied ones once."""
    again = {name for group in anatomy.tied for name in group[1:]}
    shapes = anatomy.parameter_shapes.items()
    return tuple(name for name, shape in shapes if name not in again and _is_bias_or_norm(name, shape))


def _is_bias_or_norm(name: str, shape: tuple[int, ...]) -> bool:
    """By its name, or as a vector called weight, which no layer has that mixes its inputs."""
    module, _, leaf = name.rpartition(".")
    if leaf == "bias" or leaf.endswith("_bias"):
        return True
    # A norm of each head has a weight for each head.
    return leaf == "weight" and (len(shape) == 1 or "norm" in module.rpartition(".")[2].lower())
