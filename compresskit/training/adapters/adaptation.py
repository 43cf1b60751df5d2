"""What a stage trains in place of the plain model, and the three ways it becomes a checkpoint again.

Shapes: O = out_features, I = in_features, R = rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresskit.formats.checkpoint import ADAPTER as ADAPTER_DIRECTORY
from compresskit.formats.grid import GRIDS_FILE
from compresskit.modeling import ModelSource
from compresskit.modeling.skeleton import skeleton
from compresskit.progress import Progress
from compresskit.training.adapters.attach import attach, marked, write_adapter
from compresskit.training.adapters.bits import freeze, frozen_weight, rounded
from compresskit.training.adapters.frozen import frozen_linear, frozen_model
from compresskit.training.adapters.held import hold
from compresskit.training.adapters.loftq import Start, loftq
from compresskit.training.adapters.masked import ADAPTER
from compresskit.training.adapters.merge import merged
from compresskit.training.adapters.on_grid import GridLinear
from compresskit.training.adapters.outlook import as_stored_layers
from compresskit.training.adapters.prefix import add_prefix
from compresskit.training.setting import this_rank
from compresskit.training.trainable import LOW_RANK
from compresskit.training.write import Changed, as_stored, write_checkpoint

COMPUTES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A frozen model with adapters; keeps the module that it loaded, whose frozen weights a merge needs.

    Attributes:
        adapter: ``lora``, ``dora``, ``prefix`` or ``bottleneck``.
        rank: R; width of a bottleneck; virtual tokens of a prefix.
        alpha: LoRA's update is multiplied by alpha / R.
        dropout: of the adapter's input.
        base: ``nf4``, ``int8`` or ``none``: how ``targets`` are frozen.
        loftq_rounds: alternations of LoftQ; 0 starts from a zero update.
        finish: ``adapter``, ``merge`` or ``grid``.
        merge_into: ``trained``, the frozen weight as it was rounded, or ``original``.
        targets: names of linear layers: those that LoRA and DoRA update, or that are frozen in few bits.
        held: layers whose zeros stay.
        precision: of the matrix products: ``fp32``, ``bf16`` or ``fp16``.
        seed: of the adapter's first weights.
        sharded: the engine splits parameters among ranks; not with ``int8``.
    """

    masks_gradients: ClassVar[bool] = False
    saves_frozen: ClassVar[bool] = False

    adapter: str
    rank: int
    alpha: float
    dropout: float
    base: str = "none"
    loftq_rounds: int = 0
    finish: str
    merge_into: str = "original"
    targets: tuple[str, ...]
    held: tuple[str, ...]
    precision: str = "fp32"
    seed: int
    sharded: bool = False
    _loaded: list[nn.Module] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("targets", "held"):  # a job's options have been through JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def scaling(self) -> float:
        """What LoRA's update is multiplied by."""
        return self.alpha / self.rank

    def load(self, source: ModelSource) -> nn.Module:
        """The frozen model of ``source`` with its adapter, on the CPU.

        Args:
            source: a dense checkpoint; read one tensor at a time, so that it is never in memory whole.

        Returns:
            A causal language model of transformers.
        """
        starts: dict[str, Start] = {}
        layers = frozenset((*self.targets, *as_stored_layers(source.anatomy)))
        stream = StringIO() if this_rank() else None
        with Progress("Freezing weights", len(layers), unit="layers", stream=stream) as bar:

            def replace(layer: str, weight_OI: Tensor, bias_O: Tensor | None) -> nn.Module:
                bar.advance(note=layer)
                return self._frozen(source, layer, weight_OI, bias_O, starts)

            model = frozen_model(source, layers, replace)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            with marked(model, self.base):
                tuned = self._attached(model, source)
        if self.adapter == "prefix":
            add_prefix(tuned)
        for layer in self.targets if self.adapter in LOW_RANK else ():
            self._start(source, model.get_submodule(layer), layer, starts.pop(layer, None))
        self._loaded[:] = [model]
        return model

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a complete dense checkpoint.

        Args:
            source: the checkpoint training started from.
            out: an existing empty directory.
            tensors: the trained parameters of the module.
        """
        if self.finish == "adapter":
            write_checkpoint(source, out, Changed(source, {}))
            write_adapter(self._attached(skeleton(source), source), tensors, out / ADAPTER_DIRECTORY)
        else:
            make = {f"{n}.weight": partial(self._merged, source, n, tensors) for n in self.targets}
            write_checkpoint(source, out, Changed(source, make))
        if source.is_quantised:
            shutil.copyfile(source.directory / GRIDS_FILE, out / GRIDS_FILE)

    def _attached(self, model: nn.Module, source: ModelSource) -> Any:
        return attach(
            model,
            self.adapter,
            anatomy=source.anatomy,
            targets=self.targets,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
        )

    def _keep(self, source: ModelSource, layer: str) -> Tensor | None:
        """Which weights may move; None where all may, or where the adapter stays beside the model."""
        if layer not in self.held or self.finish == "adapter":
            return None
        return source.weight_OI(layer) != 0

    def _frozen(
        self,
        source: ModelSource,
        layer: str,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        starts: dict[str, Start],
    ) -> nn.Module:
        """The layer to put under an adapter; where LoftQ chooses its start, that is left in ``starts``."""
        if layer not in self.targets:
            return frozen_linear(weight_OI, bias_O)
        grid = source.grid(layer)
        if grid is not None:
            return GridLinear(weight_OI, bias_O, grid)
        if self.loftq_rounds:
            starts[layer] = loftq(
                weight_OI,
                partial(rounded, base=self.base),
                rank=self.rank,
                scaling=self.scaling,
                rounds=self.loftq_rounds,
                keep_OI=self._keep(source, layer),
            )
            weight_OI = starts[layer].rest_OI
        return freeze(weight_OI, bias_O, self.base, dtype=COMPUTES[self.precision], sharded=self.sharded)

    def _start(self, source: ModelSource, layer: nn.Module, name: str, start: Start | None) -> None:
        """Set the first weights of a LoRA layer, and let it keep what it must."""
        module: Any = layer
        keep_OI = self._keep(source, name)
        if start is not None:
            with torch.no_grad():
                module.lora_A[ADAPTER].weight.copy_(start.a_RI)
                module.lora_B[ADAPTER].weight.copy_(start.b_OR)
                if self.adapter == "dora":
                    whole_OI = merged(
                        frozen_weight(module.base_layer),
                        start.a_RI,
                        start.b_OR,
                        self.scaling,
                        keep_OI=keep_OI,
                    )
                    module.lora_magnitude_vector[ADAPTER].weight.copy_(torch.linalg.norm(whole_OI, dim=1))
        grid = source.grid(name) if self.finish == "grid" else None
        # peft's own DoRA divides the zero norm of a row of zeros by itself, takes other gradients than ours
        # does, and loses track of 4-bit weights that ZeRO-3 gathers.
        if keep_OI is not None or grid is not None or self.adapter == "dora":
            hold(layer, keep_OI=keep_OI, grid=grid)

    def _merged(self, source: ModelSource, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameter ``layer.weight`` of the next checkpoint, as it is stored."""
        grid = source.grid(layer)
        if grid is None and self.base != "none" and self.merge_into == "trained":
            weight_OI = self._trained_on(source, layer)
        else:
            weight_OI = source.weight_OI(layer).float()
        magnitude_O = tensors.get(f"{layer}.lora_magnitude_vector.{ADAPTER}.weight")
        new_OI = merged(
            weight_OI,
            tensors[f"{layer}.lora_A.{ADAPTER}.weight"].float(),
            tensors[f"{layer}.lora_B.{ADAPTER}.weight"].float(),
            self.scaling,
            keep_OI=self._keep(source, layer),
            magnitude_O=None if magnitude_O is None else magnitude_O.float(),
        )
        if grid is not None:
            new_OI = grid.snap(new_OI)
        return as_stored(source, layer, new_OI)

    def _trained_on(self, source: ModelSource, layer: str) -> Tensor:
        """The frozen weight (O, I) in float32: of the live model, for LoftQ would take long to find it again.

        Where no rank has all of it, it is made once more.
        """
        if not self.sharded:
            return frozen_weight(self._loaded[0].get_submodule(f"{layer}.base_layer")).cpu()
        made = self._frozen(source, layer, source.weight_OI(layer), None, {})
        return frozen_weight(made)
