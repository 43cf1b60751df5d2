"""What a stage trains in place of the plain model, and how that becomes a checkpoint again.

An adaptation is made by name in every training process (see ``compresskit.training.job``), so its fields are
plain data. Its module is loaded on the CPU before an engine wraps it; its state dict is gathered at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor, nn

from compresskit.modeling import ModelSource, load_model
from compresskit.training.write import write_checkpoint


class Adaptation(Protocol):
    """A frozen dataclass of plain data that changes what is trained.

    Attributes:
        masks_gradients: whether the weights of layers are trained under their own names, so that the
            gradients of held zeros are masked; else zeros are the adaptation's own affair. Either way they
            are checked in what it saves.
        saves_frozen: whether :meth:`save` is given parameters that take no gradient.
    """

    masks_gradients: ClassVar[bool]
    saves_frozen: ClassVar[bool]

    def load(self, source: ModelSource) -> nn.Module:
        """The module to train, on the CPU: a causal language model of transformers or a wrapper of one.

        Called once in each process, after every restart too: it depends on ``source`` alone.
        """
        ...

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a complete dense checkpoint, with ``grids.safetensors`` where weights lie on grids.

        Called on the very object whose :meth:`load` made the module, which may have kept what it froze.

        Args:
            source: the checkpoint training started from.
            out: an existing empty directory.
            tensors: the whole state dict of the module from :meth:`load`, each in the dtype it had there;
                without ``saves_frozen`` only what training may have changed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """The model as it is."""

    masks_gradients: ClassVar[bool] = True
    saves_frozen: ClassVar[bool] = True

    def load(self, source: ModelSource) -> nn.Module:
        """See :meth:`Adaptation.load`."""
        model: nn.Module = load_model(source, dtype="auto", device="cpu")
        return model

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`Adaptation.save`."""
        write_checkpoint(source, out, tensors)
