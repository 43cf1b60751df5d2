"""The contract of an export target, and what its faults are found from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from compresskit.errors import Fault
from compresskit.modeling import Anatomy, ModelSource
from compresskit.modeling.checkpoint import listed
from compresskit.quant.scheme import Scheme, scheme_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """What is known of a model before any weight of it is read, or even exists.

    Attributes:
        anatomy: its linear layers and their shapes.
        config: its transformers configuration.
        tokenizer: directory of its tokenizer.
        schemes: layer -> scheme, of every quantised layer.
        trust_remote_code: whether code in the model's directory may run.
    """

    anatomy: Anatomy
    config: Any
    tokenizer: Path
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    trust_remote_code: bool = False


class Exporter(Protocol):
    """A target; it has no state, and each of its files appears in a directory that is not yet published.

    Attributes:
        least_bytes: of a parameter that the model itself stores in fewer.
        runtimes: that load what it writes.
    """

    least_bytes: ClassVar[int]
    runtimes: ClassVar[tuple[str, ...]]

    def faults(self, model: Prospect, where: str) -> list[Fault]:
        """Everything that keeps the target from holding such a ``model``; reads no weight.

        Args:
            model: what is to be exported.
            where: prefix of each fault, e.g. ``export to gguf``.

        Returns:
            All of them together; each names the layers, the missing package or the architecture.
        """
        ...

    def write(self, model: ModelSource, out: Path) -> tuple[str, ...]:
        """Write ``model``, dense or unpacked, into the empty directory ``out``, a tensor at a time.

        Returns:
            Sentences about what the target holds only nearly; shown to whoever exports.

        Raises:
            FormatError: a value cannot be stored.
        """
        ...


def prospect_of(model: ModelSource) -> Prospect:
    """What :meth:`Exporter.faults` wants to know of a checkpoint that exists."""
    grids = ((layer, model.grid(layer)) for layer in model.anatomy.linears)
    return Prospect(
        anatomy=model.anatomy,
        config=model.config,
        tokenizer=model.directory,
        schemes={layer: scheme_of(grid) for layer, grid in grids if grid is not None},
        trust_remote_code=model.trust_remote_code,
    )


def adapter_fault(got: str, where: str) -> Fault:
    """What to say where a trained adapter would be left out of what is made of the model beside it."""
    cure = "Train it again with finish merge, or merge it with peft."
    return Fault(where, "a model whose weights are all of it", got, cure)


def package_faults(packages: Iterable[str], extra: str, where: str) -> list[Fault]:
    """One fault if any of ``packages`` (names as imported) is not installed; imports none of them."""
    lost = [name for name in packages if find_spec(name) is None]
    if not lost:
        return []
    cure = f"Install it: pip install 'compresskit[{extra}]'."
    return [Fault(where, f"the package {' and '.join(lost)}", "not installed", cure)]


def layer_faults(
    model: Prospect, where: str, judge: Callable[[Scheme, int], tuple[str, str] | None]
) -> list[Fault]:
    """One fault for each reason why quantised layers do not fit, naming the layers.

    Args:
        model: its schemes are judged.
        where: the place to name.
        judge: (scheme, in_features) -> (what the target holds, the cure); None where the layer fits.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for layer, scheme in model.schemes.items():
        reason = judge(scheme, model.anatomy.linears[layer].in_features)
        if reason is not None:
            found.setdefault((str(scheme), *reason), []).append(layer)
    return [
        Fault(where, expected, f"{scheme} in {listed(layers)}", cure)
        for (scheme, expected, cure), layers in found.items()
    ]


def unquantised_fault(model: Prospect, where: str, scheme: str) -> list[Fault]:
    """A fault if no layer is quantised, for a target that holds quantised weights alone."""
    if model.schemes:
        return []
    cure = f"Quantise it first (`compresskit quantize --scheme {scheme}`), or export to dense."
    return [Fault(where, "quantised layers", "none", cure)]
