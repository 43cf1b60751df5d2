"""A checkpoint of torchao's tensor classes, which transformers loads where torchao is installed.

Format: https://github.com/pytorch/ao, ``torchao.prototype.safetensors``: each tensor's parts under
``LAYER._weight_PART``, their class and its fields as JSON in the file's metadata. Eight bits are an
``Int8Tensor`` (its inputs, if need be, rounded per token), four an ``IntxUnpackedToInt8Tensor``, the
one class of torchao that holds groups and zero points on any device; it takes a byte a weight.

Shapes: O = out_features, I = in_features, G = groups along I.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compresskit.errors import Fault
from compresskit.exports.base import Prospect, layer_faults, package_faults, prospect_of, unquantised_fault
from compresskit.exports.plain import tensors_of
from compresskit.formats.checkpoint import set_quantization, write_shards
from compresskit.formats.grid import Grid
from compresskit.modeling import ModelSource, copy_sidecars
from compresskit.quant.scheme import Scheme

UNPACKED = "torchao keeps the 4-bit integers of {} layers in a byte each: no smaller on disk than 8 bits."


@dataclass(frozen=True, slots=True)
class Torchao:
    """Loads with plain ``from_pretrained`` as torchao tensors."""

    least_bytes: ClassVar[int] = 0
    runtimes: ClassVar[tuple[str, ...]] = ("transformers",)

    def faults(self, model: Prospect, where: str) -> list[Fault]:
        """No layer is quantised, a scheme that no tensor class holds, or no torchao."""
        found = unquantised_fault(model, where, "w8a8") + layer_faults(model, where, _judge)
        return found + package_faults(["torchao"], "torchao", where)

    def write(self, model: ModelSource, out: Path) -> tuple[str, ...]:
        """Write weights, a tensor at a time, and everything beside them."""
        schemes = prospect_of(model).schemes
        metadata = {name: json.dumps({"_type": "Tensor"}) for name in model.names()}
        metadata["tensor_names"] = json.dumps(list(metadata))
        for layer in schemes:
            metadata[f"{layer}.weight"] = _fields(model, layer)
        write_shards(out, _encoded(model, schemes), metadata=metadata)
        copy_sidecars(model.directory, out)
        set_quantization(out, _config(model, schemes))
        unpacked = sum(scheme.weight_bits == 4 for scheme in schemes.values())
        return (UNPACKED.format(unpacked),) if unpacked else ()


def _encoded(model: ModelSource, schemes: Mapping[str, Scheme]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors_of(model, "packing"):
        layer, _, part = name.rpartition(".")
        grid = model.grid(layer) if part == "weight" and layer in schemes else None
        if grid is None:
            yield name, tensor
            continue
        made = _tensor(grid.quantize(tensor), grid)
        for field in _parts(made):
            yield f"{layer}._weight_{field}", getattr(made, field)


def _tensor(q_OI: Tensor, grid: Grid) -> Any:
    """torchao's tensor of the integers ``q_OI``, which may be on the meta device."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, MappingType, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    scale_OG = grid.scale_OG
    zero_OG = (
        torch.zeros_like(scale_OG, dtype=torch.int8) if grid.zero_point_OG is None else grid.zero_point_OG
    )
    block = [1, grid.group_size or q_OI.shape[1]]
    if grid.bits != 8:
        return IntxUnpackedToInt8Tensor(
            q_OI, scale_OG, zero_OG, getattr(torch, f"int{grid.bits}"), tuple(block), scale_OG.dtype, None
        )
    inputs = None
    if grid.activation_bits is not None:
        inputs = QuantizeTensorToInt8Kwargs(PerRow(), MappingType.SYMMETRIC)
    return Int8Tensor(q_OI, scale_OG, block, scale_OG.dtype, zero_point=zero_OG, act_quant_kwargs=inputs)


def _parts(made: Any) -> list[str]:
    names = [*made.tensor_data_names, *getattr(made, "optional_tensor_data_names", ())]
    return [name for name in names if getattr(made, name) is not None]


def _fields(model: ModelSource, layer: str) -> str:
    """The class of a layer's tensor and its fields, as torchao reads them; of shapes alone."""
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

    grid, linear = model.grid(layer), model.anatomy.linears[layer]
    assert grid is not None  # the scheme was made of it
    q_OI = torch.empty((linear.out_features, linear.in_features), dtype=torch.int8)
    return json.dumps(_tensor(q_OI, grid), cls=TensorSubclassAttributeJSONEncoder)


def _config(model: ModelSource, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """What transformers needs to know before it reads the tensors: only that they are torchao's."""
    from torchao.core.config import config_to_dict
    from torchao.quantization import Int8WeightOnlyConfig

    return {
        "quant_method": "torchao",
        "quant_type": {"default": config_to_dict(Int8WeightOnlyConfig())},
        "modules_to_not_convert": sorted(set(model.anatomy.linears) - set(schemes)),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def _judge(scheme: Scheme, in_features: int) -> tuple[str, str] | None:
    """What the tensor classes hold; see ``layer_faults``."""
    cure = "Quantise to w8a8, w8a16 or a w4a16 scheme, or export to compressed-tensors."
    if scheme.number != "int":
        return "integers", cure
    if scheme.weight_bits == 4 and scheme.activation_bits is not None:
        return "weights of 4 bits with inputs that are not rounded", cure
    if scheme.static:  # torchao could, but transformers reads no such scale
        return "inputs rounded per token", cure
    return None
