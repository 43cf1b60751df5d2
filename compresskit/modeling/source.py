"""A checkpoint on disk, read one tensor at a time.

Opening reads configuration and file headers, builds the skeleton on the meta device and compares the two, so
every structural fault of a checkpoint is found before any weight is read.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compresskit.errors import Fault, ModelError
from compresskit.formats.shards import Stored
from compresskit.modeling.anatomy import Anatomy, anatomy_of
from compresskit.modeling.checkpoint import Layout, find_tensors, lay_out, listed
from compresskit.modeling.fetch import build_anew, fetch, is_config
from compresskit.modeling.skeleton import CONFIG, load_config, skeleton_of
from compresskit.registry import nearest

if TYPE_CHECKING:
    from compresskit.formats.grid import Grid

GRIDS = "grids.safetensors"


class ModelSource:
    """A Hugging Face checkpoint directory.

    Args:
        directory: holds config.json and safetensors weights.
        trust_remote_code: whether code in it may run.

    Attributes:
        directory: absolute.
        config: the transformers configuration; do not change it.
        is_compressed: the weights are packed (the config has a ``quantization_config``). Such a source tells
            its anatomy and can be loaded whole, but its tensors bear the names of the packed format.

    Raises:
        ModelError: everything wrong with configuration and files.
    """

    def __init__(self, directory: str | Path, *, trust_remote_code: bool = False) -> None:
        self.directory = Path(directory).absolute()
        self.trust_remote_code = trust_remote_code
        _require_directory(self.directory)
        self.config: Any = load_config(self.directory, trust_remote_code=trust_remote_code)
        self.is_compressed = getattr(self.config, "quantization_config", None) is not None
        self._stored = find_tensors(self.directory)
        model = skeleton_of(self.config, self.directory, trust_remote_code=trust_remote_code)
        self.anatomy: Anatomy = anatomy_of(model)
        self._layout = (
            Layout(self._stored, {}, ())
            if self.is_compressed
            else lay_out(self._stored, model, self.directory)
        )

    def __repr__(self) -> str:
        return f"ModelSource({str(self.directory)!r})"

    def __contains__(self, name: object) -> bool:
        return name in self._layout.places or name in self._layout.aliases

    def names(self) -> tuple[str, ...]:
        """Names of all stored parameters, in the module's order; of tied parameters only the first."""
        return tuple(self._layout.places)

    def place(self, name: str) -> Stored:
        """Where ``name`` is stored; a tied parameter's other names lead to the same place.

        Raises:
            ModelError: no such parameter.
        """
        place = self._layout.places.get(self._layout.aliases.get(name, name))
        if place is None:
            near = nearest(name, self._layout.places)
            raise ModelError(
                Fault(str(self.directory), "a parameter's name", repr(name), f"Near names: {near}.")
            )
        return place

    def tensor(self, name: str) -> Tensor:
        """The parameter ``name`` as stored, on the CPU, in memory of its own.

        Raises:
            ModelError: no such parameter, its file is damaged, or it holds NaN or infinity.
        """
        place = self.place(name)
        tensor = place.read()
        if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
            bad = int((~tensor.isfinite()).sum())
            raise ModelError(
                Fault(
                    f"{place.path}: {place.key}",
                    "finite weights",
                    f"{bad} of {tensor.numel()} NaN or infinite",
                    "Fetch the checkpoint again; if it was trained so, go back to an earlier one.",
                )
            )
        return tensor

    def weight_OI(self, layer: str) -> Tensor:
        """The weight (O, I) of linear layer ``layer`` in its stored dtype, contiguous.

        Raises:
            ModelError: no such layer, or it cannot be read.
        """
        linear = self.anatomy.linears.get(layer)
        if linear is None:
            near = nearest(layer, self.anatomy.linears)
            raise ModelError(
                Fault(str(self.directory), "a linear layer", repr(layer), f"Near names: {near}.")
            )
        weight = self.tensor(f"{layer}.weight")
        return weight.t().contiguous() if linear.transposed else weight

    def grid(self, layer: str) -> Grid | None:
        """The grid that ``layer`` was quantised onto, if it was."""
        return self._grids.get(layer)

    @property
    def is_quantised(self) -> bool:
        """Whether any layer's weights lie on a grid."""
        return bool(self._grids)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape of ``name``."""
        return self.place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of ``name``."""
        return self.place(name).dtype

    @property
    def bytes(self) -> int:
        """Of all stored tensors."""
        return sum(place.num_bytes for place in self._stored.values())

    @property
    def compute_dtype(self) -> torch.dtype:
        """What ``from_pretrained`` would compute in: the configuration's dtype, else the first stored one."""
        stated = getattr(self.config, "dtype", None)
        if isinstance(stated, str):
            stated = getattr(torch, stated)
        if stated is not None:
            return stated  # type: ignore[no-any-return]
        places = self._layout.places.values()
        return next((p.dtype for p in places if p.dtype.is_floating_point), torch.float32)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know about the checkpoint, in full sentences."""
        if not self._layout.unused:
            return ()
        return (
            f"{self.directory.name} holds tensors that {self.config.architectures[0]} has no place for; "
            f"they are left out: {listed(self._layout.unused)}.",
        )

    @cached_property
    def _grids(self) -> Mapping[str, Grid]:
        if not (self.directory / GRIDS).is_file():
            return {}
        # Here, since formats stand beside modeling and only a model that has grids needs them.
        from compresskit.formats.grid import read_grids

        return read_grids(self.directory)


def open_model(
    spec: str | Path | ModelSource,
    *,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    build_dir: Path | None = None,
    seed: int = 0,
) -> ModelSource:
    """Open a model: a directory, a hub id, or a config.json to build a new model from.

    Args:
        spec: a checkpoint directory; else the path of a config.json, whose model is initialised at random;
            else a name on the Hugging Face hub, of which only safetensors weights are downloaded.
        tokenizer: directory or hub id whose tokenizer files a new model gets.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether code that comes with the model may run.
        build_dir: where new models are kept, each in a directory of its own.
        seed: of a new model's weights.

    Returns:
        The source; its structure has been checked.

    Raises:
        ModelError: no such model, or its files are damaged; every fault found is named.
    """
    if isinstance(spec, ModelSource):
        return spec
    path = Path(spec).expanduser()
    if is_config(path):
        directory = build_anew(
            path, tokenizer=tokenizer, out=build_dir, seed=seed, trust_remote_code=trust_remote_code
        )
    else:
        directory = path if path.exists() else fetch(str(spec), revision=revision)
    return ModelSource(directory, trust_remote_code=trust_remote_code)


def _require_directory(directory: Path) -> None:
    if not directory.exists():
        raise ModelError(
            Fault(str(directory), "a model directory", "nothing there", "Check the path, or give a hub id.")
        )
    if not directory.is_dir():
        raise ModelError(
            Fault(
                str(directory),
                "a model directory or a config.json",
                "a file",
                "Give the directory that holds config.json and the weights.",
            )
        )
    if not (directory / CONFIG).is_file():
        got = "an empty directory" if not any(directory.iterdir()) else "none"
        cure = "Give the directory of a Hugging Face model, or copy the model's config.json there."
        raise ModelError(Fault(str(directory), CONFIG, got, cure))


def is_finite(tensor: Tensor) -> bool:
    """No NaN or infinity in ``tensor``, found without a mask: NaN survives minimum and maximum."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())
