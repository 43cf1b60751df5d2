"""GGUF for llama.cpp: our integers as Q8_0, Q4_0 or Q4_1, every other matrix in F16, norms and biases in F32.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names and metadata are those of
llama.cpp's own converter. What changes: scales and dense weights are rounded to float16; llama.cpp rounds
every input to 8 bits in blocks of 32 as it multiplies, whatever the scheme says of activations.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from compresskit.errors import Fault, FormatError
from compresskit.exports.base import Prospect, layer_faults, package_faults, prospect_of
from compresskit.exports.gguf_model import (
    ARCHITECTURES,
    Architecture,
    config_faults,
    rope_factors,
    row_order,
    write_hyperparameters,
)
from compresskit.exports.gguf_vocab import vocabulary_faults, write_vocabulary
from compresskit.formats.gguf import BLOCK, BLOCK_BYTES, block_kind, encode_blocks
from compresskit.modeling import ModelSource
from compresskit.progress import with_progress
from compresskit.quant.scheme import Scheme

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
HALF = "Every matrix that is not quantised is rounded to float16; the largest change of a weight is {:.1e}."
SCALES = "Scales are rounded to float16; the largest relative change of one is {:.1e}."
LEAST = "Zero points become float16 minimums: a zero of the model is no longer exactly zero in {} layers."
INPUTS = "llama.cpp rounds inputs in blocks of 32, not as the scheme of {} layers says ({})."


@dataclass(frozen=True, slots=True)
class Gguf:
    """One file, ``model.gguf``, tokenizer included."""

    least_bytes: ClassVar[int] = 2
    runtimes: ClassVar[tuple[str, ...]] = ("llama.cpp",)

    def faults(self, model: Prospect, where: str) -> list[Fault]:
        """An unknown architecture or tokenizer, a scheme or shape that no block holds, a missing package."""
        found = config_faults(model.config, where) + package_faults(["gguf"], "gguf", where)
        return found + vocabulary_faults(model.tokenizer, where) + layer_faults(model, where, _judge)

    def write(self, model: ModelSource, out: Path) -> tuple[str, ...]:
        """Write the file; a tensor at a time.

        Raises:
            FormatError: a weight or scale is too large for float16, or a parameter has no place in the file.
        """
        import gguf

        architecture = ARCHITECTURES[model.config.architectures[0]]
        schemes = dict(prospect_of(model).schemes)
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
        entries = [_Entry.of(model, name, architecture, schemes, names) for name in model.names()]
        extra = rope_factors(model.config)
        writer = gguf.GGUFWriter(out / FILE, architecture.name)
        writer.add_name(model.directory.name)
        write_hyperparameters(writer, model.config)
        write_vocabulary(writer, model)
        _write_file_type(writer, entries)
        if extra is not None:
            writer.add_tensor_info("rope_freqs.weight", extra.shape, extra.numpy().dtype, extra.nbytes)
        for entry in entries:
            entry.announce(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if extra is not None:
            writer.write_tensor_data(extra.numpy())
        changes = _Changes()
        for entry in with_progress(entries, "writing", unit="tensors"):
            writer.write_tensor_data(entry.make(model, changes).numpy())
        writer.close()
        return changes.sentences(schemes)


@dataclass(slots=True)
class _Changes:
    """The largest changes that float16 made."""

    weight: float = 0.0
    scale: float = 0.0

    def sentences(self, schemes: dict[str, Scheme]) -> tuple[str, ...]:
        said = [HALF.format(self.weight)] if self.weight else []
        said += [SCALES.format(self.scale)] if self.scale else []
        if least := sum(not scheme.symmetric for scheme in schemes.values()):
            said.append(LEAST.format(least))
        if rounded := [str(scheme) for scheme in schemes.values() if scheme.activation_bits]:
            said.append(INPUTS.format(len(rounded), ", ".join(sorted(set(rounded)))))
        return tuple(said)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the file: its name there, its kind, and how it is made of the parameter ``source``."""

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]
    order: Tensor | None
    shift: float

    @classmethod
    def of(
        cls,
        model: ModelSource,
        source: str,
        architecture: Architecture,
        schemes: dict[str, Scheme],
        names: Any,
    ) -> _Entry:
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            got = f"{source} of {model.config.architectures[0]}"
            raise FormatError(Fault(source, "a parameter that GGUF names", got, "Export to dense instead."))
        shape = tuple(model.shape(source))
        layer = source.rpartition(".")[0]
        kind = "F32" if len(shape) < 2 else "F16"
        if source.endswith(".weight") and layer in schemes:
            scheme = schemes[layer]
            kind = block_kind(scheme.weight_bits, symmetric=scheme.symmetric) or kind
        shift = architecture.norm_shift if source.endswith("norm.weight") else 0.0
        order = row_order(source, model.config) if architecture.permuted else None
        return cls(name, source, kind, shape, order, shift)

    def announce(self, writer: GGUFWriter) -> None:
        import gguf
        import numpy as np

        if self.kind in BLOCK_BYTES:
            shape = (*self.shape[:-1], self.shape[-1] // BLOCK * BLOCK_BYTES[self.kind])
            size = shape[0] * shape[1]
            kind = gguf.GGMLQuantizationType[self.kind]
            writer.add_tensor_info(self.name, shape, np.dtype(np.uint8), size, kind)
            return
        dtype = np.dtype(np.float16 if self.kind == "F16" else np.float32)
        size = dtype.itemsize
        for n in self.shape:
            size *= n
        writer.add_tensor_info(self.name, self.shape, dtype, size)

    def make(self, model: ModelSource, changes: _Changes) -> Tensor:
        tensor = model.tensor(self.source)
        if self.kind in BLOCK_BYTES:
            layer = self.source.rpartition(".")[0]
            grid = model.grid(layer)
            assert grid is not None  # the scheme was made of it
            made, change = encode_blocks(layer, tensor, grid)
            changes.scale = max(changes.scale, change)
        elif self.kind == "F16":
            made = tensor.to(torch.float16)
            if not bool(made.isfinite().all()):
                got = f"one of {float(tensor.abs().max()):.3g}"
                cure = "Export this model to compressed-tensors or dense."
                raise FormatError(Fault(self.source, "weights below 65,504", got, cure))
            if tensor.dtype != torch.float16:
                changes.weight = max(changes.weight, float((made.float() - tensor.float()).abs().max()))
        else:
            made = tensor.to(torch.float32) + self.shift
        return (made if self.order is None else made[self.order]).contiguous()


def _judge(scheme: Scheme, in_features: int) -> tuple[str, str] | None:
    """What blocks of 32 hold; see :func:`layer_faults`."""
    kind = block_kind(scheme.weight_bits, symmetric=scheme.symmetric)
    if scheme.number != "int" or kind is None:
        held = "integers of 8 bits (symmetric) or 4 bits (symmetric or not)"
        return held, "Quantise to w8a16 or w4a16-g32, or write it dense first: --to dense, then --to gguf."
    if in_features % BLOCK:
        held = f"in_features divisible by {BLOCK}, the block of {kind}"
        return held, "Add these layers to ignore when quantising, so that they are written as F16."
    if scheme.group_size is not None and scheme.group_size % BLOCK:
        return f"groups of a multiple of {BLOCK}", f"Quantise with -g{BLOCK} or a larger power of two."
    return None


def _write_file_type(writer: GGUFWriter, entries: list[_Entry]) -> None:
    """Say which kind most quantised weights have; readers show it."""
    import gguf

    kinds = [entry.kind for entry in entries if entry.kind in BLOCK_BYTES]
    most = max(sorted(set(kinds)), key=kinds.count, default="F16")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
