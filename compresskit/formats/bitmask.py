"""bitmask checkpoints: of every packed layer a bit for each weight, and the weights that are kept.

On disk, beside parameters that are stored plain, every packed layer has ``LAYER.mask`` (uint8, (O, B)) and
``LAYER.values`` ((K,), in the weight's own type), as ``kernels.bitmap.Bitmap`` has them. A quantised layer
keeps its integers: the values are int8, and ``LAYER.scales`` (fp32, (O, G)) is what they are multiplied by.
``LAYER.weight`` is the dense shape (int64, (2,)). It stands where the weight would: a reader that knows
nothing of the format finds a tensor of the wrong shape there and stops, where it would otherwise make up the
weights that it misses. config.json says the rest in plain data, under ``quantization_config``.

A zero has no sign here: -0.0 comes back as 0.0.

Shapes: O = outputs, I = inputs, B = bytes of a row's mask, K = kept weights, G = groups of inputs that share
a scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.errors import Fault, FormatError
from compresskit.fields import fit
from compresskit.formats.base import Decoded, encode_each
from compresskit.formats.grid import Grid
from compresskit.kernels.bitmap import BYTE, VALUE_TYPES, Bitmap, pack, unpack, unpack_bits

METHOD = "compresskit-bitmask"
VERSION = 1
MASK, VALUES, SCALES, SHAPE = "mask", "values", "scales", "weight"
PARTS = (SHAPE, MASK, VALUES, SCALES)
TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in VALUE_TYPES if dtype.is_floating_point}
AGAIN = "Write the checkpoint again; it was damaged, or written by something else."
MAX_NAMED = 10

Form = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """What config.json says of one layer, and what its tensors must be.

    Attributes:
        shape: (O, I).
        kept: K.
        dtype: of the dense weight, a name of :data:`TYPES`.
        pattern: ``2:4`` where no 4 consecutive inputs keep more than 2, or another N:M; empty for none.
        bits: of a quantised layer's integers; None where the values are plain.
        group_size: inputs that share a scale; None: all of a row.
        transposed: the module stores its weight as (I, O).
    """

    shape: tuple[int, int]
    kept: int
    dtype: str
    pattern: str = ""
    bits: int | None = None
    group_size: int | None = None
    transposed: bool = False

    @property
    def parts(self) -> dict[str, Form]:
        """Every tensor of the layer."""
        rows, inputs = self.shape
        values = TYPES[self.dtype] if self.bits is None else torch.int8
        made: dict[str, Form] = {
            SHAPE: (torch.int64, (2,)),
            MASK: (torch.uint8, (rows, -(-inputs // BYTE))),
            VALUES: (values, (self.kept,)),
        }
        if self.bits is not None:
            made[SCALES] = torch.float32, (rows, inputs // (self.group_size or inputs))
        return made

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return sum(prod(shape) * dtype.itemsize for dtype, shape in self.parts.values())

    @property
    def dense_bytes(self) -> int:
        """Of the weight with its zeros, in its own type."""
        return prod(self.shape) * TYPES[self.dtype].itemsize

    @property
    def zero_fraction(self) -> float:
        """Share of the weights that are zero."""
        return 1 - self.kept / max(1, prod(self.shape))

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of the pattern."""
        keep, _, of = self.pattern.partition(":")
        return (int(keep), int(of)) if of else None

    def faults(self, weight: Bitmap, where: str) -> list[Fault]:
        """Everything in which ``weight`` is not what is said here; ``where`` is the layer's name."""
        found: dict[str, Tensor | None] = {
            MASK: weight.mask_OB,
            VALUES: weight.values_K,
            SCALES: weight.scales_OG,
        }
        forms = {part: (t.dtype, tuple(t.shape)) for part, t in found.items() if t is not None}
        faults = form_faults(where, self, {SHAPE: self.parts[SHAPE], **forms})
        faults = faults or weight.faults(where)
        if not faults and self.group is not None:
            faults += _pattern_faults(where, weight, *self.group)
        return faults


@dataclass(frozen=True, slots=True)
class Bitmask:
    """The format; see the module.

    Attributes:
        layers: what to pack, by the layer's name; those that a configuration lists are what it unpacks.
    """

    layers: Mapping[str, PackedLayer] = field(default_factory=dict)

    def config(self, grids: Mapping[str, Grid], ignore: Sequence[str]) -> dict[str, Any]:
        """The ``quantization_config`` of config.json: plain data.

        Args:
            grids: not used: a layer says its own.
            ignore: linear layers that are stored dense.
        """
        said = {name: _to_json(layer) for name, layer in sorted(self.layers.items())}
        return {"quant_method": METHOD, "version": VERSION, "layers": said, "ignore": sorted(ignore)}

    def encode(
        self, tensors: Iterable[tuple[str, Tensor]], grids: Mapping[str, Grid]
    ) -> Iterator[tuple[str, Tensor]]:
        """Pack the weights of :attr:`layers`; everything else passes through.

        Args:
            tensors: (parameter name, tensor); read one at a time.
            grids: layer name -> grid, of the quantised ones among the layers.

        Returns:
            (key, tensor) pairs, in order.

        Raises:
            FormatError: a weight is not what its layer says, lies off its grid, or never came.
        """
        both = {name: (layer, grids.get(name)) for name, layer in self.layers.items()}
        return encode_each(tensors, both, _encode_weight)

    def decode(self, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]) -> Iterator[Decoded]:
        """The inverse of :meth:`encode`.

        Args:
            tensors: (key, tensor) in any order; of a packed layer, the parts are held until all have come.
            config: the ``quantization_config`` that :meth:`config` made.

        Returns:
            Each parameter, with its grid if it has one.

        Raises:
            FormatError: the configuration is of another kind; parts of a layer are missing, or contradict
                each other or the configuration.
        """
        layers = layers_of(config)
        held: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors:
            name, _, part = key.rpartition(".")
            if name not in layers or part not in PARTS:
                yield Decoded(key, tensor, None)
                continue
            parts = held.setdefault(name, {})
            parts[part] = tensor
            if parts.keys() >= layers[name].parts.keys():
                yield _decode_weight(name, layers[name], held.pop(name))
        faults = [missing_fault(name, layers[name], parts) for name, parts in sorted(held.items())]
        if faults:
            raise FormatError(*faults)


def layer_of(
    weight_OI: Tensor, grid: Grid | None = None, *, pattern: str = "", transposed: bool = False
) -> PackedLayer:
    """What there is to say of a weight.

    Args:
        weight_OI: of a type in :data:`TYPES`; on ``grid`` if there is one.
        grid: symmetric integers, of at most 8 bits.
        pattern: ``2:4`` and the like, where the zeros lie so.
        transposed: the module stores it as (I, O).
    """
    kept = weight_OI if grid is None else grid.quantize(weight_OI)
    return PackedLayer(
        shape=(weight_OI.shape[0], weight_OI.shape[1]),
        kept=int(kept.count_nonzero()),
        dtype=str(weight_OI.dtype).removeprefix("torch."),
        pattern=pattern,
        bits=None if grid is None else grid.bits,
        group_size=None if grid is None else grid.group_size,
        transposed=transposed,
    )


def layers_of(config: Mapping[str, Any]) -> dict[str, PackedLayer]:
    """The layers of a ``quantization_config``, each checked.

    Raises:
        FormatError: another method or version, or a layer that says what cannot be; all faults together.
    """
    where = "config.json: quantization_config"
    said = {name: config.get(name) for name in ("quant_method", "version")}
    if said != {"quant_method": METHOD, "version": VERSION}:
        cure = "Read it with the compresskit that wrote it, or write it again with this one."
        expected = f"{METHOD}, version {VERSION}"
        raise FormatError(Fault(where, expected, f"{said['quant_method']}, version {said['version']}", cure))
    layers = config.get("layers")
    if not isinstance(layers, Mapping):
        raise FormatError(Fault(f"{where}.layers", "a mapping", type(layers).__name__, AGAIN))
    ignore = config.get("ignore", ())
    if not isinstance(ignore, (list, tuple)) or not all(isinstance(name, str) for name in ignore):
        raise FormatError(Fault(f"{where}.ignore", "a list of names", repr(ignore)[:80], AGAIN))
    made: dict[str, PackedLayer] = {}
    faults: list[Fault] = []
    for name, plain in layers.items():
        found = _field_faults(f"{where}.layers.{name}", plain)
        faults += found
        if not found:
            made[name] = PackedLayer(**{**plain, "shape": tuple(plain["shape"])})
    if faults:
        raise FormatError(*faults[:MAX_NAMED])
    return made


def missing_fault(name: str, layer: PackedLayer, found: Iterable[str]) -> Fault:
    """What to say of a layer some of whose tensors are not there."""
    lost = ", ".join(part for part in layer.parts if part not in set(found))
    return Fault(name, "every tensor of a packed layer", f"no {lost}", AGAIN)


def form_faults(name: str, layer: PackedLayer, found: Mapping[str, Form]) -> list[Fault]:
    """Tensors of a layer that are missing, or of another type or shape than config.json says.

    Args:
        name: of the layer.
        layer: what config.json says.
        found: part -> type and shape, as a file's header tells them.
    """
    if layer.parts.keys() - found.keys():
        return [missing_fault(name, layer, found)]
    faults = []
    for part, form in found.items():
        expected = layer.parts.get(part)
        if expected is None:
            faults.append(Fault(f"{name} {part}", "none, since config.json says no bits", _said(form), AGAIN))
        elif form != expected:
            faults.append(
                Fault(f"{name} {part}", f"{_said(expected)} as config.json says", _said(form), AGAIN)
            )
    return faults


def _encode_weight(
    name: str, tensor: Tensor, what: tuple[PackedLayer, Grid | None]
) -> Iterator[tuple[str, Tensor]]:
    layer, grid = what
    weight_OI = tensor.t() if layer.transposed else tensor
    if grid is None:
        packed = pack(weight_OI.contiguous())
    else:
        q_OI = grid.quantize(weight_OI)
        if weight_OI.dtype != grid.scale_OG.dtype or not torch.equal(grid.dequantize(q_OI), weight_OI):
            cure = "Quantise the layer again after whatever changed it."
            raise FormatError(Fault(name, "a weight that lies on its grid", "one that does not", cure))
        packed = pack(q_OI, grid.scale_OG.float())
    if faults := layer.faults(packed, name):
        raise FormatError(*faults)
    yield f"{name}.{SHAPE}", torch.tensor(layer.shape)
    yield f"{name}.{MASK}", packed.mask_OB
    yield f"{name}.{VALUES}", packed.values_K
    if packed.scales_OG is not None:
        yield f"{name}.{SCALES}", packed.scales_OG


def _decode_weight(name: str, layer: PackedLayer, parts: Mapping[str, Tensor]) -> Decoded:
    weight = Bitmap(
        mask_OB=parts[MASK],
        values_K=parts[VALUES],
        in_features=layer.shape[1],
        scales_OG=parts.get(SCALES),
    )
    faults = layer.faults(weight, name)
    if parts[SHAPE].tolist() != list(layer.shape):
        faults.append(
            Fault(f"{name} {SHAPE}", f"{list(layer.shape)}", str(parts[SHAPE].tolist())[:80], AGAIN)
        )
    if faults:
        raise FormatError(*faults)
    grid = None
    if weight.scales_OG is not None and layer.bits is not None:
        grid = Grid(layer.bits, weight.scales_OG.to(TYPES[layer.dtype]), layer.group_size)
    dense_OI = unpack(weight, TYPES[layer.dtype])
    return Decoded(f"{name}.weight", dense_OI.t().contiguous() if layer.transposed else dense_OI, grid)


def _to_json(layer: PackedLayer) -> dict[str, Any]:
    """Fields that are not at their defaults."""
    plain = {f.name: f.default for f in fields(layer)}
    said = {name: value for name, value in asdict(layer).items() if value != plain[name]}
    return {**said, "shape": list(layer.shape)}


def _field_faults(where: str, plain: Any) -> list[Fault]:
    """What is wrong with the entry of one layer."""
    if not isinstance(plain, Mapping):
        return [Fault(where, "a mapping", repr(plain)[:80], AGAIN)]
    hints = get_type_hints(PackedLayer)
    lost = [name for name in ("shape", "kept", "dtype") if name not in plain]
    faults = [Fault(where, ", ".join(lost), "none", AGAIN)] if lost else []
    for name, value in plain.items():
        if name not in hints:
            faults.append(Fault(f"{where}.{name}", "a known field", repr(value)[:80], AGAIN))
        elif not fit(value, hints[name])[0]:
            faults.append(Fault(f"{where}.{name}", "a value of its kind", repr(value)[:80], AGAIN))
    return faults or _sense_faults(where, plain)


def _sense_faults(where: str, plain: Mapping[str, Any]) -> list[Fault]:
    """Fields that are of their kind, and yet cannot be."""
    if len(plain["shape"]) != 2:
        return [Fault(f"{where}.shape", "outputs and inputs", repr(plain["shape"])[:80], AGAIN)]
    rows, inputs = plain["shape"]
    bits, size, pattern = plain.get("bits"), plain.get("group_size"), plain.get("pattern", "")
    keep, _, of = pattern.partition(":")
    known = keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of) <= inputs
    checks = (
        ("shape", "two sizes above 0", min(rows, inputs) > 0),
        ("kept", f"0 to {rows * inputs}", 0 <= plain["kept"] <= rows * inputs),
        ("dtype", ", ".join(TYPES), plain["dtype"] in TYPES),
        ("bits", "2 to 8", bits is None or 2 <= bits <= BYTE),
        (
            "group_size",
            f"a divisor of {inputs}, with bits",
            size is None or (bits and size > 0 and inputs % size == 0),
        ),
        ("pattern", "N:M", not pattern or known),
    )
    return [
        Fault(f"{where}.{name}", expected, repr(plain.get(name))[:80], AGAIN)
        for name, expected, holds in checks
        if not holds
    ]


def _pattern_faults(where: str, weight: Bitmap, keep: int, of: int) -> list[Fault]:
    """A fault where some ``of`` consecutive inputs keep more than ``keep``."""
    keep_OI = unpack_bits(weight.mask_OB, weight.in_features)
    per_group = pad(keep_OI.to(torch.uint8), (0, -keep_OI.shape[1] % of)).view(len(keep_OI), -1, of)
    per_group = per_group.sum(-1, dtype=torch.int16)
    over = (per_group > keep).nonzero()
    if not len(over):
        return []
    row, group = over[0].tolist()
    got = f"{int(per_group[row, group])} in row {row}, group {group}, and more in {len(over) - 1} others"
    return [Fault(f"{where} mask", f"at most {keep} of every {of} inputs kept ({keep}:{of})", got, AGAIN)]


def _said(form: Form) -> str:
    return f"{str(form[0]).removeprefix('torch.')} of {form[1]}"
