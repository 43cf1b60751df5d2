"""Hugging Face directories: dense, or packed by one of ``compresskit.formats``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from compresskit.errors import Fault
from compresskit.exports.base import Prospect, layer_faults, package_faults, unquantised_fault
from compresskit.formats.checkpoint import pack, set_quantization, write_shards
from compresskit.modeling import ModelSource, copy_sidecars
from compresskit.progress import with_progress
from compresskit.quant.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Dense:
    """Every weight as a plain number in the model's own dtype; a quantised one keeps its value to the bit."""

    least_bytes: ClassVar[int] = 0
    runtimes: ClassVar[tuple[str, ...]] = ("transformers", "vLLM")

    def faults(self, model: Prospect, where: str) -> list[Fault]:
        """None: a dense checkpoint holds anything."""
        return []

    def write(self, model: ModelSource, out: Path) -> tuple[str, ...]:
        """Write weights and everything beside them; activations are rounded no longer, and that is said."""
        write_shards(out, tensors_of(model, "writing"))
        copy_sidecars(model.directory, out)
        set_quantization(out, None)
        rounded = [n for n in model.anatomy.linears if (g := model.grid(n)) is not None and g.activation_bits]
        if not rounded:
            return ()
        return (f"The inputs of {len(rounded)} layers are rounded no more: a dense model cannot say so.",)


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """Packed for transformers and vLLM."""

    least_bytes: ClassVar[int] = 0
    runtimes: ClassVar[tuple[str, ...]] = ("transformers", "vLLM")

    def faults(self, model: Prospect, where: str) -> list[Fault]:
        """No layer is quantised, or one is to NF4."""
        return unquantised_fault(model, where, "w8a8") + layer_faults(model, where, self._judge)

    def write(self, model: ModelSource, out: Path) -> tuple[str, ...]:
        """Pack it, and read it back."""
        copy_sidecars(model.directory, out)
        pack(model, out, "compressed-tensors")
        return ()

    @staticmethod
    def _judge(scheme: Scheme, in_features: int) -> tuple[str, str] | None:
        if scheme.number != "nf4":
            return None
        return "integers or float8", "Export to bitsandbytes, or quantise to a w4a16 scheme instead."


@dataclass(frozen=True, slots=True)
class Bitsandbytes:
    """NF4 as bitsandbytes packs it, which transformers and peft load."""

    least_bytes: ClassVar[int] = 0
    runtimes: ClassVar[tuple[str, ...]] = ("transformers",)
    GROUP: ClassVar[int] = 64

    def faults(self, model: Prospect, where: str) -> list[Fault]:
        """No layer is quantised, or one is to anything but NF4 in groups of 64."""
        found = unquantised_fault(model, where, "nf4") + layer_faults(model, where, self._judge)
        return found + package_faults(["bitsandbytes"], "qlora", where)

    def write(self, model: ModelSource, out: Path) -> tuple[str, ...]:
        """Pack it, and read it back."""
        copy_sidecars(model.directory, out)
        pack(model, out, "bitsandbytes")
        return ()

    @classmethod
    def _judge(cls, scheme: Scheme, in_features: int) -> tuple[str, str] | None:
        if scheme.number == "nf4" and scheme.group_size == cls.GROUP and in_features % cls.GROUP == 0:
            return None
        return "nf4 in groups of 64", "Quantise with --scheme nf4, or export to compressed-tensors."


def tensors_of(model: ModelSource, title: str) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of ``model`` by its name, read when asked for."""
    for name in with_progress(model.names(), title, unit="tensors"):
        yield name, model.tensor(name)
