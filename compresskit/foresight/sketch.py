"""A model of which there need be no weights: a config.json tells all that a forecast asks."""

from __future__ import annotations

from pathlib import Path

import torch

from compresskit.modeling import ModelSource, open_model
from compresskit.modeling.anatomy import anatomy_of
from compresskit.modeling.fetch import is_config
from compresskit.modeling.skeleton import CONFIG, load_config, skeleton_of


class Sketch(ModelSource):
    """What a configuration tells; there is nothing to read.

    Args:
        path: of a config.json, or of its directory.
        trust_remote_code: whether code beside it may run.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self.directory = (path.parent if path.is_file() else path).absolute()
        self.trust_remote_code = trust_remote_code
        self.config = load_config(path, trust_remote_code=trust_remote_code)
        self.is_compressed = getattr(self.config, "quantization_config", None) is not None
        self.anatomy = anatomy_of(
            skeleton_of(self.config, self.directory, trust_remote_code=trust_remote_code)
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return self.anatomy.parameter_shapes[name]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The configuration's, else float32."""
        stated = getattr(self.config, "dtype", None)
        stated = getattr(torch, stated) if isinstance(stated, str) else stated
        return stated or torch.float32

    @property
    def bytes(self) -> int:
        """Of all parameters in that type."""
        return self.anatomy.num_parameters * self.compute_dtype.itemsize


def sketched(
    spec: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> ModelSource:
    """The model of ``spec``: opened where there are weights, else sketched from its configuration.

    Args:
        spec: a checkpoint's directory, one with a config.json alone, a config.json, or a hub id.
        revision: on the hub.
        trust_remote_code: whether code beside it may run.

    Raises:
        ModelError: there is no such model, or its configuration cannot be read.
    """
    path = Path(spec).expanduser()
    bare = path.is_dir() and (path / CONFIG).is_file() and not any(path.glob("*.safetensors"))
    if is_config(path) or bare:
        return Sketch(path, trust_remote_code=trust_remote_code)
    return open_model(spec, revision=revision, trust_remote_code=trust_remote_code)
