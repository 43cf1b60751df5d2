"""What a checkpoint weighs on disk, by kind of file, and how many of its weights are zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compresskit.artifact import MANIFEST, RECIPE, RECORDS, STAGES
from compresskit.errors import Fault, ModelError
from compresskit.formats.grid import GRIDS_FILE
from compresskit.measure.load import empty_model, load_model
from compresskit.modeling.sparse_linear import SparseLinear

Json = Any

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
TOKENIZER_PREFIXES = (
    "tokenizer",
    "special_tokens",
    "vocab",
    "merges",
    "added_tokens",
    "chat_template",
    "spm",
)
# What compresskit puts beside a model for people and for its own next stage; loading needs none of it.
NOT_THE_MODEL = (MANIFEST, RECIPE, RECORDS, STAGES, GRIDS_FILE, "stage.json")


def file_bytes(directory: Path) -> dict[str, int]:
    """Bytes on disk of a Hugging Face directory by kind of file.

    Args:
        directory: of the checkpoint; what compresskit adds for people (manifest, records, kept stages) is
            counted apart.

    Returns:
        ``weights_bytes``, ``tokenizer_bytes``, ``config_bytes`` (all else the model needs), ``total_bytes``
        (their sum) and ``manifest_bytes`` (not part of the sum).

    Raises:
        ModelError: there is no file of weights.
    """
    kinds = {"weights_bytes": 0, "tokenizer_bytes": 0, "config_bytes": 0, "manifest_bytes": 0}
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        top = path.relative_to(directory).parts[0]
        if top in NOT_THE_MODEL:
            kind = "manifest_bytes"
        elif path.suffix in WEIGHT_SUFFIXES:
            kind = "weights_bytes"
        elif path.name.startswith(TOKENIZER_PREFIXES):
            kind = "tokenizer_bytes"
        else:
            kind = "config_bytes"
        kinds[kind] += path.stat().st_size
    if not kinds["weights_bytes"]:
        raise ModelError(
            Fault(str(directory), "a file of weights", "none", "Give the directory of a saved model.")
        )
    total = sum(kinds.values()) - kinds["manifest_bytes"]
    return {**kinds, "total_bytes": total}


def size(directory: Path, *, trust_remote_code: bool = False) -> dict[str, Json]:
    """Size and zeros of the checkpoint in ``directory``.

    Zeros are counted on the model as plain ``from_pretrained`` gives it, after one token has run through it:
    a packed weight is only then what the model computes with.

    Args:
        directory: of the checkpoint.
        trust_remote_code: whether code in the directory may run.

    Returns:
        :func:`file_bytes` and ``num_parameters`` (tied ones once, before packing), ``bytes_per_parameter``
        (of the weights), ``linear_weights`` and their ``zero_fraction`` (linear layers except the head).

    Raises:
        ModelError: no weights, or the model cannot be loaded.
    """
    files = file_bytes(directory)
    empty = empty_model(directory, trust_remote_code=trust_remote_code)
    parameters = sum(p.numel() for p in empty.parameters())
    model = load_model(directory, trust_remote_code=trust_remote_code)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
    weights = zeros = 0
    for weight in linear_weights(model).values():
        weights += weight.numel()
        zeros += int((weight == 0).sum())
    return {
        **files,
        "num_parameters": parameters,
        "bytes_per_parameter": files["weights_bytes"] / parameters,
        "linear_weights": weights,
        "zero_fraction": zeros / weights if weights else 0.0,
    }


def linear_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weight of every linear layer of ``model`` but its output head, by name."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | SparseLinear) and module is not head
    }
