"""The grid a quantised weight lies on, and the file that carries grids between stages.

Shapes: O = out_features, I = in_features, G = groups along I (1 when a row has one scale).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from compresskit.errors import Fault, FormatError
from compresskit.formats.files import save_tensors

GRIDS_FILE = "grids.safetensors"
PLAIN = ("bits", "number", "group_size", "activation_bits")
TENSORS = {"scale": "scale_OG", "zero_point": "zero_point_OG", "activation_scale": "activation_scale"}
FLOAT8_MAX = 448.0  # of e4m3
# The quantiles of Dettmers et al., "QLoRA", 2023, https://arxiv.org/abs/2305.14314, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The values a weight may take, each rounded once into the scale's dtype; zero is always one of them.

    An ``int`` grid has ``(q - zero) * scale``, a ``float`` one ``q * scale`` for every q of e4m3: to the bit
    what compressed-tensors computes when it unpacks a checkpoint. An ``nf4`` grid has ``NF4[q] * scale``,
    computed in float32, as bitsandbytes does.

    Attributes:
        bits: of q; an integer lies in -2**(bits-1) ... 2**(bits-1)-1.
        scale_OG: positive, in the weight's own dtype.
        group_size: inputs that share a scale; None: all of a row.
        activation_bits: of the layer's input, rounded while the model runs; None leaves it alone.
        number: ``int``, ``float`` or ``nf4``.
        zero_point_OG: int8, the q that stands for 0; None where that is 0.
        activation_scale: (1,), of every input of the layer; None finds each token's own as the model runs.
    """

    bits: int
    scale_OG: Tensor
    group_size: int | None = None
    activation_bits: int | None = None
    number: str = "int"
    zero_point_OG: Tensor | None = None
    activation_scale: Tensor | None = None

    def quantize(self, weight_OI: Tensor) -> Tensor:
        """The q nearest to each weight.

        Args:
            weight_OI: (O, I), any float dtype.

        Returns:
            (O, I): int8, uint8 indices into :data:`NF4`, or float8_e4m3fn. For a weight on this grid
            :meth:`dequantize` gives it back to the bit.
        """
        wide = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
        ratio_OGM = self._grouped(weight_OI).to(wide) / self._spread(self.scale_OG, weight_OI).to(wide)
        if self.number == "nf4":
            code = torch.tensor(NF4, dtype=wide, device=weight_OI.device)
            q_OGM = torch.bucketize(ratio_OGM.contiguous(), (code[1:] + code[:-1]) / 2).to(torch.uint8)
        elif self.number == "float":
            q_OGM = ratio_OGM.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
        else:
            q_OGM = ratio_OGM.round_()
            if self.zero_point_OG is not None:
                q_OGM += self._spread(self.zero_point_OG, weight_OI)
            half = 2 ** (self.bits - 1)
            q_OGM = q_OGM.clamp_(-half, half - 1).to(torch.int8)
        return q_OGM.reshape(weight_OI.shape)

    def dequantize(self, q_OI: Tensor) -> Tensor:
        """The weight (O, I), in the scale's dtype, that ``q_OI`` from :meth:`quantize` stands for."""
        scale_OG1 = self._spread(self.scale_OG, q_OI)
        q_OGM = self._grouped(q_OI)
        dtype = self.scale_OG.dtype
        if self.number == "nf4":
            code = torch.tensor(NF4, dtype=torch.promote_types(dtype, torch.float32), device=q_OI.device)
            return (code[q_OGM.int()] * scale_OG1.to(code.dtype)).to(dtype).reshape(q_OI.shape)
        level_OGM = q_OGM.to(dtype)
        if self.zero_point_OG is not None:
            level_OGM = level_OGM - self._spread(self.zero_point_OG, q_OI).to(dtype)
        return (level_OGM * scale_OG1).reshape(q_OI.shape)

    def snap(self, weight_OI: Tensor) -> Tensor:
        """The nearest weight on the grid, (O, I) in the scale's dtype; zeros stay exactly zero."""
        return self.dequantize(self.quantize(weight_OI))

    def columns(self, start: int, stop: int) -> Grid:
        """The grid of inputs ``start`` to ``stop`` alone: whole groups, or a part of one."""
        if self.group_size is None:
            return self
        groups = slice(start // self.group_size, -(-stop // self.group_size))
        zero_OG = None if self.zero_point_OG is None else self.zero_point_OG[:, groups]
        size = min(self.group_size, stop - start)
        return Grid(self.bits, self.scale_OG[:, groups], size, None, self.number, zero_OG)

    def bits_per_weight(self, in_features: int) -> float:
        """Bits one stored weight takes, its share of scales and zero points included.

        Four-bit weights whose inputs are rounded too are stored as int8: nothing else loads them.
        """
        per_scale = 32 if self.number == "nf4" else 8 * self.scale_OG.element_size()
        per_zero = 0 if self.zero_point_OG is None else self.bits
        stored = 8 if self.activation_bits else self.bits
        return stored + (per_scale + per_zero) / (self.group_size or in_features)

    def _grouped(self, value_OI: Tensor) -> Tensor:
        """(O, I) as (O, G, members)."""
        rows, inputs = value_OI.shape
        groups = 1 if self.group_size is None else inputs // self.group_size
        if self.scale_OG.shape != (rows, groups) or inputs % groups:
            raise FormatError(
                Fault(
                    "grid",
                    f"scales of shape ({rows}, {groups}) for a weight ({rows}, {inputs}), {self._grouping()}",
                    str(tuple(self.scale_OG.shape)),
                    "Quantise the layer again: its shape has changed since.",
                )
            )
        return value_OI.reshape(rows, groups, -1)

    def _spread(self, per_group_OG: Tensor, like_OI: Tensor) -> Tensor:
        return per_group_OG.to(like_OI.device).unsqueeze(-1)

    def _grouping(self) -> str:
        return "one scale per row" if self.group_size is None else f"groups of {self.group_size}"


def same_grid(a: Grid | None, b: Grid | None) -> bool:
    """Whether two grids hold the same values, to the bit."""
    if a is None or b is None:
        return a is b
    plain = all(getattr(a, field) == getattr(b, field) for field in PLAIN)
    return plain and all(_same(getattr(a, field), getattr(b, field)) for field in TENSORS.values())


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def write_grids(directory: Path, grids: Mapping[str, Grid]) -> None:
    """Write ``grids`` (layer name -> grid) into ``directory``; the bytes depend on nothing else."""
    tensors, plain = {}, {}
    for layer in sorted(grids):
        grid = grids[layer]
        plain[layer] = {field: getattr(grid, field) for field in PLAIN}
        for name, field in TENSORS.items():
            if (tensor := getattr(grid, field)) is not None:
                tensors[f"{layer}.{name}"] = tensor.contiguous().cpu()
    save_tensors(directory / GRIDS_FILE, tensors, {"grids": json.dumps(plain, sort_keys=True)})


def read_grids(directory: Path) -> dict[str, Grid]:
    """Read what :func:`write_grids` wrote.

    Args:
        directory: a checkpoint.

    Returns:
        Layer name -> grid; empty where nothing is quantised.

    Raises:
        FormatError: the file is damaged.
    """
    path = directory / GRIDS_FILE
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            plain, stored = json.loads(file.metadata()["grids"]), set(file.keys())
            tensors = {
                layer: {
                    field: file.get_tensor(f"{layer}.{name}")
                    for name, field in TENSORS.items()
                    if f"{layer}.{name}" in stored
                }
                for layer in plain
            }
            return {layer: Grid(**tensors[layer], **fields) for layer, fields in plain.items()}
    except Exception as error:  # safetensors raises its own untyped errors for a truncated file
        raise FormatError(
            Fault(
                str(path), "the grids of a quantised model", f"{type(error).__name__}: {error}", "Run again."
            )
        ) from error
