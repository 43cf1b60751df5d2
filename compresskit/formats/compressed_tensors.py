"""compressed-tensors checkpoints, which transformers and vLLM load.

Format: https://github.com/vllm-project/compressed-tensors. ``int-quantized`` (w8a8, w4a8) stores int8
weights, ``float-quantized`` (fp8) e4m3; ``pack-quantized`` (w8a16, w4a16) stores several integers in an
int32, the first in its lowest bits, shifted to be unsigned. All store ``weight_scale`` (O, G) beside, some
``weight_zero_point`` (packed along O) and ``input_scale``.

Shapes: O = out_features, I = in_features, G = groups along I, W = int32 words along I.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.errors import Fault, FormatError
from compresskit.formats.base import Decoded, encode_each
from compresskit.formats.grid import Grid

METHOD = "compressed-tensors"
INT, FLOAT, PACKED = "int-quantized", "float-quantized", "pack-quantized"
MIXED = "mixed-precision"
WORD_BITS = 32
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale")


class _Form(NamedTuple):
    """What the grids of one group of the configuration have in common."""

    bits: int
    number: str
    group_size: int | None
    symmetric: bool
    activation_bits: int | None
    static: bool


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """The format; see the module."""

    def config(self, grids: Mapping[str, Grid], ignore: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of config.json.

        Args:
            grids: layer name -> grid.
            ignore: linear layers that have none.

        Returns:
            Plain data. Where all grids have one form it targets the class ``Linear`` less ``ignore``, which
            is what most readers know best; else it lists the layers of each form.

        Raises:
            FormatError: a grid is of another format, or some grids have zero points and others have none:
                transformers can unpack zero points only while it loads, all layers in one way.
        """
        _require_holdable(grids)
        forms: dict[_Form, list[str]] = {}
        for layer, grid in grids.items():
            forms.setdefault(_form(grid), []).append(layer)
        groups = {}
        for index, (form, layers) in enumerate(sorted(forms.items(), key=repr)):
            targets = ["Linear"] if len(forms) == 1 else sorted(layers)
            groups[f"group_{index}"] = _group(form, targets)
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(ignore),
            # Left packed, transformers would expect zero points in another shape than the format stores.
            **({} if all(form.symmetric for form in forms) else {"dequantize": True}),
        }

    def encode(
        self, tensors: Iterable[tuple[str, Tensor]], grids: Mapping[str, Grid]
    ) -> Iterator[tuple[str, Tensor]]:
        """Pack the weights of the layers in ``grids``; everything else passes through.

        Args:
            tensors: (parameter name, tensor); read one at a time.
            grids: layer name -> grid, on which the layer's weight has to lie.

        Returns:
            (key, tensor) pairs, in order.

        Raises:
            FormatError: a weight does not lie on its grid, or a layer of ``grids`` never came.
        """
        return encode_each(tensors, grids, _encode_weight)

    def decode(self, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]) -> Iterator[Decoded]:
        """The inverse of :meth:`encode`.

        Args:
            tensors: (key, tensor) in any order; of a packed layer, the parts are held until all have come.
            config: the ``quantization_config`` that :meth:`config` made.

        Returns:
            Each parameter with its grid, if it has one.

        Raises:
            FormatError: the configuration is of another kind, or parts of a layer are missing.
        """
        groups = _groups(config)
        held: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors:
            layer, _, part = key.rpartition(".")
            if part not in PARTS or (part == "weight" and tensor.is_floating_point() and tensor.itemsize > 1):
                yield Decoded(key, tensor, None)
                continue
            parts = held.setdefault(layer, {})
            parts[part] = tensor
            args = _args_of(layer, groups)
            if not _absent(parts, args):
                grid, q_OI = _unpack_layer(held.pop(layer), args)
                yield Decoded(f"{layer}.weight", grid.dequantize(q_OI), grid)
        for layer, parts in sorted(held.items()):
            lost = ", ".join(_absent(parts, _args_of(layer, groups)))
            cure = "Write the checkpoint again; it is incomplete."
            raise FormatError(Fault(layer, "every part of a packed weight", f"no {lost}", cure))


def pack(q_OI: Tensor, bits: int) -> Tensor:
    """Pack signed integers of ``bits`` bits into int32 words along the last dimension.

    Args:
        q_OI: int8 (O, I), each in -2**(bits-1) ... 2**(bits-1)-1; ``bits`` divides 32.
        bits: 4 or 8.

    Returns:
        int32 (O, W), W = ceil(I * bits / 32); what is left of the last word is zero.
    """
    per_word = WORD_BITS // bits
    unsigned_OI = q_OI.to(torch.int32) + (1 << (bits - 1))
    padded_OI = pad(unsigned_OI, (0, -q_OI.shape[1] % per_word))
    fields_OWP = padded_OI.reshape(q_OI.shape[0], -1, per_word)
    shifts_P = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=q_OI.device)
    return (fields_OWP << shifts_P).sum(-1, dtype=torch.int32)


def unpack(packed_OW: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of :func:`pack`: int8 (O, ``inputs``)."""
    shifts_P = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=packed_OW.device)
    fields_OWP = (packed_OW.unsqueeze(-1) >> shifts_P) & ((1 << bits) - 1)
    return (fields_OWP.flatten(1)[:, :inputs] - (1 << (bits - 1))).to(torch.int8)


def _encode_weight(layer: str, weight_OI: Tensor, grid: Grid) -> Iterator[tuple[str, Tensor]]:
    q_OI = grid.quantize(weight_OI)
    if weight_OI.dtype != grid.scale_OG.dtype or not torch.equal(grid.dequantize(q_OI), weight_OI):
        off = int((grid.snap(weight_OI) != weight_OI).sum())
        got = f"{off} of {weight_OI.numel()} weights off it, {weight_OI.dtype} on {grid.scale_OG.dtype}"
        cure = "Quantise the layer again after whatever changed it."
        raise FormatError(Fault(layer, "a weight that lies on its grid", got, cure))
    is_packed = _format_of(_form(grid)) == PACKED
    if is_packed:
        yield f"{layer}.weight_packed", pack(q_OI, grid.bits)
    else:
        yield f"{layer}.weight", q_OI
    yield f"{layer}.weight_scale", grid.scale_OG
    if grid.zero_point_OG is not None:
        yield f"{layer}.weight_zero_point", pack(grid.zero_point_OG.t(), grid.bits).t()
    if grid.activation_scale is not None:
        yield f"{layer}.input_scale", grid.activation_scale
    if is_packed:
        yield f"{layer}.weight_shape", torch.tensor(weight_OI.shape)


def _unpack_layer(parts: Mapping[str, Tensor], args: Mapping[str, Any]) -> tuple[Grid, Tensor]:
    weights, inputs = args["weights"], args.get("input_activations")
    bits, scale_OG = weights["num_bits"], parts["weight_scale"]
    if "weight" in parts:
        q_OI = parts["weight"]
    else:
        q_OI = unpack(parts["weight_packed"], bits, int(parts["weight_shape"][1]))
    zero_OG = None
    if "weight_zero_point" in parts:
        zero_OG = unpack(parts["weight_zero_point"].t(), bits, len(scale_OG)).t().contiguous()
    grid = Grid(
        bits=bits,
        scale_OG=scale_OG,
        group_size=weights.get("group_size"),
        activation_bits=inputs["num_bits"] if inputs else None,
        number=weights["type"],
        zero_point_OG=zero_OG,
        activation_scale=parts.get("input_scale"),
    )
    return grid, q_OI


def _absent(parts: Mapping[str, Tensor], args: Mapping[str, Any]) -> list[str]:
    """The parts of a layer still to come."""
    wanted = ["weight_packed", "weight_shape"] if args["format"] == PACKED else ["weight"]
    wanted += [] if args["weights"]["symmetric"] else ["weight_zero_point"]
    inputs = args.get("input_activations")
    wanted += ["input_scale"] if inputs and not inputs["dynamic"] else []
    return [part for part in (*wanted, "weight_scale") if part not in parts]


def _form(grid: Grid) -> _Form:
    return _Form(
        grid.bits,
        grid.number,
        grid.group_size,
        grid.zero_point_OG is None,
        grid.activation_bits,
        grid.activation_scale is not None,
    )


def _format_of(form: _Form) -> str:
    if form.number == "float":
        return FLOAT
    return INT if form.activation_bits else PACKED


def _require_holdable(grids: Mapping[str, Grid]) -> None:
    if others := sorted(layer for layer, grid in grids.items() if grid.number not in ("int", "float")):
        got = f"{grids[others[0]].number} in {', '.join(others[:10])}"
        cure = "Quantise these layers with an integer scheme, or all of them with nf4."
        raise FormatError(Fault(METHOD, "integer or e4m3 grids", got, cure))
    kinds = {_form(grid) for grid in grids.values()}
    if any(not form.symmetric for form in kinds) and len(kinds) > 1:
        cure = "Quantise every layer with one scheme with zero points, or none."
        got = f"{len(kinds)} different schemes"
        raise FormatError(Fault(METHOD, "one scheme for all layers where any has zero points", got, cure))


def _group(form: _Form, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": form.bits,
        "type": form.number,
        "symmetric": form.symmetric,
        "strategy": "channel" if form.group_size is None else "group",
        "group_size": form.group_size,
        "dynamic": False,
    }
    inputs = {
        "num_bits": form.activation_bits,
        "type": form.number,
        "symmetric": True,
        "strategy": "tensor" if form.static else "token",
        "group_size": None,
        "dynamic": not form.static,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if form.activation_bits else None,
        "output_activations": None,
        "format": _format_of(form),
    }


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = list((config.get("config_groups") or {}).values())
    known = all(g.get("format") in (INT, FLOAT, PACKED) for g in groups)
    if config.get("quant_method") != METHOD or not groups or not known:
        got = f"{config.get('quant_method')!r}, format {config.get('format')!r}"
        cure = "Start from the model before it was compressed."
        raise FormatError(
            Fault("config.json: quantization_config", f"{METHOD}: {INT}, {FLOAT} or {PACKED}", got, cure)
        )
    return groups


def _args_of(layer: str, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    for group in groups:
        if "Linear" in group["targets"] or layer in group["targets"]:
            return group
    cure = "Write the checkpoint again; its configuration does not name this layer."
    raise FormatError(Fault(layer, "a group of quantization_config that targets it", "none", cure))
