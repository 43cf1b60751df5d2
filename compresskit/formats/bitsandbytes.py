"""NF4 checkpoints of bitsandbytes, which transformers and peft load.

Format: https://github.com/bitsandbytes-foundation/bitsandbytes. Two indices into the code book in a byte, the
first in its high half; beside them the code book, one absmax per block of 64 inputs in float32, and shape and
dtype as JSON in a tensor of bytes. Double quantisation (the absmax themselves in 8 bits) is read, never
written: it would move every weight off its grid.

Paper: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, https://arxiv.org/abs/2305.14314.

Shapes: O = out_features, I = in_features, G = blocks along I, N = blocks of the weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from compresskit.errors import Fault, FormatError
from compresskit.formats.base import Decoded, encode_each
from compresskit.formats.grid import NF4, Grid

METHOD = "bitsandbytes"
BLOCK = 64
STATE = "quant_state.bitsandbytes__nf4"
NESTED = ("nested_absmax", "nested_quant_map")


@dataclass(frozen=True, slots=True)
class Bitsandbytes:
    """The format; see the module."""

    def config(self, grids: Mapping[str, Grid], ignore: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of config.json.

        Args:
            grids: layer name -> grid.
            ignore: linear layers that have none.

        Returns:
            Plain data; weights are computed with in the dtype they had before.
        """
        dtypes = {str(grid.scale_OG.dtype).removeprefix("torch.") for grid in grids.values()}
        return {
            "quant_method": METHOD,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(ignore),
        }

    def encode(
        self, tensors: Iterable[tuple[str, Tensor]], grids: Mapping[str, Grid]
    ) -> Iterator[tuple[str, Tensor]]:
        """Pack the weights of the layers in ``grids``; everything else passes through.

        Args:
            tensors: (parameter name, tensor); read one at a time.
            grids: layer name -> NF4 grid of blocks of 64, on which the layer's weight has to lie.

        Returns:
            (key, tensor) pairs, in order.

        Raises:
            FormatError: a grid is of another kind, a weight does not lie on its grid, or a layer of ``grids``
                never came.
        """
        return encode_each(tensors, grids, _encode_weight)

    def decode(self, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]) -> Iterator[Decoded]:
        """The inverse of :meth:`encode`; reads what bitsandbytes itself writes, too.

        Args:
            tensors: (key, tensor) in any order; of a packed layer, the parts are held until all have come.
            config: the ``quantization_config``.

        Returns:
            Each parameter with its grid. An absmax that the weight's dtype does not hold makes no grid; the
            weight is given all the same.

        Raises:
            FormatError: the configuration is of another kind, or parts of a layer are missing.
        """
        _require_nf4(config)
        held: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors:
            layer, inside, part = key.partition(".weight.")
            if not inside and (not key.endswith(".weight") or tensor.dtype != torch.uint8):
                yield Decoded(key, tensor, None)
                continue
            layer = layer if inside else key.removesuffix(".weight")
            parts = held.setdefault(layer, {})
            parts[part or "weight"] = tensor
            if not _absent(parts):
                yield _decode_weight(layer, held.pop(layer))
        for layer, parts in sorted(held.items()):
            cure = "Write the checkpoint again; it is incomplete."
            raise FormatError(
                Fault(layer, "every part of a packed weight", f"no {', '.join(_absent(parts))}", cure)
            )


def _encode_weight(layer: str, weight_OI: Tensor, grid: Grid) -> Iterator[tuple[str, Tensor]]:
    if grid.number != "nf4" or grid.group_size != BLOCK:
        got = f"{grid.number} in groups of {grid.group_size}"
        raise FormatError(Fault(layer, f"nf4 in groups of {BLOCK}", got, "Quantise it with --scheme nf4."))
    q_OI = grid.quantize(weight_OI)
    if weight_OI.dtype != grid.scale_OG.dtype or not torch.equal(grid.dequantize(q_OI), weight_OI):
        off = int((grid.snap(weight_OI) != weight_OI).sum())
        got = f"{off} of {weight_OI.numel()} weights off it, {weight_OI.dtype} on {grid.scale_OG.dtype}"
        cure = "Quantise the layer again after whatever changed it."
        raise FormatError(Fault(layer, "a weight that lies on its grid", got, cure))
    pairs = q_OI.reshape(-1, 2)
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(weight_OI.dtype).removeprefix("torch."),
        "shape": list(weight_OI.shape),
    }
    text = json.dumps(state).encode()
    yield f"{layer}.weight", ((pairs[:, 0] << 4) | pairs[:, 1]).reshape(-1, 1)
    yield f"{layer}.weight.absmax", grid.scale_OG.float().flatten()
    yield f"{layer}.weight.quant_map", torch.tensor(NF4, dtype=torch.float32)
    yield f"{layer}.weight.{STATE}", torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _decode_weight(layer: str, parts: Mapping[str, Tensor]) -> Decoded:
    state = _state(parts)
    rows, inputs = state["shape"]
    dtype = getattr(torch, state["dtype"])
    code = parts["quant_map"].float()
    packed = parts["weight"].flatten()
    q_OI = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[: prod(state["shape"])]
    absmax_N = _absmax(parts, state)
    scale_N = absmax_N.to(dtype)
    is_ours = code.equal(torch.tensor(NF4)) and state["blocksize"] == BLOCK and inputs % BLOCK == 0
    if is_ours and scale_N.float().equal(absmax_N):
        grid = Grid(4, scale_N.reshape(rows, -1), BLOCK, number="nf4")
        return Decoded(f"{layer}.weight", grid.dequantize(q_OI.reshape(rows, inputs)), grid)
    spread = absmax_N.repeat_interleave(state["blocksize"])[: q_OI.numel()]
    return Decoded(f"{layer}.weight", (code[q_OI.int()] * spread).to(dtype).reshape(rows, inputs), None)


def _absmax(parts: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    """The float32 absmax of each block, double quantisation undone."""
    if "nested_absmax" not in parts:
        return parts["absmax"].float()
    values_N = parts["nested_quant_map"].float()[parts["absmax"].int()]
    spread_N = parts["nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))
    return values_N * spread_N[: values_N.numel()] + float(state["nested_offset"])


def _state(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(parts[STATE].tolist()))
    return found


def _absent(parts: Mapping[str, Tensor]) -> list[str]:
    """The parts of a layer still to come."""
    wanted = ["weight", "absmax", "quant_map", STATE]
    if STATE in parts and "nested_offset" in _state(parts):
        wanted += NESTED
    return [part for part in wanted if part not in parts]


def _require_nf4(config: Mapping[str, Any]) -> None:
    kind = config.get("bnb_4bit_quant_type") if config.get("load_in_4bit") else "8-bit"
    if config.get("quant_method") != METHOD or kind != "nf4":
        got = f"{config.get('quant_method')!r}, {kind}"
        cure = "Start from the model before it was compressed."
        raise FormatError(Fault("config.json: quantization_config", f"{METHOD}, nf4", got, cure))
